# SPDX-License-Identifier: Apache-2.0
"""Reading compiled programs, and the plan of a small config for a slice that is not
there."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from vit_jax import hlo, plan
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig, config_dict
from vit_jax.errors import UserError

ROOT = Path(__file__).parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu"
)

# What the compiler writes, cut to what is read: a product outside of a loop, a loop of
# 5 around a loop of 3, an asynchronous gather whose fusion is repeated, and
# reduce-scatters spelled as fusions around an all-reduce, of which those that the
# compiler combined have the same channel.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_matmul (a: bf16[64,128], b: bf16[128,256]) -> bf16[64,256] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[64,256]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (g: bf16[256,128]) -> bf16[16,128] {
  %g = bf16[256,128]{1,0} parameter(0)
  %all-reduce.9 = bf16[256,128]{1,0} all-reduce(%g), channel_id=3, replica_groups=[16,16]<=[256], to_apply=%add
  ROOT %dynamic-slice.1 = bf16[16,128]{1,0} dynamic-slice(%all-reduce.9, %i, %j), dynamic_slice_sizes={16,128}
}

%all-reduce-scatter.2 (g.1: bf16[256,128]) -> bf16[16,128] {
  %g.1 = bf16[256,128]{1,0} parameter(0)
  %all-reduce.10 = bf16[256,128]{1,0} all-reduce(%g.1), channel_id=3, replica_groups=[16,16]<=[256], to_apply=%add
  ROOT %dynamic-slice.2 = bf16[16,128]{1,0} dynamic-slice(%all-reduce.10, %i, %j), dynamic_slice_sizes={16,128}
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %multiply_fusion = f32[8]{0} fusion(%p), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"100"}
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%i, %multiply_fusion)
}

%nothing (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}

%inner_condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %constant.3 = s32[]{:T(128)} constant(3)
  ROOT %compare.1 = pred[] compare(%i, %constant.3), direction=LT
}

%body (p.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.2 = (s32[], f32[8]{0}) parameter(0)
  %while.1 = (s32[], f32[8]{0}) while(%p.2), condition=%inner_condition, body=%inner_body
  %fusion.7 = bf16[64,256]{1,0} fusion(%x, %y), kind=kOutput, calls=%fused_matmul, backend_config={"estimated_cycles":"1000"}, metadata={op_name="jit(step)/mlp"}
  %fusion.8 = bf16[16,128]{1,0} fusion(%grad), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather-start.1 = (bf16[16,128]{1,0}, bf16[256,128]{1,0}) all-gather-start(%w), channel_id=7, replica_groups=mesh['row'=16,'column'=16] {'column'}, dimensions={0}
  %all-gather-start.2 = (bf16[16,128]{1,0}, bf16[256,128]{1,0}) all-gather-start(%w), channel_id=7, replica_groups=mesh['row'=16,'column'=16] {'column'}, dimensions={0}
  ROOT %tuple.2 = (s32[], f32[8]{0}) tuple(%i, %z)
}

%condition (p.3: (s32[], f32[8])) -> pred[] {
  ROOT %compare.2 = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x.1: f32[8]) -> f32[] {
  %x.1 = f32[8]{0} parameter(0)
  %while.2 = (s32[], f32[8]{0}) while(%x.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %custom-call.1 = f32[8]{0} custom-call(%x.1), custom_call_target="tpu_custom_call"
  %fusion.9 = bf16[16,128]{1,0} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.2
  %send.1 = (f32[8]{0}, u32[], token[]) send(%x.1, %after-all.1), channel_id=9, is_host_transfer=true
  ROOT %all-reduce.1 = f32[]{:T(128)} all-reduce(%loss), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_cost_counts_loop_bodies_as_often_as_they_run():
    cost = hlo.cost(PROGRAM, num_devices=256)
    assert cost.cycles == 5 * (1000 + 3 * 100)
    assert cost.matmul_cycles == 5 * 1000
    assert cost.flops == 5 * 2 * 64 * 128 * 256
    assert cost.unknown == 1
    assert max(cost.fusions)[1].endswith("jit(step)/mlp")


def test_cost_counts_traffic_by_kind():
    found = hlo.cost(PROGRAM, num_devices=256).collectives
    whole = 256 * 128 * 2
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce", "send"}
    assert found["send"].bytes == 8 * 4, "between slices, by way of the hosts"
    gather, scatter, reduce = (
        found[k] for k in ("all-gather", "reduce-scatter", "all-reduce")
    )
    assert (gather.count, gather.bytes) == (5, 5 * whole), (
        "the repeated fusion is one gather"
    )
    assert (scatter.count, scatter.bytes) == (6, 6 * whole)
    assert scatter.wire_bytes == pytest.approx(6 * whole * 15 / 16)
    assert (reduce.count, reduce.bytes, reduce.wire_bytes) == (1, 4, 2 * 4 * 3 / 4)


def test_text_that_is_not_a_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.cost("HloModule nothing\n", 1)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=[2,16]<=[32]", 16),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['a'=4,'b'=8] {'a','b'}", 32),
        ("to_apply=%add", 64),
    ],
)
def test_group_size(groups, size):
    assert hlo.group_size(f"all-reduce(%x), channel_id=1, {groups}", 64) == size


@pytest.mark.parametrize(
    ("line", "operands", "flops"),
    [
        # A plain convolution: 3 x 3, stride 2, 8 -> 16 channels.
        (
            "f32[4,5,5,16]{3,2,1,0} convolution(%x, %w), window={size=3x3 stride=2x2}, dim_labels=b01f_01io->b01f",
            {"x": "f32[4,11,11,8]", "w": "f32[3,3,8,16]"},
            2 * 4 * 5 * 5 * 16 * 9 * 8,
        ),
        # A product with 12 batch entries, written as a dilated window: only the
        # diagonal meets an input.
        (
            "bf16[64,32,12]{1,0,2} convolution(%x, %w), "
            "window={size=12 stride=11 pad=0_0 lhs_dilate=12}, dim_labels=bf0_io0->bf0",
            {"x": "bf16[64,128,12]", "w": "bf16[128,32,12]"},
            2 * 64 * 32 * 12 * 128,
        ),
        # Padding does not count.
        (
            "f32[1,8,1]{2,1,0} convolution(%x, %w), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            {"x": "f32[1,8,1]", "w": "f32[3,1,1]"},
            2 * (3 * 8 - 2),
        ),
        (
            "f32[6,7]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            {"x": "f32[6,5]", "w": "f32[5,7]"},
            2 * 6 * 7 * 5,
        ),
    ],
    ids=["stride", "batch as window", "padding", "dot"],
)
def test_flops_of_products(line, operands, flops):
    computations, _ = hlo.parse(
        f"ENTRY %main (x: f32[1]) -> f32[1] {{\n  ROOT %out = {line}\n}}\n"
    )
    assert hlo.convolution_flops(computations["main"][0], operands) == flops


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 31.75G of 15.75G hbm.", 31.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (466.44G) exceeds available HBM (15.75G).", 466.44),
        ("INVALID_ARGUMENT: hbm", 0),
    ],
)  # fmt: skip
def test_out_of_memory_messages(message, gib):
    assert plan.needed_memory(message) / 2**30 == pytest.approx(gib)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3x3", r"unknown --topology='v5e:3x3': .*v5e:16x16"),
        ("v5litepod-16", r"unknown --topology='v5litepod-16'.*choose one of v4:2x2x1"),
        ("", r"unknown --topology=''"),
    ],
)
def test_unknown_topology(name, message):
    with pytest.raises(UserError, match=message):
        plan.topology(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vit_jax\[tpu\]'"):
        plan.topology("v5e:2x2")


def tiny(**changes):
    model = ModelConfig(
        name="",
        width=128,
        depth=3,
        mlp_dim=256,
        heads=2,
        patch=16,
        num_classes=10,
        layers="scan",
    )
    data = DataConfig(source="synthetic", image_size=32, num_classes=10)
    return Config(
        model=model,
        data=data,
        optim=OptimConfig(clip=1.0),
        batch=16,
        steps=100,
        sharding="fsdp",
        **changes,
    )


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs ``python -m vit_jax.plan`` with the tiny config, written to a file."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "tiny.py").write_text(
        "from vit_jax.config import from_dict, config_dict\n"
        f"def get_config():\n    return config_dict(from_dict({config_dict(tiny()).to_dict()!r}))\n"
    )

    def run(*args):
        environment = os.environ | {"XLA_FLAGS": ""}
        return subprocess.run(
            [sys.executable, "-m", "vit_jax.plan", f"--config={folder / 'tiny.py'}", *args],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return run


@needs_libtpu
def test_plan_of_a_small_config(command):
    done = command("--topology=v5e:2x2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {
        "topology",
        "chips",
        "sharding",
        "batch",
        "peak_hbm_gib",
        "hbm_gib",
        "fits",
        "step_ms",
    } <= set(result)
    assert {"images_per_second", "compile_seconds", "collectives"} <= set(result)
    assert (
        result["topology"],
        result["chips"],
        result["sharding"],
        result["batch"],
    ) == ("v5e:2x2", 4, "fsdp", 16)
    assert result["fits"] is True
    assert (
        0 < result["peak_hbm_gib"] == pytest.approx(sum(result["memory_gib"].values()))
    )
    # 3 blocks of 4 D^2 + 2 D M, 5 tokens: the compiled program does the model's work,
    # three layers of it.
    assert (
        0.8 < result["compiled_tflops_per_chip"] / result["model_tflops_per_chip"] < 1.6
    )
    assert result["step_ms"] == pytest.approx(sum(result["step_parts_ms"].values()))
    assert result["collectives"]["all-gather"]["count"] >= 3 * 6, (
        "the weights of each layer are gathered in the loop"
    )


@needs_libtpu
def test_a_config_that_cannot_fit_says_what_would_help(command):
    done = command(
        "--topology=v5e:2x2",
        "--config.batch=8192",
        "--config.data.image_size=512",
        "--config.model.patch=8",
    )
    assert done.returncode == 0, done.stderr
    assert "fits         no:" in done.stdout
    assert "GiB too much per chip" in done.stdout
    assert "--config.accumulate=" in done.stdout
    assert "--config.model.remat=full" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--topology=v9:1x1",), "error: unknown --topology='v9:1x1'"),
        (("--topology=v5e:2x2", "more"), "error: unexpected argument 'more'"),
    ],
)
def test_command_reports_bad_input_in_one_line(command, args, message):
    done = command(*args)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@needs_libtpu
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--config.mesh=(3,)",), "config.mesh=(3,) is for 3 devices, but there are 4"),
        (("--config.batch=6",), "config.batch=6 does not divide over 4 devices"),
    ],
)
def test_command_reports_a_mesh_or_batch_that_does_not_divide(command, args, message):
    done = command("--topology=v5e:2x2", *args)
    assert done.returncode == 2
    assert message in done.stderr


def test_search_tries_micro_batches_only_where_needed(monkeypatch):
    """Replicated state never fits; zero fits with two micro-batches, the rest at once."""

    def fake(cfg, target):
        needed = {"replicate": 99, "zero": 2, "fsdp": 1}[cfg.sharding]
        return {
            "fits": cfg.accumulate >= needed,
            "step_ms": 10.0 * cfg.accumulate + (cfg.model.remat == "full"),
            "peak_hbm_gib": 1.0,
            "mesh": {"data": 4},
            "sharding": cfg.sharding,
            "remat": cfg.model.remat,
            "accumulate": cfg.accumulate,
        }

    monkeypatch.setattr(plan, "plan", fake)
    target = plan.Topology("v5e:2x2", plan.CHIPS["v5e"], (None,) * 4)
    found = plan.search(tiny(), target, limit=100)
    tried = [(p["sharding"], p["remat"], p["accumulate"]) for p in found]
    assert len(tried) == len(set(tried))
    assert {n for s, _, n in tried if s == "fsdp"} == {1}
    assert {n for s, _, n in tried if s == "zero"} == {1, 2}
    assert {n for s, _, n in tried if s == "replicate"} == {1, 2, 4}  # 4 images a chip
    fitting = [p for p in found if p["fits"]]
    assert found[: len(fitting)] == sorted(fitting, key=lambda p: p["step_ms"])
    assert len(plan.search(tiny(), target, limit=5)) == 5


@pytest.mark.parametrize(
    ("batch", "limit", "message"),
    [
        (4, 5, "config.batch=4 does not divide over 8 devices"),
        (16, 0, "--search_limit=0: it must be at least 1"),
    ],
)
def test_a_search_without_candidates_says_why(batch, limit, message):
    target = plan.Topology("v5e:2x4", plan.CHIPS["v5e"], jax.devices())
    with pytest.raises(UserError, match=message):
        plan.search(dataclasses.replace(tiny(), batch=batch), target, limit)


@needs_libtpu
def test_search_prints_one_object(command):
    done = command("--topology=v5e:2x2", "--search", "--search_limit=2", "--json")
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)
    assert best["fits"]
    assert len(best["tried"]) == 1
    assert best["step_ms"] <= best["tried"][0]["step_ms"]
    assert done.stderr.count(" GiB ") == 2  # a line for each, as they come
