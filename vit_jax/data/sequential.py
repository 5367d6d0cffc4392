# SPDX-License-Identifier: Apache-2.0
"""Shards that are read from front to back, shuffled in windows.

A pod of 60,000 images/s would ask a bucket for as many byte ranges per second; from
front to back it reads large pieces, and the next window while one is used. Training is a
function of (seed, step) all the same, on any number of processes that divides the number
of streams.
"""

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.data import order
from vit_jax.data.examples import Image, Rows
from vit_jax.data.shards import Files
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

STREAMS = 64  # the most processes that can share a sequential read
# A lower bound, so that one record more or less hardly changes the range of a stream.
STREAM_RECORDS = 256
# Records that are shuffled together, over all processes, where the config leaves it open:
# as many batches, and not fewer records.
SHUFFLED_BATCHES, SHUFFLED_RECORDS = 16, 8192
_EVALUATED = 1024  # records that are read together for evaluation

Record = Any  # what ``Files.in_order`` yields
Parse = Callable[[Record], tuple[Image, np.ndarray]]
Numbered = tuple[int, Record]
Ranges = list[tuple[int, int]]  # of numbers of records


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """How records that are read in sequence are shuffled, and how well."""

    records: int
    batch: int  # over all processes
    streams: int
    width: int  # records of a stream that are shuffled together

    @classmethod
    def of(cls, records: int, batch: int, buffer: int) -> "Shuffle":
        """``buffer``: ``config.data.shuffle_buffer``."""
        buffer = buffer or max(SHUFFLED_RECORDS, SHUFFLED_BATCHES * batch)
        streams = math.gcd(batch, STREAMS)
        while streams > max(1, records // STREAM_RECORDS):
            streams //= 2
        return cls(records, batch, streams, max(1, buffer // streams))

    @property
    def neighbours(self) -> float:
        """Share of the neighbours in a file that meet in a batch: those of one window
        do as often as its order is random."""
        size, block = self.records // self.streams, self.batch // self.streams
        width = min(self.width, size)
        if block >= width:
            return 1.0
        together = 1 - 1 / width if width < size else 1.0
        return together * (block - 1) / (width - 1)

    @property
    def uniform(self) -> float:
        """The same share where all records are shuffled together."""
        return min(1.0, (self.batch - 1) / max(1, self.records - 1))

    def __str__(self) -> str:
        return (
            f"{self.neighbours:.2%} of the neighbours in a file meet in a batch, "
            f"{self.uniform:.2%} if all were shuffled (config.data.shuffle_buffer)"
        )


class TrainReader:
    """Shuffled training records, read front to back, yet a function of (seed, step).

    The records are cut into ``streams`` equal ranges, fewer where there are few. Stream
    v fills block v of every global batch, whichever process that belongs to. It passes
    over its own range again and again, each time in windows of ``buffer / streams``
    records that are shuffled. So any number of processes that divides ``streams`` sees
    the same batches, and each opens only its own part. To resume is to compute which
    window it was.

    Args:
      buffer: records that are shuffled together over all processes; 0: 16 batches, but
        at least 8192.
    """

    def __init__(
        self,
        files: Files,
        parse: Parse,
        buffer: int,
        rows: np.ndarray,
        batch: int,
        seed: int,
    ):
        self.files, self.parse, self.batch, self.seed = files, parse, batch, seed
        self.local = rows
        self.shuffle = Shuffle.of(len(files), batch, buffer)
        self.streams, self.block = self.shuffle.streams, batch // self.shuffle.streams
        if len(rows) % self.block:
            raise UserError(
                f"a batch of {batch} of {len(files)} records is read in sequence as "
                f"{self.streams} streams of at least {STREAM_RECORDS}, which "
                f"{batch // len(rows)} processes cannot share: use a number of "
                f"processes that divides {self.streams}, or set "
                "config.data.access=random"
            )
        count = len(rows) // self.block
        self._pool = ThreadPoolExecutor(count, "vit_jax windows")
        self.next_step = -1
        self.iterators: list[Iterator[tuple[int, Record, list[Numbered]]]] = []

    def draw(self, step: int, bad: Mapping[int, str]) -> Rows:
        """The rows of a step; a step that does not follow the last one skips there."""
        started, first = time.monotonic(), step != self.next_step
        if first:
            stream = int(self.local[0]) // self.block
            self.iterators = [
                self._stream(v, step * self.block)
                for v in range(stream, stream + len(self.local) // self.block)
            ]
        index, records, windows = [], [], []
        for iterator in self.iterators:
            drawn = list(itertools.islice(iterator, self.block))
            index += [number for number, _, _ in drawn]
            records += [record for _, record, _ in drawn]
            windows.append(drawn[-1][2])
        if first:
            self._say(step, time.monotonic() - started, windows)
        self.next_step = step + 1
        position = step * self.batch + self.local

        def choose(row: int, attempt: int) -> Numbered:
            window = windows[row // self.block]
            return self._substitute(int(position[row]), window, attempt)

        def substitute(row: int, attempt: int) -> tuple[int, Image, np.ndarray]:
            number, record = choose(row, attempt)
            return number, *self.parse(record)

        for row, number in enumerate(index):
            for attempt in itertools.count():
                if number not in bad:
                    break
                number, records[row] = choose(row, attempt)
            index[row] = number
        images, labels = zip(*map(self.parse, records), strict=True)
        use = np.ones(len(index), bool)
        return Rows(
            position, np.array(index), use, list(images), list(labels), substitute
        )

    def _substitute(
        self, position: int, window: list[Numbered], attempt: int
    ) -> Numbered:
        """What stands in for an unreadable record, attempt by attempt: all of its window
        in an order that follows from the position, then all of its stream.

        Does not depend on which records are unreadable, as that may be found out later.
        """
        key = order.hash64(self.seed, 0x737562, position)
        if attempt < len(window):
            return window[_shuffled(attempt, len(window), key)]
        low, high = self._bounds(position % self.batch // self.block)
        attempt -= len(window)
        if attempt >= high - low:
            raise UserError(
                f"none of the records from {self.files.name(low)} to "
                f"{self.files.name(high - 1)} can be read: write or copy them again"
            )
        number = low + _shuffled(attempt, high - low, key)
        return next(in_sequence(self.files, number, number + 1))

    def _say(self, step: int, seconds: float, windows: list[list[Numbered]]) -> None:
        samples = [
            [self.parse(record) for _, record in w[:: -(-len(w) // 16)]]
            for w in windows
        ]
        sizes = [len(i) for s in samples for i, _ in s if isinstance(i, bytes)]
        held = sum(map(len, windows))
        log.info(
            "reading in sequence from step %d: %d streams here, %d records (%.2f GiB) "
            "shuffled together and as many read ahead, first batch after %.1f s; %s",
            step, len(windows), held, held * np.mean(sizes or 0) / 2**30, seconds,
            self.shuffle,
        )  # fmt: skip
        if all(len(s) > 7 and len({tuple(y) for _, y in s}) == 1 for s in samples):
            log.warning(
                "records that are shuffled together all have the same label: shards "
                "sorted by class need config.data.access=random, or to be written again "
                "with python -m vit_jax.data.write_records"
            )

    def _bounds(self, v: int) -> tuple[int, int]:
        total = len(self.files)
        return v * total // self.streams, (v + 1) * total // self.streams

    def _stream(
        self, v: int, position: int
    ) -> Iterator[tuple[int, Record, list[Numbered]]]:
        """(number, record, its window) from ``position`` of stream v on."""
        windows, orders = itertools.tee(self._windows(v, position))
        found = _read_ahead(self.files, (ranges for ranges, _ in windows), self._pool)
        return (
            (*window[i], window)
            for window, (_, shuffled) in zip(found, orders, strict=True)
            for i in shuffled
        )

    def _windows(self, v: int, position: int) -> Iterator[tuple[Ranges, np.ndarray]]:
        """From ``position`` of stream v on: which records a window holds, and the order
        in which those that are left of it are drawn."""
        low, high = self._bounds(v)
        size = high - low
        width = min(size, self.shuffle.width)
        epoch, within = divmod(position, size)
        while True:
            key = order.hash64(self.seed, 0x736571, v, epoch)
            # Each pass starts somewhere else, so that windows hold other neighbours.
            shift = int(key[0] % np.uint64(size))
            for w in range(within // width, -(-size // width)):
                count = min(width, size - w * width)
                begin = low + (shift + w * width) % size
                over = max(0, begin + count - high)  # what goes on at the front
                shuffled = order.permutation(
                    np.arange(count), count, order.hash64(key[0], w)
                )
                ranges = [(begin, begin + count - over), (low, low + over)]
                yield ranges, shuffled[max(0, within - w * width) :]
                within = 0
            epoch, within = epoch + 1, 0


class EvalReader:
    """Each process evaluates a range of the records, in order, from step 0 on."""

    def __init__(self, files: Files, parse: Parse, rows: np.ndarray, batch: int):
        self.parse, self.count = parse, len(rows)
        processes, process = batch // len(rows), int(rows[0]) // len(rows)
        total = len(files)
        self.low = process * total // processes
        self.high = (process + 1) * total // processes
        steps = range(self.low, self.high, _EVALUATED)
        ranges = ([(a, min(a + _EVALUATED, self.high))] for a in steps)
        pool = ThreadPoolExecutor(1, "vit_jax windows")
        found = _read_ahead(files, ranges, pool)
        self.records = itertools.chain.from_iterable(found)

    def draw(self, step: int, bad: Mapping[int, str]) -> Rows:
        index = self.low + step * self.count + np.arange(self.count)
        use = index < self.high
        drawn = itertools.islice(self.records, self.count)
        found = [self.parse(record) for _, record in drawn]
        found += [(b"", np.zeros(0, np.int32))] * (self.count - len(found))
        use &= [number not in bad for number in index.tolist()]
        images, labels = map(list, zip(*found, strict=True))
        return Rows(index, np.where(use, index, 0), use, images, labels)


def reader(
    files: Files,
    parse: Parse,
    buffer: int,
    rows: np.ndarray,
    batch: int,
    seed: int | None,
) -> TrainReader | EvalReader:
    """Of the rows of one process; ``seed`` is None for evaluation."""
    if seed is None:
        return EvalReader(files, parse, rows, batch)
    return TrainReader(files, parse, buffer, rows, batch, seed)


def in_sequence(files: Files, low: int, high: int) -> Iterator[Numbered]:
    """(number, record) for low <= number < high."""
    while low < high:
        file = files.file_of(low)
        first, end = int(files.starts[file]), int(files.starts[file + 1])
        stop = min(high, end)
        found = files.in_order(file, low - first, stop - first)
        yield from enumerate(found, low)
        low = stop


def _read_ahead(
    files: Files, windows: Iterator[Ranges], pool: ThreadPoolExecutor
) -> Iterator[list[Numbered]]:
    """The records of each window; the first is being read from now on, and each of the
    others while the one before it is used."""

    def read(ranges: Ranges) -> list[Numbered]:
        return [r for low, high in ranges for r in in_sequence(files, low, high)]

    def begin() -> list[Future[list[Numbered]]]:
        return [pool.submit(read, ranges) for ranges in itertools.islice(windows, 1)]

    def iterate(begun: list[Future[list[Numbered]]]) -> Iterator[list[Numbered]]:
        while begun:
            window = begun.pop().result()
            begun = begin()
            yield window

    return iterate(begin())


def _shuffled(index: int, size: int, key: np.ndarray) -> int:
    return int(order.permutation(np.array([index]), size, key)[0])
