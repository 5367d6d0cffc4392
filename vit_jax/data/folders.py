# SPDX-License-Identifier: Apache-2.0
"""Class folders on disk. The layouts of ``data.source="folder"``:

photos/train/cat/a.jpg      class folders under train/ and one of test/, val/, ...; also
                            Train/ and Test/, or imagenet_train/ and imagenet_val/
photos/cat/a.jpg            class folders only: a share of each class is held out (one of
                            them may be called "train", but not "test", "val", ...)
ILSVRC/Data/CLS-LOC/        Kaggle's ImageNet, and tiny-imagenet-200, see imagenet.py
photos/val.txt              "a.jpg cat" or "a.jpg 3" per line, as data.test_split: for
                            test images that are not sorted by class
photos.csv, photos.jsonl    a table instead of folders, see manifest.py

Images lie at any depth below their class folder. A folder that holds nothing but one
other folder is taken for its wrapping.
"""

import collections
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from vit_jax.config import DataConfig, nearest
from vit_jax.data import imagenet, manifest, splits
from vit_jax.data.classes import nfc
from vit_jax.data.examples import Dataset, Labels, Split, check_class_names
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp")
# Rarely photographs: they count, but not without a word where others are.
_DRAWINGS = (".gif", ".bmp")
# What archivers, file servers and Python leave behind, besides hidden names.
_NO_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir", "lost+found")


def load(cfg: DataConfig) -> Dataset:
    """The data set under ``cfg.path``."""
    if not cfg.path:
        raise UserError(
            "config.data.source is 'folder' but config.data.path is empty: set "
            "--config.data.path to a folder of class folders or to a .csv or .jsonl table"
        )
    if "://" in cfg.path:
        raise UserError(
            f"config.data.path {cfg.path!r} is an address, but folders are read from a "
            "disk: write records there (python -m vit_jax.data.write_records FOLDER "
            "gs://...) and set config.data.source=records"
        )
    root = Path(os.path.expanduser(cfg.path))
    if not root.exists():
        raise UserError(
            f"config.data.path {cfg.path!r} does not exist{_near(root)}: it must be a "
            "folder of class folders or a .csv or .jsonl table"
        )
    if root.is_file():
        return manifest.load(cfg, root)
    root = imagenet.kaggle_root(_unwrapped(root, {cfg.train_split, cfg.test_split}))
    file = root / cfg.test_split if cfg.test_split.endswith(".txt") else None
    listed = manifest.read_list(file, _places(root, file)) if file else []
    train_root, test_roots = _roots(cfg, root)
    beside = _beside(cfg, root, listed) if train_root == root else set()
    classes = {c: f for c, f in _classes(train_root).items() if c not in beside}
    names = check_class_names(sorted(classes), str(train_root))
    indices = {name: i for i, name in enumerate(names)}
    train = _images(train_root, classes, indices)
    test = None
    if file:
        test = manifest.labelled(listed, indices, file)
    elif test_roots:
        test = _test_images(root, test_roots, indices)

    def split(name: str) -> Split:
        return _test_images(root, [_asked("split", name, root)], indices)

    names = imagenet.named(names, train_root)
    return Dataset(*splits.with_test(cfg, train, test), names, splits=split)


# ------------------------------------------------------------------------ which folder


def _unwrapped(root: Path, known: Collection[str]) -> Path:
    """The folder of the splits or classes: unpacking an archive often leaves them in a
    folder that is the only one in another. ``known``: names that are no wrapping."""
    while len(inside := _subfolders(root)) == 1:
        name = inside[0]
        if name in known or _word(name)[1] == "*" or not _subfolders(root / name):
            break
        root /= name
        log.info("the data is looked for in %s, the only folder there", root)
    return root


def _roots(cfg: DataConfig, root: Path) -> tuple[Path, list[Path]]:
    """(folder of the training classes, folders that may be those of the test set)."""
    if cfg.train_split in ("", DataConfig.train_split):
        family = _family(root)
        if not family:
            _check_not_splits(root)
        train_root = next((root / family[w] for w in splits.TRAIN if w in family), root)
        tests = [root / family[w] for w in splits.TEST if w in family]
    else:
        train_root = _asked("train_split", cfg.train_split, root)
        tests = [root / n for n in splits.meant("test", _subfolders(root))]
    if not cfg.test_split or cfg.test_split.endswith(".txt"):
        tests = []
    elif cfg.test_split != DataConfig.test_split:
        tests = [_asked("test_split", cfg.test_split, root)]
    return (train_root if train_root == root else _unwrapped(train_root, ())), tests


