# SPDX-License-Identifier: Apache-2.0
"""From a data config to batches on this host.

A reader says which examples a step holds and fetches them, in the order of the steps and
ahead of their use; threads make the pixels, some rows at a time (graph.py). An example
that cannot be decoded is replaced there and then, by one that follows from its position:
it costs its own decoding, and good data pays nothing for the protection.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import order, sources, synthetic
from vit_jax.data.examples import (
    IGNORED,
    DataInfo,
    Dataset,
    Image,
    Rows,
    Split,
    Unreadable,
)
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

_GROUP = 8  # images made in one go, so that per-group work is cheap
_AHEAD = 2  # batches made before they are asked for

_bad: dict[str, str] = {}  # what this process could not read: name -> reason
_noting = threading.Lock()


def bad_examples() -> dict[str, str]:
    """What this process has met since it started and could not read: name -> reason.

    The training loop writes their number as a metric.
    """
    return dict(_bad)


def describe(cfg: DataConfig) -> DataInfo:
    """Classes and counts of the data set; decodes nothing.

    Raises:
      UserError: the data set does not exist, is empty or contradicts itself.
    """
    dataset = _load(cfg)
    train = _split(cfg, "train")
    return DataInfo(
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        num_train=len(train),
        num_test=len(_split(cfg, "test")),
        multilabel=dataset.multilabel,
        in_sequence=train.sequence is not None,
    )


def train_batches(
    cfg: DataConfig,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Training batches from step ``start`` on, without end.

    A pure function of (cfg, batch, seed, step): neither stopping and starting again nor
    the number of processes changes a bit. ``batch`` counts images over all processes;
    this one gets rows ``[i * batch / n, (i + 1) * batch / n)``.

    Yields:
      ``image`` uint8 (b, H, W, 3); ``label`` int32 (b,), or float32 (b, K) of zeros and
      ones where examples have several labels. An example to be ignored has label -1 (in
      the second case, a row of -1).

    Raises:
      UserError: see ``describe``; also when more than the share ``cfg.max_bad`` of the
        examples cannot be read.
    """
    rows = _local_rows(batch, process_index, process_count)
    if cfg.source == "synthetic":
        _load(cfg)
        return synthetic.batches(cfg, rows, itertools.count(start), salt=seed)
    stream = _Stream(cfg, "train", batch, rows, seed)
    if not stream.size:
        raise UserError(
            "there are no training examples left: config.data.test_share is "
            f"{cfg.test_share} and config.data.holdout {cfg.holdout}"
        )
    return stream.run(range(start, 2**62))


