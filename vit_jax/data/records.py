# SPDX-License-Identifier: Apache-2.0
"""Sharded TFRecord and ArrayRecord files, read in any order or in sequence.

Each record is a ``tf.train.Example`` with an encoded image and any number of labels.
``write_records`` lays a split out as

    train-00000-of-00064.tfrecord            the records, in random order
    train-00000-of-00064.tfrecord.npz        where each begins, and its labels
    train.json                               counts, class names, size of every shard

Shards made elsewhere work as well: without the ``.npz`` files the record headers are
scanned once (local files), or the shards are read in sequence (``gs://``).
"""

import bisect
import collections
import dataclasses
import functools
import json
import logging
import math
import os
import re
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import order
from vit_jax.data.examples import (
    Dataset,
    Labels,
    Rows,
    Split,
    check_class_names,
    held_out,
)
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

TFRECORD, ARRAY_RECORD = "tfrecord", "array_record"
FORMATS = (TFRECORD, ARRAY_RECORD)
IMAGE_KEY, LABEL_KEY, NAME_KEY = "image/encoded", "image/class/label", "image/filename"
TEST_SPLITS = ("test", "val", "validation", "valid")
STREAMS = 64  # of a sequential read: the most processes that can share it
STREAM_RECORDS = 256  # at least: ranges that differ by one record must not differ much
_LABEL_KEYS = (LABEL_KEY, "label", "labels", "image/label", "image/labels")
_FRAME = 16  # bytes around a TFRecord: length, its checksum, (data,) its checksum
_DAMAGED = b"the record is damaged"  # cannot be parsed: a bad example, with a reason


def load(cfg: DataConfig) -> Dataset:
    """The record set under ``cfg.path``."""
    if not cfg.path:
        raise UserError(
            "data.source is 'records' but data.path is empty: set --config.data.path "
            "to a folder with .tfrecord or .array_record files"
        )
    root = cfg.path if "://" in cfg.path else os.path.expanduser(cfg.path)
    if not tf.io.gfile.isdir(root):
        raise UserError(
            f"data.path {cfg.path!r} is not a folder: it must hold .tfrecord or "
            ".array_record files, such as vit_jax.data.write_records makes"
        )
    known = _splits(root)
    wanted = cfg.test_split
    candidates = (wanted,) if wanted not in ("", "test") else TEST_SPLITS
    test_name = next((n for n in candidates if n in known), "")
    by_class = bool(cfg.holdout or (cfg.subset and cfg.subset_balanced))
    by_class |= not test_name
    index, train = _read_split(cfg, root, cfg.train_split, known, by_class)
    if test_name:
        test_index, test = _read_split(cfg, root, test_name, known)
        if test_index.class_names != index.class_names:
            raise UserError(
                f"{root}: the splits {cfg.train_split!r} and {test_name!r} have "
                "different class names: write both again from the same data"
            )
    elif wanted not in ("", "test"):
        raise UserError(
            f"data.test_split is {wanted!r}, but {root} has only {sorted(known)}"
        )
    elif train.sequence is not None:
        raise UserError(
            f"{root} has no test split, and none can be held out of shards that are "
            "read in sequence: add one, or set --config.data.access=random"
        )
    else:
        rest, out = held_out(train, cfg.test_share)
        train, test = train.select(rest), train.select(out)
    return Dataset(
        train,
        test,
        index.class_names,
        index.multilabel,
        splits=lambda name: _read_split(cfg, root, name, known)[1],
    )


@dataclasses.dataclass(frozen=True)
class Index:
    """What ``SPLIT.json`` says."""

    format: str
    files: tuple[str, ...]
    counts: tuple[int, ...]  # examples per shard
    sizes: tuple[int, ...]  # bytes per shard
    class_names: tuple[str, ...]
    multilabel: bool
    image_key: str = IMAGE_KEY
    label_key: str = LABEL_KEY
    fingerprints: tuple[str, ...] = ()  # of the shards; () or "": not known


