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


@pytest.mark.heavy
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys, caplog):
    pytest.importorskip("tensorflow")  # reads the digits and the folder
    text = "\n\n".join("".join(c["source"]) for c in cells())
    assert "STEPS = 300" in text
    monkeypatch.chdir(tmp_path)
    text = text.replace("STEPS = 300", "STEPS = 2")
    text = text.replace('recipe("digits")', 'recipe("digits", model__depth=1)')
    exec(compile(text, PATH.name, "exec"), {"__name__": "__main__"})
    # A notebook shows warnings in red: there are none but ours, about the model.
    assert not [r for r in caplog.records if r.name == "absl"]
    said = capsys.readouterr().out
    assert "test/accuracy" in said
    assert "temple" in said
    assert (tmp_path / "vit_jax_notebook" / "tuned" / "config.json").exists()
