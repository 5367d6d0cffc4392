# SPDX-License-Identifier: Apache-2.0
"""Mutates image files and reads them as training, evaluation and prediction do.

    python tests/fuzz_images.py [--count=2000] [--seed=0]

Every file either gives pixels or is refused in one line; anything else (another
exception, more memory or time than the bounds below) is printed with its number and
counts as a failure. Memory is what each reading adds to the process (Linux tells). The
numbers of a run follow from its seed.
"""

import argparse
import collections
import ctypes
import io
import os
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from data_files import encoded, picture
from PIL import Image

from vit_jax.data import image_files, transforms
from vit_jax.data.tensorflow_cpu import tf

MIB = 2**20
SECONDS = 30  # at most, for one file in one way


def bound(size: int) -> int:
    """Bytes that reading a file may take."""
    return 200 * MIB + 3 * size


class Memory:
    """The most bytes that this process holds from here on, beyond what it held; 0 where
    the system does not tell."""

    KNOWN = os.path.exists("/proc/self/clear_refs")

    def __init__(self) -> None:
        self._before = 0
        if not self.KNOWN:
            return
        # What earlier files left to malloc would be counted for this one.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
        self._before = self._highest()

    def taken(self) -> int:
        return self._highest() - self._before if self.KNOWN else 0

    def _highest(self) -> int:
        with open("/proc/self/status") as stream:
            line = next(line for line in stream if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


def originals() -> dict[str, bytes]:
    """Whole files of every format, with and without what makes them odd."""
    rgb = picture(3, 120, 160)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = rgb.convert("RGBA")
    alpha.putalpha(rgb.convert("L"))
    frames = [picture(i, 40, 60) for i in range(3)]
    animated = io.BytesIO()
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    grey16 = Image.fromarray(
        (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    )
    return {
        "jpeg": encoded(rgb),
        "jpeg, exif, icc": encoded(rgb, exif=exif, icc_profile=bytes(3000)),
        "jpeg, progressive": encoded(rgb, progressive=True),
        "jpeg, cmyk": encoded(rgb.convert("CMYK")),
        "png": encoded(rgb, "PNG"),
        "png, exif, alpha": encoded(alpha, "PNG", exif=exif),
        "png, palette": encoded(rgb.convert("P"), "PNG"),
        "png, 16 bits": encoded(grey16, "PNG"),
        "gif": gif.getvalue(),
        "bmp": encoded(rgb, "BMP"),
        "bmp, palette": encoded(rgb.convert("P"), "BMP"),
        "webp": encoded(rgb, "WEBP", exif=exif),
        "webp, lossless, alpha": encoded(alpha, "WEBP", lossless=True),
        "webp, animated": animated.getvalue(),
    }


def mutations(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of ``count`` damaged files."""
    rng = np.random.default_rng(seed)
    files = [*originals().items()]
    changes = (_flip, _header, _claim, _cut, _insert, _remove, _zero, _splice)
    for i in range(count):
        name, data = files[i % len(files)]
        made = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            change = changes[rng.integers(len(changes))]
            change(made, rng, files[rng.integers(len(files))][1])
            name += f", {change.__name__[1:]}"
        yield name, bytes(made)


def _place(data: bytearray, rng: np.random.Generator) -> int:
    return int(rng.integers(max(len(data), 1)))


def _flip(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    for _ in range(rng.integers(1, 20)):
        if data:
            data[_place(data, rng)] ^= 1 << rng.integers(8)


def _header(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Sizes, lengths and types stand at the beginning; extreme ones are likely."""
    at = int(rng.integers(min(len(data), 60) or 1))
    value = [b"\xff\xff", b"\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1", rng.bytes(4)]
    if data:
        chosen = value[rng.integers(len(value))]
        data[at : at + len(chosen)] = chosen


def _claim(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Any sides up to 65,535, where the format keeps them."""
    width, height = (2 ** rng.uniform(0, 16, 2)).astype(int).tolist()
    if data[:4] == b"\x89PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif (at := max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))) > 0:
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif data[:3] == b"GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif data[:2] == b"BM":
        data[18:26] = struct.pack("<II", width, height)
    elif data[12:16] == b"VP8X":
        data[24:30] = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    elif data[12:15] == b"VP8":
        data[26:30] = struct.pack("<HH", width, height)


def _cut(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    del data[_place(data, rng) :]


def _insert(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    at = _place(data, rng)
    data[at:at] = rng.bytes(rng.integers(1, 200))


def _remove(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    at = _place(data, rng)
    del data[at : at + int(rng.integers(1, 200))]


def _zero(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    at = _place(data, rng)
    end = min(at + int(rng.integers(1, 400)), len(data))
    data[at:end] = bytes(end - at)


def _splice(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    at, from_ = _place(data, rng), int(rng.integers(len(other)))
    data[at : at + 300] = other[from_ : from_ + 300]


def ways() -> dict[str, Callable[[bytes], np.ndarray]]:
    """How an image is read: ``way(bytes)`` -> pixels."""
    seed = tf.constant([1, 2], tf.int64)
    spec = tf.TensorSpec((), tf.string)

    def by(ops: tuple, exact: bool) -> Callable[[bytes], np.ndarray]:
        run = transforms.compose(ops, size=32, exact=exact, knob="fuzz")
        traced = tf.function(
            lambda image: run(image, seed), input_signature=[spec], autograph=False
        )
        return lambda data: traced(tf.constant(data)).numpy()

    return {
        "training": by(transforms.DEFAULT_TRAIN, False),
        "evaluation": by(transforms.DEFAULT_EVAL, True),
        "prediction": image_files.read,
    }


# What a reader of files may raise; the pipeline counts the first two as bad, and the
# last one becomes a UserError in prediction.
REFUSALS = (tf.errors.OpError, UnicodeDecodeError, image_files.ImageFileError)


def run(count: int, seed: int) -> tuple[collections.Counter[str], list[str], int]:
    """(tally of outcomes, descriptions of failures, bytes taken by the worst file)."""
    tally: collections.Counter[str] = collections.Counter()
    failures = []
    readers = ways()
    for data in originals().values():  # traces everything, and fills caches
        for read in readers.values():
            read(data)
    highest = 0
    for number, (name, data) in enumerate(mutations(count, seed)):
        for way, read in readers.items():
            memory, started = Memory(), time.monotonic()
            try:
                read(data)
                tally[f"{way} read"] += 1
            except REFUSALS:
                tally[f"{way} refused"] += 1
            except Exception as e:  # a traceback, for a user
                tally[f"{way} FAILED"] += 1
                failures.append(f"{number} ({name}), {way}: {type(e).__name__}: {e}")
            taken, seconds = memory.taken(), time.monotonic() - started
            if taken > bound(len(data)):
                failures.append(f"{number} ({name}), {way}: {taken / MIB:.0f} MiB")
            if seconds > SECONDS:
                failures.append(f"{number} ({name}), {way}: {seconds:.0f} s")
            highest = max(highest, taken)
    return tally, failures, highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tally, failures, worst = run(arguments.count, arguments.seed)
    for failure in failures:
        print(failure)
    for outcome, number in sorted(tally.items()):
        print(f"{number:6} {outcome}")
    print(
        f"{arguments.count} files, {len(failures)} failures, at most {worst >> 20} MiB"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
