# SPDX-License-Identifier: Apache-2.0
"""Image files on disk: class folders, manifests, and test labels in a text file.

photos/train/cat/a.jpg      class folders under train/ and one of test/, val/, ...
photos/cat/a.jpg            class folders only: a share of each class is held out
photos.csv, photos.jsonl    image,label[,split]: one or several labels per image
photos/val.txt              "a.jpg 3" or "a.jpg cat" per line, as data.test_split
"""

import csv
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from vit_jax.config import DataConfig, nearest
from vit_jax.data.sources import (
    IGNORED,
    Dataset,
    Labels,
    Split,
    check_class_names,
    held_out,
)
from vit_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "val", "validation", "valid")
MANIFESTS = (".csv", ".jsonl")
_IMAGE_COLUMNS = ("image", "path", "file", "filename")
_LABEL_COLUMNS = ("labels", "label", "class")


def load(cfg: DataConfig) -> Dataset:
    """The data set under ``cfg.path``."""
    if not cfg.path:
        raise UserError(
            "data.source is 'folder' but data.path is empty: set --config.data.path "
            "to a folder of class folders or to a .csv or .jsonl manifest"
        )
    root = Path(cfg.path).expanduser()
    if not root.exists():
        raise UserError(
            f"data.path {cfg.path!r} does not exist{_near(root)}: it must be a folder "
            "of class folders or a .csv or .jsonl manifest"
        )
    if root.is_file():
        return _manifest(cfg, root)
    return _folders(cfg, root)


def from_files(paths: list[str], labels: Labels) -> Split:
    """A split of image files."""
    array = np.array(paths, object)
    return Split(
        len(paths), "path", lambda i: array[i], lambda i: str(array[i]), labels
    )


def _folders(cfg: DataConfig, root: Path) -> Dataset:
    train_root = _first(root, (cfg.train_split, *TRAIN_FOLDERS))
    names, train = _class_folders(train_root or root)
    test_split = cfg.test_split
    if test_split.endswith(".txt"):
        test = _labelled_by_text(root, root / test_split, names)
    else:
        test_root = _first(root, (test_split, *TEST_FOLDERS)) if train_root else None
        if train_root and test_root is None and test_split not in ("test", ""):
            raise UserError(
                f"data.test_split is {test_split!r}, but {root} has no such folder: "
                f"it has {_subfolders(root)}"
            )
        if test_root is None:
            rest, out = held_out(train, cfg.test_share)
            train, test = train.select(rest), train.select(out)
        else:
            test = _class_folders(test_root, names)[1]

    def split(name: str) -> Split:
        found = _first(root, (name,))
        if found is None:
            raise UserError(
                f"unknown split {name!r}: {root} has the folders {_subfolders(root)}"
            )
        return _class_folders(found, names)[1]

    return Dataset(train, test, names, splits=split)


def _class_folders(
    root: Path, names: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], Split]:
    """(class names, split) of a folder of class folders, searched to any depth.

    ``names``: the classes of the training set, to which a test set must keep.
    """
    found = _subfolders(root)
    if not found:
        files = [f for f in _files(root) if f.lower().endswith(EXTENSIONS)]
        loose = f" ({len(files)} images lie in it directly)" if files else ""
        raise UserError(
            f"{root} has no class folders{loose}: put the images of each class into a "
            "folder of its own, such as photos/cat/1.jpg, or write a .csv manifest "
            "with the columns image,label and set --config.data.path to it"
        )
    found = check_class_names(found, str(root))
    if names:
        unknown = [n for n in found if n not in names]
        if unknown:
            raise UserError(
                f"{root} has the class {unknown[0]!r}, which the training set lacks: "
                f"{nearest(unknown[0], names)}the classes are {_some(names)}"
            )
    else:
        names = found
    paths: list[str] = []
    labels: list[int] = []
    for name in found:
        files = [f for f in _files(root / name) if f.lower().endswith(EXTENSIONS)]
        if not files:
            raise UserError(
                f"class folder {root / name} holds no images with one of the "
                f"extensions {', '.join(EXTENSIONS)}: fill it or remove it"
            )
        paths += files
        labels += [names.index(name)] * len(files)
    return names, from_files(paths, Labels.single(labels))


def _labelled_by_text(root: Path, file: Path, names: tuple[str, ...]) -> Split:
    """A test set whose labels stand in a text file: ``path label`` per line."""
    if not file.exists():
        raise UserError(
            f"data.test_split is {file.name!r}, but {file} does not exist: it must "
            "have one line 'image label' per test image"
        )
    paths, labels = [], []
    indices = {name: i for i, name in enumerate(names)}
    folders = [root, *(root / n for n in _subfolders(root))]
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        path, _, label = line.strip().rpartition(" ")
        path = path.strip()
        if not path:
            raise UserError(f"{where}: {line!r} is not of the form 'image label'")
        candidates = [folder / path for folder in folders]
        paths.append(str(next((c for c in candidates if c.exists()), candidates[0])))
        labels.append(_class_index(label, indices, where))
    if not paths:
        raise UserError(f"{file} lists no images")
    _check_exist(paths, file)
    return from_files(paths, Labels.single(labels))


