# SPDX-License-Identifier: Apache-2.0
"""Splits that are held in memory, decoded, within a number of bytes."""

import collections
import contextlib
import logging
import time
import weakref
from collections.abc import Callable

import numpy as np

from vit_jax.data import graph
from vit_jax.data.examples import Image, Labels, Split, Unreadable

log = logging.getLogger(__name__)

_SAMPLES = 32  # images that tell whether it is worth trying
_AT_A_TIME = 8 * graph.THREADS  # images decoded before they are stored, at most
_BESIDE = 0.02  # of the limit that those may take


class Cached:
    """A decoded split, and what could not be decoded: position -> reason."""

    def __init__(self, pixels: np.ndarray, ends: np.ndarray, shapes: np.ndarray):
        self.pixels, self.ends, self.shapes = pixels, ends, shapes
        self.bad: dict[int, str] = {}
        self.labels = Labels.single(())
        # Of the streams that read it: while there are any, dropping it frees nothing.
        self.users: weakref.WeakSet = weakref.WeakSet()

    @property
    def size(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def split(self, name: Callable[[int], str]) -> Split:
        return Split(len(self.shapes), "pixels", self.fetch, name, self.labels)

    def fetch(self, index: np.ndarray) -> tuple[list[Image], list[np.ndarray]]:
        images = []
        for i in index.tolist():
            shape = self.shapes[i]
            end = self.ends[i]
            images.append(self.pixels[end - shape.prod() : end].reshape(shape))
        return images, self.labels.of(index)


_kept: collections.OrderedDict[Split, Cached] = collections.OrderedDict()


def cached(split: Split, limit: float, *, training: bool) -> Cached | None:
    """The split, decoded, or None where that would take more than ``limit`` bytes.

    Splits that were used last stay for the next time, within ``limit`` bytes together.
    Whether one for training is held depends on nothing else, because training differs
    in the last bits: it decodes with less precision what it does not hold.
    """
    if split in _kept:
        _kept.move_to_end(split)
        return _kept[split]
    room = limit if training else limit - _held(in_use=True)
    expected = _expected(split)
    found = _decode(split, expected, room) if expected <= room else None
    if found is None:
        return None
    for other in list(_kept):
        if _held() + found.size > limit and not _kept[other].users:
            del _kept[other]
    _kept[split] = found
    return found


def _held(*, in_use: bool = False) -> int:
    return sum(c.size for c in _kept.values() if c.users or not in_use)


def _expected(split: Split) -> float:
    """Bytes of the decoded split, by the size of some images."""
    chosen = np.unique(np.linspace(0, len(split) - 1, _SAMPLES).astype(np.int64))
    sizes = []
    for image in split.read(chosen)[0]:
        if not isinstance(image, Unreadable):
            with contextlib.suppress(*graph.ERRORS):
                sizes.append(graph.size_of(image, split.kind))
    return float(np.mean(sizes)) * len(split) if sizes else np.inf


def _decode(split: Split, expected: float, limit: float) -> Cached | None:
    started = time.monotonic()
    pixels = np.empty(int(expected), np.uint8)
    found = Cached(
        pixels, np.zeros(len(split), np.int64), np.zeros((len(split), 3), np.int32)
    )

    def decode(image: Image) -> np.ndarray | str | None:
        if isinstance(image, Unreadable):
            return image.reason
        try:
            if end + graph.size_of(image, split.kind) > limit:
                return None
            return graph.pixels(image, split.kind)
        except graph.ERRORS as e:
            return graph.reason(e)

    end, labels = 0, []
    count = int(np.clip(_BESIDE * limit * len(split) / expected, 1, _AT_A_TIME))
    for start in range(0, len(split), count):
        index = np.arange(start, min(start + count, len(split)))
        images, some = split.read(index)
        labels += some
        for i, made in zip(index, graph.POOL.map(decode, images), strict=True):
            if isinstance(made, str):
                found.bad[int(i)] = made
            elif made is None or end + made.size > limit:
                log.info("the images do not fit into config.data.cache_gib")
                return None
            else:
                if end + made.size > len(pixels):
                    # Moves pages, not bytes; those not written to take no memory.
                    pixels.resize(
                        int(min(limit, 2 * (end + made.size))), refcheck=False
                    )
                pixels[end : end + made.size] = made.reshape(-1)
                found.shapes[i] = made.shape
                end += made.size
            found.ends[i] = end
    pixels.resize(end, refcheck=False)
    found.labels = Labels.several(labels)
    seconds = time.monotonic() - started
    log.info("decoded %d images into memory in %.1f s", len(split), seconds)
    return found
