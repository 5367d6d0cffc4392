# SPDX-License-Identifier: Apache-2.0
"""The safetensors container: a table in JSON, then the values."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.weights.contents import (
    Array,
    Damaged,
    atomic,
    is_weight,
    parsing,
    require_memory,
    to_float32,
)

# Bytes that the table may have: some tens of thousands of arrays.
_LONGEST = 8 << 20

# bfloat16 as two raw bytes, which to_float32 knows.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "V2", "BOOL": "?"}
_DTYPES |= {f"{k}{8 * n}": f"<{k.lower()}{n}" for k in "IU" for n in (1, 2, 4, 8)}


def header(path: Path, where: str) -> tuple[dict[str, str], dict[str, Any], int]:
    """Text header of a safetensors file, table of its arrays, and where they begin.

    The package checks the file, also that it is as long as the table says.

    Raises:
      Damaged: it is not.
    """
    from safetensors import safe_open

    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
    if length > _LONGEST:
        raise Damaged(f"{where} states a table of {length:,} bytes: it is damaged")
    with parsing(where):
        # A type checker cannot see into the compiled module.
        opened: Any = safe_open(str(path), framework="numpy")
        with opened as file:
            about = dict(file.metadata() or {})
        with path.open("rb") as raw:
            raw.seek(8)
            table = json.loads(raw.read(length))
    return about, table, 8 + length


def read(path: Path, where: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and the text header of a safetensors file.

    Values are read here rather than by the package, because its memory map would count
    every page that was read on top of the arrays.

    Raises:
      UserError: truncated, damaged, or an array of a type that no weights have.
    """
    size = path.stat().st_size
    require_memory(size, size, where)
    about, table, begin = header(path, where)
    arrays = {}
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        kind, shape = entry["dtype"], tuple(entry["shape"])
        if kind not in _DTYPES:
            raise UserError(f"{where}: the array {name} has type {kind}: not supported")
        # A single number is kept: it may betray a family.
        if is_weight(name, np.dtype(_DTYPES[kind]), shape, where) or not shape:
            start = begin + entry["data_offsets"][0]
            arrays[name] = _stored(path, name, shape, kind, start, where)
    return arrays, about


def _stored(
    path: Path, name: str, shape: tuple[int, ...], kind: str, start: int, where: str
) -> Array:
    def values() -> np.ndarray:
        with parsing(where):
            count, dtype = math.prod(shape), _DTYPES[kind]
            flat = np.fromfile(path, dtype, count, offset=start)
            return to_float32(flat.reshape(shape))

    return Array(name, shape, values)


def write(
    path: Path,
    arrays: list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    header: dict[str, str],
) -> None:
    """A safetensors file, one array at a time; nothing partial stays.

    ``safetensors.numpy.save_file`` wants every array at once in torch's order of axes,
    which is a second copy of the model.
    """
    arrays = sorted(arrays)
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **header}}
    offset = 0
    for name, shape, _ in arrays:
        end = offset + 4 * math.prod(shape)
        table[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8 bytes
    with atomic(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, values in arrays:
            file.write(np.ascontiguousarray(values(), np.float32).data)
