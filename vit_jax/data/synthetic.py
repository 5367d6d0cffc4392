# SPDX-License-Identifier: Apache-2.0
"""Random images without tensorflow at almost no cost: for benchmarks and tests.

A handful of batches is drawn once and handed out again and again, so this measures the
rest of the program. ``data.name="multilabel"`` gives multi-hot labels; any other name,
such as the one of the config that ``--config.data.source=synthetic`` changes, is ignored.
"""

import functools
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import order
from vit_jax.data.examples import Dataset, Split

_TRAIN, _TEST = 1024, 128
_CYCLE = 4  # different batches before they repeat


def load(cfg: DataConfig) -> Dataset:
    """Names and counts; the batches come from ``train_batches``."""

    def part(size: int) -> Split:
        return Split(size, "pixels", _no_fetch, "synthetic image {}".format)

    names = tuple(str(i) for i in range(cfg.num_classes or 10))
    return Dataset(part(_TRAIN), part(_TEST), names, cfg.name == "multilabel")


def batches(
    cfg: DataConfig, rows: np.ndarray, steps: Iterator[int], salt: int
) -> Iterator[dict[str, np.ndarray]]:
    """One batch of these rows of the global batch per step; nothing is decoded and no
    transform runs: the images already have the size the model wants."""

    @functools.cache
    def cycled(turn: int) -> dict[str, np.ndarray]:
        batch = [_example(cfg, salt, turn, int(row)) for row in rows]
        size, classes = cfg.image_size, cfg.num_classes or 10
        kind = np.float32 if cfg.name == "multilabel" else np.int32
        width = (classes,) if cfg.name == "multilabel" else ()
        images = np.empty((len(rows), size, size, 3), np.uint8)
        labels = np.empty((len(rows), *width), kind)
        for i, (image, label) in enumerate(batch):
            images[i], labels[i] = image, label
        images.flags.writeable = labels.flags.writeable = False  # they are shared
        return {"image": images, "label": labels}

    for step in steps:
        yield dict(cycled(step % _CYCLE))


def _example(cfg: DataConfig, salt: int, turn: int, row: int) -> tuple:
    seed = order.hash64(salt, turn, row)
    rng = np.random.Generator(np.random.Philox(key=int(seed[0])))
    side, classes = cfg.image_size, cfg.num_classes or 10
    image = rng.integers(0, 256, (side, side, 3), np.uint8)
    if cfg.name == "multilabel":
        return image, (rng.random(classes) < 0.3).astype(np.float32)
    return image, rng.integers(classes)


def _no_fetch(index: np.ndarray) -> NoReturn:
    raise AssertionError("synthetic images are not fetched")
