# SPDX-License-Identifier: Apache-2.0
"""Tables and lists of image files with their labels.

A table, as ``data.path``: CSV with a header line, or JSONL with one object per line.

    image,label,split               {"image": "a.jpg", "label": "cat", "split": "train"}
    a.jpg,cat,train                 {"image": "b.jpg", "labels": ["cat", "dog"]}

Columns: ``image`` (or path, file, filename), relative to the folder of the table;
``label`` (or class), or ``labels`` for several, separated by "|" in CSV; ``split``, where
some rows are for testing. Classes are names, or numbers from 0; an image labelled -1 is
ignored.

A list, as ``data.test_split`` beside class folders: a text file with "a.jpg cat" or "a.jpg
3" per line. Further columns may follow a tab.
"""

import csv
import dataclasses
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.config import DataConfig
from vit_jax.data import classes, splits
from vit_jax.data.examples import (
    Dataset,
    Labels,
    Split,
    listed,
)
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

_IMAGE = ("image", "path", "file", "filename")
_LABEL = ("labels", "label", "class")


@dataclasses.dataclass(frozen=True)
class Line:
    """What a line of a table or list says of one image."""

    image: str  # path
    labels: tuple[str, ...]
    where: str  # file and line, for messages
    several: bool = False  # the image may have several labels
    split: str = ""


def load(cfg: DataConfig, file: Path) -> Dataset:
    """The data set of a CSV or JSONL table."""
    lines = list(_table(file))
    if not lines:
        raise UserError(f"{file} lists no images")
    spelled = {label: line.where for line in reversed(lines) for label in line.labels}
    names = classes.names(cfg, spelled, len(lines), str(file))
    indices = {name: i for i, name in enumerate(names)}
    parts: dict[str, list[Line]] = {}
    for line in lines:
        parts.setdefault(line.split, []).append(line)
    _check_splits(file, parts)

    def part(knob: str, name: str) -> Split:
        found = splits.meant(name, parts)
        if not found and "" in parts:
            wish = splits.wish(knob, name)
            raise UserError(f"{wish}, but {file} has no column 'split'")
        if not found:
            raise splits.missing(knob, name, file, sorted(parts))
        return labelled(parts[found[0]], indices, file)

    is_default = cfg.train_split == DataConfig.train_split
    train_name = "" if is_default and "" in parts else cfg.train_split
    test_name = cfg.test_split
    if test_name == DataConfig.test_split:
        test_name = next(iter(splits.meant(test_name, parts)), "")
    train = part("train_split", train_name)
    test = part("test_split", test_name) if test_name else None
    _report(file, parts, indices)
    return Dataset(
        *splits.with_test(cfg, train, test),
        names,
        any(line.several for line in lines),
        splits=lambda name: part("split", name),
    )


def read_list(file: Path, places: Sequence[Path]) -> list[Line]:
    """The lines "image label" of a text file; the images are looked for in ``places``.

    A label may hold spaces, so that only ``labelled`` can tell where it begins: until
    then ``image`` may be the whole line.
    """
    if not file.is_file():
        raise UserError(
            f"config.data.test_split is {file.name!r}, but {file} does not exist: it must "
            "have one line 'image label' per test image"
        )
    found = []
    for number, text in enumerate(_text(file).split("\n"), 1):
        if not text.strip():
            continue
        where = f"{file}, line {number}"
        for path, label in _readings(text.strip()):
            image = next(filter(os.path.isfile, (d / path for d in places)), None)
            if image is not None:
                found.append(Line(str(image), (classes.nfc(label),), where))
                break
        else:
            raise UserError(
                f"{where}: {text.strip()[:80]!r} is not of the form 'image label' with an "
                f"image in {places[0]} or one of its folders"
            )
    if not found:
        raise UserError(f"{file} lists no images")
    return found


def labelled(lines: Sequence[Line], indices: Mapping[str, int], file: Path) -> Split:
    """The images of some lines of ``file``, with the numbers of their classes."""
    missing = [line.image for line in lines if not os.path.isfile(line.image)]
    if missing:
        kind = "are folders" if os.path.isdir(missing[0]) else "do not exist"
        raise UserError(
            f"{file} lists {len(missing)} files that {kind}, the first is {missing[0]}: "
            "paths are relative to the folder of the table"
        )
    labels = [
        [classes.index(s, indices, line.where) for s in line.labels] for line in lines
    ]
    return from_files([line.image for line in lines], Labels.several(labels))


def from_files(paths: list[str], labels: Labels) -> Split:
    """A split of image files."""
    for path in paths:
        if not classes.is_utf8(path):  # which tensorflow asks for
            raise UserError(
                f"the file name {os.fsencode(path)!r} is not UTF-8: rename the file"
            )
    return listed("path", paths, labels, lambda i: paths[i])


# ------------------------------------------------------------------------------ lines


def _readings(text: str) -> Iterator[tuple[str, str]]:
    """What "image label" may mean: (image, label)."""
    if "\t" in text:
        image, label, *_ = text.split("\t")
        yield image.strip(), label.strip()
        return
    for space in re.finditer(r"\s+", text):
        yield text[: space.start()], text[space.end() :]


