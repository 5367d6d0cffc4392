# SPDX-License-Identifier: Apache-2.0
"""Runs as real processes that are killed and told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax.checkpoint import load_params
from vit_jax.progress import read_metrics

ROOT = Path(__file__).parent.parent
# Big enough that a step takes some 50 ms, so that there is time to be killed in the middle.
COMMAND = [
    sys.executable, "-m", "vit_jax.main", "--config=tests/tiny.py", "--config.model.width=96",
    "--config.data.image_size=48", "--config.batch=64", "--config.log_every=1",
]  # fmt: skip
ENV = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}  # one device


def start(workdir, *flags):
    return subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}", *flags], cwd=ROOT, env=ENV,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get there in 120 s"
        time.sleep(0.005)


def steps_of(workdir):
    return [m["step"] for m in read_metrics(str(workdir)) if "train/loss" in m]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """20 steps without interruption."""
    workdir = tmp_path_factory.mktemp("straight")
    code, output = finish(start(workdir))
    assert code == 0, output
    return load_params(str(workdir))


def check_same(workdir, straight):
    assert steps_of(workdir) == list(range(1, 21))
    jax.tree.map(np.testing.assert_array_equal, load_params(str(workdir)), straight)


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_killed_at_any_moment_a_run_continues_to_the_same_bits(moment, straight, tmp_path):
    process = start(tmp_path)
    folder = tmp_path / "checkpoints"
    if moment == "training":
        wait_until(lambda: 13 in steps_of(tmp_path), process)
    else:  # Orbax writes into a folder with another name first
        wait_until(lambda: folder.exists() and any("tmp" in p.name for p in folder.iterdir()), process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    code, output = finish(start(tmp_path))
    assert code == 0, output
    if moment == "training":
        assert "continuing after step 10" in output
    check_same(tmp_path, straight)


def test_asked_to_stop_a_run_saves_and_says_that_it_can_continue(straight, tmp_path):
    process = start(tmp_path)
    wait_until(lambda: 3 in steps_of(tmp_path), process)
    process.terminate()
    code, output = finish(process)
    assert code == 75, output
    assert "start the same command to continue" in output
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert 3 <= saved < 20
    code, output = finish(start(tmp_path))
    assert code == 0, output
    assert f"continuing after step {saved}" in output
    check_same(tmp_path, straight)
