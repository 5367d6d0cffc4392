# SPDX-License-Identifier: Apache-2.0
"""Image file -> what the model takes, without tensorflow.

The operations and their defaults are those of ``data/transforms.py``; a test holds the
two within one grey level of each other on lossless files (JPEG decoders may differ by a
few).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vit_jax.config import choose
from vit_jax.data import image_files
from vit_jax.errors import UserError


def read_image(path: Path, channels: int = 3) -> np.ndarray:
    """uint8 (H, W, channels) of an image file, upright, as in training.

    Raises:
      UserError: missing, unreadable, too large or not an image.
    """
    if channels not in (1, 3):
        raise UserError(f"the model takes {channels} channels; image files have 1 or 3")
    with _opened(path) as file:
        return image_files.read(file.read(), channels)


def check_image(path: Path) -> None:
    """Raises: UserError: certainly no image; reads the header only."""
    with _opened(path) as file:
        image_files.check(file)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file; what is wrong with it becomes a UserError that names it."""
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: give image files, for example {path}/*.jpg"
        )
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as e:
        raise UserError(f"image {path} does not exist") from e
    except (OSError, image_files.ImageFileError) as e:
        raise UserError(f"image {path} cannot be read: {e}") from e


def prepare(
    image: np.ndarray, transforms: Sequence[dict[str, Any]], size: tuple[int, int]
) -> np.ndarray:
    """uint8 (H, W, C) -> float32 (*size, C) in [-1, 1], which every model takes.

    Raises:
      UserError: an operation that only training has, or images of another size at the
        end.
    """
    for options in _merged(transforms, size):
        op = options.pop("op", "")
        options.pop("exact", None)
        if op != "value_range":  # which is what happens anyway
            image = choose("preprocessing operation", op, _OPS)(image, size, **options)
    if image.shape[:2] != size:
        raise UserError(
            f"preprocessing {list(transforms)} ends with images of {image.shape[:2]}, but "
            f"the model takes {size}"
        )
    return image.astype(np.float32) / np.float32(127.5) - 1


def _merged(
    transforms: Sequence[dict[str, Any]], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """Copies; a crop right after a resize becomes part of it, so that only the pixels that
    remain are computed."""
    result: list[dict[str, Any]] = []
    for transform in transforms:
        before = result[-1] if result else {}
        if (
            transform.get("op") == "central_crop"
            and before.get("op") in ("resize", "resize_small")
            and "crop" not in before
        ):
            before["crop"] = transform.get("size") or size
        else:
            result.append(dict(transform))
    return result


def rescaled(
    transforms: Sequence[dict[str, Any]], old: tuple[int, int], new: tuple[int, int]
) -> tuple[dict[str, Any], ...]:
    """The operations for a model that takes images of another (height, width): sizes in
    pixels grow along, so that the same part of an image is seen.

    The last of them says which images they were written for; ``old`` counts where it
    says nothing."""
    last = transforms[-1] if transforms else {"op": ""}
    if last.get("size") and last["op"] != "resize_small":
        old = _pair(last["size"])
    y, x = new[0] / old[0], new[1] / old[1]
    result = []
    for transform in transforms:
        if (size := transform.get("size")) and old != new:
            if transform["op"] == "resize_small":  # its one side must cover both
                size = round(size * max(y, x))
            else:
                height, width = _pair(size)
                size = [round(height * y), round(width * x)]
            transform = {**transform, "size": size}
        result.append(transform)
    return tuple(result)


# Of the resized image, worked on at a time.
_ROWS = 32


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    method: str = "bilinear",
    antialias: bool = False,
    crop: Any = None,
) -> np.ndarray:
    """uint8 (H, W, C) -> uint8 (*size, C), as ``tf.image.resize`` rounds and clips it; of
    these pixels the central ``crop``, where given."""
    window = _central(size, crop or size)
    # Columns that no pixel of the window reads are left out before the rows are summed.
    (rows, row_weights), (columns, column_weights) = (
        tuple(x[part] for x in _taps(old, new, method, antialias))
        for old, new, part in zip(image.shape, size, window, strict=False)
    )
    first = columns.min()
    image = image[:, first : columns.max() + 1]
    result = np.empty((len(rows), len(columns), image.shape[2]), np.uint8)
    pixel = np.dtype((np.void, 4 * image.shape[2]))
    # A few rows at a time stay in the processor's cache, and in memory that is used again.
    for i in range(0, len(rows), _ROWS):
        part = _apply(image, rows[i : i + _ROWS], row_weights[i : i + _ROWS])
        # Whole rows of memory are gathered many times faster than pixels, which are
        # transposed faster whole than channel by channel.
        part = np.ascontiguousarray(part.view(pixel).swapaxes(0, 1)).view(np.float32)
        part = _apply(part, columns - first, column_weights).swapaxes(0, 1)
        result[i : i + _ROWS] = np.rint(part).clip(0, 255)
    return result


def _resize(
    image: np.ndarray, wanted: tuple[int, int], size: Any = None, **options: Any
) -> np.ndarray:
    return resize(image, _pair(size) if size else wanted, **options)


def _resize_small(
    image: np.ndarray, wanted: tuple[int, int], size: Any = None, method: str = "area",
    **options: Any,
) -> np.ndarray:  # fmt: skip
    side = size or min(wanted)
    factor = np.float32(side) / np.float32(min(image.shape[:2]))
    shape = [max(side, int(np.rint(np.float32(n) * factor))) for n in image.shape[:2]]
    return resize(image, (shape[0], shape[1]), method, **options)


def _central_crop(
    image: np.ndarray, wanted: tuple[int, int], size: Any = None
) -> np.ndarray:
    return image[_central(image.shape[:2], size or wanted)]


def _central(shape: tuple[int, ...], size: Any) -> tuple[slice, slice]:
    height, width = _pair(size)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    if top < 0 or left < 0:
        raise UserError(
            f"central_crop: the image of {shape} is smaller than {height, width}"
        )
    return slice(top, top + height), slice(left, left + width)


_OPS: dict[str, Callable[..., np.ndarray]] = {
    "resize": _resize,
    "resize_small": _resize_small,
    "central_crop": _central_crop,
}


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return (size, size)
    return (int(size[0]), int(size[1]))


def _apply(image: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over the taps of each row, float32; a loop over few taps is fastest."""
    result = np.zeros((len(taps), *image.shape[1:]), np.float32)
    for t in range(taps.shape[1]):
        part = np.take(image, taps[:, t], axis=0)
        result += np.multiply(part, weights[:, t, None, None], dtype=np.float32)
    return result


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(x))


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


_KERNELS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}


def _taps(
    old: int, new: int, method: str, antialias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(new, taps) indices into the old axis, and their weights, which sum to 1."""
    scale = old / new
    if method == "nearest":
        index = np.minimum(np.floor((np.arange(new) + 0.5) * scale), old - 1)
        return index[:, None].astype(np.int64), np.ones((new, 1), np.float32)
    if method == "area":
        low = np.arange(new) * scale
        first = np.floor(low).astype(np.int64)
        index = first[:, None] + np.arange(int(np.ceil(scale)) + 1)
        high = np.minimum(index + 1, (low + scale)[:, None])
        weights = np.maximum(0, high - np.maximum(index, low[:, None]))
    else:
        kernel, support = choose("resize method", method, _KERNELS)
        width = max(scale, 1.0) if antialias else 1.0
        centre = (np.arange(new) + 0.5) * scale
        first = np.floor(centre - support * width - 0.5).astype(np.int64)
        index = first[:, None] + np.arange(int(np.ceil(2 * support * width)) + 2)
        weights = kernel((index + 0.5 - centre[:, None]) / width)
    weights = np.where((index >= 0) & (index < old), weights, 0)
    weights /= weights.sum(axis=1, keepdims=True)
    used = weights.any(axis=0)
    return index[:, used].clip(0, old - 1), weights[:, used].astype(np.float32)