def _table(file: Path) -> Iterator[Line]:
    """The lines of a table."""
    suffix = file.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise UserError(
            f"config.data.path {str(file)!r} is a file: a table must end in .csv or .jsonl"
        )
    for row, number in (_csv if suffix == ".csv" else _jsonl)(file):
        yield _line(row, file, f"{file}, line {number}")


def _csv(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, number of its first line)."""
    text = io.StringIO(_text(file), newline="")
    reader = csv.reader(text, strict=True, skipinitialspace=True)
    header: list[str] = []
    begun = 1  # the line where the row begins that is being read
    try:
        for fields in reader:
            if not header:
                header = [name.strip().casefold() for name in fields]
                _check_header(header, file)
            elif fields and len(fields) != len(header):
                raise UserError(
                    f"{file}, line {begun} has {len(fields)} fields, but the header has "
                    f"{len(header)}, {header}: put a field with a comma into quotes"
                )
            elif fields:
                yield dict(zip(header, fields, strict=True)), begun
            begun = reader.line_num + 1
    except csv.Error as e:
        quote = ": is a quote left open?" if "end of data" in str(e) else ""
        raise UserError(f"{file}, line {begun}: {e}{quote}") from e


def _check_header(header: list[str], file: Path) -> None:
    if len({*header}) < len(header):
        raise UserError(f"{file} has the columns {header}: each may come only once")
    if not {*header} & {*_IMAGE} or not {*header} & {*_LABEL}:
        separator = next((c for c in ";\t" if c in "".join(header)), "")
        hint = "is the header line missing"
        if separator:
            hint = f"are they separated by {separator!r} instead of a comma"
        raise UserError(f"{file} has the columns {header}: {hint}? It {_NEEDS}")


def _jsonl(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, line number)."""
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{file}, line {number}: not JSON: {e}") from e
        if not isinstance(row, dict):
            raise UserError(
                f"{file}, line {number}: {line:.80} is not an object such as "
                '{"image": "a.jpg", "label": "cat"}'
            )
        yield row, number


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise UserError(
            f"{file}, line {line}: the byte {e.object[e.start]:#x} is not UTF-8: save the "
            "file in that encoding"
        ) from e


def _line(row: dict[str, Any], file: Path, where: str) -> Line:
    image = next((row[k] for k in _IMAGE if row.get(k)), "")
    column = next((k for k in _LABEL if k in row), "")
    if not isinstance(image, str) or not image or not column:
        raise UserError(f"{where} has the columns {sorted(map(str, row))}: it {_NEEDS}")
    value = row[column]
    if isinstance(value, list):
        labels = value
    elif column == "labels" and isinstance(value, str | None):
        labels = [v for v in (value or "").split("|") if v.strip()]
    else:
        labels = [value]
    return Line(
        str(file.parent / image),
        tuple(classes.text(v, where) for v in labels),
        where,
        column == "labels" or isinstance(value, list),
        "" if row.get("split") is None else str(row["split"]).strip(),
    )


_NEEDS = f"needs an image ({', '.join(_IMAGE)}) and a label ({', '.join(_LABEL)})"


# ---------------------------------------------------------------------------- checks


def _check_splits(file: Path, parts: Mapping[str, list[Line]]) -> None:
    """Raises where rows would fall between the splits."""
    if "" in parts and len(parts) > 1:
        raise UserError(
            f"{parts[''][0].where}: the split is empty, but other rows have "
            f"{splits.some(sorted({*parts} - {''}))}: fill it in or remove the row"
        )
    seen: dict[str, str] = {}
    for name in sorted(parts):
        if (other := seen.setdefault(splits.plain(name), name)) != name:
            raise UserError(
                f"{parts[name][0].where}: the splits {other!r} and {name!r} differ only "
                "in capitals: write them alike"
            )


def _report(
    file: Path, parts: Mapping[str, list[Line]], indices: Mapping[str, int]
) -> None:
    """Says what is read as it stands, and hardly meant."""
    lines = [line for part in parts.values() for line in part]
    used = {
        classes.index(s, indices, line.where) for line in lines for s in line.labels
    }
    if unused := [name for name, i in indices.items() if i not in used]:
        log.warning(
            "%s: %d of %d classes have no image, the first is %s: are the classes "
            "numbered from 0?",
            file,
            len(unused),
            len(indices),
            unused[0],
        )
    first: dict[str, Line] = {}
    again = [a for a in lines if first.setdefault(a.image, a) is not a]
    if again:
        other = first[again[0].image]
        log.warning(
            "%s: %d images are listed again, the first as %s %s (%s) and as %s %s (%s)",
            file,
            len(again),
            *(list(other.labels), other.split, other.where),
            *(list(again[0].labels), again[0].split, again[0].where),
        )
    one = [line for line in lines if line.several and "," in "".join(line.labels)]
    if one and not any(len(line.labels) > 1 for line in lines):
        log.warning(
            '%s: %r is one label: several are separated by "|"',
            one[0].where,
            one[0].labels[0],
        )
