# SPDX-License-Identifier: Apache-2.0
"""Pieces of files in a bucket, kept on a local disk.

    FOLDER/size                       bytes of all pieces; locked by who adds to them
    FOLDER/SET/SHARD-VERSION-PIECE    4 MiB of a shard, and a checksum

A piece gets its name when it is complete, and its checksum is looked at before it is
used, so that a process can be killed at any time. The version is the bucket's own of the
object: one that was replaced is read again. A pass over a data set reads each piece
once; so what is there of the sets that are being read stays, and what others have left
makes room, the longest unused first. A disk that is full, read-only or not there costs
one line, and the bytes come from the bucket.
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import google_crc32c

from vit_jax.errors import UserError

log = logging.getLogger(__name__)

PIECE = 4 * 2**20
_TRAILER = struct.Struct("<QI")  # bytes of the piece, their CRC-32C
_LEAST = 16  # pieces that a cache must have room for
_RECORD = PIECE // 8  # bytes up to which a range is taken for a single record
_STORING = 64  # pieces that are being fetched and stored at a time
_ABANDONED = 600  # seconds after which a file that nobody completes is removed


class Answer(Protocol):
    """What a read will have brought."""

    def result(self) -> Any: ...


class Value(NamedTuple):
    value: bytes

    def result(self) -> "Value":
        return self


class _Joined(NamedTuple):
    """Several answers as one."""

    parts: list[Answer]

    def result(self) -> Value:
        return Value(b"".join(part.result().value for part in self.parts))


class _Cut(NamedTuple):
    """A part of an answer; asked for by itself where the whole cannot be had."""

    whole: Answer
    part: slice
    ask: Callable[[], Answer]

    def result(self) -> Value:
        try:
            return Value(self.whole.result().value[self.part])
        except Exception:  # the last piece of a file is shorter than it was asked for
            return self.ask().result()


# (name, range) -> an answer whose result has ``value`` and ``stamp``
Read = Callable[[str, slice], Any]


class DiskCache:
    """At most ``gib`` GiB of pieces under ``folder``, which processes may share."""

    def __init__(self, folder: str, gib: float):
        if gib * 2**30 < _LEAST * PIECE:
            raise UserError(
                f"config.data.disk_cache_gib is {gib:g}: it must be at least "
                f"{_LEAST * PIECE / 2**30:g}, {_LEAST} pieces of {PIECE // 2**20} MiB, "
                "or config.data.disk_cache empty"
            )
        self.folder, self.gib = Path(folder).expanduser(), gib
        self._limit = int(gib * 2**30)
        self._versions: dict[tuple[str, str], str] = {}
        self._good: dict[Path, int] = {}  # pieces that were checked -> their bytes
        self._storing: set[Path] = set()
        self._own: set[Path] = set()  # folders of the sets that this process reads
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(2, "vit_jax disk cache")
        self._stores = True  # until something stops it
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as size:
                size[0] = self._count()
        except OSError as e:
            self._stop(e)

    def same(self, folder: str, gib: float) -> bool:
        return (self.folder, self.gib) == (Path(folder).expanduser(), gib)

    def read(self, read: Read, folder: str, name: str, start: int, stop: int) -> Answer:
        """A range of bytes of a file of ``folder``, which ``read`` gets from the
        bucket."""
        found: list[Answer] = []
        version = self._version(read, folder, name)
        for number in range(start // PIECE, -(-stop // PIECE)):
            first = number * PIECE
            a, b = max(start - first, 0), min(stop - first, PIECE)
            path = self._set(folder) / f"{name}-{version}-{number}"
            held = self._held(path, a, b)
            found.append(
                Value(held) if held else self._fetch(read, name, path, first, a, b)
            )
        return found[0] if len(found) == 1 else _Joined(found)

    def close(self) -> None:
        """Waits for what is being stored."""
        while self._storing:
            time.sleep(0.01)

    def _fetch(
        self, read: Read, name: str, path: Path, first: int, a: int, b: int
    ) -> Answer:
        """[first + a, first + b) from the bucket; the piece around it is stored."""
        with self._lock:
            begins = self._stores and path not in self._storing
            begins &= len(self._storing) < _STORING
            if begins:
                self._storing.add(path)
        exact = functools.partial(read, name, slice(first + a, first + b))
        if not begins:
            return exact()
        piece = read(name, slice(first, first + PIECE))
        piece.add_done_callback(
            lambda _: self._pool.submit(self._store, read, name, path, first, piece)
        )
        # A record need not wait for its whole piece.
        return _Cut(piece, slice(a, b), exact) if b - a > _RECORD else exact()

    def _store(self, read: Read, name: str, path: Path, first: int, piece: Any) -> None:
        try:
            if piece.exception() is not None:
                piece = read(name, slice(first, None))
            data = piece.result().value
        except Exception:  # whoever needs it meets it as well
            data = b""
        try:
            if data and self._stores:
                self._write(path, data)
        except OSError as e:
            self._stop(e)
        finally:
            with self._lock:
                self._storing.discard(path)

    def _write(self, path: Path, data: bytes) -> None:
        content = data + _trailer(data)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(exist_ok=True)
        try:
            temporary.write_bytes(content)
            with self._locked() as size:
                if path.exists():
                    return
                if size[0] + len(content) > self._limit:
                    size[0] = self._make_room(len(content))
                if size[0] + len(content) > self._limit:
                    self._stop(None)
                    return
                temporary.rename(path)
                size[0] += len(content)
        finally:
            temporary.unlink(missing_ok=True)

    def _held(self, path: Path, a: int, b: int) -> bytes | None:
        """Bytes [a, b) of a piece; None where it is not there, or not good."""
        try:
            with path.open("rb", buffering=0) as stream:
                if path not in self._good:
                    self._good[path] = _checked(stream.readall())
                if b <= self._good[path]:
                    return os.pread(stream.fileno(), b - a, a)
        except FileNotFoundError:
            self._good.pop(path, None)  # another process made room
        except ValueError:  # damaged
            with contextlib.suppress(OSError), self._locked() as size:
                size[0] -= path.stat().st_size
                path.unlink()
        except OSError:
            pass
        return None

    def _version(self, read: Read, folder: str, name: str) -> str:
        """Of the object in the bucket now."""
        if (folder, name) not in self._versions:
            stamp = read(name, slice(0, 1)).result().stamp
            digest = hashlib.sha256(stamp.generation).hexdigest()
            self._versions[folder, name] = digest[:16]
        return self._versions[folder, name]

    def _set(self, folder: str) -> Path:
        found = self.folder / hashlib.sha256(folder.encode()).hexdigest()[:16]
        if found not in self._own:
            self._own.add(found)
            with contextlib.suppress(OSError):
                os.utime(found)  # used now
        return found

    def _make_room(self, needed: int) -> int:
        """Removes what other sets, or other versions, have left; what is there then."""
        current = {
            (self._set(folder), name): version
            for (folder, name), version in list(self._versions.items())
        }
        left = self._count()
        sets = [p for p in self.folder.iterdir() if p.is_dir()]
        for folder in sorted(sets, key=lambda p: (p in self._own, p.stat().st_mtime)):
            for path in sorted(folder.iterdir()):
                if left + needed <= self._limit:
                    return left
                name, version, _ = path.name.rsplit("-", 2)
                if (
                    folder in self._own
                    and current.get((folder, name), version) == version
                ):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    left -= path.stat().st_size
                    path.unlink()
        return left

    def _count(self) -> int:
        """Bytes of all pieces; removes what killed processes did not complete."""
        total = 0
        for folder in (p for p in self.folder.iterdir() if p.is_dir()):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if not entry.name.endswith(".tmp"):
                        total += status.st_size
                    elif status.st_mtime < time.time() - _ABANDONED:
                        os.unlink(entry.path)
        return total

    @contextlib.contextmanager
    def _locked(self) -> Iterator[list[int]]:
        """[bytes of all pieces], which is written back; one process at a time."""
        with open(self.folder / "size", "a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            text = stream.read()
            size = [int(text) if text.isdigit() else self._count()]
            yield size
            stream.truncate(0)
            stream.write(str(size[0]).encode())

    def _stop(self, error: OSError | None) -> None:
        """Stores nothing more, and says why, once."""
        with self._lock:
            said, self._stores = not self._stores, False
        if said:
            return
        if error is None:
            log.warning(
                "the disk cache %s is full: what does not fit in config.data."
                "disk_cache_gib = %g is read from the bucket on every pass",
                self.folder, self.gib,
            )  # fmt: skip
        else:
            log.warning(
                "config.data.disk_cache %s cannot be written to (%s): nothing more is "
                "kept there, and the data come from the bucket",
                self.folder, error.strerror or error,
            )  # fmt: skip


def _checked(content: bytes) -> int:
    """Bytes of a piece; ValueError where they are not those that were written."""
    length = len(content) - _TRAILER.size
    if length <= 0 or content[length:] != _trailer(content[:length]):
        raise ValueError("the piece is damaged")
    return length


def _trailer(data: bytes) -> bytes:
    return _TRAILER.pack(len(data), google_crc32c.value(data))
