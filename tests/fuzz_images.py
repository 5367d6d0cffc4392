# SPDX-License-Identifier: Apache-2.0
"""Mutates image files and reads them as training, evaluation and prediction do.

    python tests/fuzz_images.py [--count=2000] [--seed=0]

Every file either gives pixels or is refused in one line; anything else (another
exception, more memory or time than the bounds below) is printed with its number and
counts as a failure. The numbers of a run follow from its seed.
"""

import argparse
import collections
import io
import resource
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from data_files import encoded, picture
from PIL import Image

from vit_jax.data import image_files, transforms
from vit_jax.data.tensorflow_cpu import tf

MIB = 2**20
SECONDS = 30  # at most, for one file in all three ways


def bound(size: int, pixels: int) -> int:
    """Bytes that reading a file may take."""
    return 200 * MIB + 3 * size + image_files.BYTES_PER_PIXEL * pixels


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
    changes = (_flip, _header, _cut, _insert, _remove, _zero, _splice)
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


def run(count: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """(tally of outcomes, descriptions of failures)."""
    tally: collections.Counter[str] = collections.Counter()
    failures = []
    readers = ways()
    for data in originals().values():  # traces everything, and fills caches
        for read in readers.values():
            read(data)
    for number, (name, data) in enumerate(mutations(count, seed)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        started, pixels = time.monotonic(), 0
        outcomes = []
        for way, read in readers.items():
            try:
                made = read(data)
                outcomes.append(f"{way} read")
                pixels = max(pixels, made.shape[0] * made.shape[1])
            except REFUSALS:
                outcomes.append(f"{way} refused")
            except Exception as e:  # a traceback, for a user
                outcomes.append(f"{way} FAILED")
                failures.append(f"{number} ({name}), {way}: {type(e).__name__}: {e}")
        tally.update(outcomes)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if grown > bound(len(data), pixels):
            failures.append(f"{number} ({name}): {grown / MIB:.0f} MiB of memory")
        if (seconds := time.monotonic() - started) > SECONDS:
            failures.append(f"{number} ({name}): {seconds:.0f} s")
    return tally, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tally, failures = run(arguments.count, arguments.seed)
    for failure in failures:
        print(failure)
    for outcome, number in sorted(tally.items()):
        print(f"{number:6} {outcome}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{arguments.count} files, {len(failures)} failures, peak {peak:.0f} MiB")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
