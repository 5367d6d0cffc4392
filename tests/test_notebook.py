# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from top to bottom, with few steps and otherwise as it is."""

import ast
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "launch" / "colab.ipynb"


def cells():
    notebook = json.loads(PATH.read_text())
    assert notebook["nbformat"] == 4
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def test_it_is_stored_without_outputs_and_magics():
    for cell in cells():
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        ast.parse("".join(cell["source"]))  # plain Python: no shell lines, no magics


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorflow")  # reads the digits and the folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_JAX_STEPS", "2")
    for name in ("SOURCE", "PHOTO", "FOLDER", "WORK"):
        monkeypatch.delenv(f"VIT_JAX_{name}", raising=False)
    namespace = {"__name__": "__main__"}
    for i, cell in enumerate(cells()):
        code = compile("".join(cell["source"]), f"cell {i}", "exec")
        exec(code, namespace)
    printed = capsys.readouterr().out
    assert "test/accuracy" in printed
    assert "temple" in printed
    assert (tmp_path / "vit_jax_notebook" / "tuned" / "config.json").exists()
