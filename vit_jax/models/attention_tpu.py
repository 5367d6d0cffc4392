# SPDX-License-Identifier: Apache-2.0
"""Equations 6 and 7 as one kernel for TPUs, forward and backward: logits and attention
weights never leave the chip's vector memory.

Letters: B images; S tokens; k heads; D_h width of a head; W = k D_h. An array lies with
its last axis along the 128 lanes of a register, the one before along its sublanes.

A step of the grid holds queries, keys and values of some heads of an image in vector
memory: all of them or, where a sequence is long, all keys and some queries. Nothing is
cut or transposed to get there. Operands lie as a product with the joined projections
leaves them, (B, S, 3 W), and the result as the output projection reads it, (B, S, W).
Heads narrower than a register share one. They are not moved apart: where a product
sums over the lanes of a head, its neighbours' are zeroed in one operand, which costs
little, as the matrix unit takes 128 at a time anyway. A head that lies across the edge
of two registers is folded into one: its lanes keep their numbers, and products do not
care about their order.

docs/kernel.md has a picture.
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
FORWARD, BACKWARD = "attention_forward", "attention_backward"

# Products that contract the last axes, the last with the first, the first axes.
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


# What a step may have of images x heads x queries: many heads are many independent
# products, which hide each other's latency; too many are a long program.
ROWS = 4800
# Longer sequences are done so many queries at a time.
WHOLE, QUERIES = 640, 512
# Vector memory that the compiler gives a kernel unasked, and what is left to others.
UNASKED, RESERVED = 16 * 2**20, 8 * 2**20


class Head(NamedTuple):
    """Where a head lies in a block: lanes ``first`` to ``end`` of the window of one or
    two whole registers that begins at lane ``start`` and is ``size`` lanes long."""

    start: int
    size: int
    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attention of ``heads`` heads of width ``head_dim``.

    A step of the grid does ``block_images`` images, ``block_heads`` heads and, if that
    is not 0, only ``queries`` of the queries.
    """

    heads: int
    head_dim: int
    block_images: int = 1
    block_heads: int = 0
    queries: int = 0
    # Bytes of vector memory; 0: what the compiler allows unasked.
    vmem: int = 0
    # Runs on any machine, slowly.
    interpret: bool = False

    def forward(self, qkv: jax.Array) -> jax.Array:
        """(B, S, 3 W), queries, keys and values one after another -> (B, S, W)."""
        images, tokens, _ = qkv.shape
        parts, queries = self._specs(tokens)
        return self._call(
            partial(_forward, self),
            name=FORWARD,
            grid=self.grid(images, tokens),
            in_specs=parts,
            out_specs=queries,
            out_shape=jax.ShapeDtypeStruct((images, tokens, self.width), qkv.dtype),
        )(*[qkv] * len(parts))

    def backward(self, qkv: jax.Array, do: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the gradient ``do`` (B, S, W) of the result makes of ``qkv``: its
        gradient (B, S, 3 W), and the sums of that over S, (B, 1, 3 W) in float32."""
        images, tokens, lanes = qkv.shape
        parts, queries = self._specs(tokens)
        _, _, steps = self.grid(images, tokens)
        rows = steps * self.queries or tokens
        whole = lambda n: pl.BlockSpec(
            (self.block_images, n, lanes), lambda i, g, j: (i, 0, 0)
        )
        sums = pltpu.VMEM((tokens, self.block_heads * self.head_dim), jnp.float32)
        return self._call(
            partial(_backward, self),
            name=BACKWARD,
            grid=self.grid(images, tokens),
            in_specs=[*parts, queries],
            out_specs=[whole(rows), whole(1)],
            out_shape=[
                jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
                jax.ShapeDtypeStruct((images, 1, lanes), jnp.float32),
            ],
            scratch_shapes=[sums, sums] if self.queries else [],
        )(*[qkv] * len(parts), do)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def grid(self, images: int, tokens: int) -> tuple[int, int, int]:
        """Steps over images, heads and queries."""
        steps = pl.cdiv(tokens, self.queries) if self.queries else 1
        return (images // self.block_images, self.heads // self.block_heads, steps)

    def memory(self, tokens: int, itemsize: int) -> int:
        """About how many bytes of vector memory the backward pass takes: blocks twice,
        since one is loaded while another is worked on, and what a head computes."""
        rows = self.queries or tokens
        lanes = self.block_heads * self.head_dim
        per_step = (rows + 2 * tokens + rows) * lanes + 3 * self.width * tokens
        blocks = 2 * itemsize * self.block_images * per_step
        sums = 8 * tokens * lanes if self.queries else 0
        logits = 4 * tokens * pl.cdiv(rows, LANES) * LANES
        return blocks + sums + 4 * logits

    def windows(self) -> Iterator[Head]:
        """The heads of a block."""
        end = self.block_heads * self.head_dim
        for a in range(0, end, self.head_dim):
            b = a + self.head_dim
            if self.width % LANES:
                # Keys do not begin with a register: each head is moved to one.
                yield Head(a, b - a, 0, b - a)
            else:
                start = a // LANES * LANES
                size = min(pl.cdiv(b, LANES) * LANES, end) - start
                yield Head(start, size, a - start, b - start)

    def parts(self, refs: Any) -> list[tuple[Any, int]]:
        """Queries, keys and values in what a step is given: arrays and first lanes."""
        if len(refs) == 3:
            return [(ref, 0) for ref in refs]
        return [(refs[0], n * self.width) for n in range(3)]

    def lanes(self, part: int, lane: int, size: int) -> Any:
        """Where ``size`` lanes of a block, from ``lane`` on, lie in (B, S, 3 W)."""
        start = part * self.width + lane
        if self.block_heads < self.heads:
            before = pl.program_id(1) * self.block_heads * self.head_dim
            start = pl.multiple_of(start + before, LANES)
        return pl.ds(start, size)

    def _specs(self, tokens: int) -> tuple[list[pl.BlockSpec], pl.BlockSpec]:
        """Blocks of queries, keys and values, and of what there is per query."""
        rows, lanes = self.queries or tokens, self.block_heads * self.head_dim
        block = (self.block_images, rows, lanes)
        queries = pl.BlockSpec(block, lambda i, g, j: (i, j, g))
        if self.block_heads == self.heads and not self.queries:
            everything = (self.block_images, tokens, 3 * lanes)
            return [pl.BlockSpec(everything, lambda i, g, j: (i, 0, 0))], queries
        groups = self.heads // self.block_heads

        def all_rows(n: int) -> pl.BlockSpec:
            block = (self.block_images, tokens, lanes)
            return pl.BlockSpec(block, lambda i, g, j: (i, 0, n * groups + g))

        return [queries, all_rows(1), all_rows(2)], queries

    def _call(self, body: Any, **kwargs: Any) -> Any:
        # Only images may be divided among cores: steps of the other axes add to one
        # block of the result.
        options: dict[str, Any] = {"vmem_limit_bytes": self.vmem} if self.vmem else {}
        params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), **options
        )
        return pl.pallas_call(
            body, compiler_params=params, interpret=self.interpret, **kwargs
        )


def kernel(
    *,
    images: int,
    tokens: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    vmem: int,
    interpret: bool = False,
) -> Kernel | None:
    """The kernel for (images, tokens, 3 heads head_dim) of elements of ``itemsize``
    bytes on a device with ``vmem`` bytes of vector memory; None if it does not fit."""
    if head_dim > LANES or head_dim % 8:
        return None
    steps = pl.cdiv(tokens, QUERIES) if tokens > WHOLE else 1
    # A register of bfloat16 has 16 rows.
    queries = pl.cdiv(pl.cdiv(tokens, steps), 16) * 16 if steps > 1 else 0
    possible = [
        Kernel(heads, head_dim, i, n, queries, 0, interpret)
        for n in _divisors(heads)
        # Blocks begin with a register, or are everything.
        if n * head_dim % LANES == 0 or (n == heads and not queries)
        for i in (_divisors(images) if n == heads and not queries else [1])
    ]
    rows = lambda k: k.block_images * k.block_heads * (queries or tokens)
    # As much as a step may have, else as little as can be; less where that does not fit.
    for found in sorted(possible, key=lambda k: (rows(k) > ROWS, abs(rows(k) - ROWS))):
        need = found.memory(tokens, itemsize)
        if need <= vmem - RESERVED:
            limit = vmem - RESERVED if need > UNASKED else 0
            return dataclasses.replace(found, vmem=limit)
    return None


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _forward(kernel: Kernel, *refs: Any) -> None:
    """softmax(q k^T / sqrt(D_h)) v of each head, queries along sublanes."""
    *inputs, o_ref = refs
    for image in range(kernel.block_images):
        tiles: dict[int, jax.Array] = {}
        for head in kernel.windows():
            q, k, v = (_window(*p, image, head) for p in kernel.parts(inputs))
            s = _dot(q, _only(head, k), NT)
            p = _exp(kernel, s - s.max(1, keepdims=True))
            o = _dot(p.astype(v.dtype), v, NN) * _reciprocal(p.sum(1, keepdims=True))
            _merge(tiles, head, o)
        for lane, tile in tiles.items():
            o_ref[image, :, pl.ds(lane, tile.shape[1])] = tile.astype(o_ref.dtype)


def _backward(kernel: Kernel, *refs: Any) -> None:
    """Gradients of each head, keys along sublanes: then those of keys and values are
    plain products, and softmax reduces over sublanes, which is cheap."""
    refs, sums = (refs[:-2], refs[-2:]) if kernel.queries else (refs, ())
    *inputs, do_ref, d_ref, bias_ref = refs
    for image in range(kernel.block_images):
        tiles: list[dict[int, jax.Array]] = [{}, {}, {}]
        for head in kernel.windows():
            q, k, v = (_window(*p, image, head) for p in kernel.parts(inputs))
            do = _window(do_ref, 0, image, head)
            if kernel.queries:
                q, do = (_that_exist(kernel, x, len(k)) for x in (q, do))
            s = _dot(_only(head, k), q, NT)
            p = _exp(kernel, s - s.max(0, keepdims=True))
            p = p * _reciprocal(p.sum(0, keepdims=True))
            dp = _dot(_only(head, v), do, NT)
            ds = p * dp
            ds = (ds - p * ds.sum(0, keepdims=True)).astype(q.dtype)
            _merge(tiles[2], head, _dot(p.astype(q.dtype), do, NN))
            _merge(tiles[1], head, _dot(ds, q, NN))
            _merge(tiles[0], head, _dot(ds, k, TN))
        for part in tiles[:2]:
            for lane in part:
                part[lane] = part[lane] * kernel.scale
        if kernel.queries:
            _write_some(kernel, tiles, d_ref, bias_ref, sums)
            continue
        for part, of_part in enumerate(tiles):
            for lane, tile in of_part.items():
                at = kernel.lanes(part, lane, tile.shape[1])
                d_ref[image, :, at] = tile.astype(d_ref.dtype)
                bias_ref[image, :, at] = tile.sum(0, keepdims=True)


def _write_some(
    kernel: Kernel, tiles: Any, d_ref: Any, bias_ref: Any, sums: Any
) -> None:
    """The rows of queries, and those of keys and values once all queries have been."""
    step, steps = pl.program_id(2), pl.num_programs(2)
    rows = pl.ds(pl.multiple_of(step * kernel.queries, kernel.queries), kernel.queries)
    for lane, tile in tiles[0].items():
        at = kernel.lanes(0, lane, tile.shape[1])
        d_ref[0, rows, at] = tile.astype(d_ref.dtype)
        _add(bias_ref.at[0, :, at], tile.sum(0, keepdims=True))
    # Places are worked out here, because the interpreter cannot do so inside.
    totals = []
    for part, sum_ref in enumerate(sums, start=1):
        for lane, tile in tiles[part].items():
            own = sum_ref.at[:, pl.ds(lane, tile.shape[1])]
            _add(own, tile)
            totals.append((own, kernel.lanes(part, lane, tile.shape[1])))

    @pl.when(step == steps - 1)
    def _():
        for own, at in totals:
            total = own[...]
            d_ref[0, : len(total), at] = total.astype(d_ref.dtype)
            bias_ref[0, :, at] = total.sum(0, keepdims=True)


def _add(ref: Any, x: jax.Array) -> None:
    """Adds up ``x`` over the steps of the last axis of the grid."""
    first = pl.program_id(2) == 0

    @pl.when(first)
    def _():
        ref[...] = x

    @pl.when(jnp.logical_not(first))
    def _():
        ref[...] += x


def _dot(a: jax.Array, b: jax.Array, dims: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _exp(kernel: Kernel, x: jax.Array) -> jax.Array:
    """e^(x / sqrt(D_h)), in the powers of 2 that the hardware has."""
    return jnp.exp2(x * (kernel.scale * math.log2(math.e)))


def _reciprocal(x: jax.Array) -> jax.Array:
    """1 / x to the last bits: the hardware's estimate and one step of Newton's method."""
    # It moved to the second in jax 0.12.
    find = getattr(pltpu, "reciprocal", None) or pl.reciprocal
    r = find(x, approx=True)
    return r * (2.0 - x * r)


def _window(ref: Any, lane: int, image: int, head: Head) -> jax.Array:
    """(rows, lanes) of the register in which a head lies, or of two, folded."""
    x = ref[image, :, pl.ds(lane + head.start, head.size)]
    if head.size <= LANES:
        return x
    return _select(partial(_inside, head.first, LANES), x[:, :LANES], x[:, LANES:])


def _only(head: Head, x: jax.Array) -> jax.Array:
    """``x`` (rows, lanes) with zeros where other heads lie."""
    if head.end - head.first == x.shape[1]:
        return x

    def own(shape: tuple[int, ...]) -> jax.Array:
        if head.end <= LANES:
            return _inside(head.first, head.end, shape)
        return ~_inside(head.end - LANES, head.first, shape)

    return _select(own, x, jnp.zeros_like(x))


def _select(where: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """``x`` (rows, lanes) where ``where(shape)`` is true, else ``y``."""
    if x.dtype != jnp.bfloat16 or len(x) % 2:
        return jnp.where(where(x.shape), x, y)
    # Pairs of rows as one word: some chips select among whole words only.
    a, b = (pltpu.bitcast(z, jnp.int32) for z in (x, y))
    return pltpu.bitcast(jnp.where(where(a.shape), a, b), x.dtype)


def _merge(tiles: dict[int, jax.Array], head: Head, x: jax.Array) -> None:
    """Puts the lanes of a head among those of its neighbours, by register."""
    for lane in range(head.start, head.start + head.size, LANES):
        at, tile = lane - head.start, x
        if lane in tiles:
            own = _inside(head.first - at, head.end - at, x.shape)
            tile = jnp.where(own, x, tiles[lane])
        tiles[lane] = tile


def _inside(first: int, end: int, shape: tuple[int, ...]) -> jax.Array:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (first <= lane) & (lane < end)


def _that_exist(kernel: Kernel, x: jax.Array, tokens: int) -> jax.Array:
    """Rows ``x`` of this step, zeros beyond the last token."""
    if tokens % kernel.queries == 0:
        return x
    left = tokens - pl.program_id(2) * kernel.queries
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < left, x, jnp.zeros_like(x))
