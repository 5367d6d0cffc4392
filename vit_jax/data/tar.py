# SPDX-License-Identifier: Apache-2.0
"""Images in tar files, read in place. The layouts of ``data.source="tar"``:

train-0000.tar              shards of WebDataset: a.jpg (.jpeg, .png, .webp) with its class
                            in a.cls, a.json ("label" or "cls") or a.txt
ILSVRC2012_img_train.tar    ImageNet's archives, as they come: see imagenet.py

The members of a key may lie anywhere in their file; two files may use the same keys.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import classes, hub_sets, imagenet, split_files, tar_index
from vit_jax.data.examples import Dataset, Split
from vit_jax.data.storage import answer, ask, binary, in_order
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

# Compressed ones are refused by name, not passed over.
_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_TOGETHER = 16  # files whose headers are read at the same time


def load(cfg: DataConfig) -> Dataset:
    """The data set of the tar files under ``cfg.path``."""
    if cfg.path.startswith("hf://"):
        found = hub_sets.find(cfg, *_ENDINGS)
    else:
        root, files = split_files.find(cfg, *_ENDINGS)
        archive = next((f for f in files if os.path.basename(f) == imagenet.TRAIN), "")
        if archive:
            return _archives(cfg, os.path.dirname(archive))
        found = hub_sets.Found(root, split_files.by_split(root, files))
    opened = functools.cache(lambda name: Tars(found.files(name), tar_index.webdataset))
    train = opened(split_files.train_name(cfg, found.splits, found.root))
    spelled = classes.places(train.labels, train.name)
    names = classes.names(cfg, spelled, len(train), found.root)
    indices = {name: i for i, name in enumerate(names)}

    def read(name: str, choosing: bool) -> Split:
        images = opened(name)
        labels = classes.numbers(images.labels, indices, images.name)
        return split_files.split(cfg, images, labels, choosing)

    return split_files.dataset(cfg, found.splits, found.root, read, names)


def _archives(cfg: DataConfig, root: str) -> Dataset:
    """ImageNet as its archives hold it."""
    train, val, devkit = (
        os.path.join(root, n) for n in (imagenet.TRAIN, imagenet.VAL, imagenet.DEVKIT)
    )
    for file in (val, devkit):
        if not tf.io.gfile.exists(file):
            raise UserError(
                f"{train} is there, but {file} is missing: copy it there too"
            )
    with binary(devkit) as stream:
        synsets, truth = imagenet.devkit(devkit, stream)
    known = {"train": train, "val": val}
    indices = {wnid: i for i, wnid in enumerate(sorted(synsets))}

    def read(name: str, choosing: bool) -> Split:
        found = Tars([known[name]], tar_index.archive)
        ((spelled, which),) = found.labels
        if name == "val":
            names = [found.name(i) for i in range(len(found))]
            spelled, which = (
                imagenet.validation_labels(names, truth),
                np.arange(len(names)),
            )
        labels = classes.numbers([(spelled, which)], indices, found.name)
        return split_files.split(cfg, found, labels, choosing)

    names = imagenet.class_names(sorted(synsets), synsets)
    return split_files.dataset(cfg, known, root, read, names)


class Tars(split_files.Listed):
    """The images of several tar files as one list.

    Raises:
      UserError: see ``tar_index.read``; also where there is no image at all.
    """

    def __init__(self, files: Sequence[str], build: tar_index.Build):
        with ThreadPoolExecutor(_TOGETHER) as pool:
            indexes = list(pool.map(lambda f: tar_index.read(f, build), files))
        super().__init__(files, [len(i.names) for i in indexes], "image")
        if not len(self):
            raise UserError(
                f"{files[0]} and the other files of its split hold no images"
            )
        self.labels: list[classes.Spelled] = [
            (i.spelled.tolist(), i.labels) for i in indexes
        ]
        self._names: list[Any] = [i.names for i in indexes]
        self._begin = np.concatenate([i.starts for i in indexes])
        self._size = np.concatenate([i.sizes for i in indexes])

    def name(self, index: int) -> str:
        file = self.file_of(index)
        member: bytes = self._names[file][index - self.starts[file]]
        return f"{self.files[file]}, {member.decode()}"

    def read(self, index: np.ndarray) -> list[bytes]:
        """Images by number; all are asked for before one is waited for."""
        files = [self.files[self.file_of(i)] for i in index.tolist()]
        begin, size = self._begin[index], self._size[index]
        asked = map(ask, files, begin.tolist(), (begin + size).tolist())
        found = map(answer, files, [*asked])
        return [self._checked(*of) for of in zip(index.tolist(), found, strict=True)]

    def in_order(
        self, file: int, begin: int, stop: int
    ) -> Iterator[split_files.Numbered]:
        first = int(self.starts[file])
        chosen = slice(first + begin, first + stop)
        start, size = self._begin[chosen], self._size[chosen]
        found = in_order(self.files[file], start.tolist(), (start + size).tolist())
        for i, content in enumerate(found, first + begin):
            yield i, self._checked(i, bytes(content))

    def _checked(self, index: int, content: bytes) -> bytes:
        if len(content) != self._size[index]:
            raise UserError(
                f"{self.name(index)} is cut short: the file has changed since it was "
                "indexed; copy it again"
            )
        return content
