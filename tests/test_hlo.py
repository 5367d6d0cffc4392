# SPDX-License-Identifier: Apache-2.0
"""Reading compiled programs."""

import pytest

from vit_jax import hlo
from vit_jax.errors import UserError

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
  %z = f32[8]{0} get-tuple-element(%p.2), index=1
  %attention_forward.1 = f32[8]{0} custom-call(%z, %z), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attention_forward/pallas_call"}
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
  %attention_forward.7 = f32[8]{0} custom-call(%x.1), custom_call_target="tpu_custom_call"
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
    assert cost.kernels == {hlo.KernelCall("attention_forward", "f32", (8,)): 5 + 1}
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


@pytest.mark.parametrize(
    ("type_", "size"),
    [
        ("(bf16[3,4]{1,0}, f32[])", [24, 4]),
        ("pred[8]", [8]),
        ("f8e4m3fn[16]", [16]),
        ("s4[16]", [8]),
        ("c64[2]", [16]),
        ("token[]", [0]),
    ],
)
def test_sizes_of_element_types(type_, size):
    assert hlo.sizes(type_) == size


def test_an_element_type_of_unknown_size_is_refused():
    """Counted as 0 bytes it would make a slow network look fast."""
    text = PROGRAM.replace("f32[]{:T(128)} all-reduce(", "weird[8]{0} all-reduce(")
    with pytest.raises(UserError, match="type 'weird'"):
        hlo.cost(text, num_devices=256)


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
