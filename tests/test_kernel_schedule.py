# SPDX-License-Identifier: Apache-2.0
"""What the schedule of the attention kernel says about its time."""

import subprocess
import types

import pytest

from vit_jax import hardware, hlo, kernel_schedule, plan, tpu
from vit_jax.config import ModelConfig
from vit_jax.models import attention_tpu
from vit_jax.models.attention_tpu import Kernel

V5E, V4 = hardware.CHIPS["v5e"], hardware.CHIPS["v4"]
L16 = (64, 196, 3 * 1024)
MODEL = ModelConfig(width=1024, heads=16)


@pytest.fixture
def bundles(monkeypatch):
    """Says how many bundles a step takes, and remembers who was asked about."""
    asked = []

    def set_to(number):
        def fake(kind, name, kernel, tokens, dtype):
            asked.append((kind, name, kernel, tokens, dtype))
            return number

        monkeypatch.setattr(kernel_schedule, "bundles", fake)
        return asked

    return set_to


def call(name, shape=L16, dtype="bf16"):
    return hlo.KernelCall(name, dtype, shape)


def test_bundles_are_cycles_of_every_step(bundles):
    asked = bundles(3837)
    found = kernel_schedule.cost(call(attention_tpu.FORWARD), V5E, 64)
    assert found
    # One step per image.
    assert found.seconds == pytest.approx(64 * 3837 / 1.5e9)
    assert found.flops == 4 * 64 * 196**2 * 1024
    (kind, _, kernel, tokens, dtype), *_ = asked
    assert (kind, kernel.grid(64, 196), tokens, dtype) == ("v5e", (64, 1, 1), 196, "bf16")  # fmt: skip
    found = kernel_schedule.cost(call(attention_tpu.BACKWARD), V5E, 64)
    assert found
    assert found.flops == 10 * 64 * 196**2 * 1024


def test_memory_bounds_a_kernel_that_computes_little(bundles):
    bundles(10)
    moved = 2 * 64 * 196 * 1024
    found = kernel_schedule.cost(call(attention_tpu.FORWARD), V5E, 64)
    assert found
    assert found.seconds == pytest.approx(4 * moved / 819e9), "q, k, v and o"
    found = kernel_schedule.cost(call(attention_tpu.BACKWARD), V5E, 64)
    assert found
    assert found.seconds == pytest.approx(7 * moved / 819e9), "and do, dq, dk, dv, no o"


def test_two_cores_share_the_steps(bundles):
    bundles(10_000)
    found = kernel_schedule.cost(call(attention_tpu.FORWARD), V4, 64)
    assert found
    assert found.seconds == pytest.approx(64 * 10_000 / 2 / 1.05e9)


@pytest.mark.parametrize("name", ["splash_attention", attention_tpu.FORWARD])
def test_what_cannot_be_told_is_not_counted(bundles, name):
    bundles(None)
    assert kernel_schedule.cost(call(name), V5E, 64) is None
    cost = hlo.Cost(kernels={call(name): 48})
    assert plan.kernels(cost, V5E, MODEL) == (0.0, 0, 48)


def test_kernels_count_as_often_as_they_are_called(bundles):
    bundles(3000)
    one = kernel_schedule.cost(call(attention_tpu.FORWARD), V5E, 64)
    assert one
    cost = hlo.Cost(cycles=15 * 10**5, kernels={call(attention_tpu.FORWARD): 48})
    found = plan.kernels(cost, V5E, MODEL)
    assert found == pytest.approx((48 * one.seconds, 48 * one.flops, 0))


def test_a_dump_is_read(tmp_path):
    assert kernel_schedule.read(str(tmp_path), attention_tpu.FORWARD) is None
    name = "1.attention_forward.1-79-schedule-analysis_final_bundles.txt"
    (tmp_path / name).write_text("// a\n// total scheduled bundles:  3837\n")
    assert kernel_schedule.read(str(tmp_path), attention_tpu.FORWARD) == 3837
    assert kernel_schedule.read(str(tmp_path), attention_tpu.BACKWARD) is None


@pytest.mark.parametrize("status", [0, 1])
def test_a_compiler_that_writes_no_dump_or_is_taken(monkeypatch, status):
    """Another process has libtpu, or it knows other options: no time, no traceback."""
    done = types.SimpleNamespace(returncode=status)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(tpu, "cached", lambda key, find_out: find_out())
    found = kernel_schedule.bundles("v5e", attention_tpu.FORWARD, Kernel(2, 64, 1, 2), 16, "bf16")  # fmt: skip
    assert found is None
