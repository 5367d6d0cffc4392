# SPDX-License-Identifier: Apache-2.0
"""Where examples come from: which module lists those of a ``data.source``.

A source lists examples; it decodes nothing (examples.py has the types). To add one, write
a module with ``load(cfg) -> Dataset`` and add its line to ``SOURCES``.
"""

import dataclasses
import importlib
from typing import Any

from vit_jax.config import DataConfig, choose
from vit_jax.data.examples import Dataset, Split, held_out, subset
from vit_jax.errors import UserError

# Imported when they are asked for: some import tensorflow or scikit-learn.
SOURCES = {
    "digits": "vit_jax.data.digits",
    "folder": "vit_jax.data.folders",
    "parquet": "vit_jax.data.parquet",
    "records": "vit_jax.data.records",
    "synthetic": "vit_jax.data.synthetic",
    "tar": "vit_jax.data.tar",
    "tfds": "vit_jax.data.tfds_source",
}
_VTAB = "vit_jax.data.vtab"  # of those names of "tfds" that begin with vtab/


def load(cfg: DataConfig) -> Dataset:
    """The data set that ``cfg`` names.

    Raises:
      UserError: it does not exist, is empty, or contradicts itself.
    """
    module = choose("config.data.source", cfg.source, SOURCES)
    if cfg.source == "tfds" and cfg.name.startswith("vtab/"):
        module = _VTAB
    dataset = importlib.import_module(module).load(cfg)
    names = dataset.class_names
    if cfg.num_classes and cfg.num_classes != len(names):
        if cfg.num_classes < len(names):
            raise UserError(
                f"config.data.num_classes is {cfg.num_classes}, but {_where(cfg)} has "
                f"{len(names)} classes: leave it at 0 to use what the data holds"
            )
        # Not the bare number: a class of the data may be called that.
        extra = tuple(f"unused {i}" for i in range(len(names), cfg.num_classes))
        dataset = dataclasses.replace(dataset, class_names=names + extra)
    return dataset


def named(place: str, **options: Any) -> DataConfig | None:
    """What "KIND:PATH" names, such as ``tar:shards/`` or ``tfds:cifar10``; None where it
    is not of that form.

    Raises:
      UserError: the source has no images that could be read.
    """
    kind, _, rest = place.partition(":")
    if kind not in SOURCES:
        return None
    if kind == "synthetic":
        raise UserError(
            "the images of 'synthetic' are made while a model is trained or evaluated: "
            "there are none to read"
        )
    where = "name" if kind == "tfds" else "path"
    found: dict[str, Any] = {"source": kind, where: rest, **options}
    return DataConfig(**found)


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
            f"unknown split {name!r}: config.data.source {cfg.source!r} has ['train', 'test']"
        )
    return dataset.splits(name)


def _where(cfg: DataConfig) -> str:
    return cfg.path or cfg.name or cfg.source
