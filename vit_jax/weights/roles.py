# SPDX-License-Identifier: Apache-2.0
"""From the arrays of a torch file to the parameters of ours, and back.

Every torch ViT is made of the same parts. A *role* is one of them, for example the query
projection: which parameters of ours it holds, and how the axes differ (spec 3.7). A family
only says what its file calls each role (``families.py``); reading and writing follow the
same table, so they are inverse by construction.

A name of a family is a module (its arrays are ``NAME.weight`` and ``NAME.bias``; a name
that ends in "_" takes no dot) or a single array. ``{i}`` is the number of the block.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vit_jax.errors import UserError
from vit_jax.weights.contents import Array
from vit_jax.weights.layout import POSITIONS

Names = Mapping[str, str]  # role -> name in the file
Written = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]  # name, shape, values


class Kind(NamedTuple):
    """How the axes differ. k: heads, of size D_h; D: width of what a layer reads."""

    rank: int  # axes of the torch array; 0: any number
    shape: Callable[[tuple[int, ...], int], tuple[int, ...]]  # of torch's and k -> ours
    to_torch: Callable[[np.ndarray], np.ndarray]


def _flat_conv(s: tuple[int, ...], k: int) -> tuple[int, ...]:
    channels = 3 if math.isqrt(s[1] // 3) ** 2 * 3 == s[1] else 1
    side = math.isqrt(s[1] // channels)
    return (side, side, channels, s[0])


# All reorder axes and then reshape; the way back follows from ``shape``.
KINDS = {
    "same": Kind(0, lambda s, k: s, lambda x: x),
    "vector": Kind(1, lambda s, k: (1, 1, *s), lambda x: x[0, 0]),
    "rows": Kind(2, lambda s, k: (1, *s), lambda x: x[0]),
    "dense": Kind(2, lambda s, k: s[::-1], lambda x: x.T),
    "conv": Kind(
        4,
        lambda s, k: (s[2], s[3], s[1], s[0]),
        lambda x: x.transpose(3, 2, 0, 1),
    ),
    # A convolution as a matrix of (D, P P C), pixels row by row, channels last.
    "flat_conv": Kind(2, _flat_conv, lambda x: x.reshape(-1, x.shape[-1]).T),
    "heads_in": Kind(  # (k D_h, D) <-> (D, k, D_h)
        2,
        lambda s, k: (s[1], k, s[0] // k),
        lambda x: x.reshape(x.shape[0], -1).T,
    ),
    "heads_bias": Kind(  # (k D_h,) <-> (k, D_h)
        1, lambda s, k: (k, s[0] // k), lambda x: x.reshape(-1)
    ),
    "heads_out": Kind(  # (D, k D_h) <-> (k, D_h, D)
        2,
        lambda s, k: (k, s[1] // k, s[0]),
        lambda x: x.reshape(-1, x.shape[-1]).T,
    ),
}


def _from_torch(kind: str, x: np.ndarray, k: int) -> np.ndarray:
    shape = KINDS[kind].shape(x.shape, k)
    if kind == "conv":
        x = x.transpose(2, 3, 1, 0)
    elif kind in ("dense", "flat_conv", "heads_in", "heads_out"):
        x = x.T
    # A copy in our order of axes: later use would pay for the strides every time.
    return np.ascontiguousarray(x.reshape(shape))


def only_attention(width: int, heads: int) -> dict[str, np.ndarray]:
    """What our attention pooling has beside AIMv2's, which asks with the probe itself and
    ends with the attention: arrays that change nothing."""
    eye, mlp = np.eye(width, dtype=np.float32), "MAPHead_0/MlpBlock_0/Dense_"
    zeros = lambda *shape: np.zeros(shape, np.float32)
    return {
        f"{_POOL_QKV[0]}/kernel": eye.reshape(width, heads, -1),
        f"{_POOL_QKV[0]}/bias": zeros(heads, width // heads),
        "MAPHead_0/LayerNorm_0/scale": np.ones(width, np.float32),
        **{f"{mlp}0/kernel": zeros(width, 1), f"{mlp}0/bias": zeros(1)},
        **{f"{mlp}1/kernel": zeros(1, width), f"{mlp}1/bias": zeros(width)},
    }


class Sizes(NamedTuple):
    """What the names and shapes in a torch file depend on."""

    depth: int
    width: int
    heads: int
    pool_heads: int = 0  # of attention pooling
    stages: tuple[int, ...] | None = None  # units of a ResNet stem; None: no stem


class Part(NamedTuple):
    """One torch array: the parameters of ours that it joins along its axis 0."""

    ours: tuple[str, ...]
    kind: str


def _layer(*ours: str, kind: str = "dense", bias: str = "same") -> tuple[Part, Part]:
    kernels, biases = (tuple(f"{m}/{x}" for m in ours) for x in ("kernel", "bias"))
    return Part(kernels, kind), Part(biases, bias)


def _norm(ours: str, kind: str = "same") -> tuple[Part, Part]:
    return Part((f"{ours}/scale",), kind), Part((f"{ours}/bias",), kind)


def _array(ours: str, kind: str = "same") -> tuple[Part]:
    return (Part((ours,), kind),)


_BLOCK = "Transformer/encoderblock_{i}"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_1"
_QKV = tuple(f"{_ATTENTION}/{x}" for x in ("query", "key", "value"))
_MLP = f"{_BLOCK}/MlpBlock_3"
_POOL = "MAPHead_0/MultiHeadDotProductAttention_0"
_POOL_QKV = tuple(f"{_POOL}/{x}" for x in ("query", "key", "value"))
_IN = dict(kind="heads_in", bias="heads_bias")
_OUT = dict(kind="heads_out")

ROLES: dict[str, tuple[Part, ...]] = {
    "cls": _array("cls"),
    "dist": _array("dist"),
    "registers": _array("registers"),
    "positions": _array(POSITIONS),
    "patch": _layer("embedding", kind="conv"),
    "patch_norm": _norm("embedding_norm"),
    "norm_pre": _norm("Transformer/norm_pre"),
    "norm1": _norm(f"{_BLOCK}/LayerNorm_0"),
    "qkv": _layer(*_QKV, **_IN),
    "q": _layer(_QKV[0], **_IN),
    "k": _layer(_QKV[1], **_IN),
    "v": _layer(_QKV[2], **_IN),
    "q_bias": _array(f"{_QKV[0]}/bias", "heads_bias"),
    "k_bias": _array(f"{_QKV[1]}/bias", "heads_bias"),
    "v_bias": _array(f"{_QKV[2]}/bias", "heads_bias"),
    "q_norm": _norm(f"{_ATTENTION}/query_norm"),
    "k_norm": _norm(f"{_ATTENTION}/key_norm"),
    "relative": _array(f"{_ATTENTION}/posembed_bias/pos_embedding"),
    "attention_norm": _norm(f"{_ATTENTION}/norm", "heads_bias"),
    "out": _layer(f"{_ATTENTION}/out", **_OUT),
    "norm2": _norm(f"{_BLOCK}/LayerNorm_2"),
    "gate_up": _layer(f"{_MLP}/gate", f"{_MLP}/Dense_0"),
    "gate": _layer(f"{_MLP}/gate"),
    "up": _layer(f"{_MLP}/Dense_0"),
    "up_bias": _array(f"{_MLP}/Dense_0/bias"),
    # Of parallel blocks: up, query, key and value, of which the first is another size.
    "up_qkv": _layer(f"{_MLP}/Dense_0", *_QKV, kind="up_qkv", bias="up_qkv"),
    "mlp_norm": _norm(f"{_MLP}/norm"),
    "down": _layer(f"{_MLP}/Dense_1"),
    "norm": _norm("Transformer/encoder_norm"),
    "fc_norm": _norm("fc_norm"),
    "probe": _array("MAPHead_0/probe"),
    "pool_qkv": _layer(*_POOL_QKV, **_IN),
    "pool_q": _layer(_POOL_QKV[0], **_IN),
    "pool_k": _layer(_POOL_QKV[1], **_IN),
    "pool_v": _layer(_POOL_QKV[2], **_IN),
    "pool_kv": _layer(*_POOL_QKV[1:], **_IN),
    "pool_out": _layer(f"{_POOL}/out", **_OUT),
    "pool_norm": _norm("MAPHead_0/LayerNorm_0"),
    "pool_up": _layer("MAPHead_0/MlpBlock_0/Dense_0"),
    "pool_down": _layer("MAPHead_0/MlpBlock_0/Dense_1"),
    "pre_logits": _layer("pre_logits"),
    "head": _layer("head"),
    "head_dist": _layer("head_dist"),
    "projection": _array("head/kernel"),  # (D, E), without a bias (CLIP)
}

# These multiply what others hold and are folded into it: LayerScale the outputs of a
# branch, DINOv3's mask the biases of the projections, whose keys it zeroes.
FOLDED = {
    "scale1": tuple(
        Part((f"{_ATTENTION}/out/{x}",), "same") for x in ("kernel", "bias")
    ),
    "scale2": tuple(Part((f"{_MLP}/Dense_1/{x}",), "same") for x in ("kernel", "bias")),
    "bias_mask": (Part(tuple(f"{x}/bias" for x in _QKV), "heads_bias"),),
}
FOLDED["scale"] = FOLDED["scale1"] + FOLDED["scale2"]  # of parallel blocks


def templates(
    names: Names, stages: tuple[int, ...] | None = None
) -> Iterator[tuple[str, str, Part]]:
    """(role, name of the array in the file, what it holds) of each array of ``names``.

    ``stages``: units of the stages of a ResNet stem, as timm names them; None: no stem.
    """
    for role, name in names.items():
        if role in ROLES:
            yield from _arrays(role, name, ROLES[role])
    if stages is not None:
        backbone = names["patch"].replace("proj", "backbone")
        for name, parts in _stem(backbone, stages):
            yield from _arrays("", name, parts)


def _arrays(
    role: str, name: str, parts: tuple[Part, ...]
) -> Iterator[tuple[str, str, Part]]:
    if len(parts) == 1:
        yield role, name, parts[0]
        return
    for part, leaf in zip(parts, ("weight", "bias"), strict=True):
        yield role, f"{name}{leaf if name.endswith('_') else '.' + leaf}", part


def _stem(
    backbone: str, stages: tuple[int, ...]
) -> Iterator[tuple[str, tuple[Part, ...]]]:
    root = f"{backbone}.stem" if stages else backbone  # timm's root-only stem is flat
    yield f"{root}.conv.weight", _array("conv_root/kernel", "conv")
    yield f"{root}.norm", _norm("gn_root")
    for i, units in enumerate(stages):
        for j in range(units):
            theirs = f"{backbone}.stages.{i}.blocks.{j}"
            ours = f"block{i + 1}/unit{j + 1}"
            for n in ("1", "2", "3"):
                yield (
                    f"{theirs}.conv{n}.weight",
                    _array(f"{ours}/conv{n}/kernel", "conv"),
                )
                yield f"{theirs}.norm{n}", _norm(f"{ours}/gn{n}")
            if j == 0:
                down = f"{theirs}.downsample"
                yield f"{down}.conv.weight", _array(f"{ours}/conv_proj/kernel", "conv")
                yield f"{down}.norm", _norm(f"{ours}/gn_proj")


def read(
    arrays: dict[str, Array],
    names: Names,
    kinds: Mapping[str, str],
    sizes: Sizes,
    where: str,
) -> tuple[dict[str, Array], list[str]]:
    """Arrays under our names, and the templates of the names that were found.

    What was read is taken out of ``arrays``; the rest stays there.

    Args:
      arrays: by the names in the file.
      names: of the family.
      kinds: of roles that the family stores in another form.
      sizes: what the names and shapes depend on.

    Raises:
      UserError: an array whose shape does not fit its role.
    """
    depth, heads = sizes.depth, sizes.heads
    result: dict[str, Array] = {}
    found = []
    for role, template, part in templates(names, sizes.stages):
        k = sizes.pool_heads if role.startswith("pool_") else heads
        kind = _kind(role, part, kinds)
        used = set()
        # What is written once may be of every block.
        for i in range(depth if "{i}" in template + part.ours[0] else 1):
            name = template.replace("{i}", str(i))
            if array := arrays.get(name):
                used.add(name)
                ours = tuple(name.replace("{i}", str(i)) for name in part.ours)
                result |= _split(array, ours, kind, k, sizes.width, where)
        found += [template] * bool(used)
        for name in used:
            del arrays[name]
    if "mask" in names and arrays.pop(names["mask"], None):
        found.append(names["mask"])
    for role in FOLDED.keys() & names.keys():
        for i in range(depth):
            if array := arrays.pop(names[role].replace("{i}", str(i)), None):
                for part in FOLDED[role]:
                    ours = tuple(name.replace("{i}", str(i)) for name in part.ours)
                    _fold(result, array, Part(ours, part.kind), where)
                found += [names[role]] * (names[role] not in found)
    return result, found


def _kind(role: str, part: Part, kinds: Mapping[str, str]) -> str:
    """``kinds`` speaks of a role's first array, its weight."""
    return kinds.get(role, part.kind) if part is ROLES.get(role, [0])[0] else part.kind