def _manifest(cfg: DataConfig, file: Path) -> Dataset:
    """A CSV or JSONL file with an image, its label or labels, and perhaps a split."""
    rows = list(_rows(file))
    if not rows:
        raise UserError(f"{file} lists no images")
    multilabel = any(several for _, _, several, _, _ in rows)
    spelled = [label for _, labels, _, _, _ in rows for label in labels]
    by_name = any(not _is_integer(label) for label in spelled)
    if by_name:
        names = check_class_names(
            sorted({s for s in spelled if s != str(IGNORED)}), str(file)
        )
    else:
        highest = max((int(s) for s in spelled), default=-1)
        names = tuple(str(i) for i in range(cfg.num_classes or highest + 1))
    indices = {name: i for i, name in enumerate(names)}
    parts: dict[str, tuple[list[str], list[list[int]]]] = {}
    for image, labels, _, split, number in rows:
        paths, values = parts.setdefault(split, ([], []))
        paths.append(str(file.parent / image))
        where = f"{file}, line {number}"
        values.append([_class_index(s, indices, where) for s in labels])

    def part(name: str) -> Split:
        if name not in parts:
            raise UserError(
                f"{file} has no rows of split {name!r}: its splits are {sorted(parts)}"
            )
        paths, values = parts[name]
        _check_exist(paths, file)
        return from_files(paths, Labels.several(values))

    train_name = "" if set(parts) == {""} else cfg.train_split
    train = part(train_name)
    tests = [n for n in (cfg.test_split, *TEST_FOLDERS) if n in parts]
    if tests:
        test = part(tests[0])
    else:
        rest, out = held_out(train, cfg.test_share)
        train, test = train.select(rest), train.select(out)
    return Dataset(train, test, names, multilabel, splits=part)


def _rows(file: Path) -> Iterable[tuple[str, list[str], bool, str, int]]:
    """(image, labels, whether several are meant, split, line number) per row."""
    if file.suffix.lower() not in MANIFESTS:
        raise UserError(
            f"data.path {str(file)!r} is a file: a manifest must end in "
            f"{' or '.join(MANIFESTS)}"
        )
    with file.open(newline="", encoding="utf-8-sig") as stream:
        if file.suffix.lower() == ".csv":
            reader = csv.DictReader(stream)
            for row in reader:
                yield _row(row, file, reader.line_num)
        else:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as e:
                        raise UserError(f"{file}, line {number}: {e}") from e
                    yield _row(row, file, number)


def _row(row: dict, file: Path, number: int) -> tuple[str, list[str], bool, str, int]:
    where = f"{file}, line {number}"
    image = next((k for k in _IMAGE_COLUMNS if row.get(k)), "")
    column = next((k for k in _LABEL_COLUMNS if k in row), "")
    if not image or not column:
        raise UserError(
            f"{where} has the columns {sorted(map(str, row))}: it needs an image "
            f"({', '.join(_IMAGE_COLUMNS)}) and a label ({', '.join(_LABEL_COLUMNS)})"
        )
    value = row[column]
    several = column == "labels" or isinstance(value, list)
    if isinstance(value, list):
        labels = [str(v) for v in value]
    elif several:
        labels = [v.strip() for v in str(value or "").split("|") if v.strip()]
    else:
        labels = [str(value).strip()]
    if labels in ([""], ["None"]):
        raise UserError(
            f"{where}: the label is empty; write {IGNORED} for an image to be ignored"
        )
    return str(row[image]), labels, several, str(row.get("split") or ""), number


def _class_index(label: str, indices: Mapping[str, int], where: str) -> int:
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
        f"the classes are {_some(tuple(indices))}"
    )


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _check_exist(paths: list[str], listed_in: Path) -> None:
    missing = [p for p in paths if not os.path.exists(p)]
    if missing:
        raise UserError(
            f"{listed_in} lists {len(missing)} files that do not exist, the first is "
            f"{missing[0]}: paths are relative to the folder of the manifest"
        )


def _first(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / n for n in names if n and (root / n).is_dir()), None)


def _subfolders(root: Path) -> list[str]:
    return sorted(
        e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")
    )


def _files(root: Path) -> list[str]:
    """Every file below ``root`` in a fixed order, without hidden ones."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        found += [
            os.path.join(folder, f) for f in sorted(files) if not f.startswith(".")
        ]
    return found


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return str(list(names[:10])) + more


def _near(path: Path) -> str:
    if path.parent.is_dir():
        hint = nearest(path.name, os.listdir(path.parent))
        return f" ({hint.rstrip('? ')}?)" if hint else ""
    return ""
