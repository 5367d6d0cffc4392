# SPDX-License-Identifier: Apache-2.0
"""An ImageNet model on test sets whose labels are not its own: ReaL, ImageNet-V2,
ObjectNet.

B batch, K classes of the model, C classes of the test set. All of them take a file that
says what the labels mean; nothing is downloaded.
"""

import collections
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import DataConfig, nearest
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.evaluators.accuracy import (
    check_classes,
    check_order,
    check_single,
    hits,
    labelled,
    likeliest,
    means,
    top_sums,
)
from vit_jax.evaluators.context import Context, name_of

# Test sets are often class folders and no more: every image counts.
WHOLE = {"test_share": 1.0}


def real(
    context: Context,
    *,
    labels: str = "real.json",
    split: str = "test",
    data: Mapping[str, Any] | None = None,
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

    Raises:
      UserError: the file has not one list per image, or names a class the model lacks.
    """
    config = context.data(data)
    check_order(context, config)
    k = len(context.class_names)
    files = _file_names(config, split)
    lists = _by_position(labels, files, name_of(config), context.class_names)
    start = 0

    def step(
        logits: jax.Array, label: jax.Array, mask: jax.Array
    ) -> dict[str, jax.Array]:
        nonlocal start
        size = len(label)
        multi_hot = np.zeros((size, k), np.float32)
        # Batches hold the data in order, whatever the number of processes.
        for row, chosen in enumerate(lists[start : start + size]):
            multi_hot[row, chosen] = 1
        start += size
        new = context.put(multi_hot, context.predictor.mesh.axis_names)
        return _real(logits, new, label, mask)

    s = context.sum(step, config, split)
    original = int(s["original"]) / max(int(s["images"]), 1)
    return means(s) | {"original_accuracy": original}


def imagenet_v2(
    context: Context,
    *,
    split: str = "test",
    data: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """``accuracy`` and ``top5`` on ImageNet-V2.

    The released folders are named 0 to 999: as text they sort 0, 1, 10, 100, which is
    why this is not the plain accuracy.

    Args:
      context: the model, with the classes of ImageNet.
      split: the images.
      data: where they are: fields of DataConfig, by default
        ``{"name": "imagenet_v2/matched-frequency"}`` of tfds.

    Raises:
      UserError: another number of classes than the model, or other names.
    """
    data = {**WHOLE, **(data or {"name": "imagenet_v2/matched-frequency"})}
    if data.get("source", "tfds") == "tfds":
        data = {"train_split": "test", **data}  # its only split
    config = context.other_data(data)
    check_classes(context, config)
    names = context.describe(config).class_names
    to_model = context.put(_one_to_one(names, context.class_names, name_of(config)))
    step = functools.partial(_one_to_one_sums, to_model=to_model)
    return means(context.sum(step, config, split))


def objectnet(
    context: Context,
    *,
    mapping: str,
    split: str = "test",
    data: Mapping[str, Any] | None = None,
    restrict: bool = False,
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
        "objectnet/images"}``; None: they are the run's own data.
      restrict: choose among the mapped classes of the model only.

    Raises:
      UserError: a class that the model or the test set does not have, or one of the
        model that is mapped twice.
    """
    config = context.other_data({**WHOLE, **data}) if data else context.cfg.data
    names = context.describe(config).class_names
    of_model = _many_to_one(mapping, names, context.class_names)
    step = functools.partial(
        _many_to_one_sums, to_set=context.put(of_model), restrict=restrict
    )
    sums = context.sum(step, config, split)
    known = np.unique(of_model[of_model >= 0])
    return means(sums) | {"classes": float(len(known))}


@jax.jit
def _real(
    logits: jax.Array, lists: jax.Array, label: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """``lists`` (B, K): multi-hot, the re-assessed labels of each image."""
    top = likeliest(logits)
    plain = top_sums(hits(top[:, :1], label), labelled(label, mask))
    sums = top_sums(hits(top, lists), labelled(lists, mask))
    return sums | {"original": plain["top1"], "images": plain["count"]}


@jax.jit
def _one_to_one_sums(
    logits: jax.Array, label: jax.Array, mask: jax.Array, *, to_model: jax.Array
) -> dict[str, jax.Array]:
    check_single(label, "imagenet_v2")
    label = jnp.where(label < 0, -1, to_model[label])
    return top_sums(hits(likeliest(logits), label), labelled(label, mask))


@functools.partial(jax.jit, static_argnames="restrict")
def _many_to_one_sums(
    logits: jax.Array,
    label: jax.Array,
    mask: jax.Array,
    *,
    to_set: jax.Array,
    restrict: bool,
) -> dict[str, jax.Array]:
    """``to_set`` (K,): class of the test set for each class of the model, or -1."""
    check_single(label, "objectnet")
    if restrict:
        logits = jnp.where((to_set < 0)[None], -jnp.inf, logits)
    known = (to_set[None] == label[:, None]).any(1)
    top = to_set[likeliest(logits)]  # (B, 5)
    return top_sums(hits(top, label), labelled(label, mask) & known)


def _file_names(config: DataConfig, split: str) -> list[str]:
    """File name of every example, in the order of the data."""
    chosen = sources.evaluation_split(config, sources.load(config), split)
    numbers = chosen.index(np.arange(len(chosen)))
    if chosen.kind != "path":
        raise UserError(
            f"ReaL labels belong to file names, which config.data.source="
            f"{config.source!r} does not keep: give the validation images as --config.data.source=folder"
        )
    return [os.path.basename(chosen.name(int(i))) for i in numbers]


def _by_position(
    path: str, names: Sequence[str], where: str, classes: Sequence[str]
) -> list[list[int]]:
    """The labels of each example, as classes of the model."""
    labels = _read_json(path)
    twice = [n for n, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"{where!r} has several images called {twice[0]!r}: which labels of {path} are "
            "whose cannot be told"
        )
    if isinstance(labels, dict):
        missing = [n for n in names if n not in labels]
        if missing:
            raise UserError(
                f"{path} has no labels for {len(missing)} of the {len(names)} images of "
                f"{where!r}, for example {missing[0]!r}"
            )
        return _numbers(path, {n: labels[n] for n in names}, classes)
    if not isinstance(labels, list):
        raise UserError(
            f"{path} must be a JSON list of lists of classes, or {{file name: [class, ...]}}"
        )
    if len(labels) != len(names):
        raise UserError(
            f"{path} has labels for {len(labels)} images, but {where!r} has {len(names)}"
        )
    rank = np.argsort(np.argsort(np.array(names), kind="stable"))
    lists = _numbers(path, dict(enumerate(labels)), classes)
    return [lists[r] for r in rank]


def _one_to_one(names: Sequence[str], classes: Sequence[str], where: str) -> np.ndarray:
    """int32 (K,): the class of the model that each class of the test set is."""
    index = {n: i for i, n in enumerate(classes)}
    if set(names) == set(index):
        return np.array([index[n] for n in names], np.int32)
    numbered = _kind(names) == "number"
    if numbered and {int(n) for n in names} == set(range(len(classes))):
        return np.array([int(n) for n in names], np.int32)
    if numbered or _kind(names) == _kind(classes):
        strange = next(n for n in names if n not in index)
        raise UserError(
            f"{where!r} has the class {strange!r}, which the model lacks: "
            f"{nearest(strange, index)}the test set must have the classes of the model"
        )
    return np.arange(len(classes), dtype=np.int32)


def _kind(names: Sequence[str]) -> str:
    """Names of one kind can be compared: numbers, WordNet's ids, or words."""
    if all(n.isdecimal() for n in names):
        return "number"
    return "id" if all(re.fullmatch(r"n\d{8}", n) for n in names) else "words"


def _many_to_one(path: str, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """int32 (K,): the class of the test set that each class of the model means, -1 for
    none."""
    mapping = _read_json(path)
    if not isinstance(mapping, dict):
        raise UserError(
            f"{path} must be a JSON object: {{class: [class of the model, ...]}}"
        )
    for name in mapping:
        if name not in names:
            raise UserError(
                f"{path} maps {name!r}, which the test set does not have: "
                f"{nearest(name, names)}it has {len(names)} classes such as {names[0]!r}"
            )
    to_set = np.full(len(classes), -1, np.int32)
    for name, numbers in zip(mapping, _numbers(path, mapping, classes), strict=True):
        for number in numbers:
            if to_set[number] not in (-1, names.index(name)):
                raise UserError(
                    f"{path} maps class {number} of the model to both "
                    f"{names[to_set[number]]!r} and {name!r}: leave it at one of them"
                )
            to_set[number] = names.index(name)
    return to_set


def _numbers(
    path: str, entries: Mapping[Any, Any], classes: Sequence[str]
) -> list[list[int]]:
    """The classes of the model in each entry of a label map, as numbers: they are given
    as a list of numbers or names, as one number, or as names with ";" between them.

    Raises:
      UserError: another form, or no class of the model.
    """
    index = {n: i for i, n in enumerate(classes)}
    result = []
    for entry, value in entries.items():
        if isinstance(value, str):
            value = [t.strip() for t in value.split(";")]
        given = [value] if type(value) is int else value
        if not isinstance(given, list):
            raise UserError(
                f"{path} has {value!r} for {entry!r}: it must be a list of classes"
            )
        numbers = [index.get(c, -1) if isinstance(c, str) else c for c in given]
        for c, n in zip(given, numbers, strict=True):
            if type(n) is not int or not 0 <= n < len(classes):
                near = nearest(c, index) if isinstance(c, str) else ""
                raise UserError(
                    f"{path} names class {c!r} for {entry!r}, but the model has "
                    f"{len(classes)} classes: {near}give the number or name of one"
                )
        result.append(numbers)
    return result


def _read_json(path: str) -> Any:
    try:
        with open(path) as f:
            return json.load(f)
    except OSError as e:
        raise UserError(f"cannot read the label map {path}: {e.strerror}") from e
    except ValueError as e:
        raise UserError(f"the label map {path} is not JSON: {e}") from e