class Shards:
    """The records of several files as one list."""

    def __init__(
        self,
        files: tuple[str, ...],
        counts: tuple[int, ...],
        format: str,
        fingerprints: tuple[str, ...] = (),
    ):
        self.files, self.counts, self.format = files, counts, format
        self.fingerprints = fingerprints or ("",) * len(files)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.check = functools.lru_cache(maxsize=None)(self._check)
        self._offsets = functools.lru_cache(maxsize=None)(self._load_offsets)
        self._pool = ThreadPoolExecutor(32) if _is_remote(files[0]) else None
        self._open = functools.lru_cache(maxsize=256)(self._open_file)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, index: np.ndarray) -> np.ndarray:
        """Records by number, object (n,) of bytes.

        Raises:
          UserError: a shard and its index disagree.
        """
        shard = np.searchsorted(self.starts, index, side="right") - 1
        result = np.empty(len(index), object)
        if self.format == ARRAY_RECORD:
            for s in np.unique(shard):
                rows = np.flatnonzero(shard == s)
                within = (index[rows] - self.starts[s]).tolist()
                result[rows] = self._array_records(int(s), within)
            return result
        where = [(int(s), int(i - self.starts[s])) for s, i in zip(shard, index)]  # noqa: B905
        mapped = self._pool.map if self._pool else map
        for row, record in enumerate(mapped(self._tfrecord, where)):
            result[row] = record
        return result

    def name(self, index: int) -> str:
        shard = bisect.bisect_right(self.starts, index) - 1
        return f"{self.files[shard]}, record {index - self.starts[shard]}"

    def labels(self) -> Labels | None:
        """All labels, from the ``.npz`` files; None where there are none.

        Raises:
          UserError: some are missing, or one does not belong to its shard.
        """
        parts, missing = [], []
        for shard, file in enumerate(self.files):
            found = read_sidecar(file, "labels", "label_counts", "fingerprint")
            if found is None:
                missing.append(file)
                continue
            values, counts, fingerprint = found
            self._check_fingerprint(shard, fingerprint)
            self._check_count(shard, len(counts))
            parts.append((values, counts))
        if not parts:
            return None
        if missing:
            raise UserError(
                f"{missing[0]}.npz, which holds the classes of its records, is missing: "
                "copy it again or write the records again; without it "
                "--config.data.subset_balanced=False still draws a subset, and a test "
                "split of its own replaces data.holdout and data.test_share"
            )
        starts = np.cumsum(np.concatenate([[0], *(c for _, c in parts)]))
        return Labels(np.concatenate([v for v, _ in parts]), starts.astype(np.int64))

    def array_record(self, shard: int) -> Any:
        """A reader of one ArrayRecord shard, which is the one that was indexed."""
        self.check(shard)
        reader = open_array_record(self.files[shard])
        self._check_count(shard, reader.num_records())
        return reader

    def _tfrecord(self, where: tuple[int, int]) -> bytes:
        shard, i = where
        offsets = self._offsets(shard)
        begin, end = int(offsets[i]), int(offsets[i + 1])
        frame = self._pread(shard, begin, end - begin)
        length = end - begin - _FRAME
        if len(frame) != end - begin or struct.unpack("<Q", frame[:8])[0] != length:
            raise UserError(
                f"{self.files[shard]} does not match its index at record {i}: it was "
                "cut short or replaced; copy it again or write the records again"
            )
        return _verified(frame[12:])

    def _pread(self, shard: int, begin: int, length: int) -> bytes:
        if self._pool is None:
            return self._open(shard).read(begin, length)
        with tf.io.gfile.GFile(self.files[shard], "rb") as stream:
            stream.seek(begin)
            return stream.read(length)

    def _array_records(self, shard: int, within: list[int]) -> list[bytes]:
        reader = self._open(shard)
        try:
            return reader.read(within)
        except RuntimeError:  # one of them is damaged
            return [_array_record(reader, i) for i in within]

    def _open_file(self, shard: int) -> Any:
        if self.format == ARRAY_RECORD:
            return self.array_record(shard)
        return _File(self.files[shard])

    def _load_offsets(self, shard: int) -> np.ndarray:
        self.check(shard)
        found = read_sidecar(self.files[shard], "offsets")
        offsets = found[0] if found else scan(self.files[shard])
        self._check_count(shard, len(offsets) - 1)
        return offsets

    def _check(self, shard: int) -> None:
        """Refuses a shard that is not the one that the index lists."""
        if self.fingerprints[shard]:
            found = read_sidecar(self.files[shard], "fingerprint")
            if found is not None:
                self._check_fingerprint(shard, found[0])

    def _check_fingerprint(self, shard: int, found: np.ndarray) -> None:
        if self.fingerprints[shard] not in ("", str(found)):
            raise UserError(
                f"{self.files[shard]} is not the shard that its index lists: it was "
                "written or copied at another time; write the records again"
            )

    def _check_count(self, shard: int, found: int) -> None:
        if found != self.counts[shard]:
            raise UserError(
                f"{self.files[shard]} holds {found} records, but its index says "
                f"{self.counts[shard]}: copy it again or write the records again"
            )


