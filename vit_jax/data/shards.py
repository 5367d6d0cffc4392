# SPDX-License-Identifier: Apache-2.0
"""The records of sharded TFRecord and ArrayRecord files, as bytes, by number.

``SHARD.npz`` beside a shard, where ``write_records`` made it, says where each record
begins and which labels it has. Reads are exact byte ranges and go out together, so that
a slow disk or a bucket is waited for once per batch, not once per record.
"""

import abc
import bisect
import functools
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np
import tensorstore

from vit_jax.data.examples import Labels, Unreadable
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

TFRECORD, ARRAY_RECORD = "tfrecord", "array_record"
FORMATS = (TFRECORD, ARRAY_RECORD)
HEADER = 12  # bytes before a TFRecord's data: its length and the checksum of that
FOOTER = 4  # bytes behind it: its checksum
DAMAGED = Unreadable("the record is damaged")
_TOGETHER = 32  # files read at the same time
_OPEN = 4096  # shards whose offsets, or readers, are kept

Record = bytes | Unreadable


class Files(abc.ABC):
    """The examples of several files as one list.

    Args:
      counts: examples in each file.
      unit: what an example of a file is called.
    """

    def __init__(self, files: Sequence[str], counts: Sequence[int], unit: str):
        self.files, self.counts, self._unit = files, counts, unit
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, index: int) -> str:
        file = self.file_of(index)
        return f"{self.files[file]}, {self._unit} {index - self.starts[file]}"

    def file_of(self, index: int) -> int:
        """Which file holds an example."""
        return bisect.bisect_right(self.starts, index) - 1

    @abc.abstractmethod
    def in_order(self, file: int, begin: int, stop: int) -> Iterator[Any]:
        """The examples [begin, stop) of a file, read from front to back."""


