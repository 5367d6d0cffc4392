# SPDX-License-Identifier: Apache-2.0
"""What the schedule of the attention kernel says about its time."""

import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vit_jax import hardware, hlo, kernel_schedule, plan, tpu
from vit_jax.models import attention_tpu
from vit_jax.models.attention_tpu import Kernel

ROOT = Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu"
)
V5E, V4 = hardware.CHIPS["v5e"], hardware.CHIPS["v4"]
L16 = (64, 196, 3 * 1024)


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
    assert plan.kernels(cost, V5E, 64) == (0.0, 0, 48)


def test_kernels_count_as_often_as_they_are_called(bundles):
    bundles(3000)
    one = kernel_schedule.cost(call(attention_tpu.FORWARD), V5E, 64)
    assert one
    cost = hlo.Cost(cycles=15 * 10**5, kernels={call(attention_tpu.FORWARD): 48})
    found = plan.kernels(cost, V5E, 64)
    assert found == pytest.approx((48 * one.seconds, 48 * one.flops, 0))


def test_a_dump_is_read(tmp_path):
    assert kernel_schedule.read(str(tmp_path), attention_tpu.FORWARD) is None
    name = "1.attention_forward.1-79-schedule-analysis_final_bundles.txt"
    (tmp_path / name).write_text("// a\n// total scheduled bundles:  3837\n")
    assert kernel_schedule.read(str(tmp_path), attention_tpu.FORWARD) == 3837
    assert kernel_schedule.read(str(tmp_path), attention_tpu.BACKWARD) is None


@pytest.mark.process
@pytest.mark.parametrize("status", [0, 1])
def test_a_compiler_that_writes_no_dump_or_is_taken(monkeypatch, status):
    """Another process has libtpu, or it knows other options: no time, no traceback."""
    done = types.SimpleNamespace(returncode=status)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(tpu, "cached", lambda key, find_out: find_out())
    found = kernel_schedule.bundles("v5e", attention_tpu.FORWARD, Kernel(2, 64, 1, 2), 16, "bf16")  # fmt: skip
    assert found is None


@needs_libtpu
def test_the_schedule_of_a_small_kernel():
    """Of 2 heads and 32 tokens: some hundred bundles, more of them backward."""
    kernel = Kernel(2, 64, 1, 2)
    forward, backward = (
        kernel_schedule.bundles("v5e", name, kernel, 32, "bf16")
        for name in (attention_tpu.FORWARD, attention_tpu.BACKWARD)
    )
    assert forward
    assert backward
    assert 50 < forward < backward < 2000


BLOCK = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vit_jax import kernels, tpu
from vit_jax.config import ModelConfig
from vit_jax.models.attention import MultiHeadAttention

target = tpu.topology("v5e:1x1")
mesh = Mesh(np.array(target.devices), ("column",))
attend = kernels.Attend("pallas", mesh, vmem=128 * 2**20)
cfg = ModelConfig(width=256, heads=4, dtype="bfloat16")
place = lambda s, d: jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, P()))
z = place((8, 197, 256), jnp.bfloat16)
plain = MultiHeadAttention(cfg)
params = jax.eval_shape(plain.init, jax.random.key(0), z, z)
params = jax.tree.map(lambda x: place(x.shape, x.dtype), params)

def loss(params, z):
    y = MultiHeadAttention(cfg, True, attend=attend).apply(params, z, z)
    return jnp.square(y.astype(jnp.float32)).sum()

print(jax.jit(jax.grad(loss, (0, 1))).lower(params, z).compile().as_text())
"""


@needs_libtpu
def test_no_copy_appears_around_the_kernel():
    """Of its operands and results: they lie as the products beside it have them."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCK], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    computations, entry = hlo.parse(done.stdout)
    names = re.compile(r"%([\w.\-]+)")
    calls = [i for i in computations[entry] if "tpu_custom_call" in i.rest]
    assert len(calls) == 2
    for call in calls:
        operands = names.findall(call.rest.split("custom_call_target")[0])
        beside = [
            i
            for i in computations[entry]
            if i.name in operands or call.name in names.findall(i.rest)
        ]
        assert beside
        assert not {i.op for i in beside} & {"copy", "transpose", "reshape", "pad"}
