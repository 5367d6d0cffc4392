# SPDX-License-Identifier: Apache-2.0
"""From a data config to batches on this host.

``_Stream.rows`` says which examples a step holds, with which seeds; everything after it
is a stateless function of those, run by tf.data in parallel and handed on in order. An
example that cannot be decoded makes its batch fail; that batch is then done over
without it (``_Stream.repair``), so good data pays nothing for the protection.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import os
import time
from collections.abc import Iterator, Set
from typing import Any

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import order, sources, synthetic
from vit_jax.data.examples import IGNORED, DataInfo, Dataset, Rows, Split
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

_bad: dict[str, str] = {}  # what this process could not read: name -> reason


def bad_examples() -> dict[str, str]:
    """The examples that this process met and could not read: name -> reason.

    The training loop writes their number as a metric. Reset by ``bad_examples.clear``.
    """
    return dict(_bad)


def describe(cfg: DataConfig) -> DataInfo:
    """Classes and counts of the data set; decodes nothing.

    Raises:
      UserError: the data set does not exist, is empty or contradicts itself.
    """
    dataset = _load(cfg)
    return DataInfo(
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        num_train=len(sources.training_split(cfg, dataset)),
        num_test=len(sources.evaluation_split(cfg, dataset, "test")),
        multilabel=dataset.multilabel,
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
    split, bad = _cached(cfg, "train")
    if not len(split):
        raise UserError(
            "there are no training examples left: data.test_share is "
            f"{cfg.test_share} and data.holdout {cfg.holdout}"
        )
    stream = _Stream(cfg, _load(cfg), split, bad, batch, rows, seed, training=True)
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
        size = len(sources.evaluation_split(cfg, _load(cfg), split))
        steps = range(-(-size // batch))
        found = synthetic.batches(cfg, rows, iter(steps), salt=-1 - (split == "train"))
        return (
            b | {"mask": (step * batch + rows < size).astype(np.float32)}
            for step, b in zip(steps, found, strict=True)
        )
    chosen, bad = _cached(cfg, split)
    stream = _Stream(cfg, _load(cfg), chosen, bad, batch, rows, 0, training=False)
    return stream.run(range(-(-stream.size // batch)))


def split_of(cfg: DataConfig, name: str) -> Split:
    """The examples of a split, undecoded."""
    return sources.evaluation_split(cfg, _load(cfg), name)


def stream_of(cfg: DataConfig, split: Split, batch: int) -> Iterator[Batch]:
    """Training batches of any list of examples, all of one class; for the benchmark."""
    rows, dataset = np.arange(batch), Dataset(split, split, ("0",))
    stream = _Stream(cfg, dataset, split, {}, batch, rows, 0, training=True)
    return stream.run(range(2**62))


class _Stream:
    """The rows of one process of every batch of one split.

    Training: shuffled, augmented, endless. Otherwise: every example once, in order.
    """

    def __init__(
        self,
        cfg: DataConfig,
        dataset: Dataset,
        split: Split,
        bad: dict[int, str],
        batch: int,
        rows: np.ndarray,
        seed: int,
        *,
        training: bool,
    ) -> None:
        from vit_jax.data import graph  # imports tensorflow, which takes seconds

        self.graph, self.training = graph, training
        self.cfg, self.batch, self.local, self.seed = cfg, batch, rows, seed
        self.num_classes, self.multilabel = dataset.num_classes, dataset.multilabel
        self.dataset, self.split, self.size = dataset, split, len(split)
        self.bad = bad  # cannot be read: left out; example -> reason
        # Damaged in the middle: some crops can be made. Remembering these as bad would
        # make a batch depend on which crops came before.
        self.torn: dict[int, str] = {}
        self.group = graph.group_function(cfg, split, dataset, training=training)
        self.sequence = None
        if split.sequence is not None:
            self.sequence = split.sequence.reader(
                batch, rows, seed if training else None
            )
        self.failure: BaseException | None = None
        for index, reason in self.bad.items():
            self._report(index, reason)
        self._check_bad()

    def run(self, steps: range) -> Iterator[Batch]:
        """One batch per step. The work starts here, before the first ``next``."""
        batches = self._batches(steps)

        def iterate() -> Iterator[Batch]:
            nonlocal batches
            for step in steps:
                try:
                    rows, made = next(batches)
                except self.graph.ERRORS:
                    if self.failure is not None:
                        raise self.failure from None
                    rows, made = self.repair(step)
                    batches = self._batches(range(step + 1, steps.stop))
                yield self.finish(rows, made)

        return iterate()

    def rows(self, step: int, failed: Set[tuple[int, int]] = frozenset()) -> Rows:
        """Which examples the step holds on this process.

        ``failed``: (row, example) that turned out not to be possible in this step.
        """

        def unusable(index: np.ndarray) -> np.ndarray:
            found = np.zeros(len(index), bool)
            if self.bad:
                found = np.isin(index, np.fromiter(self.bad, np.int64, len(self.bad)))
            for row, example in failed:
                found[row] |= index[row] == example
            return found

        if self.sequence is not None:
            return self.sequence.rows(step, unusable)
        position = step * self.batch + self.local
        if not self.training:
            use = (position < self.size) & ~unusable(position)
            return Rows(position, np.where(use, position, 0), use)
        index = order.train_indices(position, self.size, self.seed)
        attempt = 0
        while (left := unusable(index)).any():
            index[left] = order.substitutes(
                position[left], self.size, self.seed, attempt
            )
            attempt += 1
        return Rows(position, index, np.ones(len(position), bool))

    def feed(self, rows: Rows) -> dict[str, np.ndarray]:
        """What tf.data needs to make these examples; nothing for unused rows."""
        count = len(rows.index)
        fed = {
            "seed": order.augmentation_seeds(rows.position, self.seed),
            "use": rows.use.copy(),  # tensorflow may reuse the memory
            "data": np.full(count, b"", object),
            "shape": np.zeros((count, 3), np.int32),
        }
        if rows.record is not None:
            data: Any = rows.record
        else:
            data = self.split.fetch(self.split.index(rows.index[rows.use]))
        if self.split.kind == "pixels":
            data, fed["shape"][rows.use] = data
        fed["data"][rows.use] = data
        return fed

    def finish(self, rows: Rows, made: dict[str, np.ndarray]) -> Batch:
        """Adds labels and, for evaluation, the mask."""
        if "label" in made:
            label = made["label"]
        else:
            assert self.split.labels is not None
            index = self.split.index(rows.index)
            if self.multilabel:
                label = multi_hot(self.split.labels.of(index), self.num_classes)
            else:
                label = self.split.labels.first(index)
        if self.training:
            return {"image": made["image"], "label": label}
        per_row = (slice(None),) + (None,) * (label.ndim - 1)
        use = rows.use & (label != IGNORED).reshape(len(label), -1).any(axis=1)
        label = np.where(use[per_row], label, np.zeros_like(label))
        return {"image": made["image"], "label": label, "mask": use.astype(np.float32)}

    def repair(self, step: int) -> tuple[Rows, dict[str, np.ndarray]]:
        """Does one step over, without what cannot be read; returns (rows, made)."""
        failed: set[tuple[int, int]] = set()
        while True:
            rows = self.rows(step, failed)
            fed = self.feed(rows)
            made = self.graph.readable(fed, self.group)
            missing = [
                (row, int(index))
                for row, index in enumerate(rows.index)
                if row not in made
            ]
            if not missing:
                return rows, self.graph.stack(made)
            for row, index in missing:
                if index not in self.bad and index not in self.torn:
                    reason = self.graph.reason(fed, row, self.group)
                    torn = self.graph.torn(fed, row, self.split, self.dataset)
                    (self.torn if torn else self.bad)[index] = reason
                    self._report(index, reason)
            self._check_bad()
            if failed.issuperset(missing):
                raise RuntimeError(f"step {step} cannot be made without {missing}")
            failed.update(missing)

    def _batches(self, steps: range) -> Iterator[tuple[Rows, dict[str, np.ndarray]]]:
        """(rows, images and perhaps labels) per step, made ahead in the background."""
        drawn: collections.deque[Rows] = collections.deque()  # fed, not yet delivered

        def feed(step: int) -> dict[str, np.ndarray]:
            try:
                drawn.append(self.rows(step))
                return self.feed(drawn[-1])
            except BaseException as e:
                self.failure = e  # tensorflow would turn it into text
                raise

        for made in self.graph.batches(steps, feed, len(self.local), self.group):
            yield drawn.popleft(), made

    def _name(self, index: int) -> str:
        return self.split.name(int(self.split.index(np.array([index]))[0]))

    def _report(self, index: int, reason: str) -> None:
        name = self._name(index)
        if name not in _bad:
            _bad[name] = reason
            log.warning("skipped the unreadable example %s: %s", name, reason)

    def _check_bad(self) -> None:
        # One bad file must not stop a run on thirty photos, whatever the share.
        allowed = self.cfg.max_bad * self.size
        if self.cfg.max_bad > 0:
            allowed = max(allowed, 1)
        bad = self.bad | self.torn
        if bad and (len(bad) > allowed or len(bad) == self.size):
            index, reason = next(iter(bad.items()))
            raise UserError(
                f"{len(bad)} of {self.size} examples cannot be read, more than "
                f"the share data.max_bad = {self.cfg.max_bad}: the first is "
                f"{self._name(index)} ({reason}); remove these files or raise "
                "--config.data.max_bad"
            )


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


def _spread(values: np.ndarray, row: np.ndarray, count: int) -> np.ndarray:
    result = np.zeros((count, *values.shape[1:]), values.dtype)
    result[row] = values
    return result


# ---------------------------------------------------------------------- memory of sets

_LISTING = ("train_transforms", "eval_transforms", "image_size", "decode", "max_bad")


def _load(cfg: DataConfig) -> Dataset:
    """``sources.load``, remembered: evaluation during training asks again and again."""
    return _load_once(_listing(cfg), _signature(cfg.path))


def _listing(cfg: DataConfig) -> DataConfig:
    """The config without what does not change the list of examples (and so hashable)."""
    defaults = DataConfig()
    keep = () if cfg.source != "synthetic" else ("image_size",)
    return dataclasses.replace(
        cfg, **{k: getattr(defaults, k) for k in _LISTING if k not in keep}
    )


@functools.lru_cache(maxsize=8)
def _load_once(cfg: DataConfig, signature: tuple[int, ...]) -> Dataset:
    return sources.load(cfg)


def _signature(path: str) -> tuple[int, ...]:
    """Changes when files are added or removed: times of the folder, two levels deep."""
    if not path or not os.path.exists(path):
        return ()
    times = [os.stat(path).st_mtime_ns]
    folders = [path] if os.path.isdir(path) else []
    for _ in range(2):
        entries = [e for f in folders for e in os.scandir(f) if e.is_dir()]
        times += sorted(e.stat().st_mtime_ns for e in entries)
        folders = [e.path for e in entries]
    return tuple(times)


def _cached(cfg: DataConfig, name: str) -> tuple[Split, dict[int, str]]:
    """The split, decoded in memory where it fits ``cache_gib``, and its unreadable
    examples as far as they are known."""
    split, bad = _cached_once(_listing(cfg), _signature(cfg.path), name)
    return split, dict(bad)


@functools.lru_cache(maxsize=4)
def _cached_once(
    cfg: DataConfig, signature: tuple[int, ...], name: str
) -> tuple[Split, dict[int, str]]:
    from vit_jax.data import graph

    dataset = _load_once(cfg, signature)
    split = sources.evaluation_split(cfg, dataset, name)
    in_memory = split.kind == "pixels"
    if in_memory or split.sequence is not None or cfg.cache_gib <= 0 or not len(split):
        return split, {}
    if graph.decoded_bytes(split, dataset) > cfg.cache_gib * 2**30:
        return split, {}
    started = time.monotonic()
    cached, bad = graph.decode_all(split, dataset)
    log.info(
        "decoded %d images of %s into memory in %.1f s",
        len(split),
        name,
        time.monotonic() - started,
    )
    return cached, bad
