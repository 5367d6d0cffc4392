# SPDX-License-Identifier: Apache-2.0
"""From the spellings of three code generations to the names of the released files.

The names this code base uses are the original ones (``LayerNorm_0``,
``MultiHeadDotProductAttention_1``, ``LayerNorm_2``, ``MlpBlock_3``: one running counter
per block). Later code counts per kind (``LayerNorm_1``, ``MlpBlock_0``); big_vision
moved the position table, once kept the attention-pooling head inline, stores optimizer
state next to the parameters, or stacks the blocks for ``scan`` (spec 3.2, 3.3, 3.5).
"""

import re

import numpy as np

from vit_jax.errors import UserError
from vit_jax.weights.contents import Array
from vit_jax.weights.report import Report

POSITIONS = "Transformer/posembed_input/pos_embedding"
STACKED = "Transformer/encoderblock/"

# Where the parameters may be, in the order in which the places are tried. The first
# four are those of released npz files, the others of Flax and Orbax checkpoints.
PREFIXES = (
    "",
    "params/",
    "opt/target/",
    "params/img/",
    "img/",
    "target/",
    "target/params/",
    "optimizer/target/",
    "optimizer/target/params/",
    "opt/target/params/",
    "0/",
    "0/params/",
    "params/params/",
    "state/params/",
    "model/",
)
_ANCHORS = ("embedding/kernel", "conv_root/kernel")

_POSITION_ALIASES = ("pos_embedding", "Transformer/pos_embedding")
_INLINE_MAP = (
    "probe",
    "MlpBlock_0/",
    "MultiHeadDotProductAttention_0/",
    "LayerNorm_0/",
)
_BLOCK = re.compile(r"Transformer/encoderblock(?:_\d+)?/")
_LINEN = {
    "LayerNorm_0": "LayerNorm_0",
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
_MAP_KINDS = {"MultiHeadDotProductAttention", "MlpBlock", "LayerNorm"}


def canonical(arrays: dict[str, Array], tree: str, report: Report) -> dict[str, Array]:
    """The parameters among ``arrays`` under the names of the released files.

    Args:
      arrays: by the names in the file.
      tree: which subtree to read, as in ``file.npz:img``; "": found.
      report: told what was renamed and ignored.

    Raises:
      UserError: no Vision Transformer is in there.
    """
    prefix = _find_prefix(arrays, tree, report.where)
    inside = {
        k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
    }
    outside = [k for k in arrays if not k.startswith(prefix)]
    if outside:
        kinds = sorted({k.split("/")[0] for k in outside})
        report.change(
            f"ignored: {len(outside)} arrays outside {prefix!r} (under {kinds}), such as "
            f"optimizer state"
        )
    names = rename(list(inside))
    result = {}
    for old, new in names.items():
        report.rename(prefix + old, new)
        array = inside[old]
        if re.search(r"(^|/)gn(_root|_proj|\d+)/(scale|bias)$", new):
            array = _squeeze(array)
        if new in result:
            report.problem(f"{result[new].name} and {array.name} are both {new}")
        result[new] = array
    return _unstack(result, report)


def rename(names: list[str]) -> dict[str, str]:
    """``{name in the file: released name}``; idempotent on released names."""
    new = {n: n for n in names}
    for alias in _POSITION_ALIASES:
        if alias in new and POSITIONS not in new:
            new[alias] = POSITIONS
    if "probe" in new:
        for name in names:
            if name.startswith(_INLINE_MAP):
                new[name] = f"MAPHead_0/{name}"
    blocks: dict[str, set[str]] = {}
    for name in names:
        if match := _BLOCK.match(name):
            child = name[match.end() :].split("/")[0]
            blocks.setdefault(match.group(), set()).add(child)
    for block, children in blocks.items():
        # Counting anew would also close the gap that a missing array left, so a block
        # is renamed only if it is in the later scheme as a whole.
        if children <= _LINEN.keys():
            for name in names:
                if name.startswith(block):
                    child, slash, rest = name[len(block) :].partition("/")
                    new[name] = f"{block}{_LINEN[child]}{slash}{rest}"
    for name in names:
        if match := re.match(r"MAPHead(?:_\d+)?/(\w+?)(?:_\d+)?/(.*)", new[name]):
            if match[1] in _MAP_KINDS:
                new[name] = f"MAPHead_0/{match[1]}_0/{match[2]}"
        elif re.match(r"MAPHead(?:_\d+)?/probe$", new[name]):
            new[name] = "MAPHead_0/probe"
    return new


def _find_prefix(arrays: dict[str, Array], tree: str, where: str) -> str:
    if tree:
        tree = tree.strip("/")
        prefixes: tuple[str, ...] = (f"params/{tree}/", f"{tree}/")
    else:
        prefixes = PREFIXES
    for prefix in prefixes:
        if any(prefix + anchor in arrays for anchor in _ANCHORS):
            return prefix
    found = [k.removesuffix(a) for a in _ANCHORS for k in arrays if k.endswith("/" + a)]
    hint = (
        f"; arrays of a model are under {sorted(set(found))}: name one as "
        f"'{where}:{found[0].strip('/').removeprefix('params/')}'"
        if found
        else ""
    )
    if any("norm-pre-head" in k or "/unit01/" in k for k in arrays):
        hint = "; it looks like a BiT ResNet-v2, which is another network"
    raise UserError(
        f"{where} holds no Vision Transformer"
        + (f" under {tree!r}" if tree else "")
        + f": neither {' nor '.join(map(repr, _ANCHORS))} is among its {len(arrays)} "
        f"arrays {sorted(arrays)[:4]}{hint}"
    )


def _squeeze(array: Array) -> Array:
    """GroupNorm vectors (1, 1, 1, C), as the first releases store them, to (C,)."""
    shape = array.shape
    if len(shape) == 4 and shape[:3] == (1, 1, 1):
        return array.reshape(shape[3])
    return array


def _unstack(arrays: dict[str, Array], report: Report) -> dict[str, Array]:
    """Blocks stacked along axis 0 become blocks of their own: views, no copies."""
    result = {}
    for name, array in arrays.items():
        if not name.startswith(STACKED):
            result[name] = array
            continue
        if not array.shape:
            report.problem(f"{array.name} is stacked but has no axis of layers")
            continue
        read = _once(array)
        for i in range(array.shape[0]):
            inner = name.removeprefix(STACKED)
            result[f"Transformer/encoderblock_{i}/{inner}"] = Array(
                f"{array.name}[{i}]", array.shape[1:], lambda i=i, read=read: read()[i]
            )
    return result


def _once(array: Array):
    values: list[np.ndarray] = []

    def read() -> np.ndarray:
        if not values:
            values.append(array.read())
        return values[0]

    return read