def read_sidecar(file: str, *keys: str) -> list[np.ndarray] | None:
    """Arrays of the ``.npz`` file beside a shard; None where there is none.

    Raises:
      UserError: it is cut short or lacks one of them.
    """
    sidecar = file + ".npz"
    if not tf.io.gfile.exists(sidecar):
        return None
    try:
        with tf.io.gfile.GFile(sidecar, "rb") as stream, np.load(stream) as data:
            return [data[k] for k in keys]
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as e:
        raise UserError(
            f"{sidecar} cannot be read ({type(e).__name__}): copy it again or write "
            "the records again"
        ) from e


class _File:
    """A local file that several threads read from; closed when nobody needs it."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, begin: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, begin)

    def __del__(self) -> None:
        os.close(self._descriptor)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Shards that are only read from front to back."""

    shards: Shards
    buffer: int  # records that are shuffled together, over all processes

    def reader(self, batch: int, rows: np.ndarray, seed: int | None) -> Any:
        if seed is None:
            return _EvalReader(self, batch, rows)
        return _TrainReader(self, batch, rows, seed)


def scan(file: str) -> np.ndarray:
    """Where the records of a TFRecord file begin, and where the last one ends.

    Reads the 12-byte headers only.

    Raises:
      UserError: the file ends in the middle of a record.
    """
    size = tf.io.gfile.stat(file).length
    offsets, at = [0], 0
    with _binary(file) as stream:
        while at < size:
            stream.seek(at)
            header = stream.read(12)
            at += _FRAME + (
                struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
            )
            if at > size:
                raise UserError(
                    f"{file} is cut short: record {len(offsets) - 1} ends beyond the "
                    f"{size} bytes of the file; copy it again"
                )
            offsets.append(at)
    return np.array(offsets, np.int64)


