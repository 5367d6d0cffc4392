# SPDX-License-Identifier: Apache-2.0
"""Several real processes do what one does, and none waits forever for another."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
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
# SGD: Adam would divide rounding noise by its own size where a gradient is zero (the
# key's bias).
COMMAND = [
    sys.executable, "-m", "vit_jax.main", "--config=tests/tiny.py", "--config.model.depth=1",
    "--config.optim.name=sgd", "--config.optim.learning_rate=0.01", "--config.data.holdout=0.0361",
]  # fmt: skip
TEST_IMAGES = 37  # 0.0361 of 1024: not divisible by anything
GLOO = (
    r"\[Gloo\] Rank ",
    " is connected to ",
    r" peer ranks\. Expected number of connected peer ranks is : ",
)
LONG = [
    "--config.steps=1000000",
    "--config.log_every=10",
    "--config.eval.every=0",
    "--config.checkpoint.every=0",
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workdir, processes, *flags):
    """The same command on every process; four devices in all."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes} {FAST_COMPILE}",
    }  # fmt: skip
    together = [
        f"--coordinator=127.0.0.1:{free_port()}",
        f"--num_processes={processes}",
    ]
    return [
        subprocess.Popen(
            [*COMMAND, f"--workdir={workdir}", *flags, *(together if processes > 1 else []),
             *([f"--process_id={i}"] if processes > 1 else [])],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def finish(processes):
    """[(exit status, standard output, standard error)]. The pipes are read at once: a
    full one blocks its process."""
    ends = [()] * len(processes)

    def read(i):
        out, err = processes[i].communicate(timeout=600)
        ends[i] = (processes[i].returncode, out, err)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(processes))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return ends


def run(workdir, processes, *flags):
    ends = finish(start(workdir, processes, *flags))
    assert [e[0] for e in ends] == [0] * processes, ends
    return ends


@contextlib.contextmanager
def running(workdir):
    """Two processes in the middle of a long training; none is left behind."""
    logged = len(read_metrics(str(workdir)))
    processes = start(workdir, 2, *LONG)
    try:
        deadline = time.monotonic() + 240
        while len(read_metrics(str(workdir))) <= logged + 2:
            assert all(p.poll() is None for p in processes), finish(processes)
            assert time.monotonic() < deadline, "the run did not get there in 240 s"
            time.sleep(0.05)
        yield processes
    finally:
        for p in processes:
            p.kill()
            p.wait()


def steps_saved(workdir):
    return {
        int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()
    }


def same(a, b):
    """Equal but for the order in which gradients of devices are summed, which Gloo and
    one process choose differently."""
    a, b = load_params(str(a)), load_params(str(b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), a, b)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    run(workdir, 1)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    return workdir, run(workdir, 2)


def test_two_processes_train_and_evaluate_like_one(alone, two):
    workdir, ends = two
    same(workdir, alone)
    lines, expected = read_metrics(str(workdir)), read_metrics(str(alone))
    assert [m["step"] for m in lines] == [m["step"] for m in expected]
    for got, want in zip(lines, expected, strict=True):
        for key in ("test/accuracy", "test/count", "train/loss", "test/loss"):
            assert got.get(key, -1.0) == pytest.approx(want.get(key, -1.0), rel=1e-5)
    assert lines[-1]["test/count"] == TEST_IMAGES
    # Process 0 alone talks and writes. Gloo's threads mix the pieces of their lines.
    said = ends[1][1].split("\n", 1)[1]
    assert re.sub("|".join((*GLOO, r"\d+", r"\s")), "", said) == ""
    assert len(list(workdir.glob("events*"))) == 1
    assert json.loads((workdir / "config.json").read_text())["steps"] == 20


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_other_numbers_of_processes_continue(processes, two, tmp_path):
    first, _ = two
    shutil.copytree(first, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/20")
    ends = run(tmp_path / "run", processes)
    assert "continuing after step 10" in ends[0][1]
    same(tmp_path / "run", first)


def test_stopping_one_process_stops_all_at_the_same_step_and_a_lost_one_ends_the_others(
    tmp_path,
):
    with running(tmp_path) as processes:
        processes[1].send_signal(signal.SIGTERM)
        ends = finish(processes)
    assert [e[0] for e in ends] == [75, 75], ends
    (saved,) = steps_saved(tmp_path)
    assert f"stopped after step {saved} of" in ends[0][1]

    with running(tmp_path) as processes:
        processes[1].kill()
        status, output, errors = finish(processes)[0]
    assert f"continuing after step {saved}" in output
    assert status == 75, errors
    assert errors.splitlines()[-1].startswith(
        "error: process 0 of 2 lost contact with process 1: start the same"
    )
    assert "Traceback" not in errors
    assert steps_saved(tmp_path) == {saved}

    with running(tmp_path) as processes:
        processes[0].kill()
        status, _, errors = finish(processes)[1]
    # JAX may notice first that its coordinator is gone, and aborts with a message of
    # its own.
    assert status in (75, -signal.SIGABRT), errors
    assert (
        "error: process 1 of 2 lost contact with process 0" in errors
        or "another task died" in errors
    )


# The meeting -------------------------------------------------------------------


def test_a_lone_process_says_who_is_missing(tmp_path):
    """As a command; test_peers.py has process 0 and more of them."""
    me = 1
    flags = [
        f"--coordinator=127.0.0.1:{free_port()}",
        "--num_processes=2",
        f"--process_id={me}",
    ]
    result = subprocess.run(
        [*COMMAND, f"--workdir={tmp_path}", *flags, "--process_timeout=2"],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2, result
    assert result.stdout.startswith(
        f"process {me} of 2: waiting for the others at 127.0.0.1"
    )
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"error: process {me} of 2 is alone: process {1 - me} did not come within 2 s"
    )
    assert "--process_timeout" in line
