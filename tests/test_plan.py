# SPDX-License-Identifier: Apache-2.0
"""The plan of a small config for a slice that is not there, and the search for a
better one."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from vit_jax import hardware, hlo, kernel_schedule, plan, search, tpu, train
from vit_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    config_dict,
    replace,
)
from vit_jax.errors import UserError
from vit_jax.models import attention_tpu
from vit_jax.models.attention_tpu import Kernel

ROOT = Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu"
)
TINY = Config(
    model=ModelConfig(
        name="", width=128, depth=3, mlp_dim=256, heads=2, patch=16, num_classes=10, layers="scan"
    ),
    data=DataConfig(source="synthetic", image_size=32, num_classes=10),
    optim=OptimConfig(clip=1.0),
    batch=16,
    steps=100,
    sharding="fsdp",
)  # fmt: skip


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 31.75G of 15.75G hbm.", 31.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (466.44G) exceeds available HBM (15.75G).", 466.44),
        ("INVALID_ARGUMENT: hbm", 0),
    ],
)  # fmt: skip
def test_out_of_memory_messages(message, gib):
    assert tpu.needed_memory(message) / 2**30 == pytest.approx(gib)


def test_a_kernel_beyond_vector_memory(monkeypatch):
    lowered = types.SimpleNamespace(as_text=lambda: "", compile=None)
    target = tpu.Topology("v5e:1x1", hardware.CHIPS["v5e"], [None])
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for "
        "%attention_forward. Scoped allocation with size 17.25M and limit 16.00M exceeded scoped vmem limit by 1.25M."
    )

    def compile():
        raise jax.errors.JaxRuntimeError(message)

    lowered.compile = compile
    monkeypatch.setattr(tpu, "cached", lambda key, find_out: find_out())
    with pytest.raises(UserError) as e:
        tpu.compile(lowered, target)
    assert str(e.value) == (
        "a kernel asks for more vector memory than there is (17.25M of 16.00M): set config.model.attention=xla"
    )
    assert train.out_of_memory(None, message) == str(e.value)
    assert tpu.beyond_vector_memory("RESOURCE_EXHAUSTED: hbm") == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3x3", r"unknown --topology='v5e:3x3': .*v5e:16x16"),
        ("v5litepod-16", r"unknown --topology='v5litepod-16'.*choose one of v4:2x2x1"),
        ("v3:2x2", r"unknown --topology='v3:2x2'"),
        ("", r"unknown --topology=''"),
    ],
)
def test_unknown_topology(name, message):
    with pytest.raises(UserError, match=message):
        tpu.topology(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vit_jax\[plan\]'"):
        tpu.topology("v5e:2x2")


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_chips_by_the_names_that_jax_gives_them(kind, flops):
    chip = hardware.chip_of(kind)
    assert chip
    assert chip.flops == flops


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40S", "TPU7x"])
def test_other_chips_have_no_peak(kind):
    assert hardware.chip_of(kind) is None


@pytest.mark.process
@needs_libtpu
def test_plan_of_a_small_config(tmp_path):
    """The command, end to end: standard output is one strict JSON document, whatever is
    hinted."""
    path = tmp_path / "tiny.py"
    path.write_text(
        "from vit_jax.config import from_dict, config_dict\n"
        f"def get_config():\n    return config_dict(from_dict({config_dict(TINY).to_dict()!r}))\n"
    )
    command = [sys.executable, "-m", "vit_jax.plan", f"--config={path}"]
    done = subprocess.run(
        [*command, "--topology=v5e:2x2", "--json", "--config.loss=sigmoid"],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout, parse_constant=pytest.fail)
    assert "hint  " in done.stderr
    assert "whole run  " in done.stderr, "people read it there"
    assert {
        "topology": "v5e:2x2",
        "chips": 4,
        "sharding": "fsdp",
        "batch": 16,
        "images_per_chip": 4,
        "fits": True,
    }.items() <= result.items()
    assert {"hbm_gib", "images_per_second", "compile_seconds"} <= set(result)
    assert result["images_per_second_per_host"] == result["images_per_second"]
    memory = sum(result["memory_gib"].values())
    assert 0 < result["peak_hbm_gib"] == pytest.approx(memory)
    # 3 blocks of 4 D^2 + 2 D M, 5 tokens: the compiled program does the model's work,
    # three layers of it.
    work = result["compiled_tflops_per_chip"] / result["model_tflops_per_chip"]
    assert 0.8 < work < 1.6
    assert result["step_ms"] == pytest.approx(sum(result["step_parts_ms"].values()))
    gathered = result["collectives"]["all-gather"]["count"]
    assert gathered >= 3 * 6, "the weights of each layer are gathered in the loop"


def described(kind, devices):
    """A topology of the fake devices: enough to plan up to the compiler."""
    return tpu.Topology(kind, hardware.CHIPS["v5e"], devices)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("changes", "per_chip"),
    [
        ({}, 4),
        ({"accumulate": 2}, 4),
        ({"sharding": "tensor", "mesh": (2, 2)}, 8),
        ({"sharding": "tensor", "mesh": (1, 4), "model__heads": 4, "batch": 2}, 2),
    ],
)
def test_a_config_that_cannot_fit_says_what_may_help(monkeypatch, changes, per_chip):
    problem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.00G of 15.75G hbm."
    compiled = tpu.Compiled("", 1.0, problem=problem)
    monkeypatch.setattr(tpu, "compile", lambda lowered, target: compiled)
    cfg = replace(TINY, **changes)
    found = plan.plan(cfg, described("v5e:2x2", jax.devices()[:4]))
    assert found["images_per_chip"] == per_chip
    assert (found["fits"], found["step_ms"]) == (False, None)
    assert found["peak_hbm_gib"] == pytest.approx(40)
    text = plan.report(found)
    assert "fits         no: 24.25 GiB too much per chip" in text
    assert "--config.model.remat=full" in text
    assert ("--config.sharding=fsdp" in text) is False
    assert "--topology=v5e:2x4" in text or cfg.batch < 8
    assert "--topology=v5p:2x2x1" in text
    if not changes:
        assert "--config.accumulate=4" in text
        assert "batch 16 = 4 per device\n" in text


def test_hosts_share_the_images(monkeypatch):
    """v5e:8x8 as the compiler describes it, sixteen hosts with four chips each: B/16 at
    51.0 ms needs 5,020 images/s of each."""
    devices = [SimpleNamespace(process_index=i // 4) for i in range(64)]
    assert plan.hosts(devices) == 16
    two_slices = [SimpleNamespace(process_index=0, slice_index=i) for i in (0, 0, 1)]
    assert plan.hosts(two_slices) == 2
    cost = hlo.Cost()
    cost.cycles = 0.051 * hardware.CHIPS["v5e"].clock
    cfg = replace(TINY, batch=4096)
    none = plan.Kernels(0.0, 0, 0)
    found = plan.speed(cost, none, hardware.CHIPS["v5e"], 1.0, cfg, devices)
    assert found["images_per_second"] == pytest.approx(80_314, rel=1e-4)
    assert found["images_per_second_per_host"] == pytest.approx(5_020, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": (3,)}, r"config.mesh=\(3,\) is for 3 devices, but there are 4"),
        ({"batch": 6}, r"config.batch=6 does not divide over 4 devices"),
    ],
)
def test_a_mesh_or_batch_that_does_not_divide(changes, message):
    with pytest.raises(UserError, match=message):
        plan.plan(replace(TINY, **changes), described("v5e:2x2", jax.devices()[:4]))


def test_what_was_compiled_once_is_found_on_disk(tmp_path, monkeypatch, request):
    # Every test after this one would compile without the cache.
    place = jax.config.jax_compilation_cache_dir
    restore = lambda: jax.config.update("jax_compilation_cache_dir", place)
    request.addfinalizer(restore)
    monkeypatch.setattr(tpu.importlib.metadata, "version", lambda name: "1")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    calls = []

    def find_out():
        calls.append(1)
        return {"n": len(calls)}

    assert tpu.cached(["a"], find_out) == {"n": 1}
    assert tpu.cached(["a"], find_out) == {"n": 1}
    assert tpu.cached(["b"], find_out) == {"n": 2}
    (cut, _) = sorted((tmp_path / "plan").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    cut.write_bytes(cut.read_bytes()[:10])
    assert tpu.cached(["a"], find_out) == {"n": 3}, "half a file is written anew"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--other")
    assert tpu.cached(["a"], find_out) == {"n": 4}, "the compiler has other options"
    assert tpu.cached(["c"], lambda: None) is None
    assert tpu.cached(["c"], lambda: 1) == 1, "what was not found out is tried again"
    (tmp_path / "file").touch()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file"))
    assert tpu.cached(["d"], lambda: 2) == 2, "what cannot be written ends nothing"


# The search ------------------------------------------------------------------


class Chip64:
    """One of 64 on a torus."""

    slice_index = 0

    def __init__(self, i):
        self.id, self.coords = i, (i // 8, i % 8, 0)


POD = [Chip64(i) for i in range(64)]
BIG = replace(TINY, batch=4096, sharding="replicate", model__layers="loop")


def found(cfg, devices, cost, limit=12, attention="pallas, which a run checks first"):
    """Search with ``cost(candidate) -> (milliseconds, GiB)`` for the compiler."""
    tried, told = [], []

    def fake(c):
        milliseconds, gib = cost(c)
        tried.append(search.key(c, devices))
        return {
            "fits": gib <= 16,
            "step_ms": milliseconds if gib <= 16 else None,
            "peak_hbm_gib": gib,
            "attention": attention,
            "hbm_gib": 16.0,
            "images_per_chip": c.batch // len(devices),
        }

    pairs = search.search(cfg, devices, fake, limit=limit, minutes=60, tell=told.append)
    assert len(tried) == len(set(tried)) == len(pairs) == len(told) <= limit
    return pairs, tried, told


def like_a_pod(c):
    """What was compiled, roughly: loops cost a quarter, scans that keep activations
    more than those that compute them again, and the best mesh is 4 x 16."""
    rows = c.mesh[0] if len(c.mesh) > 1 else 1
    ms = 300 + 5 * abs(math.log2(rows) - 2) + 20 * (c.accumulate > 1)
    ms += {"zero": 0, "fsdp": 15, "replicate": 60}[c.sharding]
    ms += {("scan", "none"): 10, ("scan", "full"): 0, ("scan", "dots"): 5}.get(
        (c.model.layers, c.model.remat), -60
    )
    gib = {"none": 24, "dots": 12, "full": 2}[c.model.remat] / c.accumulate
    return ms, gib + {"zero": 2, "fsdp": 1, "replicate": 6}[c.sharding]


def test_the_search_finds_the_best_within_its_default_limit():
    """A mesh of two axes and blocks in a loop that have to compute again."""
    pairs, tried, told = found(BIG, POD, like_a_pod)
    best, result = pairs[0]
    assert (best.sharding, best.mesh, best.accumulate) == ("zero", (4, 16), 1)
    assert (best.model.layers, best.model.remat) != ("scan", "none")
    assert best.model.layers == "loop"
    assert result["fits"]
    assert tried[0] == ("zero", (8, 8), "scan", "full", 1, "auto"), (
        "quick to compile, fits"
    )
    assert tried[1] == ("replicate", (64,), "loop", "none", 1, "auto"), (
        "the config as it is"
    )
    assert "; best so far zero " in told[-1]
    assert told[-1].startswith("[12/12, 0 min]")
    ranks = [search.rank(p) for _, p in pairs]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("needed", [2, 8])
def test_the_search_takes_micro_batches_where_nothing_fits(needed):
    """On 64 chips too, within the default limit."""
    pairs, *_ = found(
        BIG, POD, lambda c: (100.0 * c.accumulate, 15.0 * needed / c.accumulate)
    )
    assert pairs[0][1]["fits"]
    assert pairs[0][0].accumulate == needed


def test_micro_batches_that_are_not_needed_are_taken_back():
    pairs, *_ = found(replace(BIG, accumulate=4), POD, lambda c: (c.accumulate, 1.0))
    assert pairs[0][0].accumulate == 1


def test_fewer_micro_batches_divide_the_batch_as_well():
    _, tried, _ = found(replace(BIG, accumulate=15), POD, lambda c: (c.accumulate, 1.0))
    assert {key[-2] for key in tried} == {15, 5, 1}


def test_a_candidate_that_is_refused_is_left_out():
    """Such as a stack of blocks, of which config.optim.freeze means the first one."""

    def plan_of(c):
        if c.model.layers == "scan":
            raise UserError("matches no parameter")
        fits = {"fits": True, "step_ms": 1.0, "peak_hbm_gib": 1.0}
        return fits | {"attention": "xla"}

    told = []
    go = functools.partial(
        search.search, devices=POD, plan=plan_of, limit=3, minutes=1, tell=told.append
    )
    assert {c.model.layers for c, _ in go(BIG)} == {"loop"}
    assert "left out: matches no parameter" in told
    with pytest.raises(UserError, match="matches no parameter"):
        go(replace(BIG, model__layers="scan"))


@pytest.mark.parametrize("minutes", [0, -1, math.nan])
def test_a_search_needs_time(minutes):
    with pytest.raises(UserError, match=r"--search_minutes=.*: it must be above 0"):
        search.search(BIG, POD, lambda c: {}, limit=1, minutes=minutes, tell=str)


@pytest.mark.heavy
def test_the_same_program_is_compiled_once():
    """On one chip a strategy changes nothing; on eight, () is (8,)."""
    _, tried, _ = found(BIG, POD[:1], lambda c: (1.0, 1.0), limit=100)
    assert {len(key) for key in tried} == {4}
    assert "xla" in {key[-1] for key in tried}
    _, tried, _ = found(BIG, POD[:1], lambda c: (1.0, 1.0), 100, "xla, because it is")
    assert {key[-1] for key in tried} == {"auto"}, "which is xla there"
    _, tried, _ = found(BIG, POD[:8], lambda c: (1.0, 1.0), limit=100)
    assert ("zero", (8,), "scan", "full", 1, "auto") in tried
    assert all(key[1] for key in tried)


def test_no_candidate_is_begun_after_the_time(monkeypatch):
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(now))
    pairs = search.search(
        BIG,
        POD,
        lambda c: {
            "fits": True,
            "step_ms": 1.0,
            "peak_hbm_gib": 1.0,
            "attention": "xla",
        },
        limit=100,
        minutes=10,
        tell=str,
    )
    assert len(pairs) == 3


@pytest.mark.parametrize(
    ("batch", "limit", "message"),
    [
        (4, 5, "config.batch=4 does not divide over 8 devices"),
        (16, 0, "--search_limit=0: it must be at least 1"),
    ],
)
def test_a_search_without_candidates_says_why(batch, limit, message):
    target = described("v5e:2x4", jax.devices())
    with pytest.raises(UserError, match=message):
        search.search(
            dataclasses.replace(TINY, batch=batch),
            target.devices,
            lambda c: plan.plan(c, target),
            limit=limit,
            minutes=1,
            tell=str,
        )


# The attention kernel. Here, since one process at a time can load libtpu ----------


@pytest.mark.process
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


@pytest.mark.process
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
