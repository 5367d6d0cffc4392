# SPDX-License-Identifier: Apache-2.0
"""Runs as real processes that are killed and told to stop."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from fast import FAST_COMPILE

from vit_jax.checkpoint import load_params
from vit_jax.workdir import read_metrics

pytestmark = pytest.mark.process

ROOT = Path(__file__).parent.parent
# Big enough that a step takes some 20 ms (compiled without optimizing), so that there
# is time to be killed in the middle.
COMMAND = [
    sys.executable, "-m", "vit_jax.main", "--config=tests/tiny.py", "--config.model.width=64",
    "--config.data.image_size=32", "--config.batch=32", "--config.log_every=1",
]  # fmt: skip
ENV = {
    "XLA_FLAGS": FAST_COMPILE,
    "JAX_PLATFORMS": "cpu",
}  # one device
CACHE = "JAX_COMPILATION_CACHE_DIR"


def start(workdir, *flags, **env):
    return subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}", *flags], cwd=ROOT, env=os.environ | ENV | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def wait_until(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get there in 300 s"
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


def is_saving(workdir):
    """Orbax writes into a folder with another name first."""
    folder = workdir / "checkpoints"
    return folder.exists() and any("tmp" in p.name for p in folder.iterdir())


def steps_saved(workdir):
    folder = workdir / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    return sorted(int(n) for n in names if n.isdigit())


def test_killed_at_any_moment_a_run_continues_to_the_same_bits(straight, tmp_path):
    """While it saves for the first time, then while it trains."""
    process = start(tmp_path, "--config.checkpoint.every=5")
    wait_until(lambda: is_saving(tmp_path), process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    process = start(tmp_path, "--config.checkpoint.every=5")
    # A save waits for the one before, so that of step 5 is complete.
    wait_until(lambda: 13 in steps_of(tmp_path), process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    code, output = finish(start(tmp_path))
    assert code == 0, output
    assert re.search(r"continuing after step (5|10)\b", output), output
    check_same(tmp_path, straight)


def test_asked_to_stop_a_run_saves_and_says_that_it_can_continue(straight, tmp_path):
    """While it evaluates, which it does not finish, then while it trains."""
    many = tuple({"type": "accuracy", "prefix": f"again{i}"} for i in range(500))
    process = start(
        tmp_path, "--config.eval.batch=1", f"--config.eval.evaluators={many}"
    )
    wait_until(lambda: 10 in steps_of(tmp_path), process)
    process.terminate()
    code, output = finish(process)
    assert code == 75, output
    assert "start the same command to continue" in output
    assert steps_saved(tmp_path) == [10]
    assert not any("again0/accuracy" in m for m in read_metrics(str(tmp_path)))
    # What was cut short is made up for before anything else is trained.
    process = start(tmp_path)
    wait_until(lambda: 11 in steps_of(tmp_path), process)
    process.terminate()
    code, output = finish(process)
    assert code == 75, output
    saved = steps_saved(tmp_path)[-1]
    assert 11 <= saved < 20
    log = {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    code, output = finish(start(tmp_path, **log))
    assert code == 0, output
    # What one run compiled the next one reads.
    assert "Persistent compilation cache hit for 'jit_train_step'" in output
    assert "warning" not in output.lower()
    assert f"continuing after step {saved}" in output
    rows = [m for m in read_metrics(str(tmp_path)) if "test/accuracy" in m]
    assert [m["step"] for m in rows] == [10, 20]
    check_same(tmp_path, straight)


def test_asked_to_stop_while_compiling_a_run_leaves_before_it_trains(tmp_path):
    process = start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    while not process.stdout.readline().startswith("initialize"):
        assert process.poll() is None
    process.terminate()
    code, output = finish(process)
    assert code == 75, output
    assert not steps_of(tmp_path)
    assert not steps_saved(tmp_path)


def test_asked_to_stop_while_saving_a_run_completes_the_checkpoint(tmp_path):
    process = start(tmp_path)
    wait_until(lambda: is_saving(tmp_path), process)
    process.terminate()
    code, output = finish(process)
    assert code == 75, output
    assert 10 in steps_saved(tmp_path)
    assert not is_saving(tmp_path)
    load_params(str(tmp_path))  # compares digests


def test_the_compilation_cache_is_in_the_home_folder_and_can_be_switched_off(tmp_path):
    """Of every command."""
    code = (
        "import jax\n"
        "from vit_jax import cli\n"
        "def command(arguments):\n"
        "    print(jax.config.jax_compilation_cache_dir)\n"
        "    jax.jit(lambda x: x + 1)(1.0)\n"
        "cli.run(command)\n"
    )
    env = {k: v for k, v in (os.environ | ENV).items() if k != CACHE} | {
        "HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    call = lambda **more: subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env | more,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout.strip()
    folder = tmp_path / ".cache" / "vit_jax" / "xla"
    assert call(JAX_ENABLE_COMPILATION_CACHE="false") == "None"
    assert not folder.exists()
    assert call() == str(folder)
    assert list(folder.iterdir())
    assert call(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == str(
        tmp_path / "mine"
    )
    assert list((tmp_path / "mine").iterdir())
