# SPDX-License-Identifier: Apache-2.0
"""VTAB-1k: 19 tasks with 1,000 training examples each (paper section 4.1, B.1.1).

``data.name="vtab/dtd"`` trains on the 800 + 200 examples and tests on the full test
set; ``data.train_split="train800"`` trains on 800 and tests on the other 200, for
selection. Splits and label rules are those of the benchmark's own code; sizes that a
split depends on are read from the data set.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_jax.config import DataConfig, choose
from vit_jax.data import tfds_source
from vit_jax.data.examples import Dataset, Labels, Split
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

# The three groups over which the paper averages.
NATURAL, SPECIALIZED, STRUCTURED = "natural", "specialized", "structured"


def as_is(example: Any) -> int:
    """The label that tfds gives."""
    return int(example["label"])


def nearest_clevr(example: Any) -> int:
    """Distance of the nearest object in six bins."""
    depth = np.min(np.asarray(example["objects"]["pixel_coords"])[:, 2])
    return _bin(depth, (0, 8, 8.5, 9, 9.5, 10, 100))


def nearest_kitti(example: Any) -> int:
    """Distance of the nearest car, van or truck in four bins."""
    kind = np.asarray(example["objects"]["type"])
    depth = np.asarray(example["objects"]["location"])[:, 2]
    return _bin(np.min(depth[kind < 3], initial=1000.0), (-100, 8, 20, 999))


def brighten(encoded: bytes) -> bytes:
    """dSprites stores its pixels as 0 and 1."""
    return tf.io.encode_png(tf.io.decode_png(encoded) * 255).numpy()


def _bin(value: float, thresholds: tuple[float, ...]) -> int:
    """The largest i with thresholds[i] < value."""
    return int(np.flatnonzero(np.asarray(thresholds) < value)[-1])


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the table.

    ``val``: where the 200 validation examples begin, as (split, start): start an
    integer or a share of the split. ``test``: (split, start), to its end.
    """

    group: str
    source: str
    classes: int
    val: tuple[str, float]
    test: tuple[str, float]
    label: Callable[[Any], int] = as_is
    flip: bool = True
    crop: bool = True
    image: Callable[[bytes], bytes] = lambda encoded: encoded


_VALIDATION = ("validation", 0)
_TEST = ("test", 0)

