# SPDX-License-Identifier: Apache-2.0
"""Where examples come from. ``SOURCES[name](cfg) -> Dataset``.

A source lists examples; it decodes nothing (examples.py has the types). To add one, add
a function and its line in ``SOURCES``.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from vit_jax.config import DataConfig, choose
from vit_jax.data.examples import (
    Dataset,
    Split,
    from_arrays,
    held_out,
    subset,
)
from vit_jax.errors import UserError


def load(cfg: DataConfig) -> Dataset:
    """The data set that ``cfg`` names.

    Raises:
      UserError: it does not exist, is empty, or contradicts itself.
    """
    dataset = choose("data.source", cfg.source, SOURCES)(cfg)
    names = dataset.class_names
    if cfg.num_classes and cfg.num_classes != len(names):
        if cfg.num_classes < len(names):
            raise UserError(
                f"data.num_classes is {cfg.num_classes}, but {_where(cfg)} has "
                f"{len(names)} classes: leave it at 0 to use what the data holds"
            )
        # Not the bare number: a class of the data may be called that.
        extra = tuple(f"unused {i}" for i in range(len(names), cfg.num_classes))
        dataset = dataclasses.replace(dataset, class_names=names + extra)
    return dataset


def training_split(cfg: DataConfig, dataset: Dataset) -> Split:
    """What is trained on: the training set less ``holdout``, cut down to ``subset``."""
    split = dataset.train
    if cfg.holdout:
        split = split.select(held_out(split, cfg.holdout)[0])
    if cfg.subset:
        split = split.select(subset(cfg, split))
    return split


def evaluation_split(cfg: DataConfig, dataset: Dataset, name: str) -> Split:
    """``"train"``: what is trained on; ``"test"``: the test set, or ``holdout`` of the
    training set where that is set; anything else: the source's split of that name."""
    if name == "train":
        return training_split(cfg, dataset)
    if name == "test":
        if cfg.holdout:
            return dataset.train.select(held_out(dataset.train, cfg.holdout)[1])
        return dataset.test
    if dataset.splits is None:
        raise UserError(
            f"unknown split {name!r}: data.source {cfg.source!r} has ['train', 'test']"
        )
    return dataset.splits(name)


# ---------------------------------------------------------------------------- sources


def synthetic(cfg: DataConfig) -> Dataset:
    """Random images of the right shape, for benchmarks and tests; see synthetic.py."""
    from vit_jax.data import synthetic as module

    return module.load(cfg)


def digits(cfg: DataConfig) -> Dataset:
    """1,797 scans of handwritten digits, 8 x 8 pixels, that ship with scikit-learn."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8) * (255 / 16)  # 0..16 -> 0..255
    grey = np.round(pixels).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    split = from_arrays(images, labels, "digit")
    train, test = held_out(split, cfg.test_share)
    names = tuple(str(i) for i in range(10))
    return Dataset(split.select(train), split.select(test), names)


def folder(cfg: DataConfig) -> Dataset:
    """Class folders, or a manifest that lists image files with their labels."""
    from vit_jax.data import folders

    return folders.load(cfg)


def tfds(cfg: DataConfig) -> Dataset:
    """An image classification set of tensorflow-datasets, or a VTAB-1k task."""
    from vit_jax.data import tfds_source, vtab

    if cfg.name.startswith("vtab/"):
        return vtab.load(cfg)
    return tfds_source.load(cfg)


def records(cfg: DataConfig) -> Dataset:
    """TFRecord or ArrayRecord shards, as ``write_records`` makes them or others do."""
    from vit_jax.data import records as module

    return module.load(cfg)


SOURCES: dict[str, Callable[[DataConfig], Dataset]] = {
    "digits": digits,
    "folder": folder,
    "records": records,
    "synthetic": synthetic,
    "tfds": tfds,
}


def _where(cfg: DataConfig) -> str:
    return cfg.path or cfg.name or cfg.source
