# SPDX-License-Identifier: Apache-2.0
"""Preprocessing inside a compiled program: uint8 images of any size -> what the model
takes.

The operations are those of ``weights/preprocessing.py``, which works on one image on the
host; a test holds the two together. Here the size of the images may be a symbol, so that
an exported program takes any. B images, H and W their height and width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vit_jax.config import choose
from vit_jax.errors import UserError

# Of an image: a number, or a symbol of jax.export.
Length = Any


class _Axis(NamedTuple):
    """What is seen of the rows or columns of an image: ``seen`` from ``first`` on, once
    they are resized to ``new``. What the size of an image decides is traced."""

    length: Length  # of the image
    new: Any
    first: Any = 0
    seen: int = 0  # 0: all of them, as many as only the image decides
    resized: bool = False

    @property
    def old(self) -> jax.Array:
        return jnp.asarray(self.length, jnp.int32)


def prepare(
    images: jax.Array, transforms: Sequence[Mapping[str, Any]], size: tuple[int, int]
) -> jax.Array:
    """uint8 (B, H, W, C) -> float32 (B, *size, C) in [-1, 1].

    Raises:
      UserError: an operation that a program cannot have, or operations that do not lead
        to images of ``size``.
    """
    axes = [_Axis(n, jnp.asarray(n, jnp.int32)) for n in images.shape[1:3]]
    method, antialias = "bilinear", False
    for transform in transforms:
        name = transform["op"]
        op = choose("preprocessing operation", name, _OPS)
        if op is not _central_crop:
            if axes[0].resized:
                raise UserError(f"{_cannot(transforms)} resizes twice")
            method = transform.get("method", _METHODS[name])
            antialias = transform.get("antialias", False)
        axes = op(axes, size, transform.get("size"))
    if tuple(axis.seen for axis in axes) != size:
        raise UserError(f"{_cannot(transforms)} does not end with images of {size}")
    exact = jax.lax.Precision.HIGHEST
    rows, columns = (_weights(axis, method, antialias) for axis in axes)
    x = jnp.einsum("ih,bhwc->biwc", rows, images.astype(jnp.float32), precision=exact)
    x = jnp.einsum("jw,biwc->bijc", columns, x, precision=exact)
    return jnp.rint(x).clip(0, 255) / 127.5 - 1.0


def _cannot(transforms: Any) -> str:
    return f"preprocessing cannot be part of the program: {list(transforms)}"


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _resize(axes: list[_Axis], wanted: tuple[int, int], size: Any) -> list[_Axis]:
    sides = zip(axes, _pair(size) if size else wanted, strict=True)
    return [_Axis(a.length, n, 0, n, True) for a, n in sides]


def _resize_small(axes: list[_Axis], wanted: tuple[int, int], size: Any) -> list[_Axis]:
    side = size or min(wanted)
    shorter = jnp.minimum(axes[0].old, axes[1].old)
    factor = jnp.float32(side) / shorter.astype(jnp.float32)
    grown = [jnp.rint(a.old.astype(jnp.float32) * factor) for a in axes]
    new = [jnp.maximum(side, n.astype(jnp.int32)) for n in grown]
    return [_Axis(a.length, n, 0, 0, True) for a, n in zip(axes, new, strict=True)]


def _central_crop(axes: list[_Axis], wanted: tuple[int, int], size: Any) -> list[_Axis]:
    sides = zip(axes, _pair(size) if size else wanted, strict=True)
    return [
        a._replace(first=a.first + ((a.seen or a.new) - n) // 2, seen=n)
        for a, n in sides
    ]


_OPS = {"resize": _resize, "resize_small": _resize_small, "central_crop": _central_crop}
_METHODS = {"resize": "bilinear", "resize_small": "area"}


def _weights(axis: _Axis, method: str, antialias: bool) -> jax.Array:
    """(seen, length): how much of each row of the image is in each one that is seen.

    Positions are whole numbers of 1 / (2 new) rows, so that none is rounded.
    """
    old, new = axis.old, jnp.asarray(axis.new, jnp.int32)
    source = jnp.arange(axis.length, dtype=jnp.int32)[None, :]
    target = jnp.arange(axis.seen, dtype=jnp.int32)[:, None] + axis.first
    if method == "nearest":
        index = jnp.minimum((2 * target + 1) * old // (2 * new), old - 1)
        return (source == index).astype(jnp.float32)
    if method == "area":
        low = jnp.maximum(source * new, target * old)
        high = jnp.minimum((source + 1) * new, (target + 1) * old)
        weights = jnp.maximum(high - low, 0).astype(jnp.float32)
    else:
        kernel = choose("resize method", method, _KERNELS)
        distance = ((2 * source + 1) * new - (2 * target + 1) * old).astype(jnp.float32)
        width = jnp.maximum(old, new) if antialias else new
        weights = kernel(distance / (2 * width).astype(jnp.float32))
    return weights / weights.sum(axis=1, keepdims=True)


def _triangle(x: jax.Array) -> jax.Array:
    return jnp.maximum(0.0, 1 - jnp.abs(x))


def _cubic(x: jax.Array) -> jax.Array:
    """Keys' kernel with a = -0.5."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


_KERNELS = {"bilinear": _triangle, "bicubic": _cubic}