TASKS: dict[str, Task] = {
    "caltech101": Task(NATURAL, "caltech101", 102, ("train", 0.9), _TEST),
    "cifar100": Task(NATURAL, "cifar100", 100, ("train", 0.9), _TEST),
    "dtd": Task(NATURAL, "dtd", 47, _VALIDATION, _TEST),
    "flowers102": Task(NATURAL, "oxford_flowers102", 102, _VALIDATION, _TEST),
    "pets": Task(NATURAL, "oxford_iiit_pet", 37, ("train", 0.8), _TEST),
    "svhn": Task(NATURAL, "svhn_cropped", 10, ("train", 0.9), _TEST),
    "sun397": Task(NATURAL, "sun397/tfds", 397, _VALIDATION, _TEST),
    "patch_camelyon": Task(SPECIALIZED, "patch_camelyon", 2, _VALIDATION, _TEST),
    "eurosat": Task(SPECIALIZED, "eurosat/rgb", 10, ("train", 0.6), ("train", 0.8)),
    "resisc45": Task(SPECIALIZED, "resisc45", 45, ("train", 0.6), ("train", 0.8)),
    "retinopathy": Task(
        SPECIALIZED,
        "diabetic_retinopathy_detection/btgraham-300",
        5,
        _VALIDATION,
        _TEST,
    ),
    "clevr_count": Task(
        STRUCTURED,
        "clevr",
        8,
        ("train", 0.9),
        _VALIDATION,
        lambda e: len(np.asarray(e["objects"]["size"])) - 3,
        crop=False,
    ),
    "clevr_distance": Task(
        STRUCTURED,
        "clevr",
        6,
        ("train", 0.9),
        _VALIDATION,
        nearest_clevr,
        crop=False,
    ),
    "dmlab": Task(STRUCTURED, "dmlab", 6, _VALIDATION, _TEST, crop=False),
    "kitti_distance": Task(
        STRUCTURED, "kitti", 4, _VALIDATION, _TEST, nearest_kitti, crop=False
    ),
    "dsprites_location": Task(
        STRUCTURED,
        "dsprites",
        16,
        ("train", 0.8),
        ("train", 0.9),
        lambda e: int(e["label_x_position"]) // 2,
        flip=False,
        crop=False,
        image=brighten,
    ),
    "dsprites_orientation": Task(
        STRUCTURED,
        "dsprites",
        16,
        ("train", 0.8),
        ("train", 0.9),
        lambda e: int(int(e["label_orientation"]) // 2.5),
        flip=False,
        image=brighten,
    ),
    "smallnorb_azimuth": Task(
        STRUCTURED,
        "smallnorb",
        18,
        _TEST,
        ("test", 0.5),
        lambda e: int(e["label_azimuth"]),
        flip=False,
    ),
    "smallnorb_elevation": Task(
        STRUCTURED,
        "smallnorb",
        9,
        _TEST,
        ("test", 0.5),
        lambda e: int(e["label_elevation"]),
    ),
}


def load(cfg: DataConfig) -> Dataset:
    """The task ``vtab/NAME``."""
    task = choose("VTAB task in data.name", cfg.name.removeprefix("vtab/"), TASKS)
    builder = tfds_source.prepared(task.source, cfg.path)
    sizes = {k: v.num_examples for k, v in builder.info.splits.items()}
    splits = split_expressions(task, sizes)
    choose("data.train_split", cfg.train_split, {"train": 0, "train800": 0})

    def read(expressions: str) -> Split:
        found = tfds_source.read(builder, expressions, task.label, task.image)
        return _checked(found, task, cfg.name)

    names = [str(i) for i in range(task.classes)]
    if task.label is as_is:
        known = builder.info.features["label"].names or []
        names = list(known) if len(known) == task.classes else names
    full = cfg.train_split == "train"
    return Dataset(
        read(splits["train800val200" if full else "train800"]),
        read(splits["test" if full else "val200"]),
        tuple(names),
        splits=lambda name: read(choose("VTAB split", name, splits)),
        train_transforms=transforms(task, cfg.image_size),
    )


def split_expressions(task: Task, sizes: dict[str, int]) -> dict[str, str]:
    """tfds split expressions of train800, val200, train800val200 and test."""

    def start(split: str, at: float) -> int:
        return int(at * sizes[split]) if at < 1 else int(at)

    val_split, val_at = task.val
    begin = start(val_split, val_at)
    val = f"{val_split}[{begin}:{begin + 200}]"
    test_split, test_at = task.test
    test = f"{test_split}[{start(test_split, test_at)}:]" if test_at else test_split
    return {
        "train800": "train[:800]",
        "val200": val,
        "train800val200": f"train[:800]+{val}",
        "test": test,
    }


def transforms(task: Task, size: int) -> tuple[dict[str, Any], ...]:
    """BiT's pre-processing (5.4 a): 448 -> 384 and in proportion, with the exceptions
    for tasks whose label a crop or a flip would change."""
    if task.crop:
        ops = ({"op": "resize", "size": round(size * 7 / 6)}, {"op": "random_crop"})
    else:
        ops = ({"op": "resize"},)
    return (*ops, {"op": "flip"}) if task.flip else ops


def _checked(split: Split, task: Task, name: str) -> Split:
    assert isinstance(split.labels, Labels)
    values = split.labels.values
    if values.size and not 0 <= values.min() <= values.max() < task.classes:
        raise UserError(
            f"{name}: labels lie in [{values.min()}, {values.max()}], but the task has "
            f"{task.classes} classes: the tfds set is not the expected version"
        )
    return split
