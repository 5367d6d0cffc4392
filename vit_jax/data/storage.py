# SPDX-License-Identifier: Apache-2.0
"""Ranges of bytes of files, on a disk or in a bucket, many at a time.

How many follows from Little's law: what is under way at a time is what arrives per
second, times the seconds that one read takes. Those are measured on the first reads.
From a local disk, a read takes less time than to hand it to another thread: these are
done one by one, until most of them take long, as those of a mounted network file system
do.
"""

import collections
import contextlib
import functools
import io
import itertools
import logging
import math
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tensorstore

from vit_jax.data.disk_cache import PIECE, Answer, DiskCache, Value
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

# Reads per second and CPU: hardly any image is decoded faster.
WANTED = 2_000
_MEASURED = 4  # first reads, which go out one by one to be timed
_MOST = 512  # reads at a time
_LINK = 2.5e8  # bytes per second of a file: hosts read several at a time
_AHEAD = 2, 16  # pieces of a file that are asked for at a time, at least and at most
_LATE = 1e-3  # seconds from which on others should be under way while one read is
_PATIENCE = 8  # late reads, less those in time, after which they are

_disks: dict[str, DiskCache] = {}  # folder in a bucket -> what keeps its bytes


def is_remote(path: str) -> bool:
    return "://" in path


def binary(file: str) -> Any:
    """A stream of bytes, local or remote; large pieces of a remote file are read ahead."""
    with _reading(file):
        if is_remote(file):
            return io.BufferedReader(Remote(file), PIECE)
        return open(file, "rb")


def stat(file: str) -> Any:
    """``length`` and ``mtime_nsec`` of a file."""
    with _reading(file):
        return tf.io.gfile.stat(file)