def _split(
    array: Array, ours: tuple[str, ...], kind: str, k: int, width: int, where: str
) -> dict[str, Array]:
    """The arrays of ours that one torch array holds."""
    shape, count = array.shape, len(ours)
    each = [kind] * count
    first = shape[0] // count if shape else 0
    if kind == "up_qkv":
        each = ["dense", *["heads_in"] * 3]
        if len(shape) == 1:
            each = ["same", *["heads_bias"] * 3]
        first = shape[0] - 3 * width if shape else 0
    rest = (shape[0] - first) // max(count - 1, 1) if shape else 0
    ends = [first + j * rest for j in range(count)]
    through = (
        shape[-1] if kind == "heads_out" and shape else rest if count > 1 else first
    )
    rank = KINDS[each[-1]].rank
    if not shape or (rank and len(shape) != rank) or first < 1 or ends[-1] != shape[0]:
        raise UserError(
            f"{where}: {array.name} has shape {shape}: it must have "
            f"{rank or 'some'} axes, the first for {count} equal parts"
        )
    if kind.startswith(("heads", "up_qkv")) and through % k:
        raise UserError(f"{where}: heads={k} does not divide {array.name} {shape}")
    read = _shared(array, count)
    result = {}
    for name, begin, end, kind in zip(ours, [0, *ends], ends, each, strict=False):
        part = (end - begin, *shape[1:])
        values = lambda b=begin, e=end, kind=kind: _from_torch(kind, read()[b:e], k)
        result[name] = Array(array.name, KINDS[kind].shape(part, k), values)
    return result


