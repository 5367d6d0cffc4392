# SPDX-License-Identifier: Apache-2.0
"""What a source hands to the pipeline: the types, and choosing among examples.

A source lists examples; it decodes nothing. Each split is a random-access list: an
example is a file path, the encoded bytes or decoded pixels, and its labels, read a batch
of indices at a time (sources too remote for that are read in sequence, see
sequential.py).
"""

import dataclasses
import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import order
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

IGNORED = -1  # label of an example that counts neither for the loss nor for a metric


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a data set holds; ``class_names[i]`` names output i of the model."""

    num_classes: int
    class_names: tuple[str, ...]
    num_train: int  # training examples really used, after holdout and subset
    num_test: int  # examples evaluated in place of the test set
    multilabel: bool
    in_sequence: bool = False  # training examples come in an order of their own


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of N examples: ``values[starts[i]:starts[i + 1]]`` belong to i."""

    values: np.ndarray  # int32
    starts: np.ndarray  # int64 (N + 1,)

    @classmethod
    def single(cls, values: Sequence[int] | np.ndarray) -> "Labels":
        values = np.asarray(values, np.int32)
        return cls(values, np.arange(len(values) + 1))

    @classmethod
    def several(cls, lists: Iterable[Sequence[int] | np.ndarray]) -> "Labels":
        lists = list(lists)
        starts = np.cumsum([0] + [len(x) for x in lists])
        values = np.fromiter((v for x in lists for v in x), np.int32, starts[-1])
        return cls(values, starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, index: np.ndarray) -> list[np.ndarray]:
        return [self.values[self.starts[i] : self.starts[i + 1]] for i in index]

    def first(self, index: np.ndarray) -> np.ndarray:
        """int32 (n,): the first label of each, IGNORED where there is none."""
        starts, ends = self.starts[index], self.starts[np.asarray(index) + 1]
        padded = np.append(self.values, np.int32(IGNORED))
        return np.where(ends > starts, padded[starts], np.int32(IGNORED))


Kind = Literal["path", "encoded", "pixels"]


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands where an image cannot be had."""

    reason: str


# What stands for one image: a path (str), an encoded file (bytes) or uint8 (H, W, 3), as
# the split's kind says; or Unreadable.
Image = Any
# Numbers of examples -> an image and int32 labels for each.
Fetch = Callable[[np.ndarray], tuple[list[Image], list[np.ndarray]]]


@dataclasses.dataclass
class Rows:
    """The examples of one step on this process, one per local row."""

    position: np.ndarray  # int64 (b,): what the augmentation follows from
    index: np.ndarray  # int64 (b,): which example of the split
    use: np.ndarray  # bool (b,): False where the row stays empty
    images: list[Image]
    labels: list[np.ndarray]
    # (row, attempt) -> (index, image, labels) of what may stand in for a row that cannot
    # be read: the same whichever examples are known to be bad. None: it stays empty.
    substitute: Callable[[int, int], tuple[int, Image, np.ndarray]] | None = None


class Reader(Protocol):
    """Draws the rows of one process, for one step after the other."""

    def draw(self, step: int, bad: Mapping[int, str]) -> Rows:
        """``bad``: examples that are known to be unreadable, not to be drawn."""
        ...


# (rows of the batch that this process has, batch over all processes, seed or None for
# evaluation) -> reader
MakeReader = Callable[[np.ndarray, int, int | None], Reader]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A list of examples. ``select`` restricts it to some of them, in that order."""

    size: int
    kind: Kind
    fetch: Fetch
    name: Callable[[int], str]  # of one example, for the log
    labels: Labels | None = None  # None: known only when an example is read
    # Where only reading in order is possible, or much faster.
    sequence: MakeReader | None = None
    selected: np.ndarray | None = None

    def __len__(self) -> int:
        return self.size if self.selected is None else len(self.selected)

    def index(self, index: np.ndarray) -> np.ndarray:
        """Positions in this list -> numbers of examples in the source."""
        return index if self.selected is None else self.selected[index]

    def read(self, index: np.ndarray) -> tuple[list[Image], list[np.ndarray]]:
        """Images, as ``kind`` says, and labels of positions in this list."""
        return self.fetch(self.index(index))

    def name_of(self, index: int) -> str:
        """Of one position in this list."""
        return self.name(int(self.index(np.array([index]))[0]))

    def select(self, chosen: np.ndarray) -> "Split":
        return dataclasses.replace(self, selected=self.index(np.asarray(chosen)))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Both splits of a data set, before holdout and subset."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    multilabel: bool = False
    splits: Callable[[str], Split] | None = None  # any other split, by name
    train_transforms: tuple[dict[str, Any], ...] = ()  # where the config leaves it open

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def listed(
    kind: Kind,
    images: Sequence[Image] | np.ndarray,
    labels: Labels,
    name: Callable[[int], str],
) -> Split:
    """A split whose paths, encoded images or pixels (uint8 (N, H, W, 3)) are in memory."""

    def fetch(index: np.ndarray) -> tuple[list[Image], list[np.ndarray]]:
        return [images[i] for i in index], labels.of(index)

    return Split(len(images), kind, fetch, name, labels)


