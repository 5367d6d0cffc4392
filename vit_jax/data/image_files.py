# SPDX-License-Identifier: Apache-2.0
"""Image files without tensorflow: what a header says, and the pixels, by Pillow.

Prediction reads every file here. Training and evaluation ask here for what tensorflow's
decoders do not tell (the EXIF orientation) or get wrong (BMP, GIF, WebP), so that all
three see the same image.
"""

import io
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

# An image of more pixels is not decoded.
MAX_PIXELS = 2**27
# What decoding may take beside three times the file: JPEGs that would take more are
# decoded smaller.
MEMORY = 200 * 2**20
# So many pixels of a JPEG or PNG never take more.
SMALL = MEMORY // 14
# A few bytes may claim any size. Where a byte stands for more pixels than in photographs,
# what cannot be decoded within that memory is refused.
PIXELS_PER_BYTE = 64

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
# Not Image.open, which warns of images with two thirds of our limit.
_OPENERS = {
    _JPEG: JpegImagePlugin.JpegImageFile,
    _PNG: PngImagePlugin.PngImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}

_LOCK = threading.Lock()  # the filter of warnings belongs to the whole process


class ImageFileError(ValueError):
    """A file that is not an image, claims too much, or is damaged."""


def header(data: bytes) -> tuple[int, int, int, int]:
    """(height, width, orientation, halvings): the sides of the pixels as they are stored,
    the EXIF orientation, in [1, 8], that says how to turn them, and how often the sides
    are halved (in the DCT domain) while a JPEG of more than some 26 megapixels is decoded.

    Raises:
      ImageFileError: not an image, or one that claims too many pixels.
    """
    height = width = kind = 0
    if data.startswith(_PNG) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
    elif data.startswith(_JPEG):
        segments = _jpeg_segments(data)
        frames = ((k, s) for k, s, e in segments if k in _FRAMES and e - s > 5)
        kind, start = next(frames, (0, 0))
        height, width = struct.unpack_from(">HH", data, start + 1) if start else (0, 0)
    elif data.startswith(b"RIFF"):
        height, width = _webp_sides(data)
    if not data.startswith((_PNG, _JPEG)) and not height * width:
        with opened(io.BytesIO(data)) as image:
            width, height = image.size
    orientation = _orientation(data)
    progressive = kind in _PROGRESSIVE
    halvings = _halvings(height, width, data, len(data), progressive)
    return height, width, orientation, halvings


def check(file: BinaryIO) -> None:
    """Reads no more than a header, where the format allows it.

    Raises:
      ImageFileError: certainly not an image, or one that claims too many pixels.
    """
    with opened(file) as image:
        file.seek(0)
        start, size = file.read(32), file.seek(0, io.SEEK_END)
        progressive = "progressive" in image.info
        _halvings(image.height, image.width, start, size, progressive)


def read(data: bytes, channels: int = 3) -> np.ndarray:
    """uint8 (H, W, channels): the first frame, upright. Alpha is dropped, 16 bits become
    8; ``channels`` is 3 or, for grey, 1.

    Raises:
      ImageFileError: see ``header``; also a file that is damaged or cut short.
    """
    with opened(io.BytesIO(data)) as image:
        progressive = "progressive" in image.info
        halvings = _halvings(image.height, image.width, data, len(data), progressive)
        try:
            if halvings:
                sides = (image.width >> halvings, image.height >> halvings)
                image.draft(None, sides)
            return _upright(image, channels, _orientation(data))
        except Exception as e:  # Pillow's decoders raise errors of any kind
            raise ImageFileError(f"it may be truncated: {_one_line(e)}") from e


def _upright(image: Image.Image, channels: int, orientation: int) -> np.ndarray:
    """uint8 (H, W, channels): converted and turned by strips, not in a copy of all."""
    width, height = image.size
    transposed, rows, columns = turns(orientation)
    sides = (width, height) if transposed else (height, width)
    pixels = np.empty((*sides, channels), np.uint8)
    stored = pixels[:: -1 if rows else 1, :: -1 if columns else 1]
    stored = stored.transpose(1, 0, 2) if transposed else stored
    for top in range(0, height, _ROWS):
        end = min(top + _ROWS, height)
        strip = image.crop((0, top, width, end))
        if image.mode.startswith("I"):  # 16 bits
            strip = (np.asarray(strip) >> 8).clip(0, 255)[..., None]
        else:
            mode = "RGB" if channels == 3 else "L"
            strip = np.asarray(strip if strip.mode == mode else strip.convert(mode))
        stored[top:end] = strip.reshape(end - top, width, -1)
    return pixels


_ROWS = 64


def turns(orientation: int) -> tuple[bool, bool, bool]:
    """What makes an image upright: (transpose first?, reverse rows?, reverse columns?)

    5 to 8 are 1 to 4 of the transposed image; 2 mirrors, 4 turns upside down, 3 both.
    """
    turn = (orientation - 1) % 4
    return orientation >= 5, turn >= 2, turn in (1, 2)