def _shared(array: Array, uses: int) -> Callable[[], np.ndarray]:
    """``array.read`` that reads once for so many uses in a row, then lets go."""
    kept: list[np.ndarray] = []
    left = [uses]

    def read() -> np.ndarray:
        values = kept[0] if kept else array.read()
        left[0] -= 1
        kept[:] = [values] if left[0] > 0 else []
        if left[0] <= 0:
            left[0] = uses
        return values

    return read if uses > 1 else array.read


def _fold(result: dict[str, Array], array: Array, part: Part, where: str) -> None:
    """Multiplies what ``part`` names by ``array``, along the last axis."""
    count = len(part.ours)
    for j, name in enumerate(part.ours):
        if name not in result:
            continue
        old = result[name]
        size = array.shape[0] // count if len(array.shape) == 1 else 0
        if size != (old.shape[-1] if part.kind == "same" else math.prod(old.shape)):
            raise UserError(
                f"{where}: {array.name} has shape {array.shape}, which does not fit "
                f"{old.name} {old.shape}"
            )

        def scaled(
            x: np.ndarray, j: int = j, size: int = size, old: Array = old
        ) -> np.ndarray:
            factor = array.read()[j * size : (j + 1) * size]
            return x * (factor if part.kind == "same" else factor.reshape(old.shape))

        result[name] = old.map(old.shape, scaled)


