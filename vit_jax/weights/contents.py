# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, before anything big is read.

Every format is opened as a :class:`Contents`: names and shapes at once, values one
array at a time. So the architecture is inferred and every mismatch found before the
first weight is read, and the peak memory of loading is the parameters plus one array.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import UserError


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
    model: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # ModelConfig fields
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
    torch: bool = False  # the arrays have the names of a torch model
    # JSON objects beside torch weights, by file name, for example "config.json".
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


class Damaged(UserError):
    """The bytes are not those that were written: only another copy of them helps."""


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
        why = str(e).partition("\n")[0] or type(e).__name__
        raise Damaged(
            f"{what} is truncated or damaged ({why}): download or copy it again"
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


def in_memory(name: str, values: Any) -> Array:
    """An array that has been read already."""
    values = np.asarray(values)
    return Array(name, values.shape, lambda: to_float32(values))


def to_float32(values: np.ndarray) -> np.ndarray:
    """``values`` as float32; bfloat16 that numpy wrote as two raw bytes is recovered."""
    if values.dtype.kind == "V" and values.dtype.itemsize == 2:
        import ml_dtypes

        values = values.view(ml_dtypes.bfloat16)
    return np.asarray(values, np.float32)


def require_memory(needed: int, where: str) -> None:
    """Refuses what cannot fit, before it is read.

    Raises:
      UserError: ``needed`` bytes are more than this machine has left.
    """
    available = available_memory()
    if needed > available:
        raise UserError(
            f"{where} unpacks to {needed / 2**30:.1f} GiB, but this machine has "
            f"{available / 2**30:.1f} GiB of memory left: it is damaged or hostile, or "
            "needs a larger machine"
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
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        if limit != "max":
            limits.append(int(limit) - used)
    except (OSError, ValueError):
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
