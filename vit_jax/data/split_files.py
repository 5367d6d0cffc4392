# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder hold which split, where other tools have named them.

data/train-00000-of-00064.parquet    by what stands before the numbers
imagenet1k-validation-07.tar         or by a word in it
train/0007.tar                       or by the folder
0007.tar                             else all are for training
"""

import abc
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import sequential, splits
from vit_jax.data.examples import IGNORED, Dataset, Image, Labels, Split
from vit_jax.data.shards import Files
from vit_jax.data.storage import is_remote, keep_on_disk
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

_WORDS = {*splits.TRAIN, *splits.TEST}
_NUMBERS = re.compile(r"[-_.]?\d+([-_]of[-_]\d+.*)?$")
_OF = re.compile(r"[-_]of[-_](\d+)")


def find(cfg: DataConfig, *suffixes: str) -> tuple[str, list[str]]:
    """(``cfg.path``, files below it that end in one of ``suffixes``, in order); it may
    also be one of the files.

    Raises:
      UserError: there is none.
    """
    if not cfg.path:
        raise UserError(
            f"config.data.source is {cfg.source!r} but config.data.path is empty: set "
            f"--config.data.path to a folder with {suffixes[0]} files, or to one of them"
        )
    path = cfg.path if "://" in cfg.path else os.path.expanduser(cfg.path)
    path = path.rstrip("/") or path
    try:
        if not tf.io.gfile.exists(path):
            raise UserError(
                f"config.data.path {cfg.path!r} does not exist: it must be a folder with "
                f"{suffixes[0]} files, or one of them"
            )
        found = _below(path) if tf.io.gfile.isdir(path) else [path]
    except tf.errors.OpError as e:
        raise UserError(
            f"config.data.path {cfg.path!r} cannot be read: {e.message}"
        ) from e
    files = [f for f in found if f.lower().endswith(suffixes)]
    if not files:
        there = splits.some([os.path.relpath(f, path) for f in found])
        raise UserError(
            f"config.data.path {cfg.path!r} has no {suffixes[0]} files, but {there}: "
            f"config.data.source={cfg.source} reads nothing else"
        )
    if cfg.disk_cache and is_remote(path):
        keep_on_disk(path, cfg.disk_cache, cfg.disk_cache_gib)
    return path, files


def _below(root: str) -> list[str]:
    """Every file below a folder but hidden ones."""
    return sorted(
        os.path.join(folder, name)
        for folder, _, names in tf.io.gfile.walk(root)
        if not re.search(r"(^|/)\.[^/.]", os.path.relpath(folder, root))
        for name in names
        if not name.startswith(".")
    )


def by_split(root: str, files: Iterable[str]) -> dict[str, list[str]]:
    """Split -> its files, as the names of files and folders say; of one that was named
    itself, for training.

    Raises:
      UserError: some of the files that the names count are missing.
    """
    if (files := [*files]) == [root]:
        return {splits.TRAIN[0]: files}
    found: dict[str, list[str]] = {}
    for file in files:
        found.setdefault(_split_of(os.path.relpath(file, root)), []).append(file)
    for parts in found.values():
        check_whole(parts)
    return found


def _split_of(path: str) -> str:
    *folders, name = path.split("/")
    stem = name.rsplit(".", 1)[0]
    before = _NUMBERS.sub("", stem)
    for part in (before, *reversed(folders)):
        for word in re.split(r"[^a-z]+", splits.plain(part)):
            if word in _WORDS:
                return word
    return before if _OF.search(stem) and before else splits.TRAIN[0]


def check_whole(files: Sequence[str], total: re.Pattern[str] = _OF) -> None:
    """Raises UserError where names such as ``train-00001-of-00064`` count other files;
    ``total``: what finds the 64 in a name."""
    totals = {int(m[1]) for f in files if (m := total.search(os.path.basename(f)))}
    if totals and totals != {len(files)}:
        raise UserError(
            f"{os.path.dirname(files[0]) or 'the data set'} holds {len(files)} shards such as "
            f"{os.path.basename(files[0])}, but their names say that there are "
            f"{' or '.join(str(t) for t in sorted(totals))}: copy those that are "
            "missing, or remove what is left of another set"
        )


def train_name(cfg: DataConfig, known: Iterable[str], root: str) -> str:
    """Which of the splits to train on."""
    known = list(known)
    found = splits.meant(cfg.train_split, known)
    others = [name for name in known if splits.plain(name) not in splits.TEST]
    if not found and cfg.train_split == DataConfig.train_split and len(others) == 1:
        found = others  # the only one that is not for testing, whatever it is called
    if not found:
        raise splits.missing("train_split", cfg.train_split, root, sorted(known))
    return found[0]


def dataset(
    cfg: DataConfig,
    known: Iterable[str],
    root: str,
    read: Callable[[str, bool], Split],
    class_names: tuple[str, ...],
    *,
    multilabel: bool = False,
) -> Dataset:
    """The splits that the config asks for.

    Args:
      known: names of the splits there are.
      read: called with one of them, and whether a part of it is to be chosen, which
        takes random access.
    """
    known = list(known)

    def named(knob: str, name: str) -> str:
        if found := splits.meant(name, known):
            return found[0]
        raise splits.missing(knob, name, root, sorted(known))

    if cfg.test_split in ("", DataConfig.test_split):
        wanted = splits.meant(cfg.test_split, known)
    else:
        wanted = [named("test_split", cfg.test_split)]
    test = _first_labelled(cfg, root, ((n, read(n, False)) for n in wanted))
    choosing = bool(cfg.subset or cfg.holdout or test is None)
    train = read(train_name(cfg, known, root), choosing)
    return Dataset(
        *splits.with_test(cfg, train, test),
        class_names,
        multilabel,
        splits=lambda name: read(named("split", name), False),
    )


def _first_labelled(
    cfg: DataConfig, root: str, candidates: Iterable[tuple[str, Split]]
) -> Split | None:
    """The first that can be tested on: test sets are often published without labels."""
    for name, split in candidates:
        if split.labels is None or (split.labels.values != IGNORED).any():
            return split
        if cfg.test_split != DataConfig.test_split:
            raise UserError(
                f"{root}: no image of config.data.test_split {name!r} has a label: name "
                "another split, or '' to hold out a share of the training images"
            )
        log.warning("%s: no image of the split %r has a label, left out", root, name)
    return None


def _in_sequence(cfg: DataConfig, choosing: bool, too_large: bool) -> bool:
    """Whether a split is read from front to back.

    Args:
      choosing: whether a part of it is to be chosen.
      too_large: whether reading at random would be slow.
    """
    if cfg.access == "sequential" and choosing:
        raise UserError(
            "config.data.access is 'sequential', but config.data.subset, "
            "config.data.holdout and a test set held out of the training images "
            "(config.data.test_share) need random access: set config.data.access=random"
        )
    return cfg.access == "sequential" or (
        cfg.access == "auto" and too_large and not choosing
    )


Numbered = tuple[int, Image]


class Listed(Files):
    """Images of several files, whose labels are known before they are read."""

    @abc.abstractmethod
    def read(self, index: np.ndarray) -> list[Image]:
        """Images by number."""

    @abc.abstractmethod
    def in_order(self, file: int, begin: int, stop: int) -> Iterator[Numbered]:
        """(number among all, image) of [begin, stop) of a file, from front to back."""


def split(
    cfg: DataConfig,
    images: Listed,
    labels: Labels,
    choosing: bool,
    too_large: bool = False,
) -> Split:
    """The images with their labels; the rest as in ``dataset`` and ``in_sequence``."""

    def fetch(index: np.ndarray) -> tuple[list[Image], list[np.ndarray]]:
        return images.read(index), labels.of(index)

    def parse(found: Numbered) -> tuple[Image, np.ndarray]:
        number, image = found
        return image, labels.of(np.array([number]))[0]

    sequence = None
    if _in_sequence(cfg, choosing, too_large or is_remote(images.files[0])):
        buffer = cfg.shuffle_buffer
        sequence = functools.partial(sequential.reader, images, parse, buffer)
    return Split(len(images), "encoded", fetch, images.name, labels, sequence)
