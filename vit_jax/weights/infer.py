# SPDX-License-Identifier: Apache-2.0
"""The whole architecture, read off the shapes of the arrays."""

import dataclasses
import re
from typing import Any

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.weights.contents import Array, count_up
from vit_jax.weights.layout import POSITIONS
from vit_jax.weights.report import Report

_LARGEST = 1 << 15  # side of an image that a file may state
_BLOCK = "Transformer/encoderblock_0"
_QUERY = f"{_BLOCK}/MultiHeadDotProductAttention_1/query/kernel"


def infer(
    arrays: dict[str, Array],
    known: dict[str, Any],
    image_size: tuple[int, int],
    report: Report,
) -> ModelConfig:
    """The ModelConfig that ``arrays`` were trained with.

    Args:
      arrays: under the released names.
      known: ModelConfig fields that the file's metadata or the caller states, for
        example the GELU, which no array shows.
      image_size: the caller's, used where the arrays show no size and a position table
        is no square; (0, 0): none.
      report: told what had to be assumed and what cannot be.
    """
    fields = _resnet(arrays, report)
    stem = arrays.get("conv_root/kernel") or arrays.get("embedding/kernel")
    if stem is None or len(stem.shape) != 4:
        what = f"{stem.name} has shape {stem.shape}" if stem else "no embedding/kernel"
        raise UserError(f"{report.where} is no Vision Transformer: {what}")
    fields["channels"] = stem.shape[2]
    head = arrays.get("head/kernel")
    fields["num_classes"] = head.shape[-1] if head and head.shape else 0
    if "embedding/kernel" in arrays:
        fields |= _transformer(arrays, report)
        fields["pre_logits"] = "pre_logits/kernel" in arrays
    elif not fields.get("resnet"):
        raise UserError(f"{report.where} has a ResNet root but nothing that follows it")
    for key, shown in fields.items():
        # A guess is all there is to go by for the heads of some torch files.
        if key in known and known[key] != shown:
            report.problem(
                f"model.{key} is stated as {known[key]}, but the arrays show {shown}"
            )
    if "depth" in fields:
        fields["head"] = _head(arrays, known.get("head", ""))
        if known.get("head", fields["head"]) != fields["head"]:
            report.problem(
                f"model.head is stated as {known['head']!r}, but the arrays "
                f"{'with' if 'cls' in arrays else 'without'} a class token are those of "
                f"{fields['head']!r}"
            )
        fields |= _positions(arrays, known.get("positions", ""), report)
    stated = {k: v for k, v in known.items() if k not in fields and k != "name"}
    cfg = ModelConfig(**{"name": "", **fields, **stated})
    if cfg.image_size == (0, 0):
        size = _image_size(cfg, arrays, image_size, report)
        cfg = dataclasses.replace(cfg, image_size=size)
    if max(cfg.image_size) > _LARGEST:
        raise UserError(
            f"{report.where} states image_size={cfg.image_size}: at most {_LARGEST}"
        )
    return dataclasses.replace(cfg, name=name_of(cfg))


def class_row(cfg: ModelConfig, arrays: dict[str, Array]) -> bool:
    """Whether the stored position table begins with a row for the class token."""
    if POSITIONS not in arrays:
        return False
    rows, columns = variants.token_grid(cfg, cfg.image_size)
    return arrays[POSITIONS].shape[1] == rows * columns + 1


def name_of(cfg: ModelConfig) -> str:
    """The name in ``models/variants.py`` with these sizes, or "" if none has them."""
    if not cfg.depth:
        names = [f"{n}x{cfg.resnet_width}" for n in variants.RESNETS]
    else:
        row = (cfg.depth, cfg.width, cfg.mlp_dim, cfg.heads)
        sizes = [n for n, size in variants.SIZES.items() if tuple(size) == row]
        names = [f"ViT-{n}/{cfg.patch}" for n in sizes]
        if cfg.resnet_width:
            factor = f"x{cfg.resnet_width}" if cfg.resnet_width > 1 else ""
            names = [
                f"{stem}{factor}+ViT-{n}/{p}"
                for stem, p in variants.STEMS
                for n in sizes
            ]
    shown = ("resnet", "resnet_width", "depth", "width", "mlp_dim", "heads", "patch")
    for name in names:
        full = variants.resolve(ModelConfig(name=name))
        if all(
            getattr(full, f) == getattr(cfg, f)
            for f in shown
            if f != "width" or cfg.depth
        ):
            return name
    return ""