class Shards(Files):
    """The records of several files as one list.

    Args:
      counts: records in each file.
      fingerprints: what the sidecars must call themselves; (), or "" for one: anything.
      offsets: where the records of a file begin and the last one ends, for files that
        have been scanned.
    """

    def __init__(
        self,
        files: tuple[str, ...],
        counts: tuple[int, ...],
        format: str,
        fingerprints: tuple[str, ...] = (),
        offsets: Mapping[str, np.ndarray] | None = None,
    ):
        super().__init__(files, counts, "record")
        self.format = format
        self._fingerprints = fingerprints or ("",) * len(files)
        self._scanned = offsets or {}
        self._pool = ThreadPoolExecutor(_TOGETHER, "vit_jax shards")
        self._offsets = functools.lru_cache(maxsize=_OPEN)(self._load_offsets)
        self._reader = functools.lru_cache(maxsize=256)(
            functools.partial(self.array_record, options=_AT_RANDOM)
        )

    def read(self, index: np.ndarray) -> list[Record]:
        """Records by number.

        Raises:
          UserError: a shard and its index disagree.
        """
        shards = np.searchsorted(self.starts, index, side="right") - 1
        numbers = (index - self.starts[shards]).tolist()
        wanted: dict[int, list[int]] = {}
        for row, shard in enumerate(shards.tolist()):
            wanted.setdefault(shard, []).append(row)
        read = self._array_records if self.format == ARRAY_RECORD else self._start
        within = [[numbers[row] for row in rows] for rows in wanted.values()]
        result: list[Any] = [DAMAGED] * len(index)
        found = self._pool.map(read, wanted, within)
        for rows, records in zip(wanted.values(), found, strict=True):
            for row, record in zip(rows, records, strict=True):
                result[row] = record
        if self.format == TFRECORD:
            return [
                self._finish(int(shard), i, frame)
                for shard, i, frame in zip(shards, numbers, result, strict=True)
            ]
        return result

    def in_order(self, file: int, begin: int, stop: int) -> Iterator[Record]:
        if self.format == TFRECORD:
            yield from self._tfrecords(file, begin, stop)
        else:
            opened = self.array_record(file)
            yield from (array_record(opened, i) for i in range(begin, stop))

    def labels(self) -> Labels | None:
        """All labels, from the ``.npz`` files; None where there are none.

        Raises:
          UserError: some are missing, or one does not belong to its shard.
        """
        found = list(self._pool.map(self.sidecar, range(len(self.files))))
        missing = [f for f, s in zip(self.files, found, strict=True) if s is None]
        sidecars = [s for s in found if s is not None]
        if not sidecars:
            return None
        if missing:
            raise UserError(
                f"{missing[0]}.npz, which holds the classes of its records, is missing: "
                "copy it again or write the records again; without it "
                "config.data.subset_balanced=False still draws a subset, and a test "
                "split of its own replaces config.data.holdout and test_share"
            )
        for shard, sidecar in enumerate(sidecars):
            self.check_count(shard, len(sidecar["label_counts"]))
        counts = np.concatenate([[0], *(s["label_counts"] for s in sidecars)])
        values = np.concatenate([s["labels"] for s in sidecars])
        return Labels(values, np.cumsum(counts, dtype=np.int64))

    def sidecar(self, shard: int) -> dict[str, np.ndarray] | None:
        """What lies beside a shard.

        Raises:
          UserError: it cannot be read, or belongs to another shard than the indexed one.
        """
        found = read_sidecar(self.files[shard])
        expected = self._fingerprints[shard]
        if found and expected and str(found["fingerprint"]) != expected:
            raise UserError(
                f"{self.files[shard]} is not the shard that its index lists: it was "
                "written or copied at another time; write the records again"
            )
        return found

    def array_record(self, shard: int, options: str = "") -> Any:
        """A reader of one ArrayRecord shard, which is the one that was indexed."""
        self.sidecar(shard)
        reader = open_array_record(self.files[shard], options)
        self.check_count(shard, reader.num_records())
        return reader

    def check_count(self, shard: int, found: int) -> None:
        if found != self.counts[shard]:
            raise UserError(
                f"{self.files[shard]} holds {found} records, but its index says "
                f"{self.counts[shard]}: copy it again or write the records again"
            )

    def _tfrecords(self, shard: int, begin: int, stop: int) -> Iterator[Record]:
        self.sidecar(shard)  # refuses a shard that is not the indexed one
        file, count = self.files[shard], self.counts[shard]
        with binary(file) as stream:
            for number in range(stop):
                header = stream.read(HEADER)
                length = (
                    struct.unpack("<Q", header[:8])[0] if len(header) == HEADER else -1
                )
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

    def _start(self, shard: int, within: list[int]) -> list[Any]:
        """Asks for some TFRecords of a shard; returns what will hold their bytes."""
        offsets, file = self._offsets(shard), self.files[shard]
        return [ask(file, int(offsets[i]), int(offsets[i + 1])) for i in within]

    def _finish(self, shard: int, number: int, reading: Any) -> Record:
        frame = answer(self.files[shard], reading)
        length = len(frame) - HEADER - FOOTER
        if length < 0 or struct.unpack("<Q", frame[:8])[0] != length:
            raise UserError(
                f"{self.files[shard]} does not match its index at record {number}: it "
                "was cut short or replaced; copy it again or write the records again"
            )
        return verified(frame[HEADER:])

    def _array_records(self, shard: int, within: list[int]) -> list[Record]:
        reader = self._reader(shard)
        try:
            return reader.read(within)
        except RuntimeError:  # one of them is damaged
            return [array_record(reader, i) for i in within]

    def _load_offsets(self, shard: int) -> np.ndarray:
        file = self.files[shard]
        sidecar = self.sidecar(shard)
        if sidecar is not None:
            offsets = sidecar["offsets"]
        elif file in self._scanned:
            offsets = self._scanned[file]
        else:
            offsets = scan(file)
        self.check_count(shard, len(offsets) - 1)
        return offsets


_SIDECAR = ("offsets", "labels", "label_counts", "bytes", "fingerprint")


