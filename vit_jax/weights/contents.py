# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, before anything big is read.

Every format is opened as a :class:`Contents`: names and shapes at once, values one
array at a time. So the architecture is inferred and every mismatch found before the
first weight is read, and the peak memory of loading is the parameters plus one array.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError, one_line


class Array(NamedTuple):
    """One array of a checkpoint; ``read`` returns its values as float32."""

    name: str  # as the file spells it, for messages
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def map(
        self, shape: tuple[int, ...], function: Callable[[np.ndarray], np.ndarray]
    ) -> "Array":
        """This array after ``function``, which turns it into ``shape`` when read."""
        return Array(self.name, shape, lambda: function(self.read()))

    def reshape(self, *shape: int) -> "Array":
        return self.map(shape, lambda x: x.reshape(shape))


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What travels with the weights besides the arrays."""

    class_names: tuple[str, ...] = ()
    transforms: tuple[dict[str, Any], ...] = ()  # of an image on its way to the model
    # Fields of ModelConfig.
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    multilabel: bool = False  # probabilities are independent: sigmoid, not softmax
    family: str = ""  # whose names the file has: of families.py; "": the released ones
    arrays: tuple[str, ...] = ()  # which arrays it has, see roles.write
    resize: str = ""  # how tables of positions are resized, see positions.py


@dataclasses.dataclass(frozen=True)
class Contents:
    """An opened checkpoint."""

    where: str  # path or URL, for messages
    arrays: dict[str, Array]
    metadata: Metadata = Metadata()
    notes: tuple[str, ...] = ()  # lines for the report
    torch: bool = False  # the arrays have the names of a torch model
    # JSON objects beside torch weights, by file name, for example "config.json".
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


_GROUP = Path("/sys/fs/cgroup")  # what the system says about this container
# Names, arrays or instructions that a file may hold: a published ViT has some hundreds.
MOST_ENTRIES = 100_000


class Damaged(UserError):
    """The bytes are not those that were written: get another copy."""


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Turns all that a parser may trip over in damaged bytes into :class:`Damaged`.

    Only around calls of foreign parsers: no list of what they raise would be complete.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as e:
        raise Damaged(
            f"{what} is truncated or damaged ({one_line(e)}): download or copy it again"
        ) from e


def count_up(numbers: Iterable[int], first: int, what: str) -> int:
    """How many consecutive numbers there are from ``first`` on: layers, say.

    The numbers come from names in a file: the time depends on how many there are, never
    on how large they are.

    Raises:
      UserError: naming the first gap, after ``what``.
    """
    found, end = set(numbers), first
    while end in found:
        end += 1
    if len(found) > end - first:
        raise UserError(f"{what}{end} is missing")
    return end - first


def unchunked(arrays: dict[str, Array]) -> dict[str, Array]:
    """Without the numbers of the pieces into which DINOv2's training cuts the blocks, as
    in Franca and WebSSL: ``blocks.PIECE.BLOCK.norm1``, where BLOCK counts all blocks."""
    renamed = {re.sub(r"\bblocks\.\d+\.(?=\d+\.)", "blocks.", n): n for n in arrays}
    if len(renamed) < len(arrays):
        return arrays
    return {new: arrays[old] for new, old in renamed.items()}


def in_memory(name: str, values: Any) -> Array:
    """An array that has been read already."""
    values = np.asarray(values)
    return Array(name, values.shape, lambda: to_float32(values))


def is_weight(name: str, dtype: np.dtype, shape: tuple[int, ...], where: str) -> bool:
    """Whether an array of this type is a parameter; counters and masks are none.

    Raises:
      UserError: it is one, but in a type that is not read here.
    """
    if dtype.kind == "f" or dtype == "V2":
        return True
    if dtype.itemsize == 1 and dtype.kind in "iu" and len(shape) > 1:
        raise UserError(
            f"{where}: the array {name} has type {dtype}: quantised weights are not "
            "supported; save them as float32 or float16"
        )
    if dtype.kind not in "iub":
        raise UserError(f"{where}: the array {name} has type {dtype}: not supported")
    return False


def to_float32(values: np.ndarray) -> np.ndarray:
    """``values`` as float32; bfloat16 that numpy wrote as two raw bytes is recovered."""
    if values.dtype.kind == "V" and values.dtype.itemsize == 2:
        import ml_dtypes

        values = values.view(ml_dtypes.bfloat16)
    # What overflows becomes infinite, which the check of all values names.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values, np.float32)


# What a file may unpack to: this many times its size, and something for small ones.
_EXPANSION = 8
_ALLOWANCE = 64 << 20


def require_memory(unpacked: int, size: int, where: str) -> None:
    """Refuses what cannot fit, or grows out of all proportion, before it is read.

    Args:
      unpacked: bytes in memory.
      size: bytes of the file.
      where: the file, for the message.

    Raises:
      UserError: it is more than the file can honestly hold, or than this machine has.
    """
    if unpacked > _EXPANSION * size + _ALLOWANCE:
        raise UserError(
            f"{where} has {size:,} bytes but claims to unpack to {unpacked:,}, more than "
            f"{_EXPANSION} times as many: it is damaged or hostile"
        )
    available = available_memory()
    if unpacked > available:
        raise UserError(
            f"{where} unpacks to {unpacked / 2**30:.1f} GiB, but this machine has "
            f"{available / 2**30:.1f} GiB of memory left: use a larger machine"
        )


def available_memory() -> int:
    """Bytes that this process may still use: free memory, capped by the container's."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        limit = (_GROUP / "memory.max").read_text().strip()
        used = int((_GROUP / "memory.current").read_text())
        # Cached files count as used, but the system drops them when memory is short.
        stat = dict(map(str.split, (_GROUP / "memory.stat").read_text().splitlines()))
        cached = int(stat["inactive_file"]) + int(stat["active_file"])
        if limit != "max":
            limits.append(int(limit) - used + cached)
    except (OSError, ValueError, LookupError):
        pass
    return max(0, min(limits, default=1 << 62))


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
