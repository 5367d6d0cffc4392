# SPDX-License-Identifier: Apache-2.0
"""Classifiers on frozen features: what few-shot, nearest neighbours and the linear probe
share.

Each of them collects the features of a training split (``collect``), fits a classifier,
and counts its right answers on a test split (``score``). N examples, B batch, D width,
K classes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import DataConfig
from vit_jax.errors import UserError
from vit_jax.evaluators.context import Context, check_finite, fetch, name_of


def collect(
    context: Context, data: DataConfig, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) float32 and labels (N,) int32 of a split, in the order of the
    data.

    They are held once: the array grows in place, because a list of batches and its
    concatenation would need the memory twice.

    Raises:
      UserError: the labels are multi-hot, or features are not finite.
    """
    features = np.empty((0, 0), np.float32)
    labels = np.empty((0,), np.int32)
    size = 0
    pending: tuple[jax.Array, ...] = ()

    def store(*batch: jax.Array) -> None:
        nonlocal features, size
        x, y, mask = fetch(batch)
        if y.ndim != 1:
            raise UserError(
                f"the data set {name_of(data)!r} has several labels per image: features are "
                "compared only on sets with one label (fewshot, knn, linear_probe)"
            )
        keep = mask > 0
        new = size + int(keep.sum())
        if new > len(features):
            rows = max(new, 2 * len(features), 4096)
            # realloc moves pages, not bytes, and untouched rows take no memory.
            features.resize((rows, x.shape[1]), refcheck=False)
            labels.resize(rows, refcheck=False)
        features[size:new], labels[size:new] = x[keep], y[keep]
        size = new

    for outputs, batch in context.outputs(data, split):
        # Storing lags one batch behind, so that the device computes meanwhile.
        if pending:
            store(*pending)
        x = representation(outputs["pre_logits"])
        pending = (x, batch["label"], batch["mask"])
    if pending:
        store(*pending)
    if not size:
        raise UserError(f"the {split} split of {name_of(data)!r} has no examples")
    features.resize((size, features.shape[1]), refcheck=False)
    labels.resize(size, refcheck=False)
    broken = sum(int((~np.isfinite(x).all(1)).sum()) for x in _pieces(features))
    check_finite(broken, data, split)
    return features, labels


def representation(x: jax.Array) -> jax.Array:
    """What the head reads, (B, D); of a model without a pooled vector, the mean over
    its tokens."""
    return x if x.ndim == 2 else x.mean(1)


def score(
    context: Context,
    data: DataConfig,
    split: str,
    classify: Callable[[jax.Array], Mapping[str, jax.Array]],
) -> tuple[dict[str, Any], int]:
    """Accuracies of classifiers on a split, and its number of images.

    Args:
      context: the model.
      data: the data set.
      split: to test on.
      classify: features (B, D) float32 -> by name, the chosen classes int (..., B).

    Returns:
      By the same names, float64 (...); and the count.
    """

    def step(x: jax.Array, label: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        return _right(classify(representation(x).astype(jnp.float32)), label, mask)

    sums = context.sum(step, data, split, output="pre_logits")
    count = int(sums.pop("count"))
    if not count:
        raise UserError(
            f"no example of the split {split!r} of {name_of(data)!r} has a label, so "
            "there is no accuracy"
        )
    return {n: np.float64(v) / count for n, v in sums.items()}, count


@jax.jit
def _right(
    chosen: Mapping[str, jax.Array], label: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    def count(classes: jax.Array) -> jax.Array:
        shape = (1,) * (classes.ndim - 1) + (-1,)
        hit = (classes == label.reshape(shape)) & (mask > 0).reshape(shape)
        return jnp.sum(hit, axis=-1, dtype=jnp.int32)

    return {n: count(c) for n, c in chosen.items()} | {
        "count": jnp.sum(mask > 0, dtype=jnp.int32)
    }


class Bank(NamedTuple):
    """A data set of features on the devices, in chunks: C chunks x S devices x m rows."""

    x: jax.Array  # (C, S, m, D), divided over all devices along S
    y: jax.Array  # (C, S, m) int32, -1 where a row is padding


def bank(context: Context, x: np.ndarray, y: np.ndarray, rows: int = 4096) -> Bank:
    """Moves features to the devices, each of which holds its share; ``x`` and ``y`` are
    resized in place.

    Args:
      context: gives the devices.
      x: features (N, D); owned by the caller and not used afterwards.
      y: labels (N,).
      rows: m at most, the rows of a chunk that a device works on at a time.
    """
    devices = context.predictor.mesh.size
    m = min(rows, -(-len(x) // devices))
    chunks = -(-len(x) // (devices * m))
    n, total = len(x), chunks * devices * m
    x.resize((total, x.shape[1]), refcheck=False)  # new rows are 0
    y.resize(total, refcheck=False)
    y[n:] = -1
    axes = (None, context.predictor.mesh.axis_names)
    shape = (chunks, devices, m)
    return Bank(
        context.put(x.reshape(*shape, -1), *axes), context.put(y.reshape(shape), *axes)
    )


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, without a second array of the size
    of ``x``."""
    mean = np.zeros(x.shape[1])
    squares = np.zeros(x.shape[1])
    for piece in _pieces(x):
        mean += piece.sum(0, dtype=np.float64) / len(x)
    for piece in _pieces(x):
        squares += np.square(piece - mean[None]).sum(0)
    return mean.astype(np.float32), np.sqrt(squares / len(x)).astype(np.float32)


def _pieces(x: np.ndarray, rows: int = 8192) -> Iterator[np.ndarray]:
    return (x[i : i + rows] for i in range(0, len(x), rows))