def read_sidecar(file: str) -> dict[str, np.ndarray] | None:
    """Arrays of the ``.npz`` file beside a shard; None where there is none.

    Raises:
      UserError: it is cut short or lacks one of them.
    """
    sidecar = file + ".npz"
    if not tf.io.gfile.exists(sidecar):
        return None
    try:
        with tf.io.gfile.GFile(sidecar, "rb") as stream, np.load(stream) as data:
            return {k: data[k] for k in {*_SIDECAR, *data.files}}
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as e:
        raise UserError(
            f"{sidecar} cannot be read ({type(e).__name__}): copy it again or write "
            "the records again"
        ) from e


def scan(file: str) -> np.ndarray:
    """Where the records of a TFRecord file begin, and where the last one ends.

    Reads the 12-byte headers only.

    Raises:
      UserError: the file ends in the middle of a record.
    """
    size = tf.io.gfile.stat(file).length
    offsets, at = [0], 0
    with binary(file) as stream:
        while at < size:
            stream.seek(at)
            header = stream.read(HEADER)
            whole = len(header) == HEADER
            length = struct.unpack("<Q", header[:8])[0] if whole else size
            at += HEADER + length + FOOTER
            if at > size:
                raise UserError(
                    f"{file} is cut short: record {len(offsets) - 1} ends beyond the "
                    f"{size} bytes of the file; copy it again"
                )
            offsets.append(at)
    return np.array(offsets, np.int64)


_AT_RANDOM = "readahead_buffer_size:0,max_parallelism:0"


def open_array_record(file: str, options: str = "") -> Any:
    """A reader of an ArrayRecord file."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as e:
        raise UserError(
            f"{file} needs the package array_record: pip install array_record, or "
            "write the data with --format=tfrecord"
        ) from e
    try:
        return ArrayRecordReader(file, options)
    except (ValueError, RuntimeError, OSError) as e:
        raise UserError(f"{file} cannot be opened: {str(e).splitlines()[0]}") from e


def array_record(reader: Any, index: int) -> Record:
    """One record of an ArrayRecord file."""
    try:
        return reader.read([index])[0]
    except RuntimeError:
        return DAMAGED


def verified(data: bytes) -> Record:
    """The data of a TFRecord, less the masked CRC-32C at its end: without it, a flipped
    bit in a label would go unnoticed."""
    crc = google_crc32c.value(data[:-FOOTER])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    stored = struct.unpack("<I", data[-FOOTER:])[0]
    return data[:-FOOTER] if masked == stored else DAMAGED


def is_remote(path: str) -> bool:
    return "://" in path


def binary(file: str) -> Any:
    """A stream of bytes, local or remote."""
    return tf.io.gfile.GFile(file, "rb") if is_remote(file) else open(file, "rb")


def ask(file: str, start: int, stop: int) -> Any:
    """Asks for a range of bytes; ``answer`` waits for them. Many can be under way."""
    folder, name = os.path.split(file)
    return _store(folder).read(name, byte_range=slice(start, stop))


def answer(file: str, asked: Any) -> bytes:
    """The bytes that were asked for; b"" where the file ends before them."""
    try:
        return asked.result().value
    except Exception as e:  # of many kinds
        if "OUT_OF_RANGE" in str(e):
            return b""
        text = str(e).splitlines()[0][:200]
        raise UserError(f"{file} cannot be read: {text}") from e


@functools.lru_cache(maxsize=64)
def _store(folder: str) -> Any:
    """What reads byte ranges of the files of a folder, many at a time."""
    where: Any = {"driver": "file", "path": os.path.abspath(folder) + "/"}
    try:
        return tensorstore.KvStore.open(
            folder + "/" if is_remote(folder) else where
        ).result()
    except ValueError as e:
        raise UserError(
            f"{folder} cannot be read at random ({str(e).splitlines()[0][:200]}): copy "
            "the shards to a local disk or to gs://"
        ) from e
