# SPDX-License-Identifier: Apache-2.0
"""An ImageNet model on test sets whose labels are not its own: ReaL, ImageNet-V2,
ObjectNet.

B batch, K classes of the model, C classes of the test set. All of them take a file that
says what the labels mean; nothing is downloaded.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import data as datasets
from vit_jax.config import DataConfig, nearest
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.evaluators.accuracy import correct, counted, means
from vit_jax.evaluators.context import Batch, Context
from vit_jax.evaluators.features import name_of


def real(
    context: Context,
    *,
    labels: str = "real.json",
    split: str = "test",
    data: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> dict[str, float]:
    """ImageNet-ReaL: a prediction is right if it is one of the image's re-assessed
    labels.

    Images without any are left out of the mean. ``original_accuracy`` is by the labels
    of the data set itself.

    Args:
      context: the model.
      labels: JSON file, either the released list of lists in the order of the file
        names, or ``{file name: [class, ...]}``.
      split: the images, from a source that knows their file names (a folder).
      data: fields of DataConfig to change.
      prefix: belongs to the caller.

    Raises:
      UserError: as many lists as images are needed, and classes of the model.
    """
    del prefix
    config = context.data(data)
    k = len(context.class_names)
    lists = _by_position(labels, _file_names(config, split), name_of(config))
    _check_classes(labels, (c for row in lists for c in row), k)
    start = 0

    def step(outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        nonlocal start
        size = len(batch["label"])
        multi_hot = np.zeros((size, k), np.float32)
        # Batches hold the data in order, whatever the number of processes.
        for row, chosen in enumerate(lists[start : start + size]):
            multi_hot[row, list(chosen)] = 1
        start += size
        new = context.put(multi_hot, context.mesh.axis_names)
        sums = _sums(outputs["logits"], new, batch["mask"])
        plain = _sums(outputs["logits"], batch["label"], batch["mask"])
        return sums | {"original": plain["top1"], "images": plain["count"]}

    s = context.sum(step, config, split)
    original = int(s["original"]) / max(int(s["images"]), 1)
    return means(s) | {"original_accuracy": original}


def imagenet_v2(
    context: Context,
    *,
    split: str = "test",
    data: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> dict[str, float]:
    """``accuracy`` and ``top5`` on ImageNet-V2; ``data`` chooses the variant.

    The released folders are named 0 to 999: as text they sort 0, 1, 10, 100, which is
    why this is not the plain accuracy.
    """
    del prefix
    tfds = {"source": "tfds", "name": "imagenet_v2/matched-frequency"}
    config = context.data(data or tfds)
    names = datasets.describe(config).class_names
    if all(n.isdigit() for n in names):
        to_model = np.array([int(n) for n in names], np.int32)
    else:
        to_model = np.arange(len(names), dtype=np.int32)
    _check_classes(name_of(config), to_model, len(context.class_names))
    lookup = context.put(to_model)

    def step(outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        return _sums_of_mapped(outputs["logits"], batch["label"], batch["mask"], lookup)

    return means(context.sum(step, config, split))


def objectnet(
    context: Context,
    *,
    mapping: str,
    split: str = "test",
    data: Mapping[str, Any] | None = None,
    restrict: bool = False,
    prefix: str = "",
) -> dict[str, float]:
    """``accuracy`` and ``top5`` on the classes of a test set that the model knows.

    A prediction is right at k if one of the k most likely classes of the model maps to
    the true class. Images of classes that no class of the model maps to are left out
    (ObjectNet: 113 of 313 remain). Resizing the shorter side and cropping the middle,
    as the paper does, also removes ObjectNet's red border.

    Args:
      context: the model, fine-tuned on ImageNet.
      mapping: JSON file ``{class of the test set: [index or name of a class of the
        model, ...]}``; a string of names separated by ";" does as well.
      split: the images.
      data: where they are, for example ``{"source": "folder", "path":
        "objectnet/images"}``.
      restrict: choose among the mapped classes of the model only.
      prefix: belongs to the caller.

    Raises:
      UserError: a class that the model or the test set does not have.
    """
    del prefix
    config = context.data(data)
    names = datasets.describe(config).class_names
    to_set = context.put(_many_to_one(mapping, names, context.class_names))

    def step(outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        args = (outputs["logits"], batch["label"], batch["mask"], to_set)
        return _mapped_step(*args, restrict=restrict)

    sums = context.sum(step, config, split)
    return means(sums) | {"classes": float(len(np.unique(jax.device_get(to_set))) - 1)}


@jax.jit
def _sums(logits: jax.Array, label: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    valid = counted(label, mask)
    sums = {
        "top1": jnp.sum(correct(logits, label, 1) & valid, dtype=jnp.int32),
        "count": jnp.sum(valid, dtype=jnp.int32),
    }
    if logits.shape[1] > 5:
        sums["top5"] = jnp.sum(correct(logits, label, 5) & valid, dtype=jnp.int32)
    return sums


@jax.jit
def _sums_of_mapped(
    logits: jax.Array, label: jax.Array, mask: jax.Array, to_model: jax.Array
) -> dict[str, jax.Array]:
    return _sums(logits, jnp.where(label < 0, -1, to_model[label]), mask)


@functools.partial(jax.jit, static_argnames="restrict")
def _mapped_step(
    logits: jax.Array,
    label: jax.Array,
    mask: jax.Array,
    to_set: jax.Array,
    *,
    restrict: bool,
) -> dict[str, jax.Array]:
    """``to_set`` (K,): class of the test set for each class of the model, or -1."""
    if restrict:
        logits = jnp.where((to_set < 0)[None], -jnp.inf, logits)
    known = (to_set[None] == label[:, None]).any(1)
    valid = counted(label, mask) & known
    top = to_set[jax.lax.top_k(logits, min(5, logits.shape[1]))[1]]  # (B, 5)
    hit = top == label[:, None]
    sums = {
        "top1": jnp.sum(hit[:, 0] & valid, dtype=jnp.int32),
        "count": jnp.sum(valid, dtype=jnp.int32),
    }
    if logits.shape[1] > 5:
        sums["top5"] = jnp.sum(hit.any(1) & valid, dtype=jnp.int32)
    return sums


def _file_names(config: DataConfig, split: str) -> list[str]:
    """File name of every example, in the order of the data."""
    chosen = sources.evaluation_split(config, sources.load(config), split)
    numbers = chosen.index(np.arange(len(chosen)))
    if chosen.kind != "path":
        raise UserError(
            f"ReaL labels belong to file names, which data.source {config.source!r} does "
            "not keep: give the validation images as --config.data.source=folder"
        )
    return [os.path.basename(chosen.name(int(i))) for i in numbers]


def _by_position(path: str, names: Sequence[str], where: str) -> list[Sequence[int]]:
    """The labels of each example."""
    labels = _read_json(path)
    if isinstance(labels, dict):
        missing = [n for n in names if n not in labels]
        if missing:
            raise UserError(
                f"{path} has no labels for {len(missing)} of the {len(names)} images of "
                f"{where!r}, for example {missing[0]!r}"
            )
        return [labels[n] for n in names]
    if len(labels) != len(names):
        raise UserError(
            f"{path} has labels for {len(labels)} images, but {where!r} has {len(names)}"
        )
    rank = np.argsort(np.argsort(np.array(names), kind="stable"))
    return [labels[r] for r in rank]


def _many_to_one(path: str, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """int32 (K,): the class of the test set that each class of the model means, -1 for
    none."""
    mapping = _read_json(path)
    if not isinstance(mapping, dict):
        raise UserError(
            f"{path} must be a JSON object: {{class: [class of the model, ...]}}"
        )
    to_set = np.full(len(classes), -1, np.int32)
    index = {n: i for i, n in enumerate(classes)}
    for name, targets in mapping.items():
        if name not in names:
            raise UserError(
                f"{path} maps {name!r}, which the test set does not have: "
                f"{nearest(name, names)}it has {len(names)} classes such as {names[0]!r}"
            )
        if isinstance(targets, str):
            targets = [t.strip() for t in targets.split(";")]
        for target in [targets] if isinstance(targets, int) else targets:
            if isinstance(target, str) and target not in index:
                raise UserError(
                    f"{path} maps {name!r} to {target!r}, which is no class of the model: "
                    f"{nearest(target, index)}give its name or its number"
                )
            number = index[target] if isinstance(target, str) else target
            _check_classes(path, [number], len(classes))
            to_set[number] = names.index(name)
    return to_set


def _check_classes(path: str, classes: Any, k: int) -> None:
    for c in classes:
        if not 0 <= c < k:
            raise UserError(f"{path} names class {c}, but the model has {k} classes")


def _read_json(path: str) -> Any:
    try:
        with open(path) as f:
            return json.load(f)
    except OSError as e:
        raise UserError(f"cannot read the label map {path}: {e.strerror}") from e
    except ValueError as e:
        raise UserError(f"the label map {path} is not JSON: {e}") from e