def names(folder: str) -> list[str]:
    """The names in a folder, sorted; empty where it does not exist."""
    if is_remote(folder):
        found = _called(folder, _store(folder).kv.list())
        # A bucket knows no folders, and lists what lies below them as well.
        return sorted({key.decode().split("/")[0] for key in found})
    with _reading(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def whole(file: str) -> bytes | None:
    """All bytes of a file; None where it does not exist."""
    if is_remote(file):
        folder, name = os.path.split(file)
        found = _called(file, _store(folder).kv.read(name))
        return None if found.state == "missing" else found.value
    if not os.path.exists(file):
        return None
    with _reading(file), open(file, "rb") as stream:
        return stream.read()


def tail(file: str, count: int) -> bytes:
    """The last bytes of a file; b"" where it does not exist."""
    if not is_remote(file):
        return (whole(file) or b"")[-count:]
    folder, name = os.path.split(file)
    try:
        return (
            _store(folder).kv.read(name, byte_range=slice(-count, None)).result().value
        )
    except ValueError:  # there are fewer
        return whole(file) or b""


def keep_on_disk(root: str, folder: str, gib: float) -> None:
    """Keeps what is read of the files below ``root``, a folder in a bucket, on disk.

    Raises:
      UserError: ``gib`` is too small to keep anything.
    """
    if root not in _disks or not _disks[root].same(folder, gib):
        _disks[root] = DiskCache(folder, gib)


def ask(file: str, start: int, stop: int) -> Answer:
    """Asks for a range of bytes; ``answer`` waits for them. Many can be under way."""
    folder, name = os.path.split(file)
    store = _store(folder)
    try:
        for root, disk in _disks.items():
            if folder.startswith(root):
                return disk.read(store.read, folder, name, start, stop)
        return store.read(name, slice(start, stop))
    except (ValueError, OSError) as e:  # some is read at once
        raise _failed(file, e) from e


def answer(file: str, asked: Answer) -> bytes:
    """The bytes that were asked for; b"" where the file ends before them."""
    try:
        return asked.result().value
    except Exception as e:  # of many kinds
        if "OUT_OF_RANGE" in str(e):
            return b""
        raise _failed(file, e) from e


def again(file: str, start: int, stop: int) -> bytes | None:
    """The bytes as the bucket has them, where a disk may have spoilt them; None where
    none can have."""
    folder, name = os.path.split(file)
    if not any(folder.startswith(root) for root in _disks):
        return None
    return answer(file, _store(folder).read(name, slice(start, stop)))


def at_once(file: str) -> bool:
    """Whether ``ask`` waits for the bytes, as from there another thread would take
    longer."""
    return _store(os.path.dirname(file)).at_once


def timed(file: str) -> contextlib.AbstractContextManager[None]:
    """Around a read of a file by other means, for ``at_once``."""
    return _store(os.path.dirname(file)).timed(0)


def in_pieces(file: str, start: int, stop: int) -> Iterator[bytes]:
    """A long range, in large pieces that are asked for ahead of their use: as many as
    arrive while one is on its way."""
    ahead = _store(os.path.dirname(file)).ahead
    cuts = [start, *range(start - start % PIECE + PIECE, stop, PIECE), stop]
    coming = itertools.pairwise(cuts if start < stop else ())
    asked = collections.deque(
        ask(file, a, b) for a, b in itertools.islice(coming, ahead)
    )
    while asked:
        yield answer(file, asked.popleft())
        asked.extend(ask(file, a, b) for a, b in itertools.islice(coming, 1))


def in_order(
    file: str, begin: Sequence[int], end: Sequence[int]
) -> Iterator[memoryview]:
    """Ascending ranges of bytes, read in pieces; shorter where the file ends before.

    Views: what is cut out of its piece takes memory of its own.
    """
    pieces = in_pieces(file, begin[0], end[-1]) if len(begin) else iter(())
    piece, at = memoryview(b""), begin[0] if len(begin) else 0  # where it begins
    for a, b in zip(begin, end, strict=True):
        parts = [piece[a - at : b - at]]
        while at + len(piece) < b and (found := next(pieces, b"")):
            at, piece = at + len(piece), memoryview(found)
            parts.append(piece[max(0, a - at) : b - at])
        yield parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


class Remote(io.RawIOBase):
    """A file of a bucket, with what Arrow and ``io.BufferedReader`` ask of a file."""

    def __init__(self, file: str):
        super().__init__()
        self._file, self._at = file, 0
        self._size = stat(file).length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}
        self._at = start[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        found = b"".join(in_pieces(self._file, self._at, stop))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


class _Store:
    """Reads of the files of one folder."""

    def __init__(self, folder: str):
        self.folder, self._lock = folder, threading.Lock()
        self._seconds: list[float] = []
        # Late reads of a local disk, less those in time.
        self._late = _PATIENCE if is_remote(folder) else 0
        self.ahead = _AHEAD[0]  # pieces of a file that are asked for at a time
        self.kv = self._open(0)

    def read(self, name: str, byte_range: slice) -> Answer:
        if self.at_once:
            return self._read_at_once(name, byte_range)
        if len(self._seconds) < _MEASURED:
            with self._lock:
                if len(self._seconds) < _MEASURED:
                    return self._measured(name, byte_range)
        return self.kv.read(name, byte_range=byte_range)

    def _read_at_once(self, name: str, byte_range: slice) -> Answer:
        path, count = f"{self.folder}/{name}", byte_range.stop - byte_range.start
        with self.timed(count):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.pread(descriptor, count, byte_range.start)
            finally:
                os.close(descriptor)
        return Value(found if len(found) == count else b"")

    @contextlib.contextmanager
    def timed(self, count: int) -> Iterator[None]:
        """What is done inside reads so many bytes at once."""
        started = time.perf_counter()
        yield
        late = time.perf_counter() - started > _LATE + count / _LINK
        self._late = max(0, self._late + (1 if late else -1))

    @property
    def at_once(self) -> bool:
        """Whether a read takes less time than to hand it to another thread."""
        return self._late < _PATIENCE

    def _measured(self, name: str, byte_range: slice) -> Answer:
        started = time.perf_counter()
        reading = self.kv.read(name, byte_range=byte_range)
        if reading.exception() is None:
            self._seconds.append(time.perf_counter() - started)
        if len(self._seconds) == _MEASURED:
            seconds = statistics.median(self._seconds)
            count = at_a_time(seconds)
            arriving = math.ceil(_LINK * seconds / PIECE)
            self.ahead = min(max(arriving, _AHEAD[0]), _AHEAD[1])
            say = log.info if is_remote(self.folder) else log.debug
            say(
                "a read from %s takes %.1f ms: up to %d go out at a time, or %d large "
                "pieces of a file",
                self.folder, 1e3 * seconds, count, self.ahead,
            )  # fmt: skip
            self.kv = self._open(count)
        return reading

    def _open(self, count: int) -> Any:
        """``count``: reads at a time; 0: tensorstore's own number."""
        kinds = ("file_io", "gcs_request", "http_request", "s3_request")
        limits = {f"{k}_concurrency": {"limit": count} for k in kinds if count}
        path = os.path.abspath(self.folder) + "/"
        local = {"driver": "file", "path": path}
        spec: Any = self.folder + "/" if is_remote(self.folder) else local
        try:
            context = tensorstore.Context(limits)
            return tensorstore.KvStore.open(spec, context=context).result()
        except ValueError as e:
            raise UserError(
                f"{self.folder} cannot be read at random ({str(e).splitlines()[0][:200]}): "
                "copy the shards to a local disk or to gs://"
            ) from e


def at_a_time(seconds: float) -> int:
    """Reads under way at a time that keep the CPUs of this host busy where one takes so
    many seconds."""
    cpus = os.cpu_count() or 1
    return min(max(math.ceil(WANTED * cpus * seconds), cpus, 4), _MOST)


@functools.lru_cache(maxsize=64)
def _store(folder: str) -> _Store:
    return _Store(folder)


def _called(where: str, asked: Any) -> Any:
    try:
        return asked.result()
    except Exception as e:  # of many kinds
        raise _failed(where, e) from e


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, tf.errors.OpError) as e:
        raise _failed(where, e) from e


def _failed(where: str, error: Exception) -> UserError:
    text = getattr(error, "strerror", None) or str(error)
    return UserError(f"{where} cannot be read: {text.splitlines()[0][:200]}")