def eval_batches(
    cfg: DataConfig,
    *,
    batch: int,
    split: str = "test",
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every example of a split once, over all processes together.

    ``split``: ``"test"`` (the held-out slice where ``cfg.holdout`` is set), ``"train"``
    (what is trained on, without augmentation) or any split the source has. The last
    batch is padded; ``mask`` float32 (b,) is 0 for padding, for ignored labels and for
    unreadable examples. Every process yields equally many batches.
    """
    rows = _local_rows(batch, process_index, process_count)
    if cfg.source == "synthetic":
        size = len(_split(cfg, split))
        steps = range(-(-size // batch))
        found = synthetic.batches(cfg, rows, iter(steps), salt=-1 - (split == "train"))
        return (
            b | {"mask": (step * batch + rows < size).astype(np.float32)}
            for step, b in zip(steps, found, strict=True)
        )
    stream = _Stream(cfg, split, batch, rows, None)
    return stream.run(range(-(-stream.size // batch)))


class _Stream:
    """The rows of one process of every batch of one split.

    Training (with a seed): shuffled, augmented, endless. Otherwise: every example once,
    in order.
    """

    def __init__(
        self,
        cfg: DataConfig,
        name: str,
        batch: int,
        rows: np.ndarray,
        seed: int | None,
    ) -> None:
        from vit_jax.data import graph  # imports tensorflow, which takes seconds

        self.graph, self.cfg, self.seed = graph, cfg, seed
        dataset = _load(cfg)
        self.num_classes, self.multilabel = dataset.num_classes, dataset.multilabel
        self.split = _split(cfg, name)
        self.bad: dict[int, str] = {}  # cannot be read: left out; example -> reason
        # Damaged in the middle: some crops can be made. Leaving these out would make a
        # batch depend on which crops came before.
        self.torn: dict[int, str] = {}
        self.size = len(self.split)
        self._hold()
        # As many as divide the batch, so that one function is traced.
        self.count = max(k for k in range(1, _GROUP + 1) if len(rows) % k == 0)
        training = seed is not None
        self.maker = graph.maker(
            cfg, dataset, self.split.kind, self.count, training=training
        )
        make_reader = self.split.sequence or functools.partial(_Reader, self.split)
        self.reader = make_reader(rows, batch, seed)
        groups = len(rows) // self.count
        self.ahead = max(_AHEAD, -(-_AHEAD * graph.THREADS // groups))
        for index, reason in self.bad.items():
            self._report(index, reason)
        self._check_bad()

    def run(self, steps: range) -> Iterator[Batch]:
        """One batch per step. The work starts here, before the first ``next``."""
        reading = ThreadPoolExecutor(1, "vit_jax read")
        coming = iter(steps)
        begun = collections.deque(
            reading.submit(self._begin, step)
            for step in itertools.islice(coming, self.ahead)
        )

        def iterate() -> Iterator[Batch]:
            while begun:
                rows, images, making = begun.popleft().result()
                for made in making:
                    made.result()
                for step in itertools.islice(coming, 1):
                    begun.append(reading.submit(self._begin, step))
                yield self._finish(rows, images)

        return iterate()

    def _begin(self, step: int) -> tuple[Rows, np.ndarray, list[Future[None]]]:
        """Fetches the examples of a step and starts to make them."""
        rows = self.reader.draw(step, self.bad)
        seeds = order.augmentation_seeds(rows.position, self.seed or 0)
        images = np.empty((len(rows.index), *self.maker.shape), self.maker.dtype)
        groups = (slice(a, a + self.count) for a in range(0, len(images), self.count))
        submit = functools.partial(
            self.graph.POOL.submit, self._make, rows, seeds, images
        )
        return rows, images, [submit(group) for group in groups]

    def _make(
        self, rows: Rows, seeds: np.ndarray, images: np.ndarray, group: slice
    ) -> None:
        """Fills in some rows of ``images``, and corrects ``rows`` where it must."""
        found = rows.images[group]
        whole = not any(isinstance(image, Unreadable) for image in found)
        if whole and rows.use[group].all():
            try:
                images[group] = self.maker.group(found, seeds[group])
                return
            except self.graph.ERRORS:  # one of them; found out below
                pass
        made = {}
        for row in range(group.start, group.stop):
            if rows.use[row]:
                one = self._make_one(rows, row, seeds[row])
                rows.use[row] = one is not None
                if one is not None:
                    made[row] = one
        images[group] = 0
        if made:
            # Unused rows get what is at hand; it is not copied.
            every = [
                made.get(row, next(iter(made.values())))
                for row in range(group.start, group.stop)
            ]
            done = self.maker.together(every, seeds[group])
            for row in made:
                images[row] = done[row - group.start]

    def _make_one(self, rows: Rows, row: int, seed: np.ndarray) -> Any:
        """What the maker makes of the row or, in training, of the first of its
        substitutes that can be read; None where there is none."""
        index, image, label = int(rows.index[row]), rows.images[row], rows.labels[row]
        tried: set[int] = set()
        for attempt in itertools.count():
            if index not in self.bad and index not in tried:
                reason = image.reason if isinstance(image, Unreadable) else ""
                if not reason:
                    try:
                        made = self.maker.alone(image, seed)
                        rows.index[row], rows.labels[row] = index, label
                        return made
                    except self.graph.ERRORS as e:
                        reason = self.graph.reason(e)
                tried.add(index)
                self._note(index, image, reason)
            if rows.substitute is None:
                return None
            self._check_bad()  # where all are bad, the search would have no end
            index, image, label = rows.substitute(row, attempt)
        raise AssertionError("substitutes have no end")

    def _finish(self, rows: Rows, images: np.ndarray) -> Batch:
        """Adds labels and, for evaluation, the mask."""
        if self.multilabel:
            label = multi_hot(rows.labels, self.num_classes)
        else:
            first = [values[0] if len(values) else IGNORED for values in rows.labels]
            label = np.array(first, np.int32)
        if self.seed is not None:
            return {"image": images, "label": label}
        per_row = (slice(None),) + (None,) * (label.ndim - 1)
        use = rows.use & (label != IGNORED).reshape(len(label), -1).any(axis=1)
        label = np.where(use[per_row], label, np.zeros_like(label))
        return {"image": images, "label": label, "mask": use.astype(np.float32)}

    def _hold(self) -> None:
        """Replaces the split by its decoded images where they fit ``cache_gib``."""
        limit = self.cfg.cache_gib * 2**30
        decoded = self.split.kind == "pixels"
        if decoded or self.split.sequence or limit <= 0 or not self.size:
            return
        from vit_jax.data import cache

        training = self.seed is not None
        found = cache.cached(self.split, limit, training=training)
        if found is not None:
            found.users.add(self)
            self.split, self.bad = found.split(self.split.name_of), dict(found.bad)

    def _note(self, index: int, image: Image, reason: str) -> None:
        """Remembers and reports an example that could not be made."""
        readable = not isinstance(image, Unreadable)
        torn = readable and self.graph.is_torn(image, self.split.kind)
        with _noting:
            if index not in self.bad and index not in self.torn:
                (self.torn if torn else self.bad)[index] = reason
                self._report(index, reason)
        self._check_bad()

    def _report(self, index: int, reason: str) -> None:
        name = self.split.name_of(index)
        if name not in _bad:
            _bad[name] = reason
            log.warning("skipped the unreadable example %s: %s", name, reason)

    def _check_bad(self) -> None:
        # One bad file must not stop a run on thirty photos, whatever the share.
        allowed = self.cfg.max_bad * self.size
        if self.cfg.max_bad > 0:
            allowed = max(allowed, 1)
        count = len(self.bad) + len(self.torn)
        if count and (count > allowed or count == self.size):
            index, reason = next(iter({**self.bad, **self.torn}.items()))
            raise UserError(
                f"{count} of {self.size} examples cannot be read, more than the share "
                f"config.data.max_bad = {self.cfg.max_bad}: the first is "
                f"{self.split.name_of(index)} ({reason}); remove these files or raise "
                "config.data.max_bad"
            )


class _Reader:
    """Draws from a list that can be read in any order."""

    def __init__(self, split: Split, rows: np.ndarray, batch: int, seed: int | None):
        self.split, self.local, self.batch, self.seed = split, rows, batch, seed

    def draw(self, step: int, bad: Mapping[int, str]) -> Rows:
        position = step * self.batch + self.local
        size = len(self.split)

        def known(index: np.ndarray) -> np.ndarray:
            return np.array([i in bad for i in index.tolist()], bool)

        if self.seed is None:
            use = (position < size) & ~known(position)
            index = np.where(use, position, 0)
        else:
            use = np.ones(len(position), bool)
            index = order.train_indices(position, size, self.seed)
            for attempt in itertools.count():
                left = known(index)
                if not left.any() or len(bad) == size:
                    break
                index[left] = order.substitutes(
                    position[left], size, self.seed, attempt
                )
        images: list[Image] = [None] * len(index)
        labels = [np.zeros(0, np.int32)] * len(index)
        found = zip(np.flatnonzero(use), *self.split.read(index[use]), strict=True)
        for row, image, label in found:
            images[row], labels[row] = image, label

        def substitute(row: int, attempt: int) -> tuple[int, Image, np.ndarray]:
            assert self.seed is not None
            at = position[row : row + 1]
            chosen = order.substitutes(at, size, self.seed, attempt)
            (image,), (label,) = self.split.read(chosen)
            return int(chosen[0]), image, label

        replace = None if self.seed is None else substitute
        return Rows(position, index, use, images, labels, replace)


def multi_hot(labels: list[np.ndarray], num_classes: int) -> np.ndarray:
    """float32 (n, num_classes): one where a class is present; ignored: all IGNORED."""
    result = np.zeros((len(labels), num_classes), np.float32)
    for row, values in zip(result, labels, strict=True):
        if IGNORED in values:
            row[:] = IGNORED
        else:
            row[values] = 1
    return result


def _local_rows(batch: int, process_index: int, process_count: int) -> np.ndarray:
    if batch <= 0 or batch % process_count:
        raise UserError(
            f"batch is {batch}: it must be a positive multiple of the number of "
            f"processes, {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise UserError(
            f"process_index is {process_index}: it must lie in [0, {process_count})"
        )
    per_process = batch // process_count
    return np.arange(per_process) + process_index * per_process


# ---------------------------------------------------------------------- memory of sets


@dataclasses.dataclass
class _Listed:
    """A data set, the splits that were asked for, and when its folders last changed."""

    dataset: Dataset
    changed: dict[str, int]
    splits: dict[str, Split] = dataclasses.field(default_factory=dict)


_listed: collections.OrderedDict[DataConfig, _Listed] = collections.OrderedDict()


def _list(cfg: DataConfig) -> _Listed:
    """What ``sources.load`` says, remembered until a file is added or removed, or a
    ``test_split`` that is a file is written again: evaluation during training asks again
    and again."""
    key = _listing(cfg)
    found = _listed.get(key)
    if found is None or any(_changed(p) != t for p, t in found.changed.items()):
        # First: what changes meanwhile is seen later.
        changed = _folders(cfg.path, os.path.basename(cfg.test_split))
        found = _listed[key] = _Listed(sources.load(key), changed)
    _listed.move_to_end(key)
    while len(_listed) > 8:
        _listed.popitem(last=False)
    return found


def _load(cfg: DataConfig) -> Dataset:
    return _list(cfg).dataset


def _split(cfg: DataConfig, name: str) -> Split:
    found = _list(cfg)
    if name not in found.splits:
        found.splits[name] = sources.evaluation_split(cfg, found.dataset, name)
    return found.splits[name]


def _listing(cfg: DataConfig) -> DataConfig:
    """The config without what does not change the list of examples (and so hashable);
    image_size stays, as the transforms of a VTAB task follow from it."""
    return dataclasses.replace(
        cfg, train_transforms=(), eval_transforms=(), decode="fast", max_bad=0.0
    )


def _folders(path: str, listed: str) -> dict[str, int]:
    """When each folder below ``path``, and each file called ``listed``, last changed."""
    times: dict[str, int] = {}
    seen = set()
    todo = [os.path.expanduser(path)] if path and "://" not in path else []
    while todo:
        folder = todo.pop()
        times[folder] = _changed(folder)
        real = os.path.realpath(folder)  # a link may lead back
        if real in seen:
            continue
        seen.add(real)
        # A file has no entries, and what cannot be read is for the source to say.
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    todo.append(entry.path)
                elif entry.name == listed:
                    times[entry.path] = _changed(entry.path)
    return times


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