def write(
    flat: Mapping[str, np.ndarray],
    names: Names,
    kinds: Mapping[str, str],
    sizes: Sizes,
    present: frozenset[str],
) -> tuple[list[Written], list[str]]:
    """(name, shape, values) of each array of a file, and our arrays without a place.

    Args:
      flat: our parameters by name.
      names: of the family; of two roles that hold the same, the first is written.
      kinds: as in :func:`read`.
      sizes: depth and stages of the model.
      present: templates of the names that the file should have, where they matter:
        LayerScale is written as ones, a token of masked modelling as zeros, and
        biases of zeros are left out.
    """
    left = dict(flat)
    depth = sizes.depth
    result: list[Written] = []
    every = templates(names, sizes.stages)
    wanted = [(t in present, role, t, part) for role, t, part in every]
    for known in (True, False):
        for is_known, role, template, part in wanted:
            if is_known != known:
                continue
            kind = _kind(role, part, kinds)
            for i in range(depth if "{i}" in template else 1):
                ours = [name.replace("{i}", str(i)) for name in part.ours]
                if not set(ours) <= left.keys():
                    continue
                values = [left[name] for name in ours]
                zeros = template.endswith("bias") and not any(map(np.any, values))
                if zeros and present and not known:
                    continue
                result.append(_join(template.replace("{i}", str(i)), values, kind))
                for name in ours:
                    del left[name]
    width = flat["embedding/kernel"].shape[-1]
    for role in ("scale1", "scale2", "scale"):
        if names.get(role) in present:
            ones = lambda: np.ones(width, np.float32)
            scale = [names[role].replace("{i}", str(i)) for i in range(depth)]
            result += [(name, (width,), ones) for name in scale]
    if names.get("mask", "") in present:
        mask = (1, width) if kinds.get("mask") == "matrix" else (1, 1, width)
        result.append((names["mask"], mask, lambda: np.zeros(mask, np.float32)))
    homeless = [k for k, v in left.items() if not k.endswith("bias") or np.any(v)]
    return result, homeless


def _join(name: str, ours: list[np.ndarray], kind: str) -> Written:
    kinds = [kind] * len(ours)
    if kind == "up_qkv":
        matrix = ours[0].ndim == 2
        kinds = (["dense"] if matrix else ["same"]) + (
            ["heads_in" if matrix else "heads_bias"] * 3
        )

    def values() -> np.ndarray:
        parts = [
            KINDS[kind].to_torch(np.asarray(x))
            for x, kind in zip(ours, kinds, strict=True)
        ]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    views = [np.broadcast_to(np.float32(0), x.shape) for x in ours]
    shapes = [
        KINDS[kind].to_torch(x).shape for x, kind in zip(views, kinds, strict=True)
    ]
    return name, (sum(s[0] for s in shapes), *shapes[0][1:]), values
