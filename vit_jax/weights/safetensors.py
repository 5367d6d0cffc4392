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
    atomic,
    parsing,
    require_memory,
    to_float32,
)

# bfloat16 as two raw bytes, which to_float32 knows.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "V2", "I64": "<i8", "I32": "<i4"}


def header(path: Path, where: str) -> tuple[dict[str, str], dict[str, Any], int]:
    """Text header of a safetensors file, table of its arrays, and where they begin.

    The package checks the file, also that it is as long as the table says.

    Raises:
      Damaged: it is not.
    """
    from safetensors import safe_open

    with parsing(where):
        # A type checker cannot see into the compiled module.
        opened: Any = safe_open(str(path), framework="numpy")
        with opened as file:
            about = dict(file.metadata() or {})
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            table = json.loads(raw.read(length))
    return about, table, 8 + length


def read(path: Path, where: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and the text header of a safetensors file.

    Values are read here rather than by the package, because its memory map would count
    every page that was read on top of the arrays.

    Raises:
      UserError: truncated, damaged, or an array of a type that no weights have.
    """
    require_memory(path.stat().st_size, where)
    about, table, begin = header(path, where)
    arrays = {}
    for name, entry in table.items():
        kind = entry.get("dtype", "")
        if name == "__metadata__":
            continue
        if kind.startswith(("I", "U", "BOOL")) and entry["shape"]:
            continue  # indices are no parameters; single numbers may betray a family
        if kind not in _DTYPES:
            raise UserError(f"{where}: the array {name} has type {kind}: not supported")
        start = begin + entry["data_offsets"][0]
        arrays[name] = _stored(path, name, tuple(entry["shape"]), kind, start)
    return arrays, about


def _stored(
    path: Path, name: str, shape: tuple[int, ...], kind: str, start: int
) -> Array:
    def values() -> np.ndarray:
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