def _family(root: Path) -> dict[str, str]:
    """The folders that are splits, by the word that says which: {"train": "imagenet_train",
    "val": "imagenet_val"}; {}: the folders of ``root`` are classes."""
    families: dict[str, dict[str, str]] = {}
    for name in _subfolders(root):
        word, rest = _word(name)
        families.setdefault(rest, {}).setdefault(word, name)
    plain = families.pop("*", {})
    train = next((plain[w] for w in splits.TRAIN if w in plain), "")
    # A folder without sub-folders beside class folders is itself a class (of trains, say).
    if train and (_subfolders(root / train) or not families):
        return plain
    pairs = [
        family
        for family in families.values()
        if {*splits.TEST} & family.keys()
        and any(w in family and _subfolders(root / family[w]) for w in splits.TRAIN)
    ]
    return pairs[0] if len(pairs) == 1 else {}


def _word(name: str) -> tuple[str, str]:
    """What names a split in a name, and the rest: ("val", "imagenet_*")."""
    key = splits.plain(name)
    for word in sorted((*splits.TRAIN, *splits.TEST), key=len, reverse=True):
        if word in key:
            return word, key.replace(word, "*", 1)
    return "", key


def _check_not_splits(root: Path) -> None:
    """Raises where folders that should be classes hold the same folders all over."""
    have = _subfolders(root)
    inside = [{*_subfolders(root / name)} for name in have] if len(have) <= 20 else []
    shared = set.intersection(*inside) if len(inside) > 1 else set()
    if len(shared) < 2 or 2 * len(shared) < len(set.union(*inside)):
        return
    same = f"the folders {splits.some(have)} of {root} hold the same folders, "
    same += splits.some(sorted(shared))
    if len(shared) < len(have):
        log.warning("%s; they count as classes all the same", same)
        return
    raise UserError(
        f"{same}, so they seem to be splits and not classes: set "
        f"--config.data.train_split and --config.data.test_split to two of them, "
        f"--config.data.path to one ({root / have[0]}), or list the images in a .csv table"
    )


def _beside(cfg: DataConfig, root: Path, listed: list[manifest.Line]) -> set[str]:
    """Folders beside the class folders that hold the images a text file lists.

    Raises:
      UserError: one is called like a test split and does not.
    """
    asked = cfg.test_split.removesuffix(".txt")
    found = {n for n in _subfolders(root) if splits.plain(n) in (asked, *splits.TEST)}
    for name in sorted(found):
        inside = os.path.join(root, name, "")
        if not any(line.image.startswith(inside) for line in listed):
            deeper = [n for n in _subfolders(root) if _family(root / n)]
            hint = f"set --config.data.path={root / deeper[0]}, " if deeper else ""
            raise UserError(
                f"{root} has the folder {name!r}, named as a test split, but no "
                f"training split: {hint}put the class folders of the training images "
                f"into {root / splits.TRAIN[0]}, as in train/cat/1.jpg and "
                f"{name}/cat/1.jpg, or rename it if it is a class"
            )
    return found


def _asked(knob: str, name: str, root: Path) -> Path:
    """The folder of the split that a knob asks for."""
    have = _subfolders(root)
    if found := splits.meant(name, have):
        return root / found[0]
    raise splits.missing(knob, name, root, have)


def _places(root: Path, file: Path) -> list[Path]:
    """Where to look for the images of a list, in this order: those of the class folders
    may have the same names."""
    have = _subfolders(root)
    tests = [n for n in have if n == file.stem or splits.plain(n) in splits.TEST]
    near = [root, file.parent, *(root / n for n in tests)]
    deeper = [p / n for p in near[1:] if p != root for n in _subfolders(p)]
    return [*near, *deeper, *(root / n for n in have if n not in tests)]


# ----------------------------------------------------------------------------- images


def _classes(root: Path) -> dict[str, list[str]]:
    """Class -> its folders: two where a name is spelled with composed and with separate
    accents."""
    classes: dict[str, list[str]] = {}
    for folder in _subfolders(root):
        classes.setdefault(nfc(folder), []).append(folder)
    if not classes:
        images = [f for f in files(root) if _suffix(f) in EXTENSIONS]
        loose = f" ({len(images)} images lie in it directly)" if images else ""
        raise UserError(
            f"{root} has no class folders{loose}: put the images of each class into a "
            "folder of its own, such as photos/cat/1.jpg, or write a .csv table with the "
            "columns image,label and set --config.data.path to it"
        )
    return classes


