# SPDX-License-Identifier: Apache-2.0
"""The records of sharded TFRecord and ArrayRecord files, as bytes, by number.

``SHARD.npz`` beside a shard, where ``write_records`` made it, says where each record
begins and which labels it has. Reads are exact byte ranges and go out together, so that
a slow disk or a bucket is waited for once per batch, not once per record.
"""

import abc
import ast
import bisect
import contextlib
import functools
import io
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np

from vit_jax.data.examples import Labels, Unreadable
from vit_jax.data.storage import (
    again,
    answer,
    ask,
    at_once,
    binary,
    in_order,
    stat,
    tail,
    timed,
    whole,
)
from vit_jax.errors import UserError

TFRECORD, ARRAY_RECORD = "tfrecord", "array_record"
FORMATS = (TFRECORD, ARRAY_RECORD)
HEADER = 12  # bytes before a TFRecord's data: its length and the checksum of that
FOOTER = 4  # bytes behind it: its checksum
DAMAGED = Unreadable("the record is damaged")
_TOGETHER = 32  # files whose index is read at the same time
KEPT = 2**25  # records whose offsets are kept, in 256 MiB
_CHOSEN = 2**24  # records among which some can be chosen by class, in 1 GiB

Record = bytes | memoryview | Unreadable


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
        # So many shards that what is kept of them does not grow with the data set.
        kept = KEPT // max(counts, default=1) or 1
        self._offsets = functools.lru_cache(maxsize=kept)(self._load_offsets)
        self._first_offset = functools.cache(self._load_first_offset)
        self._reader = functools.lru_cache(maxsize=min(kept, 256))(
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
        each = map if at_once(self.files[0]) else self._pool.map
        found = each(read, wanted, within)
        for rows, records in zip(wanted.values(), found, strict=True):
            for row, record in zip(rows, records, strict=True):
                result[row] = record
        if self.format == TFRECORD:
            return [
                self._checked(s, i, a, b, answer(str(self.files[s]), asked))
                for s, i, (a, b, asked) in zip(
                    shards.tolist(), numbers, result, strict=True
                )
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
        if len(self) > _CHOSEN:
            raise UserError(
                f"{os.path.dirname(self.files[0])} holds {len(self):,} records, and up "
                f"to {_CHOSEN:,} can be told apart by class in the memory of a host: "
                "write the splits that config.data.holdout, test_share and subset would "
                "make as shards of their own"
            )
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
        offsets = self._offsets(shard)[begin : stop + 1].tolist()
        frames = in_order(self.files[shard], offsets[:-1], offsets[1:])
        for number, frame in enumerate(frames, begin):
            first, end = offsets[number - begin : number - begin + 2]
            yield self._checked(shard, number, first, end, frame)

    def _start(self, shard: int, within: list[int]) -> list[Any]:
        """Asks for some TFRecords of a shard: where they lie and what will hold their
        bytes."""
        file = self.files[shard]
        return [(a, b, ask(file, a, b)) for a, b in self._ranges(shard, within)]

    def _ranges(self, shard: int, within: list[int]) -> list[tuple[int, int]]:
        """Where records begin and end."""
        sidecar = self.files[shard] + ".npz"
        begin = self._first_offset(shard) if len(self) > KEPT else 0
        if not begin:
            offsets = self._offsets(shard)
            return [(int(offsets[i]), int(offsets[i + 1])) for i in within]
        asked = [ask(sidecar, begin + 8 * i, begin + 8 * i + 16) for i in within]
        return [struct.unpack("<2q", answer(sidecar, a)) for a in asked]

    def _load_first_offset(self, shard: int) -> int:
        """Where in a sidecar the offsets begin; 0: it has to be read as a whole."""
        sidecar, expected = self.files[shard] + ".npz", self._fingerprints[shard]
        # In a numpy array of text a character takes four bytes.
        if not expected or expected.encode("utf-32-le") not in tail(sidecar, 2**16):
            return 0
        head = answer(sidecar, ask(sidecar, 0, 512))
        name, extra = struct.unpack("<2H", head[26:30])
        at = 30 + name + extra
        stored = head[8:10] == b"\0\0" and head[30 : 30 + name] == b"offsets.npy"
        if not stored or not head[at:].startswith(b"\x93NUMPY\1\0"):
            return 0
        length = 10 + struct.unpack("<H", head[at + 8 : at + 10])[0]
        shape = ast.literal_eval(head[at + 10 : at + length].decode())["shape"]
        self.check_count(shard, shape[0] - 1)
        return at + length

    def _checked(
        self, shard: int, number: int, start: int, stop: int, frame: bytes | memoryview
    ) -> Record:
        """The data of a TFRecord."""
        file, record = self.files[shard], unframed(frame)
        if record is None or isinstance(record, Unreadable):
            fresh = again(file, start, stop)
            record = record if fresh is None else unframed(fresh)
        if record is None:
            raise UserError(
                f"{file} does not match its index at record {number}: it "
                "was cut short or replaced; copy it again or write the records again"
            )
        return record

    def _array_records(self, shard: int, within: list[int]) -> list[Record]:
        reader, file = self._reader(shard), self.files[shard]
        records = []
        with contextlib.suppress(RuntimeError):  # one of them is damaged
            if not at_once(file):
                return reader.read(within)
        for i in within:
            with timed(file):
                records.append(array_record(reader, i))
        return records

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
    content = whole(sidecar)
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content)) as data:
            return {k: data[k] for k in {*_SIDECAR, *data.files}}
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError) as e:
        raise UserError(
            f"{sidecar} cannot be read ({type(e).__name__}): copy it again or write "
            "the records again"
        ) from e


def scan(file: str) -> np.ndarray:
    """Where the records of a TFRecord file begin, and where the last one ends.

    Reads the 12-byte headers only; all of a remote file, in large pieces, because
    waiting for one header after the other takes longer.

    Raises:
      UserError: the file ends in the middle of a record.
    """
    size = stat(file).length
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


def unframed(frame: bytes | memoryview) -> Record | None:
    """The data of a TFRecord, if its masked CRC-32C is right: without it, a flipped bit
    in a label would go unnoticed. None where the frame is not a whole record."""
    length = len(frame) - HEADER - FOOTER
    if length < 0 or struct.unpack("<Q", frame[:8])[0] != length:
        return None
    data = frame[HEADER:-FOOTER]
    crc = google_crc32c.value(bytes(data))
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    stored = struct.unpack("<I", frame[-FOOTER:])[0]
    return data if masked == stored else DAMAGED
