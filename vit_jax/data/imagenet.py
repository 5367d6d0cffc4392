# SPDX-License-Identifier: Apache-2.0
"""ImageNet (ILSVRC 2012) and its relatives as they are handed out: where the labels of
the validation images stand, and what the classes are called.

ILSVRC2012_img_train.tar            a tar of tars, one per class, and a flat tar of the
ILSVRC2012_img_val.tar              validation images, whose classes are numbers of the
ILSVRC2012_devkit_t12.tar.gz        devkit
ILSVRC/Data/CLS-LOC/{train,val}     of Kaggle, with LOC_val_solution.csv and
                                    LOC_synset_mapping.txt some folders above
tiny-imagenet-200/val/              val_annotations.txt beside images/; words.txt above

Classes are in the order of their WordNet numbers, as everywhere.
"""

import collections
import csv
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.data import splits
from vit_jax.errors import UserError

TRAIN, VAL, DEVKIT = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)
_WNID = re.compile(r"n\d{8}")
_SOLUTION = "LOC_val_solution.csv"
_NAMES = ("LOC_synset_mapping.txt", "words.txt")  # WordNet number, what it is called
_ABOVE = 5  # folders that are searched for these


def devkit(file: str, stream: Any) -> tuple[dict[str, str], list[str]]:
    """(WordNet number -> what it is called, that of each validation image) of the devkit.

    Raises:
      UserError: it is damaged.
    """
    from scipy.io import loadmat

    try:
        with tarfile.open(fileobj=stream, mode="r:gz") as archive:
            parts = {Path(m.name).name: m for m in archive if m.isfile()}

            def read(name: str) -> bytes:
                member = archive.extractfile(parts[name])
                assert member is not None  # it is a file
                return member.read()

            synsets = loadmat(io.BytesIO(read("meta.mat")), squeeze_me=True)
            truth = read("ILSVRC2012_validation_ground_truth.txt").split()
        leaves = [s for s in synsets["synsets"] if not s["num_children"]]
        names = {str(s["WNID"]): str(s["words"]) for s in leaves}
        wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
        return names, [wnids[int(number)] for number in truth]
    except Exception as e:  # gzip, tarfile, scipy and the archive each have their own
        raise UserError(
            f"{file} is not ImageNet's devkit, or damaged ({type(e).__name__}: "
            f"{str(e)[:200]}): copy it again"
        ) from e


def validation_labels(members: Sequence[str], truth: Sequence[str]) -> list[str]:
    """The WordNet number of each image, whose names end in its number from 1.

    Raises:
      UserError: a name does not.
    """
    found = []
    for name in members:
        match = re.search(r"_val_(\d{8})\.\w+$", name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(truth):
            raise UserError(
                f"{name} is not one of the {len(truth)} validation images of ImageNet"
            )
        found.append(truth[number - 1])
    return found


def kaggle_root(root: Path) -> Path:
    """The folder of the splits in Kaggle's tree; other folders as they are."""
    for inside in ("Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"):
        if (root / inside / "train").is_dir():
            return root / inside
    return root


def label_file(folder: Path) -> Path | None:
    """What says the classes of the images in a folder that is not sorted by class."""
    solution = _above(folder, _SOLUTION)
    if solution and splits.plain(folder.name) in splits.VALIDATION:
        return solution
    return next(filter(_is_list, sorted(folder.glob("*.txt"))), None)


def _is_list(file: Path) -> bool:
    """Whether lines of "image label", separated by a tab, begin in a file."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        image, *labels = stream.readline(1000).split("\t")
    return bool(labels) and Path(image).suffix.lower() in (".jpeg", ".jpg", ".png")


def solution(file: Path, folder: Path) -> list[tuple[str, str, str]]:
    """(image, WordNet number, where it stands) of the lines of LOC_val_solution.csv."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
        return [
            (
                str(folder / f"{row['ImageId']}.JPEG"),
                row["PredictionString"].split()[0],
                f"{file}, line {number}",
            )
            for number, row in enumerate(rows, 2)
        ]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        csv.Error,
    ) as e:
        raise UserError(
            f"{file} is not Kaggle's {_SOLUTION}, with the columns ImageId and "
            f"PredictionString ({type(e).__name__}: {e})"
        ) from e


def named(classes: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Classes that are called by their WordNet numbers, as a file of that folder or of
    one above it names them; others as they are."""
    if not all(map(_WNID.fullmatch, classes)):
        return tuple(classes)
    file = next((f for n in _NAMES if (f := _above(folder, n))), None)
    if file is None:
        return tuple(classes)
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    lines = [line.split(None, 1) for line in text.splitlines()]
    words = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    return class_names(classes, words)


def class_names(wnids: Sequence[str], words: Mapping[str, str]) -> tuple[str, ...]:
    """What the classes are called; with their number where two are called the same, as
    the birds and the machines that are cranes."""
    plain = [words.get(wnid, wnid) for wnid in wnids]
    count = collections.Counter(name.casefold() for name in plain)
    return tuple(
        name if count[name.casefold()] == 1 else f"{name} ({wnid})"
        for name, wnid in zip(plain, wnids, strict=True)
    )


def _above(folder: Path, name: str) -> Path | None:
    """A file in a folder, or in the nearest of those above it that has it."""
    places = [folder, *folder.absolute().parents][:_ABOVE]
    return next((p / name for p in places if (p / name).is_file()), None)