def _images(
    root: Path, classes: Mapping[str, list[str]], indices: Mapping[str, int]
) -> Split:
    """The images of class folders, whose names must be among ``indices``."""
    for name in check_class_names(sorted(classes), str(root)):
        if name not in indices:
            raise UserError(
                f"{root} has the class {name!r}, which the training set lacks: "
                f"{nearest(name, indices)}the classes are {splits.some([*indices])}"
            )
    paths: list[str] = []
    labels: list[int] = []
    kinds: collections.Counter[str] = collections.Counter()
    for name in sorted(classes):
        found = [f for folder in classes[name] for f in files(root / folder)]
        suffixes = [_suffix(f) for f in found]
        images = [f for f, s in zip(found, suffixes, strict=True) if s in EXTENSIONS]
        kinds.update(suffixes)
        if not images:
            others, rest = _counted(collections.Counter(suffixes)), ": "
            if others:
                rest = f", only {others}: convert them to one of the extensions "
                rest += f"{', '.join(EXTENSIONS)}, or "
            raise UserError(
                f"class folder {root / name} holds no images{rest}remove it"
            )
        paths += images
        labels += [indices[name]] * len(images)
    _report(root, kinds)
    return manifest.from_files(paths, Labels.single(labels))


def _test_images(
    root: Path, candidates: list[Path], indices: Mapping[str, int]
) -> Split:
    """The first of the folders that is sorted by class, or whose labels are listed."""
    for folder in candidates:
        found = _unwrapped(folder, indices)
        if any(name in indices for name in map(nfc, _subfolders(found))):
            return _images(found, _classes(found), indices)
        if file := imagenet.label_file(folder):
            return manifest.labelled(_lines(file, folder, root), indices, file)
        log.warning("%s is left out: it has no folder of a training class", folder)
    lists = [*root.glob("*.txt"), *root.glob("*/*.txt")]
    try:
        return _images(candidates[0], _classes(candidates[0]), indices)
    except UserError as e:
        example = str(min(lists).relative_to(root)) if lists else "val.txt"
        raise UserError(
            f"{e}; if the test images are not sorted by class, set --config.data."
            f"test_split to a list of lines 'image label', such as {example}, or to '' "
            "to hold out a share of the training images"
        ) from e


def _lines(file: Path, folder: Path, root: Path) -> list[manifest.Line]:
    """What a file says of the images in a folder that is not sorted by class."""
    if file.suffix == ".csv":
        found = imagenet.solution(file, folder)
        return [manifest.Line(image, (label,), at) for image, label, at in found]
    return manifest.read_list(file, _places(root, file))


def _report(root: Path, kinds: collections.Counter[str]) -> None:
    """Says what was left out, and what is hardly meant."""
    left_out = {s: n for s, n in kinds.items() if s not in EXTENSIONS}
    if left_out:
        log.warning(
            "%s: left out %d files that are none of %s: %s",
            root,
            sum(left_out.values()),
            ", ".join(EXTENSIONS),
            _counted(collections.Counter(left_out)),
        )
    drawings = collections.Counter({s: kinds[s] for s in _DRAWINGS if s in kinds})
    images = sum(n for s, n in kinds.items() if s in EXTENSIONS)
    if drawings and drawings.total() < images:
        log.warning(
            "%s: %s among %d images count as photographs: remove them if they are icons "
            "or placeholders",
            root,
            _counted(drawings),
            images,
        )


def _counted(kinds: collections.Counter[str]) -> str:
    return ", ".join(f"{n} {s or 'without extension'}" for s, n in kinds.most_common(5))


# ------------------------------------------------------------------------------- disk


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _subfolders(root: Path) -> list[str]:
    return sorted(e.name for e in _entries(root) if e.is_dir())


def _entries(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """What is in a folder and not hidden."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in _NO_FOLDERS:
                    yield entry
    except OSError as e:
        raise UserError(
            f"cannot read the folder {folder}: {e.strerror}: make it readable, or move it "
            "out of the data set"
        ) from e


def files(root: Path) -> list[str]:
    """Every file below ``root`` in a fixed order, without hidden ones."""
    found: list[str] = []
    visited: list[str] = []  # real paths of ``root`` and of links that were followed

    def leads_back(link: str) -> bool:
        """Whether a link leads to what is listed anyway, or to what holds the link."""
        if not visited:
            visited.append(os.path.join(os.path.realpath(root), ""))
        target = os.path.join(os.path.realpath(link), "")
        known = any(target.startswith(v) or v.startswith(target) for v in visited)
        visited.append(target)
        return known

    todo = [(os.fspath(root), False)]
    while todo:
        folder, is_link = todo.pop()
        if is_link and leads_back(folder):
            continue
        entries = sorted(_entries(folder), key=lambda e: e.name)
        # What is no file, no folder and no broken link is a pipe or the like, on which a
        # reader would wait for ever.
        found += [e.path for e in entries if e.is_file() or not os.path.exists(e.path)]
        deeper = [(e.path, e.is_symlink()) for e in entries if e.is_dir()]
        todo += reversed(deeper)
    return found


def _near(path: Path) -> str:
    if path.parent.is_dir():
        hint = nearest(path.name, os.listdir(path.parent))
        return f" ({hint.rstrip('? ')}?)" if hint else ""
    return ""
