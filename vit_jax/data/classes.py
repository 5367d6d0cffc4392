# SPDX-License-Identifier: Apache-2.0
"""Labels as tables, tars and Parquet files spell them, and their numbers.

A label is a name, or a number from 0; -1 is ignored. Where all are numbers, they are the
outputs of the model; otherwise the names are numbered in alphabetical order.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.config import DataConfig, nearest
from vit_jax.data import splits
from vit_jax.data.examples import IGNORED, Labels, check_class_names
from vit_jax.errors import UserError

MAX_CLASSES = 100_000  # limit on classes named by numbers, or one per image


def text(value: Any, where: str) -> str:
    """One label as text: 1, 1.0, "1" and "1.0" are the same, as tables that were written
    as floats hold them."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise UserError(
            f"{where}: the label {value!r:.80} is neither a name nor a whole number"
        )
    label = "" if value is None else nfc(str(value).strip())
    label = re.sub(r"^(-?\d+)\.0+$", r"\1", label)
    if not label:
        raise UserError(
            f"{where}: the label is empty; write {IGNORED} for an image to be ignored"
        )
    if not is_utf8(label) or (isinstance(value, float) and not _is_integer(label)):
        raise UserError(
            f"{where}: the label {label!r:.80} is not a name: write it as text"
        )
    return label


def names(
    cfg: DataConfig, labels: Mapping[str, str], images: int, source: str
) -> tuple[str, ...]:
    """The classes that labels tell of.

    Args:
      labels: label -> where it stands, for messages.
      images: how many images have them.
      source: the file or folder of all.
    """
    spelled = {label: where for label, where in labels.items() if label != str(IGNORED)}
    if not all(map(_is_integer, spelled)):
        return check_class_names(sorted(spelled), source)
    classes = cfg.num_classes or max(map(int, spelled), default=-1) + 1
    if classes <= 0:
        raise UserError(
            f"{source} names no class: its labels are {splits.some([*spelled]) or IGNORED}, "
            f"but classes are numbered from 0 and {IGNORED} is ignored"
        )
    if not cfg.num_classes and classes > max(images, MAX_CLASSES):
        raise UserError(
            f"{spelled[max(spelled, key=int)]}: label {classes - 1} asks for {classes} "
            f"classes, with {images} images: number the classes from 0, or set "
            "--config.data.num_classes if there are so many"
        )
    return tuple(str(i) for i in range(classes))


def index(label: str, indices: Mapping[str, int], where: str) -> int:
    """The number of a label among the classes, whose numbers are ``indices``."""
    if label == str(IGNORED):
        return IGNORED
    if label in indices:  # also where the names are numbers
        return indices[label]
    if _is_integer(label):
        if 0 <= int(label) < len(indices):
            return int(label)
        raise UserError(
            f"{where}: label {label} is out of range: with {len(indices)} classes it "
            f"must lie in [0, {len(indices) - 1}] (or be {IGNORED}: ignored)"
        )
    raise UserError(
        f"{where}: unknown class {label!r}: {nearest(label, indices)}"
        f"the classes are {splits.some([*indices])}"
    )


# The labels of the N examples of one file: (as they are spelled, int (N,): which of them).
Spelled = tuple[Sequence[str], np.ndarray]
Name = Callable[[int], str]  # of one example of all files


def places(files: Iterable[Spelled], name: Name) -> dict[str, str]:
    """label -> the first example that has it."""
    return {label: name(i) for label, i in _first(files)}


def numbers(files: Sequence[Spelled], indices: Mapping[str, int], name: Name) -> Labels:
    """The ``index`` of all labels, one per example."""
    known = {label: index(label, indices, name(i)) for label, i in _first(files)}
    parts = [
        np.array([known[label] for label in spelled], np.int32)[which]
        for spelled, which in files
    ]
    return Labels.single(np.concatenate(parts))


def _first(files: Iterable[Spelled]) -> Iterator[tuple[str, int]]:
    """(label, the first example that has it)"""
    start, seen = 0, set[str]()
    for spelled, which in files:
        used, first = np.unique(which, return_index=True)
        for number, i in zip(used.tolist(), first.tolist(), strict=True):
            label = spelled[int(number)]
            if label not in seen:
                seen.add(label)
                yield label, start + i
        start += len(which)


def nfc(name: str) -> str:
    """One spelling of accents: macOS and others write the same name in other bytes."""
    return unicodedata.normalize("NFC", name)


def is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_integer(label: str) -> bool:
    digits = label.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) < 19
