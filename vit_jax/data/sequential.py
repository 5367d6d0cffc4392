# SPDX-License-Identifier: Apache-2.0
"""Shards that are read from front to back, shuffled in windows.

A pod of 60,000 images/s would ask a bucket for as many byte ranges per second; from
front to back it reads large pieces. Training is a function of (seed, step) all the same,
on any number of processes that divides the number of streams.
"""

import itertools
import logging
import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from vit_jax.data import order
from vit_jax.data.examples import Image, Rows
from vit_jax.data.shards import (
    ARRAY_RECORD,
    FOOTER,
    HEADER,
    Record,
    Shards,
    array_record,
    binary,
    verified,
)
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

STREAMS = 64  # the most processes that can share a sequential read
# A lower bound, so that one record more or less hardly changes the range of a stream.
STREAM_RECORDS = 256
# Records that are shuffled together, over all processes, where the config leaves it open:
# as many batches, and not fewer records.
SHUFFLED_BATCHES, SHUFFLED_RECORDS = 16, 8192

Parse = Callable[[Record], tuple[Image, np.ndarray]]
Numbered = tuple[int, Record]


class TrainReader:
    """Shuffled training records, read front to back, yet a function of (seed, step).

    The records are cut into ``streams`` equal ranges, fewer where there are few. Stream
    v fills block v of every global batch, whichever process that belongs to. It passes
    over its own range again and again, each time in windows of ``buffer / streams``
    records that are shuffled. So any number of processes that divides ``streams`` sees
    the same batches, and each opens only its own part. To resume, whole windows are
    skipped by their headers.

    Args:
      buffer: records that are shuffled together over all processes; 0: 16 batches, but
        at least 8192.
    """

    def __init__(
        self,
        shards: Shards,
        parse: Parse,
        buffer: int,
        rows: np.ndarray,
        batch: int,
        seed: int,
    ):
        self.shards, self.parse, self.batch, self.seed = shards, parse, batch, seed
        self.local = rows
        self.buffer = buffer or max(SHUFFLED_RECORDS, SHUFFLED_BATCHES * batch)
        self.streams = math.gcd(batch, STREAMS)
        while self.streams > max(1, len(shards) // STREAM_RECORDS):
            self.streams //= 2
        self.block = batch // self.streams  # rows of a stream in a batch
        if len(rows) % self.block:
            raise UserError(
                f"a batch of {batch} of {len(shards)} records is read in sequence as "
                f"{self.streams} streams of at least {STREAM_RECORDS}, which "
                f"{batch // len(rows)} processes cannot share: use a number of "
                f"processes that divides {self.streams}, or set "
                "config.data.access=random"
            )
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
                f"none of the records from {self.shards.name(low)} to "
                f"{self.shards.name(high - 1)} can be read: write or copy them again"
            )
        number = low + _shuffled(attempt, high - low, key)
        return next(in_sequence(self.shards, number, number + 1))

    def _say(self, step: int, seconds: float, windows: list[list[Numbered]]) -> None:
        held = [record for w in windows for _, record in w]
        size = sum(len(r) for r in held if isinstance(r, bytes)) / 2**30
        log.info(
            "reading in sequence from step %d: %d streams here, %d records (%.2f GiB) "
            "shuffled together, first batch after %.1f s",
            step, len(windows), len(held), size, seconds,
        )  # fmt: skip
        samples = [w[:: -(-len(w) // 16)] for w in windows]
        labels = [{tuple(self.parse(r)[1]) for _, r in sample} for sample in samples]
        if all(
            len(s) > 7 and len(k) == 1 for s, k in zip(samples, labels, strict=True)
        ):
            log.warning(
                "records that are shuffled together all have the same label: shards "
                "sorted by class need config.data.access=random, or to be written again "
                "with python -m vit_jax.data.write_records"
            )

    def _bounds(self, v: int) -> tuple[int, int]:
        total = len(self.shards)
        return v * total // self.streams, (v + 1) * total // self.streams

    def _stream(
        self, v: int, position: int
    ) -> Iterator[tuple[int, Record, list[Numbered]]]:
        """(number, record, its window) from ``position`` of stream v on."""
        low, high = self._bounds(v)
        size = high - low
        width = max(1, min(size, self.buffer // self.streams))
        epoch, within = divmod(position, size)
        skip = within // width
        while True:
            key = order.hash64(self.seed, 0x736571, v, epoch)
            # Each pass starts somewhere else, so that windows hold other neighbours.
            shift = int(key[0] % np.uint64(size))
            records = self._range(low, high, shift, skip * width)
            for w in range(skip, -(-size // width)):
                window = list(itertools.islice(records, width))
                count = len(window)
                shuffled = order.permutation(
                    np.arange(count), count, order.hash64(key[0], w)
                )
                for i in shuffled[max(0, within - w * width) :]:
                    yield (*window[i], window)
                within = 0
            epoch, skip, within = epoch + 1, 0, 0

    def _range(self, low: int, high: int, shift: int, skip: int) -> Iterator[Numbered]:
        """Records [low, high) starting at low + shift and going round, less ``skip``."""
        size = high - low
        begin, left = (shift + skip) % size, size - skip
        for a, b in ((low + begin, high), (low, low + begin)):
            stop = min(b, a + left)
            yield from in_sequence(self.shards, a, stop)
            left -= stop - a


class EvalReader:
    """Each process evaluates a range of the records, in order, from step 0 on."""

    def __init__(self, shards: Shards, parse: Parse, rows: np.ndarray, batch: int):
        self.parse, self.count = parse, len(rows)
        processes, process = batch // len(rows), int(rows[0]) // len(rows)
        total = len(shards)
        self.low = process * total // processes
        self.high = (process + 1) * total // processes
        self.records = in_sequence(shards, self.low, self.high)

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
    shards: Shards,
    parse: Parse,
    buffer: int,
    rows: np.ndarray,
    batch: int,
    seed: int | None,
) -> TrainReader | EvalReader:
    """Of the rows of one process; ``seed`` is None for evaluation."""
    if seed is None:
        return EvalReader(shards, parse, rows, batch)
    return TrainReader(shards, parse, buffer, rows, batch, seed)


def in_sequence(shards: Shards, low: int, high: int) -> Iterator[Numbered]:
    """(number, record) for low <= number < high; what comes before is skipped by its
    headers, not read."""
    while low < high:
        shard = shards.shard_of(low)
        first, end = int(shards.starts[shard]), int(shards.starts[shard + 1])
        stop = min(high, end)
        one = _array_records if shards.format == ARRAY_RECORD else _tfrecords
        found = one(shards, shard, low - first, stop - first)
        yield from enumerate(found, low)
        low = stop


def _array_records(
    shards: Shards, shard: int, begin: int, stop: int
) -> Iterator[Record]:
    opened = shards.array_record(shard)
    return (array_record(opened, i) for i in range(begin, stop))


def _tfrecords(shards: Shards, shard: int, begin: int, stop: int) -> Iterator[Record]:
    shards.sidecar(shard)  # refuses a shard that is not the indexed one
    file, count = shards.files[shard], shards.counts[shard]
    with binary(file) as stream:
        for number in range(stop):
            header = stream.read(HEADER)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == HEADER else -1
            if length >= 0 and number < begin:
                stream.seek(stream.tell() + length + FOOTER)
                continue
            data = stream.read(length + FOOTER) if length >= 0 else b""
            if len(data) != length + FOOTER:
                raise UserError(
                    f"{file} is cut short at record {number} of {count}: copy it again"
                )
            yield verified(data)
        if stop == count and stream.read(1):
            raise UserError(
                f"{file} holds more than the {count} records that its index says: copy "
                "it again or write the records again"
            )


def _shuffled(index: int, size: int, key: np.ndarray) -> int:
    return int(order.permutation(np.array([index]), size, key)[0])
