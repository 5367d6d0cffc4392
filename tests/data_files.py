# SPDX-License-Identifier: Apache-2.0
"""Small image files and folders for the data tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 24, width: int = 32) -> Image.Image:
    """Smooth colours, so that JPEG keeps them nearly as they are."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    if format == "JPEG":
        options = {"quality": 95} | options
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_folder(root: Path, classes: dict[str, int], splits=("",)) -> Path:
    """``root/split/class/i.jpg``; every image is another one."""
    number = 0
    for split in splits:
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                number += 1
                (folder / f"{i:03d}.jpg").write_bytes(encoded(picture(number)))
    return root


def take(batches, count):
    return [b for _, b in zip(range(count), batches, strict=False)]
