# SPDX-License-Identifier: Apache-2.0
"""The container of the official releases: a zip of ``.npy`` members (spec section 3.1).

Reading never unpickles. Writing streams one array at a time, so that exporting needs no
memory beside the parameters.
"""

import math
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.weights.contents import (
    Array,
    Damaged,
    atomic,
    parsing,
    require_memory,
    to_float32,
)


def read(path: Path, where: str, stack: ExitStack) -> dict[str, Array]:
    """The arrays of an npz file by name; ``stack`` closes the file.

    Raises:
      UserError: truncated, encrypted or compressed beyond memory, pickled members, or a
        member whose header contradicts its size.
    """
    with parsing(where):
        archive = stack.enter_context(zipfile.ZipFile(path))
        members = [m for m in archive.infolist() if not m.is_dir()]
    strange = [m.filename for m in members if not m.filename.endswith(".npy")]
    if strange or not members:
        what = f"holds {strange[0]!r}" if strange else "is empty"
        raise UserError(f"{where} is a zip but not an npz: it {what}")
    require_memory(sum(m.file_size for m in members), where)
    return {
        m.filename.removesuffix(".npy"): _member(archive, m, where) for m in members
    }


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


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> Array:
    """Reads the header of one member and checks it against the member's size."""
    name = info.filename.removesuffix(".npy")
    if info.flag_bits & 1:
        raise UserError(f"{where} is encrypted: {name}")
    with parsing(f"{where}: the array {name}"), archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = header(file)
        offset = file.tell()
    if dtype.hasobject:
        raise UserError(
            f"{where} holds pickled Python objects ({name}), which are never loaded "
            "because unpickling runs code: save plain arrays with numpy.savez, one per "
            "parameter"
        )
    if dtype.kind not in "fVbiu" or (dtype.kind == "V" and dtype.itemsize != 2):
        raise UserError(f"{where}: the array {name} has type {dtype}, not a number")
    size = math.prod(shape) * dtype.itemsize
    if offset + size != info.file_size:
        raise Damaged(
            f"{where}: the array {name} claims shape {shape} of {dtype} ({size} bytes) "
            f"but the file holds {info.file_size - offset}: it is damaged"
        )

    def values() -> np.ndarray:
        with parsing(f"{where}: the array {name}"), archive.open(info) as file:
            return to_float32(np.lib.format.read_array(file, allow_pickle=False))

    return Array(name, tuple(shape), values)
