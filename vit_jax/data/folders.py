# SPDX-License-Identifier: Apache-2.0
"""Image files on disk: class folders, manifests, and test labels in a text file.

photos/train/cat/a.jpg      class folders under train/ and one of test/, val/, ...
photos/cat/a.jpg            class folders only: a share of each class is held out (one of
                            them may be called "train", but not "test", "val", ...)
photos.csv, photos.jsonl    image,label[,split]: one or several labels per image
photos/val.txt              "a.jpg 3" or "a.jpg cat" per line, as data.test_split
"""

import collections
import csv
import io
import json
import logging
import os
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from vit_jax.config import DataConfig, nearest
from vit_jax.data.examples import (
    IGNORED,
    Dataset,
    Labels,
    Split,
    check_class_names,
    held_out,
)
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")
TRAIN_FOLDERS = ("train", "training")
VALIDATION = ("val", "validation", "valid")
TEST_FOLDERS = ("test", *VALIDATION)
MANIFESTS = (".csv", ".jsonl")
MAX_CLASSES = 100_000  # that labels which are numbers can make, or one per example
_IMAGE_COLUMNS = ("image", "path", "file", "filename")
_LABEL_COLUMNS = ("labels", "label", "class")


def load(cfg: DataConfig) -> Dataset:
    """The data set under ``cfg.path``."""
    if not cfg.path:
        raise UserError(
            "data.source is 'folder' but data.path is empty: set --config.data.path "
            "to a folder of class folders or to a .csv or .jsonl manifest"
        )
    root = Path(os.path.expanduser(cfg.path))
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
    for path in paths:
        if not _is_utf8(path):  # which tensorflow asks for
            raise UserError(
                f"the file name {os.fsencode(path)!r} is not UTF-8: rename the file"
            )
    array = np.array(paths, object)
    return Split(
        len(paths), "path", lambda i: array[i], lambda i: str(array[i]), labels
    )


def _folders(cfg: DataConfig, root: Path) -> Dataset:
    test_split = cfg.test_split
    tests = (test_split.removesuffix(".txt"), *TEST_FOLDERS)
    train_root = _train_root(cfg, root, tests)
    listed = (
        _listed(root, root / test_split, tests) if test_split.endswith(".txt") else []
    )
    without = _test_folders(root, tests, listed) if train_root == root else []
    names, train = _class_folders(train_root, without=without)
    if listed:
        test = _labelled_by_text(root / test_split, listed, names)
    elif test_root := _test_root(cfg, root, train_root):
        test = _class_folders(test_root, names)[1]
    else:
        rest, out = held_out(train, cfg.test_share)
        train, test = train.select(rest), train.select(out)

    def split(name: str) -> Split:
        found = _first(root, (name,))
        if found is None:
            raise UserError(
                f"unknown split {name!r}: {root} has the folders {_subfolders(root)}"
            )
        return _class_folders(found, names)[1]

    return Dataset(train, test, names, splits=split)


def _train_root(cfg: DataConfig, root: Path, tests: tuple[str, ...]) -> Path:
    """The folder of the training split: ``root`` where the classes lie there."""
    if cfg.train_split not in ("", DataConfig.train_split):
        return _chosen(root, "train_split", cfg.train_split)
    found = _first(root, TRAIN_FOLDERS)
    classes = set(_subfolders(root)) - {*TRAIN_FOLDERS, *tests}
    # Without folders of its own, and beside classes, it is a class: trains.
    return root if found is None or (classes and not _subfolders(found)) else found


def _test_folders(
    root: Path, tests: tuple[str, ...], listed: list[tuple[str, str, str]]
) -> list[str]:
    """Folders beside the class folders that hold the images a text file lists.

    Raises:
      UserError: one is called like a test split and does not.
    """
    found = sorted({*tests} & {*_subfolders(root)})
    for name in found:
        inside = os.path.join(root, name, "")
        if not any(path.startswith(inside) for path, _, _ in listed):
            raise UserError(
                f"{root} has the folder {name!r}, named as a test split, but no "
                "training split: put the class folders of the training images into "
                f"{root / TRAIN_FOLDERS[0]}, as in train/cat/1.jpg and "
                f"{name}/cat/1.jpg, or rename it if it is a class"
            )
    return found


def _test_root(cfg: DataConfig, root: Path, train_root: Path) -> Path | None:
    """The folder of the test split; None: there is none, nor is one asked for."""
    if cfg.test_split not in ("", DataConfig.test_split):
        return _chosen(root, "test_split", cfg.test_split)
    return None if train_root == root else _first(root, TEST_FOLDERS)


def _chosen(root: Path, knob: str, name: str) -> Path:
    # tfds says "validation" where folders say "val".
    found = _first(root, (name, *(VALIDATION if name in VALIDATION else ())))
    if found is None:
        raise UserError(
            f"data.{knob} is {name!r}, but {root} has no such folder: it has "
            f"{_some(tuple(_subfolders(root)))}; only the default, "
            f"{getattr(DataConfig, knob)!r}, stands for whichever there is"
        )
    return found


