# SPDX-License-Identifier: Apache-2.0
"""Two processes with four devices each count what one process counts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_context import context
from fast import FAST_COMPILE

from vit_jax.evaluators import EVALUATORS

pytestmark = pytest.mark.process

HERE = Path(__file__).parent
OPTIONS = {
    "accuracy": {},
    "per_class": {},
    "knn": {"k": (3,)},
    "fewshot": {"shots": (1, 5)},
    "linear_probe": {"l2": (1e-2,), "iterations": 5},
}


def measure():
    """37 test examples of 4 classes; every evaluator that keeps global arrays."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))
    y, y_test = np.arange(50) % 4, np.arange(37) % 4
    x = centres[y] + rng.normal(size=(50, 8))
    x_test = centres[y_test] + rng.normal(size=(37, 8))
    fake = context({"train": (x, y), "test": (x_test, y_test)}, centres.T)
    return {name: EVALUATORS[name].measure(fake, **o) for name, o in OPTIONS.items()}


def child(port: int, process_id: int):
    import jax

    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process_id)
    assert jax.device_count() == 8
    assert jax.local_device_count() == 4
    print("RESULT", json.dumps(measure()), flush=True)


def test_two_processes_give_the_same_numbers():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    code = (
        "import sys, test_evaluators_processes as t; t.child(*map(int, sys.argv[1:]))"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(i)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    expected = measure()
    assert expected["accuracy"]["count"] == 37
    for process in children:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        line = next(x for x in out.splitlines() if x.startswith("RESULT"))
        got = json.loads(line.removeprefix("RESULT"))
        for name in OPTIONS:
            assert got[name].keys() == expected[name].keys()
            for key, value in expected[name].items():
                np.testing.assert_allclose(
                    got[name][key], value, rtol=1e-6, err_msg=key
                )
