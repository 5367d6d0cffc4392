# SPDX-License-Identifier: Apache-2.0
"""What the benchmark measures, and what it prints."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from fast import FAST_COMPILE
from test_multihost import finish, free_port

from vit_jax import benchmark, config, hardware
from vit_jax import train as training

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parent.parent


def test_standard_output_is_one_strict_json_document(command):
    done = command(
        f"--config={tiny.__file__}", "--what=train,infer", "--rounds=1", "--round_steps=2", "--json",
        module="vit_jax.benchmark",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert "first batch" in done.stderr, "what the loop says"
    assert "train/loop_over_step" in done.stderr, "for people"
    train, infer = found["train"], found["infer"]
    assert train["loop_over_step"] == pytest.approx(
        train["loop_images_per_second"] / train["images_per_second"]
    )
    assert train["step_ms"] == pytest.approx(1e3 * 16 / train["images_per_second"])
    speeds = infer["images_per_second_by_batch"]
    assert list(map(int, speeds)) == [8, 16], "of 8 devices"
    assert infer["images_per_second"] == max(speeds.values())
    ours = ("eager", "jitted", "exported")
    for name in ours:
        times, speeds = infer["latency_ms"][name], infer["speed"][name]
        assert 0 < times["median"] <= times["p99"]
        assert list(map(int, speeds)) == [1, 2], "images of one device"
        assert speeds["1"] == pytest.approx(1e3 / times["median"])
    for name in ("timm", "transformers"):
        assert (name in infer["latency_ms"]) != (name in infer["left_out"])
    assert "infer/latency_ms/exported/p99" in done.stderr


@pytest.mark.process
def test_a_pod_is_timed_as_one_and_process_0_prints():
    """Two processes of two devices each."""
    command = [
        sys.executable, "-m", "vit_jax.benchmark", f"--config={tiny.__file__}", "--config.model.depth=1",
        "--what=train,infer", "--rounds=1", "--round_steps=2", "--json", "--num_processes=2", f"--coordinator=127.0.0.1:{free_port()}",
    ]  # fmt: skip
    flags = f"--xla_force_host_platform_device_count=2 {FAST_COMPILE}"
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={i}"], cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    ends = finish(processes)
    assert [status for status, *_ in ends] == [0, 0], ends
    found = json.loads(ends[0][1], parse_constant=pytest.fail)
    assert found["device"].startswith("4 x ")
    assert found["train"]["loop_over_step"] > 0
    assert list(map(int, found["infer"]["images_per_second_by_batch"])) == [4, 16]
    assert ends[1][1] == "", "it only takes part"


@pytest.mark.parametrize(
    ("smallest", "largest", "sizes"),
    [
        (1, 64, [1, 4, 16, 64]),
        (1, 100, [1, 4, 16, 64, 100]),
        (8, 512, [8, 32, 128, 512]),
        (8, 1024, [8, 32, 128, 512, 1024]),
        (8, 8, [8]),
    ],
)
def test_inference_is_timed_at_the_batch_of_the_config_too(smallest, largest, sizes):
    assert benchmark.batches(smallest, largest) == sizes


@pytest.fixture(scope="module")
def loop():
    """The benchmark of training with rounds as long as it chooses, a second each, and
    what it had SIGTERM do meanwhile."""
    handlers, steps = [], []
    run = training.Loop.run

    def look(self, state):
        handlers.append(signal.getsignal(signal.SIGTERM))
        steps.append((self.cfg.log_every, self.cfg.steps))
        return run(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Loop, "run", look)
        patch.setattr(benchmark, "ROUND_SECONDS", 1.0)
        # As if every step took 20 ms, however long it takes here.
        patch.setattr(benchmark, "_seconds", lambda *args: args[-1] / 50)
        found = benchmark.train(
            config.replace(tiny.TINY, log_every=1, profile="200:210"), 2, 0
        )
    return found, handlers, steps


def test_sigterm_ends_a_benchmark(loop):
    """A handler of the training loop would only have shortened a round."""
    _, handlers, _ = loop
    assert handlers == [signal.getsignal(signal.SIGTERM)] * 2


def test_rounds_of_a_small_model_are_not_short(loop):
    """10 steps of it take milliseconds: starting the loop would be most of them."""
    found, _, steps = loop
    assert len(set(steps)) == 1
    length, whole = steps[0]
    assert whole == 2 * length
    assert length == 50
    assert found["images_per_second"] == 50 * tiny.TINY.batch


def test_mfu_needs_a_chip_that_is_known(loop, monkeypatch):
    assert "mfu" not in loop[0]
    monkeypatch.setattr(hardware, "chip_of", lambda kind: hardware.CHIPS["v5e"])
    found = benchmark.utilisation(197e12 * 4)
    assert found == {"tflops": 4 * 197, "mfu": 0.5}
