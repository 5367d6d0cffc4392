# SPDX-License-Identifier: Apache-2.0
"""Images made for training: no larger than it needs them, upright and in sRGB.

Most of what a photograph costs is decoding pixels that a crop of 224 then throws away.
An image whose shorter side is above the wanted one becomes a JPEG of that side, once and
for all; docs/data.md has a table of what that costs in fidelity.
"""

import dataclasses
import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from vit_jax.data import image_files
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shrink:
    """``shorter_side`` in pixels and the JPEG ``quality``; 0 and 0: nothing is changed."""

    shorter_side: int = 0
    quality: int = 0

    def __post_init__(self) -> None:
        if self.shorter_side < 0:
            raise UserError(
                f"--shorter_side is {self.shorter_side}: it must be a number of pixels, "
                "or 0 to keep the images as they are"
            )
        if self.shorter_side and not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}: it must lie in [1, 100]")

    def __str__(self) -> str:
        if not self.shorter_side:
            return "as they are (no --shorter_side)"
        return f"with --shorter_side={self.shorter_side} --quality={self.quality}"

    def __call__(self, data: bytes, pixels: np.ndarray) -> bytes:
        """The file to train on in place of the file ``data``, which holds ``pixels``,
        uint8 (H, W, 3), upright.

        Nothing is enlarged: what is small enough comes back as it is, byte by byte,
        unless its colours are not those of sRGB, which readers take them for.
        """
        small = min(pixels.shape[:2]) <= self.shorter_side
        if not self.shorter_side:
            return data
        converted = _in_srgb(data, pixels)
        if small and converted is None:
            return data
        image = converted or Image.fromarray(pixels)
        if not small:
            image = image.resize(self._size(image), Image.Resampling.LANCZOS)
        # Chroma at half the resolution, as most photographs have it already.
        encoded = tf.io.encode_jpeg(
            np.asarray(image), quality=self.quality, optimize_size=True
        )
        return encoded.numpy()

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) with the wanted shorter side."""
        factor = self.shorter_side / min(image.size)
        width, height = (max(1, round(side * factor)) for side in image.size)
        return width, height


def _in_srgb(data: bytes, pixels: np.ndarray) -> Image.Image | None:
    """The upright image, converted; None where there is no profile, or none that differs
    from sRGB, or one that does not fit the pixels, which viewers ignore too."""
    try:
        with image_files.opened(io.BytesIO(data)) as image:
            profile = image.info.get("icc_profile")
            if not profile:
                return None
            mode = {"CMYK": "CMYK", "L": "L", "LA": "L", "1": "L"}.get(
                image.mode, "RGB"
            )
            mode = "L" if image.mode.startswith("I") else mode  # 16 bits
            transform = _transform(profile, mode)
            if transform is None:
                return None
            if mode == "CMYK":  # ``pixels`` are RGB already, by a rule of thumb
                turned = image_files.turns(image_files.header(data)[2])
                source = _turned(image, *turned)
            else:
                source = Image.fromarray(pixels[..., 0] if mode == "L" else pixels)
        return ImageCms.applyTransform(source, transform)
    except (ImageCms.PyCMSError, image_files.ImageFileError, OSError):
        return None


def _turned(image: Image.Image, transpose: bool, rows: bool, columns: bool) -> Any:
    """See ``image_files.turns``."""
    for wanted, method in (
        (transpose, Image.Transpose.TRANSPOSE),
        (rows, Image.Transpose.FLIP_TOP_BOTTOM),
        (columns, Image.Transpose.FLIP_LEFT_RIGHT),
    ):
        image = image.transpose(method) if wanted else image
    return image


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Any:
    """From the colours of an ICC profile to sRGB; None where they are sRGB."""
    found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "srgb" in ImageCms.getProfileDescription(found).lower():
        return None
    return ImageCms.buildTransform(found, _SRGB, mode, "RGB")


_SRGB = ImageCms.createProfile("sRGB")