def open_array_record(file: str) -> Any:
    """A reader of an ArrayRecord file."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as e:
        raise UserError(
            f"{file} needs the package array_record: pip install array_record, or "
            "write the data with --format=tfrecord"
        ) from e
    try:
        return ArrayRecordReader(file)
    except (ValueError, RuntimeError, OSError) as e:
        raise UserError(f"{file} cannot be opened: {str(e).splitlines()[0]}") from e


def _verified(data: bytes) -> bytes:
    """A TFRecord without the checksum at its end, a masked CRC-32C; a flipped bit of a
    label would be read without a word."""
    crc = google_crc32c.value(data[:-4])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    return data[:-4] if masked == struct.unpack("<I", data[-4:])[0] else _DAMAGED


def _array_record(reader: Any, index: int) -> bytes:
    try:
        return reader.read([index])[0]
    except RuntimeError:
        return _DAMAGED


# --------------------------------------------------------------------- in sequence


class _TrainReader:
    """Shuffled training records, read front to back, yet a function of (seed, step).

    The records are cut into ``streams`` equal ranges, fewer where there are few. Stream v fills block v of every
    global batch, whichever process that belongs to; it passes over its own range again
    and again, each time in windows of ``buffer / streams`` records that are shuffled.
    So any number of processes that divides ``streams`` sees the same batches and each
    opens only its own part. To resume, whole windows are skipped by their headers.
    """

    def __init__(self, source: Sequence, batch: int, rows: np.ndarray, seed: int):
        self.source, self.batch, self.local, self.seed = source, batch, rows, seed
        self.streams = math.gcd(batch, STREAMS)
        while self.streams > max(1, len(source.shards) // STREAM_RECORDS):
            self.streams //= 2
        self.block = batch // self.streams
        if len(rows) % self.block:
            raise UserError(
                f"a batch of {batch} of {len(source.shards)} records is read in "
                f"sequence as {self.streams} streams of at least {STREAM_RECORDS}, "
                f"which {batch // len(rows)} processes cannot share: use a number of "
                f"processes that divides {self.streams}, or "
                "--config.data.access=random"
            )
        share = len(rows) / batch
        files = source.shards.files
        mean = sum(tf.io.gfile.stat(f).length for f in files[:4]) / max(
            sum(source.shards.counts[:4]), 1
        )
        log.info(
            "reading in sequence: %d streams here, about %.2f GiB of records shuffled",
            round(self.streams * share),
            min(source.buffer, len(source.shards)) * share * mean / 2**30,
        )
        self.recent: collections.OrderedDict[int, tuple] = collections.OrderedDict()
        self.iterators: list[Iterator] = []

    def rows(self, step: int, unusable: Callable[[np.ndarray], np.ndarray]) -> Rows:
        index, record, windows = self._drawn(step)
        position = step * self.batch + self.local
        attempt = 0
        while (left := np.flatnonzero(unusable(index))).size:
            for row in left.tolist():
                window = windows[row // self.block]
                index[row], record[row] = self._substitute(
                    int(position[row]), window, attempt
                )
            attempt += 1
        return Rows(position, index, np.ones(len(index), bool), record)

    def _substitute(
        self, position: int, window: list, attempt: int
    ) -> tuple[int, bytes]:
        """What stands in for an unreadable record, attempt by attempt: all of its window
        in an order that follows from the position, then all of its stream.

        Which are unreadable plays no part: it may become known only later.
        """
        key = order.hash64(self.seed, 0x737562, position)
        if attempt < len(window):
            return window[_shuffled(attempt, len(window), key)]
        low, high = self._bounds(position % self.batch // self.block)
        attempt -= len(window)
        if attempt >= high - low:
            shards = self.source.shards
            raise UserError(
                f"none of the records from {shards.name(low)} to "
                f"{shards.name(high - 1)} can be read: write or copy them again"
            )
        number = low + _shuffled(attempt, high - low, key)
        return next(_in_sequence(self.source.shards, number, number + 1))

    def _drawn(self, step: int) -> tuple[np.ndarray, np.ndarray, list]:
        """(index, record, window of each stream) of a step.

        Steps come in order; a batch that is done over asks for the last few again.
        """
        if step not in self.recent:
            if not self.recent or step != next(reversed(self.recent)) + 1:
                self._start(step)
            started, first = time.monotonic(), not self.recent
            index = np.empty(len(self.local), np.int64)
            record = np.empty(len(self.local), object)
            windows = []
            for s, iterator in enumerate(self.iterators):
                window: list = []
                for row in range(s * self.block, (s + 1) * self.block):
                    index[row], record[row], window = next(iterator)
                windows.append(window)
            self.recent[step] = index, record, windows
            if first:  # the first batch waits for the skipping and for full windows
                log.info(
                    "reading in sequence from step %d: first batch after %.1f s",
                    step,
                    time.monotonic() - started,
                )
            while len(self.recent) > 16:
                self.recent.popitem(last=False)
        index, record, windows = self.recent[step]
        return index.copy(), record.copy(), windows

    def _start(self, step: int) -> None:
        self.recent.clear()
        first = int(self.local[0]) // self.block
        self.iterators = [
            self._stream(v, step * self.block)
            for v in range(first, first + len(self.local) // self.block)
        ]

    def _bounds(self, v: int) -> tuple[int, int]:
        total = len(self.source.shards)
        return v * total // self.streams, (v + 1) * total // self.streams

    def _stream(self, v: int, position: int) -> Iterator[tuple[int, bytes, list]]:
        """(index, record, its window) from ``position`` of stream v on."""
        low, high = self._bounds(v)
        size = high - low
        width = max(1, min(size, self.source.buffer // self.streams))
        epoch, within = divmod(position, size)
        skip = within // width
        while True:
            key = order.hash64(self.seed, 0x736571, v, epoch)
            # Each pass starts somewhere else, so that windows hold other neighbours.
            shift = int(key[0] % np.uint64(size))
            records = self._range(low, high, shift, skip * width)
            for w in range(skip, -(-size // width)):
                count = min(width, size - w * width)
                window = [next(records) for _ in range(count)]
                shuffled = order.permutation(
                    np.arange(count), count, order.hash64(key[0], w)
                )
                for i in shuffled[max(0, within - w * width) :]:
                    yield (*window[i], window)
                within = 0
            epoch, skip, within = epoch + 1, 0, 0

    def _range(
        self, low: int, high: int, shift: int, skip: int
    ) -> Iterator[tuple[int, bytes]]:
        """Records [low, high) starting at low + shift and going round, less ``skip``."""
        size = high - low
        begin, left = (shift + skip) % size, size - skip
        for a, b in ((low + begin, high), (low, low + begin)):
            stop = min(b, a + left)
            yield from _in_sequence(self.source.shards, a, stop)
            left -= stop - a


class _EvalReader:
    """Each process evaluates a range of the records, in order."""

    def __init__(self, source: Sequence, batch: int, rows: np.ndarray):
        self.shards, self.local = source.shards, rows
        processes, process = batch // len(rows), int(rows[0]) // len(rows)
        total = len(source.shards)
        self.low = process * total // processes
        self.high = (process + 1) * total // processes
        self.recent: collections.OrderedDict[int, np.ndarray] = (
            collections.OrderedDict()
        )
        self.iterator: Iterator[tuple[int, bytes]] = iter(())
        self.next_step = -1

    def rows(self, step: int, unusable: Callable[[np.ndarray], np.ndarray]) -> Rows:
        index = self.low + step * len(self.local) + np.arange(len(self.local))
        use = index < self.high
        if step not in self.recent:
            if step != self.next_step:
                self.iterator = _in_sequence(
                    self.shards, min(int(index[0]), self.high), self.high
                )
            drawn = np.full(len(index), b"", object)
            drawn[use] = [next(self.iterator)[1] for _ in range(use.sum())]
            self.recent[step], self.next_step = drawn, step + 1
            while len(self.recent) > 16:
                self.recent.popitem(last=False)
        use &= ~unusable(index)
        return Rows(index, np.where(use, index, 0), use, self.recent[step][use])


def _shuffled(index: int, size: int, key: np.ndarray) -> int:
    return int(order.permutation(np.array([index]), size, key)[0])


def _in_sequence(shards: Shards, low: int, high: int) -> Iterator[tuple[int, bytes]]:
    """(number, record) for low <= number < high; what comes before is skipped by its
    headers, not read."""
    while low < high:
        shard = bisect.bisect_right(shards.starts, low) - 1
        first, end = int(shards.starts[shard]), int(shards.starts[shard + 1])
        stop = min(high, end)
        file = shards.files[shard]
        if shards.format == ARRAY_RECORD:
            reader = shards.array_record(shard)
            for i in range(low - first, stop - first):
                yield first + i, _array_record(reader, i)
        else:
            shards.check(shard)
            with _binary(file) as stream:
                for number in range(first, stop):
                    header = stream.read(12)
                    length = (
                        struct.unpack("<Q", header[:8])[0] if len(header) == 12 else -1
                    )
                    if number < low:
                        stream.seek(stream.tell() + length + 4)
                        continue
                    data = stream.read(length + 4) if length >= 0 else b""
                    if len(data) != length + 4:
                        raise UserError(
                            f"{file} is cut short at record {number - first} of "
                            f"{end - first}: copy it again"
                        )
                    yield number, _verified(data)
                if stop == end and stream.read(1):
                    raise UserError(
                        f"{file} holds more than the {end - first} records that its "
                        "index says: copy it again or write the records again"
                    )
        low = stop


# ------------------------------------------------------------------------- discovery


def _read_split(
    cfg: DataConfig,
    root: str,
    name: str,
    known: dict[str, list[str]],
    by_class: bool = False,
) -> tuple[Index, Split]:
    """``by_class``: the labels are needed to choose among the examples."""
    if name not in known:
        raise UserError(f"unknown split {name!r}: {root} has {sorted(known)}")
    index_file = os.path.join(root, name + ".json")
    if tf.io.gfile.exists(index_file):
        index = read_index(index_file)
        _check(index, index_file)
    else:
        index = _without_index(cfg, known[name])
    shards = Shards(index.files, index.counts, index.format, index.fingerprints)
    remote = _is_remote(root)
    scanned = index.format == TFRECORD and not tf.io.gfile.exists(
        index.files[0] + ".npz"
    )
    sequential = cfg.access == "sequential" or (
        cfg.access == "auto" and remote and scanned
    )
    labels = shards.labels() if by_class and not sequential else None
    split = Split(
        len(shards),
        "record",
        shards.read,
        shards.name,
        labels,
        parse=_parser(index.image_key, index.label_key),
        sequence=Sequence(shards, cfg.shuffle_buffer or 8192) if sequential else None,
    )
    if sequential and (cfg.subset or cfg.holdout):
        raise UserError(
            "data.subset and data.holdout need random access to the records: set "
            "--config.data.access=random"
        )
    return index, split


def read_index(file: str) -> Index:
    """Reads ``SPLIT.json``."""
    with tf.io.gfile.GFile(file, "rb") as stream:
        content = stream.read()
    try:
        data = json.loads(content)
        shards = data["shards"]
        root = os.path.dirname(file)
        names = check_class_names(data["class_names"], file)
        index = Index(
            format=data["format"],
            files=tuple(os.path.join(root, s["file"]) for s in shards),
            counts=tuple(int(s["examples"]) for s in shards),
            sizes=tuple(int(s["bytes"]) for s in shards),
            class_names=names,
            multilabel=bool(data["multilabel"]),
            image_key=data.get("image_key", IMAGE_KEY),
            label_key=data.get("label_key", LABEL_KEY),
            fingerprints=tuple(s.get("fingerprint", "") for s in shards),
        )
        if index.format not in FORMATS or min(index.counts, default=0) < 0:
            raise ValueError(f"format {index.format!r}, counts {index.counts}")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{file} is not an index of records ({type(e).__name__}: {e}): write the "
            "records again with python -m vit_jax.data.write_records"
        ) from e
    if sum(index.counts) != data.get("examples", sum(index.counts)):
        raise UserError(
            f"{file} contradicts itself: its shards hold {sum(index.counts)} examples, "
            f"but it says {data['examples']}"
        )
    return index


def _check(index: Index, file: str) -> None:
    """Refuses shards that are missing, cut short or not those of the index."""
    if not index.files or not sum(index.counts):
        raise UserError(f"{file} lists no examples")
    for shard, size in zip(index.files, index.sizes, strict=True):
        if not tf.io.gfile.exists(shard):
            raise UserError(f"{shard}, which {file} lists, does not exist")
        found = tf.io.gfile.stat(shard).length
        if found != size:
            what = "is cut short" if found < size else "is not the one that was indexed"
            raise UserError(
                f"{shard} {what}: it has {found} bytes, but {file} says {size}; copy "
                "it again or write the records again"
            )


_OF = re.compile(r"-of-(\d+)")
_SHARD = re.compile(
    r"(?P<split>.*?)-\d+(-of-\d+)?\.?(?P<format>tfrecords?|array_?record)?$"
    r"|(?P<plain>.*)\.(?P<kind>tfrecords?|array_?record)(-\d+-of-\d+)?$"
)


def _splits(root: str) -> dict[str, list[str]]:
    """Split name -> its shard files, by file name (or by index, where there is one)."""
    found: dict[str, list[str]] = {}
    names = sorted(tf.io.gfile.listdir(root))
    for name in names:
        match = _SHARD.match(name.rstrip("/"))
        if match and not name.endswith((".json", ".npz", ".tmp")):
            split = match["split"] or match["plain"] or "train"
            # tfds calls its files SET-SPLIT.tfrecord-00000-of-00001
            split = split.split(".")[0].rsplit("-", 1)[-1] or "train"
            found.setdefault(split, []).append(os.path.join(root, name))
    for name in names:
        if name.endswith(".json"):
            found.setdefault(name[: -len(".json")], [])
    found = {s: f for s, f in found.items() if f or s + ".json" in names}
    if not any(found.values()):
        raise UserError(
            f"{root} holds no .tfrecord or .array_record files: make some with "
            "python -m vit_jax.data.write_records"
        )
    return found


def _without_index(cfg: DataConfig, files: list[str]) -> Index:
    """What can be told of shards that somebody else wrote."""
    if not cfg.num_classes:
        raise UserError(
            f"{os.path.dirname(files[0])} has no index that says how many classes there "
            "are: set --config.data.num_classes, or write the data again with python "
            "-m vit_jax.data.write_records"
        )
    totals = {int(m[1]) for f in files if (m := _OF.search(os.path.basename(f)))}
    if totals and totals != {len(files)}:
        raise UserError(
            f"{os.path.dirname(files[0])} holds {len(files)} shards such as "
            f"{os.path.basename(files[0])}, but their names say that there are "
            f"{' or '.join(str(t) for t in sorted(totals))}: copy those that are "
            "missing, or remove what is left of another set"
        )
    array = "array" in os.path.basename(files[0])
    if array:
        counts = [open_array_record(f).num_records() for f in files]
        if 0 in counts:  # what is cut short looks like this as well
            raise UserError(
                f"{files[counts.index(0)]} holds no records: copy it again or remove it"
            )
    else:
        started = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            counts = [len(o) - 1 for o in pool.map(scan, files)]
        log.info(
            "counted %d records in %.1f s", sum(counts), time.monotonic() - started
        )
    format = ARRAY_RECORD if array else TFRECORD
    first = Shards((files[0],), (counts[0],), format).read(np.array([0]))[0]
    image_key, label_key, several = _keys(first, files[0])
    return Index(
        format,
        tuple(files),
        tuple(counts),
        (),
        tuple(str(i) for i in range(cfg.num_classes)),
        several or cfg.name == "multilabel",
        image_key,
        label_key,
    )


def _keys(record: bytes, file: str) -> tuple[str, str, bool]:
    """(image key, label key, several labels) of a record whose layout is unknown."""
    try:
        features = tf.train.Example.FromString(record).features.feature
    except Exception as e:  # protobuf's DecodeError has no stable home
        raise UserError(f"{file} does not hold tf.train.Example records") from e
    images = [k for k, v in features.items() if _is_image(v.bytes_list.value)]
    labels = [k for k, v in features.items() if len(v.int64_list.value)]
    label = next((k for k in _LABEL_KEYS if k in labels), "")
    label = label or next((k for k in sorted(labels) if "label" in k), "")
    if len(images) != 1 or not label:
        raise UserError(
            f"{file}: cannot tell the image and the label apart in records with the "
            f"features {sorted(features)}: call them {IMAGE_KEY!r} and {LABEL_KEY!r}"
        )
    return images[0], label, len(features[label].int64_list.value) > 1


_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF")


def _is_image(values: Any) -> bool:
    return len(values) == 1 and values[0].startswith(_MAGIC)


def _parser(image_key: str, label_key: str) -> Any:
    def parse(record: Any) -> tuple[Any, Any]:
        features = tf.io.parse_single_example(
            record,
            {
                image_key: tf.io.FixedLenFeature([], tf.string),
                label_key: tf.io.VarLenFeature(tf.int64),
            },
        )
        return features[image_key], features[label_key].values

    return parse


def _is_remote(path: str) -> bool:
    return "://" in path


def _binary(file: str) -> Any:
    return tf.io.gfile.GFile(file, "rb") if _is_remote(file) else open(file, "rb")
