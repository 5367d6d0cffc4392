# SPDX-License-Identifier: Apache-2.0
"""VTAB-1k: 19 tasks with 1,000 training examples each (paper section 4.1, B.1.1).

``data.name="vtab/dtd"`` trains on the 800 + 200 examples and tests on the full test
set; ``data.train_split="train800"`` trains on 800 and tests on the other 200, for
selection. Splits and label rules are those of the benchmark's own code; sizes that a
split depends on are read from the data set.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from vit_jax.config import DataConfig, choose
from vit_jax.data import tfds_source
from vit_jax.data.examples import Dataset, Labels, Split
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError
from vit_jax.vtab_tasks import TASKS, Task


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


# Of the tasks whose label is not the one that tfds gives.
LABELS: dict[str, Callable[[Any], int]] = {
    "clevr_count": lambda e: len(np.asarray(e["objects"]["size"])) - 3,
    "clevr_distance": nearest_clevr,
    "kitti_distance": nearest_kitti,
    "dsprites_location": lambda e: int(e["label_x_position"]) // 2,
    "dsprites_orientation": lambda e: int(int(e["label_orientation"]) // 2.5),
    "smallnorb_azimuth": lambda e: int(e["label_azimuth"]),
    "smallnorb_elevation": lambda e: int(e["label_elevation"]),
}


def load(cfg: DataConfig) -> Dataset:
    """The task ``vtab/NAME``."""
    name = cfg.name.removeprefix("vtab/")
    task = choose("VTAB task in config.data.name", name, TASKS)
    builder = tfds_source.prepared(task.source, cfg.path)
    sizes = {k: v.num_examples for k, v in builder.info.splits.items()}
    splits = split_expressions(task, sizes)
    choose("config.data.train_split", cfg.train_split, {"train": 0, "train800": 0})
    label = LABELS.get(name, lambda example: example["label"])
    image = brighten if task.source == "dsprites" else lambda encoded: encoded

    def read(expressions: str) -> Split:
        found = tfds_source.read(builder, expressions, label, image)
        return _checked(found, task, cfg.name)

    names = [str(i) for i in range(task.classes)]
    if name not in LABELS:
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
