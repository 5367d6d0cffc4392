# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from top to bottom, with few steps and otherwise as it is."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fast import FAST_COMPILE

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


@pytest.mark.process
def test_it_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("tensorflow")  # reads the digits and the folder
    script = tmp_path / "notebook.py"
    text = "\n\n".join("".join(c["source"]) for c in cells())
    assert "STEPS = 300" in text
    script.write_text(text.replace("STEPS = 300", "STEPS = 2"))
    # One device and no optimisation: what takes time in so small a run is compiling.
    env = os.environ | {"XLA_FLAGS": FAST_COMPILE}
    env |= {"PYTHONPATH": str(PATH.parent.parent), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    # A notebook shows standard error in red: only lines of our own, about the model.
    red = [x for x in result.stderr.splitlines() if "WARNING:absl" in x]
    assert not red
    assert "test/accuracy" in result.stdout
    assert "temple" in result.stdout
    assert (tmp_path / "vit_jax_notebook" / "tuned" / "config.json").exists()