def opened(file: BinaryIO) -> Image.Image:
    start = file.read(8)
    file.seek(0)
    opener = next((o for magic, o in _OPENERS.items() if start.startswith(magic)), None)
    try:
        # Pillow warns of damaged EXIF, which is no reason to refuse the pixels.
        with _LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return opener(file) if opener else Image.open(file, formats=("TIFF",))
    except Exception as e:
        found = f"begins with {start!r}" if start else "is empty"
        found = "has a truncated or damaged header" if opener else found
        raise ImageFileError(
            f"not an image, it {found}: JPEG, PNG, GIF, BMP and WebP work"
        ) from e


def _halvings(
    height: int, width: int, start: bytes, size: int, progressive: bool
) -> int:
    """See ``header``, of a file that begins with ``start`` and has ``size`` bytes.

    Raises:
      ImageFileError: it claims no pixels, or too many.
    """
    pixels = height * width
    if not pixels:
        raise ImageFileError("the header is damaged: the image has no size")
    if pixels > MAX_PIXELS:
        raise ImageFileError(f"{height} x {width} is more than {MAX_PIXELS} pixels")
    # Bytes per pixel, the pixels (3) among them. Pillow holds 4 for colours and 1 for what
    # is grey or has a palette; frames of other formats are drawn on a canvas and copied.
    jpeg, png = start.startswith(_JPEG), start.startswith(_PNG)
    few = png and start[25:26] in b"\x00\x03"
    each = 4 if few else 8 if jpeg or png else 24
    coefficients = 6 if progressive else 0  # which are held at once
    limit, memory = MEMORY + 3 * size, 0.0
    for halvings in range(4 if jpeg else 1):
        memory = pixels * (coefficients + each / 4**halvings)
        if memory <= limit:
            return halvings
    if pixels > PIXELS_PER_BYTE * size:
        raise ImageFileError(
            f"{height} x {width} pixels in {size} bytes: decoding would take "
            f"{memory / 2**20:.0f} MiB, and so small a file may take {limit / 2**20:.0f}"
        )
    return 3 if jpeg else 0


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# -------------------------------------------------------------------------------- EXIF


def _orientation(data: bytes) -> int:
    """As EXIF says; 1 where it says nothing, or nothing that can be understood."""
    exif = _exif(data)
    order = ">" if exif.startswith(b"MM") else "<"
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, entry)
            if tag == 0x0112:
                integer = {1: "B", 3: "H", 4: "I"}.get(kind, "H")
                (value,) = struct.unpack_from(order + integer, exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # none, or damaged
        pass
    return 1


def _exif(data: bytes) -> bytes:
    """The EXIF block, wherever it stands in a JPEG, PNG or WebP; b"": there is none."""
    for magic, (parts, wanted) in _CONTAINERS.items():
        if data.startswith(magic):
            for kind, start, end in parts(data):
                body = data[start:end] if kind == wanted else b""
                if (body := body.removeprefix(b"Exif\0\0")).startswith((b"II", b"MM")):
                    return body
    return b""


# All three give (kind, start, end) of the parts of a file.


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Those before the pixels."""
    at = 2
    while (marker := _MARKER.search(data, at)) and marker.end() + 2 <= len(data):
        kind, start = marker[1][0], marker.end()
        if kind == 0xDA:  # the pixels
            return
        (length,) = struct.unpack_from(">H", data, start)
        yield kind, start + 2, start + length
        at = start + max(length, 2)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8, at + 8 + length
        at += length + 12  # a checksum follows


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        yield kind, at + 8, at + 8 + length
        at += 8 + length + length % 2


def _webp_sides(data: bytes) -> tuple[int, int]:
    """(height, width), which Pillow tells when it has taken memory for the pixels."""
    for kind, start, end in _webp_chunks(data):
        body = data[start : min(end, start + 10)]
        if len(body) < 5:
            break
        if kind == b"VP8X":
            return int.from_bytes(body[7:], "little") + 1, (
                int.from_bytes(body[4:7], "little") + 1
            )
        if kind == b"VP8L":
            sides = int.from_bytes(body[1:5], "little")
            return (sides >> 14) % 2**14 + 1, sides % 2**14 + 1
        if kind == b"VP8 " and len(body) == 10:
            width, height = struct.unpack_from("<HH", body, 6)
            return height % 2**14, width % 2**14
    return 0, 0


_MARKER = re.compile(rb"\xff([\x02-\xcf\xda-\xfe])")  # of segments that have a length
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # those three are tables
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_CONTAINERS: dict[bytes, tuple[Callable, bytes | int]] = {
    _JPEG: (_jpeg_segments, 0xE1),
    _PNG: (_png_chunks, b"eXIf"),
    b"RIFF": (_webp_chunks, b"EXIF"),
}