def held_out(split: Split, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits positions into (rest, held out), the same share of every class.

    The choice depends on the examples alone, never on the seed of the run, so that runs
    with different seeds are compared on the same images. It is random, not by class,
    where only the records know the labels. All are held out by a share of 1.
    """
    if share == 1:
        return np.zeros(0, np.int64), np.arange(len(split))
    if not 0 < share < 1:
        raise UserError(
            f"a share of {share} of the examples cannot be held out: set "
            "config.data.test_share or config.data.holdout between 0 and 1"
        )
    if split.labels is None:
        log.warning("held out at random: the classes are known only to the records")
    taken = np.zeros(len(split), bool)
    classes = _by_class(split)
    for members in classes:
        count = round(share * len(members))
        if len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        taken[members[:count]] = True
    if taken.all() or not taken.any():
        why = f"a share of {share} leaves one side empty"
        if max(map(len, classes), default=0) < 2:
            why = "no class has two of them, so that no share leaves some on both sides"
        raise UserError(
            f"cannot hold out some of {len(split)} examples: {why}; change "
            "config.data.test_share or config.data.holdout, or name a test set with "
            "config.data.test_split"
        )
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def check_class_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    """The names, refused where two are the same to a reader or a file system."""
    seen: dict[str, str] = {}
    for name in names:
        key = unicodedata.normalize("NFC", name.strip().casefold())
        if key in seen:
            raise UserError(
                f"{where} has two classes of the same name, {seen[key]!r} and "
                f"{name!r}: rename or merge one of them"
            )
        seen[key] = name
    return tuple(names)


def subset(cfg: DataConfig, split: Split) -> np.ndarray:
    """``cfg.subset`` of the positions: nested (a smaller subset lies in a larger one)
    and independent of the seed of the run."""
    total = len(split)
    count = round(cfg.subset * total) if cfg.subset < 1 else int(cfg.subset)
    if not 0 < count <= total:
        raise UserError(
            f"config.data.subset is {cfg.subset}, which makes {count} examples of {total}: "
            "set it to a share below 1 or a number of examples that there are"
        )
    if not cfg.subset_balanced:
        return np.sort(order.permutation(np.arange(count), total, _FIXED))
    if split.labels is None:
        raise UserError(
            f"data.subset cannot hold as many examples of every class: those of "
            f"{cfg.path or cfg.name or cfg.source} are known only to its records; write it again with python "
            "-m vit_jax.data.write_records, or set --config.data.subset_balanced=False"
        )
    # Round robin over the classes until enough are taken: as even as the data allows.
    classes = _by_class(split)
    ranks = np.concatenate([np.arange(len(members)) for members in classes])
    members = np.concatenate(classes)
    turn = np.argsort(ranks, kind="stable")
    return np.sort(members[turn[:count]])


_FIXED = 0x68656C64  # names the one permutation that splits and subsets follow


def _by_class(split: Split) -> list[np.ndarray]:
    """Positions of each class (by first label), each list in a fixed random order."""
    shuffled = order.permutation(np.arange(len(split)), len(split), _FIXED)
    if split.labels is None:
        return [shuffled]
    label = split.labels.first(split.index(shuffled))
    by_label = np.argsort(label, kind="stable")
    edges = np.flatnonzero(np.diff(label[by_label])) + 1
    return np.split(shuffled[by_label], edges)
