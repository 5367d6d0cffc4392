# SPDX-License-Identifier: Apache-2.0
"""The container of the official releases: a zip of ``.npy`` members (spec section 3.1).

Reading never unpickles. Writing streams one array at a time, so that exporting needs no
memory beside the parameters.
"""

import io
import math
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.weights.contents import (
    MOST_ENTRIES,
    Array,
    Damaged,
    atomic,
    is_weight,
    parsing,
    require_memory,
    to_float32,
)


class _Bounded(io.FileIO):
    """``zipfile`` reads a whole directory at once: no more than a real one has."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size and size > 1 << 24:
            raise ValueError(f"its directory has {size:,} bytes")
        return super().read(size)


def archive(path: Path, where: str, stack: ExitStack) -> zipfile.ZipFile:
    """An opened zip file; ``stack`` closes it.

    Raises:
      UserError: truncated or encrypted, or it unpacks to more than such a file may.
    """
    with parsing(where):
        file = zipfile.ZipFile(stack.enter_context(_Bounded(path)))
        members = [m for m in file.infolist() if not m.is_dir()]
    for member in members:
        if member.flag_bits & 1:
            raise UserError(f"{where} is encrypted: {member.filename!r}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"{where}: {member.filename!r} is compressed by no usual way"
            )
    if len({m.filename for m in members}) < len(members):
        raise UserError(f"{where} holds one name twice: it is damaged or hostile")
    if len(members) > MOST_ENTRIES:
        raise UserError(f"{where} holds {len(members):,} members: not a checkpoint")
    require_memory(sum(m.file_size for m in members), path.stat().st_size, where)
    return file


def read(file: zipfile.ZipFile, where: str) -> dict[str, Array]:
    """The arrays of an npz file by name.

    Raises:
      UserError: other members than arrays, pickled ones, or one whose header contradicts
        its size.
    """
    members = [m for m in file.infolist() if not m.is_dir()]
    strange = [m.filename for m in members if not m.filename.endswith(".npy")]
    if strange or not members:
        what = f"holds {strange[0]!r}" if strange else "is empty"
        raise UserError(f"{where} is a zip but not an npz: it {what}")
    found = (_member(file, m, where) for m in members)
    return {array.name: array for array in found if array}


def write(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes what ``numpy.savez`` would, one array at a time; nothing partial stays."""
    with atomic(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, values in arrays:
            # A fixed date makes the file a pure function of the weights.
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(info, "w", force_zip64=True) as member:
                values = np.asarray(values)
                np.lib.format.write_array_header_1_0(member, _header(values))
                flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
                for start in range(0, flat.size, 1 << 24):
                    member.write(flat[start : start + (1 << 24)].data)


def _header(values: np.ndarray) -> dict[str, Any]:
    return {
        "descr": np.lib.format.dtype_to_descr(values.dtype),
        "fortran_order": False,
        "shape": values.shape,
    }


def _member(file: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> Array | None:
    """Reads the header of one member; None: it is not a parameter."""
    name = info.filename.removesuffix(".npy")
    what = f"{where}: the array {name!r}"
    with parsing(what), file.open(info) as member:
        old = np.lib.format.read_magic(member) == (1, 0)
        header = np.lib.format.read_array_header_1_0
        if not old:
            header = np.lib.format.read_array_header_2_0
        shape, _, dtype = header(member)
        offset = member.tell()
    if dtype.hasobject:
        raise UserError(
            f"{where} holds pickled Python objects ({name}), which are never loaded "
            "because unpickling runs code: save plain arrays with numpy.savez, one per "
            "parameter"
        )
    size = math.prod(shape) * dtype.itemsize
    if offset + size != info.file_size:
        raise Damaged(
            f"{what} claims shape {shape} of {dtype} ({size} bytes) "
            f"but the file holds {info.file_size - offset}: it is damaged"
        )

    def values() -> np.ndarray:
        with parsing(what), file.open(info) as member:
            return to_float32(np.lib.format.read_array(member, allow_pickle=False))

    if not is_weight(name, dtype, shape, where):
        return None
    return Array(name, tuple(shape), values)