def _class_folders(
    root: Path, names: tuple[str, ...] = (), without: Collection[str] = ()
) -> tuple[tuple[str, ...], Split]:
    """(class names, split) of a folder of class folders, searched to any depth.

    ``names``: the classes of the training set, to which a test set must keep.
    ``without``: folders that are no classes.
    """
    folders: dict[str, list[str]] = {}
    for folder in _subfolders(root):
        if folder not in without:
            folders.setdefault(_nfc(folder), []).append(folder)
    if not folders:
        files = [f for f in _files(root) if f.lower().endswith(EXTENSIONS)]
        loose = f" ({len(files)} images lie in it directly)" if files else ""
        raise UserError(
            f"{root} has no class folders{loose}: put the images of each class into a "
            "folder of its own, such as photos/cat/1.jpg, or write a .csv manifest "
            "with the columns image,label and set --config.data.path to it"
        )
    found = check_class_names(sorted(folders), str(root))
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
    left_out: collections.Counter[str] = collections.Counter()
    for name in found:
        files = []
        for file in (f for folder in folders[name] for f in _files(root / folder)):
            suffix = os.path.splitext(file)[1].lower()
            if suffix in EXTENSIONS:
                files.append(file)
            else:
                left_out[suffix or "without an extension"] += 1
        if not files:
            raise UserError(
                f"class folder {root / name} holds no images with one of the "
                f"extensions {', '.join(EXTENSIONS)}: fill it or remove it"
            )
        paths += files
        labels += [names.index(name)] * len(files)
    if left_out:
        log.warning(
            "%s: left out %d files that are none of %s: %s",
            root,
            left_out.total(),
            ", ".join(EXTENSIONS),
            ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5)),
        )
    return names, from_files(paths, Labels.single(labels))


def _listed(
    root: Path, file: Path, tests: tuple[str, ...]
) -> list[tuple[str, str, str]]:
    """(image, label, where it stands) per line ``path label`` of a text file.

    Images lie in ``root`` or in one of its folders, looked for in ``tests`` first: an
    image of a class may have the same name.
    """
    if not file.exists():
        raise UserError(
            f"data.test_split is {file.name!r}, but {file} does not exist: it must "
            "have one line 'image label' per test image"
        )
    found = []
    folders = sorted(_subfolders(root), key=lambda name: name not in tests)
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        path, _, label = line.strip().rpartition(" ")
        path = path.strip()
        if not path:
            raise UserError(f"{where}: {line!r} is not of the form 'image label'")
        candidates = [root / path, *(root / folder / path for folder in folders)]
        image = next((c for c in candidates if c.exists()), candidates[0])
        found.append((str(image), _nfc(label), where))
    if not found:
        raise UserError(f"{file} lists no images")
    return found


def _labelled_by_text(
    file: Path, listed: list[tuple[str, str, str]], names: tuple[str, ...]
) -> Split:
    """A test set whose labels stand in a text file."""
    indices = {name: i for i, name in enumerate(names)}
    labels = [_class_index(label, indices, where) for _, label, where in listed]
    paths = [path for path, _, _ in listed]
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
        classes = cfg.num_classes or max((int(s) for s in spelled), default=-1) + 1
        if not cfg.num_classes and classes > max(len(rows), MAX_CLASSES):
            number = next(
                n for _, ls, _, _, n in rows for s in ls if int(s) >= classes - 1
            )
            raise UserError(
                f"{file}, line {number}: label {classes - 1} asks for {classes} classes, "
                f"with {len(rows)} images: number the classes from 0, or set "
                "--config.data.num_classes if there are so many"
            )
        names = tuple(str(i) for i in range(classes))
    indices = {name: i for i, name in enumerate(names)}
    parts: dict[str, tuple[list[str], list[list[int]]]] = {}
    for image, labels, _, split, number in rows:
        paths, values = parts.setdefault(split, ([], []))
        paths.append(str(file.parent / image))
        where = f"{file}, line {number}"
        values.append([_class_index(s, indices, where) for s in labels])

    unsplit = set(parts) == {""}

    def part(name: str, knob: str = "split") -> Split:
        if name not in parts:
            found = (
                "has no column 'split'"
                if unsplit
                else f"has the splits {sorted(parts)}"
            )
            raise UserError(f"{knob} is {name!r}, but {file} {found}")
        paths, values = parts[name]
        _check_exist(paths, file)
        return from_files(paths, Labels.several(values))

    train_name = cfg.train_split
    if unsplit and train_name == DataConfig.train_split:
        train_name = ""
    train = part(train_name, "data.train_split")
    if cfg.test_split not in ("", DataConfig.test_split):
        test = part(cfg.test_split, "data.test_split")
    elif tests := [n for n in TEST_FOLDERS if n in parts]:
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
    text = _text(file)
    if file.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                yield _row(row, file, reader.line_num)
        except csv.Error as e:  # such as a quote left open, and a field without end
            raise UserError(f"{file}, line {reader.line_num + 1}: {e}") from e
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise UserError(f"{file}, line {number}: {e}") from e
            if not isinstance(row, dict):
                raise UserError(
                    f"{file}, line {number}: {line:.80} is no object such as "
                    '{"image": "a.jpg", "label": "cat"}'
                )
            yield _row(row, file, number)


def _text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise UserError(
            f"{file}, line {line}: the byte {data[e.start]:#x} is not UTF-8: save the "
            "file in that encoding"
        ) from e


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
    labels = [_nfc(label) for label in labels]
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


def _nfc(name: str) -> str:
    """One spelling of accents: macOS and others write the same name in other bytes."""
    return unicodedata.normalize("NFC", name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    real = root.resolve()
    seen = {str(p) for p in (real, *real.parents)}  # a link may lead back here

    def is_new(folder: str) -> bool:
        real = os.path.realpath(folder)
        new = real not in seen
        seen.add(real)
        return new

    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [
            s
            for s in sorted(subfolders)
            if not s.startswith(".") and is_new(os.path.join(folder, s))
        ]
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
