# SPDX-License-Identifier: Apache-2.0
"""Flax's msgpack files (the official code writes them), read where they lie.

A checkpoint is a map of maps whose leaves are arrays. An array is the extension type 1,
which packs [shape, name of the dtype, bytes]; above 1 GiB it is a map of chunks. Names
and shapes are read at once, values when they are asked for.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from vit_jax.errors import UserError
from vit_jax.weights.contents import (
    MOST_ENTRIES,
    Array,
    is_weight,
    parsing,
    require_memory,
    to_float32,
)

_CHUNKED = "__msgpack_chunked_array__"
_DEEPEST = 32
# First byte -> (kind, bytes that state the size), and of values of a fixed size.
_SIZED = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xC7: ("ext", 1),
    0xC8: ("ext", 2), 0xC9: ("ext", 4), 0xD9: ("str", 1), 0xDA: ("str", 2),
    0xDB: ("str", 4), 0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2),
    0xDF: ("map", 4),
}  # fmt: skip
_FIXED = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4,
    0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class _Head(NamedTuple):
    """What comes next: ``size`` is its bytes, its entries or the number itself."""

    kind: str  # map, list, str, bin, ext, int, or "" for every other number
    size: int
    ext: int = 0  # type of an extension


class _Stored(NamedTuple):
    """Where values lie; several pieces for an array in chunks."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...]  # (offset, bytes)


def read(path: Path, where: str) -> dict[str, Array]:
    """The arrays of a msgpack file, by their path in its maps.

    Raises:
      UserError: truncated, damaged, or not a map.
    """
    size = path.stat().st_size
    require_memory(size, size, where)
    arrays: dict[str, Array] = {}
    what = f"{where}, a Flax msgpack file,"
    with path.open("rb") as file, parsing(what):
        reader = _Reader(file, size)
        head = reader.head()
        if head.kind != "map":
            raise UserError(f"{where} is msgpack but holds no parameters")
        for name, stored in reader.leaves(head.size, "", 0):
            if name in arrays:
                raise UserError(f"{where} holds the name {name!r} twice")
            if is_weight(name, stored.dtype, stored.shape, where):
                arrays[name] = _array(path, name, stored, what)
        if file.tell() != size:
            raise ValueError(f"{size - file.tell():,} bytes follow its end")
    return arrays


def _array(path: Path, name: str, stored: _Stored, what: str) -> Array:
    def piece(at: int, size: int) -> np.ndarray:
        return np.fromfile(path, stored.dtype, size // stored.dtype.itemsize, offset=at)

    def values() -> np.ndarray:
        with parsing(what):
            flat = [piece(at, size) for at, size in stored.pieces]
            joined = np.concatenate(flat) if len(flat) != 1 else flat[0]
            return to_float32(joined.reshape(stored.shape))

    return Array(name, stored.shape, values)


class _Reader:
    """Walks a file forward; every step takes at least a byte, and they are counted."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._size, self._steps = file, size, 0

    def head(self) -> _Head:
        self._steps += 1
        if self._steps > 10 * MOST_ENTRIES:
            raise ValueError(f"more than {10 * MOST_ENTRIES:,} entries")
        first = self._bytes(1)[0]
        if first <= 0x7F:
            return _Head("int", first)
        if first >= 0xE0:
            return _Head("int", first - 256)
        if first <= 0xBF:
            kinds = (("map", 0xF), ("list", 0xF), ("str", 0x1F), ("str", 0x1F))
            kind, mask = kinds[(first - 0x80) >> 4]
            return _Head(kind, first & mask)
        if first in _SIZED:
            kind, width = _SIZED[first]
            size = int.from_bytes(self._bytes(width))
            return _Head(kind, size, self._bytes(1)[0] if kind == "ext" else 0)
        if first in _FIXED_EXT:
            return _Head("ext", _FIXED_EXT[first], self._bytes(1)[0])
        unsigned = first in (0xCC, 0xCD, 0xCE, 0xCF)
        value = int.from_bytes(self._bytes(_FIXED[first]))
        return _Head("int" if unsigned else "", value)

    def leaves(
        self, entries: int, prefix: str, depth: int
    ) -> Iterator[tuple[str, _Stored]]:
        """The arrays of a map of which the head was read."""
        if depth > _DEEPEST:
            raise ValueError(f"maps nested more than {_DEEPEST} deep")
        for _ in range(entries):
            key = self._text()
            head = self.head()
            name = f"{prefix}{key}"
            if key == _CHUNKED:
                yield prefix.rstrip("/"), self._chunked()
                return
            if head.kind == "map":
                yield from self.leaves(head.size, f"{name}/", depth + 1)
            elif (head.kind, head.ext) == ("ext", 1):
                yield name, self._ndarray(head.size)
            else:
                self._skip(head)

    def _ndarray(self, size: int) -> _Stored:
        end = self._file.tell() + size
        self._expect("list", 3)
        shape = tuple(self._number() for _ in range(self._expect("list")))
        name = self._text()
        dtype = np.dtype("V2" if name == "bfloat16" else name).newbyteorder("<")
        data = self._expect("bin")
        at = self._file.tell()
        if data != math.prod(shape) * dtype.itemsize or at + data != end:
            raise ValueError(f"{data} bytes for shape {shape} of {dtype}")
        self._skip(_Head("bin", data))
        return _Stored(shape, dtype, ((at, data),))

    def _chunked(self) -> _Stored:
        """The rest of a map that began with ``_CHUNKED``: shape, then chunks."""
        self._text()
        shape = tuple(
            (self._text(), self._number())[1] for _ in range(self._expect("map"))
        )
        self._text()
        chunks = [s for _, s in self.leaves(self._expect("map"), "", 0)]
        if len({c.dtype for c in chunks}) != 1:
            raise ValueError("an array in chunks of different types")
        pieces = tuple(piece for c in chunks for piece in c.pieces)
        if (
            sum(size for _, size in pieces)
            != math.prod(shape) * chunks[0].dtype.itemsize
        ):
            raise ValueError(f"chunks that do not make up shape {shape}")
        return _Stored(shape, chunks[0].dtype, pieces)

    def _skip(self, head: _Head) -> None:
        pending = [head]
        left = 1
        while left:
            head = pending.pop() if pending else self.head()
            left -= 1
            if head.kind in ("map", "list"):
                left += head.size * (2 if head.kind == "map" else 1)
            elif head.kind in ("str", "bin", "ext"):
                if self._file.tell() + head.size > self._size:
                    raise ValueError(f"{head.size:,} bytes are stated, but not there")
                self._file.seek(head.size, 1)

    def _expect(self, kind: str, size: int = -1) -> int:
        head = self.head()
        if head.kind != kind or size not in (-1, head.size):
            raise ValueError(f"a {head.kind or 'number'} in place of a {kind}")
        return head.size

    def _number(self) -> int:
        return self._expect("int")

    def _text(self) -> str:
        size = self._expect("str")
        return self._bytes(size).decode()

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count) if count <= self._size else b""
        if len(data) < count:
            raise ValueError("it ends too early")
        return data