def _resnet(arrays: dict[str, Array], report: Report) -> dict[str, Any]:
    root = arrays.get("conv_root/kernel")
    if root is None:
        return {}
    stages: dict[int, set[int]] = {}
    for name in arrays:
        if match := re.match(r"block(\d{1,9})/unit(\d{1,9})/", name):
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    where = f"{report.where}: block"
    blocks = range(1, 1 + count_up(stages, 1, where))
    resnet = tuple(count_up(stages[i], 1, f"{where}{i}/unit") for i in blocks)
    width = root.shape[-1]
    if width % 64:
        report.problem(f"{root.name} has {width} channels, not a multiple of 64")
    return {
        "resnet": resnet,
        "resnet_width": max(1, width // 64),
    }


def _transformer(arrays: dict[str, Array], report: Report) -> dict[str, Any]:
    embedding = arrays["embedding/kernel"]
    if len(embedding.shape) != 4 or embedding.shape[0] != embedding.shape[1]:
        raise UserError(
            f"{report.where}: {embedding.name} has shape {embedding.shape}: it must be "
            "(P, P, channels, width) with square patches"
        )
    block = re.compile(r"Transformer/encoderblock_(\d{1,9})/")
    numbers = (int(m[1]) for name in arrays if (m := block.match(name)))
    depth = count_up(numbers, 0, f"{report.where}: Transformer/encoderblock_")
    query = arrays.get(_QUERY)
    mlp = f"{_BLOCK}/MlpBlock_3/Dense_0/kernel"
    for name in (_QUERY, mlp):
        if name not in arrays:
            raise UserError(
                f"{report.where} holds no Vision Transformer that this code knows: "
                f"{name} is missing; the first of its {len(arrays)} arrays are "
                f"{sorted(arrays)[:6]}"
            )
    assert query is not None
    if len(query.shape) != 3 or len(arrays[mlp].shape) != 2:
        raise UserError(
            f"{report.where}: {query.name} has shape {query.shape} and {mlp} has shape "
            f"{arrays[mlp].shape}: they must be (width, heads, width / heads) and "
            "(width, mlp_dim)"
        )
    return {
        "width": embedding.shape[3],
        "depth": depth,
        "mlp_dim": arrays[mlp].shape[1],
        "heads": query.shape[1],
        "patch": embedding.shape[0],
    }


def _head(arrays: dict[str, Array], stated: str) -> str:
    """What reads the tokens; ``stated`` decides between heads without arrays."""
    if "MAPHead_0/probe" in arrays:
        return "map"
    if "cls" in arrays:
        possible = ("token", "masked_patch" if "mask_token" in arrays else "token")
        return stated if stated in possible else possible[-1]
    return stated if stated in ("gap", "none") else "gap"


def _positions(arrays: dict[str, Array], stated: str, report: Report) -> dict[str, Any]:
    names = "\n".join(arrays)
    every = f"{_BLOCK}/posembed_input/"
    fields: dict[str, Any] = {}
    if any(name.startswith(every) for name in arrays):
        fields["position_at"] = "every"
    if re.search(r"posembed_input/pos_embedding$", names, re.MULTILINE):
        fields["positions"] = "learned"
    elif "posembed_input/pos_embedding_x" in names:
        fields["positions"] = "learned2d"
    elif re.search(r"MultiHead\w+/\w+/pos_embedding$", names, re.MULTILINE):
        fields["positions"] = "relative"
    elif stated in ("sincos2d", "none"):
        fields["positions"] = stated
    else:
        width = arrays["embedding/kernel"].shape[3]
        fields["positions"] = "none" if width % 4 else "sincos2d"
        report.change(
            f"assumed: the file has no position table, so positions={fields['positions']!r}"
            " (fixed waves, as in the published files without a table); if it was trained "
            "without any, pass positions='none'"
            if not width % 4
            else "assumed: the file has no position table, so positions='none'"
        )
    return fields


def _image_size(
    cfg: ModelConfig,
    arrays: dict[str, Array],
    wanted: tuple[int, int],
    report: Report,
) -> tuple[int, int]:
    """(height, width) that the stored position table was made for."""
    unit = max(cfg.patch, 1)
    if cfg.resnet_width:
        unit *= 4 * 2 ** max(len(cfg.resnet) - 1, 0)
    for table in (POSITIONS, f"{_BLOCK}/posembed_input/pos_embedding"):
        y, x = arrays.get(f"{table}_y"), arrays.get(f"{table}_x")
        if y and x and len(y.shape) == len(x.shape) == 3:
            return y.shape[0] * unit, x.shape[1] * unit
    relative = rf"{_BLOCK}/MultiHead\w+/\w+/pos_embedding"
    names = [POSITIONS, f"{_BLOCK}/posembed_input/pos_embedding"]
    names += [name for name in arrays if re.fullmatch(relative, name)]
    name = next((name for name in names if name in arrays), "")
    if not name:
        if wanted == (0, 0) and cfg.depth:
            report.change(
                "assumed: no array shows the image size, so image_size=224; pass "
                "image_size= for another"
            )
        return wanted if wanted != (0, 0) else (224, 224)
    shape = arrays[name].shape
    if cfg.positions == "relative" and len(shape) == 2:
        shape = (1, (shape[0] + 1) // 2, shape[1])  # from offsets -(n - 1) to n - 1
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 1:
        report.problem(
            f"{arrays[name].name} has shape {shape}: it must be (1, n, width)"
        )
        return (unit, unit)
    n = shape[1]
    # Square wins, because the released files are: the images that the caller wants may
    # have as many patches by chance (24 x 24 and 18 x 32).
    for patches in (n - 1, n) if "cls" in arrays else (n, n - 1):
        side = int(patches**0.5)
        if patches and side * side == patches:
            return side * unit, side * unit
    if wanted != (0, 0):
        rows, columns = variants.token_grid(cfg, wanted)
        if n - rows * columns in (0, 1):
            return wanted
    report.problem(
        f"{arrays[name].name} has {n} rows, which is no square grid of patches: pass "
        "image_size=(height, width) of the images that the file was trained on"
    )
    return (unit, unit)
