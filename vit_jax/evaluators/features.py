# SPDX-License-Identifier: Apache-2.0
"""The frozen representation of a data set, streamed from the devices into one array."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax import data as datasets
from vit_jax.config import DataConfig
from vit_jax.errors import UserError
from vit_jax.evaluators.context import Batch, Context, check_finite, fetch, name_of


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
    pending: Any = None

    def store(outputs: Mapping[str, Any], batch: Batch) -> None:
        nonlocal features, size
        x, y, mask = fetch((representation(outputs), batch["label"], batch["mask"]))
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
        small = {"label": batch["label"], "mask": batch["mask"]}
        if pending is not None:
            store(*pending)
        pending = ({"pre_logits": outputs["pre_logits"]}, small)
    if pending is not None:
        store(*pending)
    if not size:
        raise UserError(f"the {split} split of {name_of(data)!r} has no examples")
    features.resize((size, features.shape[1]), refcheck=False)
    labels.resize(size, refcheck=False)
    broken = sum(int((~np.isfinite(x).all(1)).sum()) for x in _pieces(features))
    check_finite(broken, data, split)
    return features, labels


def representation(outputs: Mapping[str, jax.Array]) -> jax.Array:
    """What the head reads, (B, D); of a model without a pooled vector, the mean over
    its tokens."""
    x = outputs["pre_logits"]
    return x if x.ndim == 2 else x.mean(1)


def num_classes(context: Context, data: DataConfig) -> int:
    """Classes of the data set an evaluator runs on, which need not be those of the
    model."""
    info = context.info if data == context.cfg.data else datasets.describe(data)
    return info.num_classes


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
    devices = context.mesh.size
    m = min(rows, -(-len(x) // devices))
    chunks = -(-len(x) // (devices * m))
    n, total = len(x), chunks * devices * m
    x.resize((total, x.shape[1]), refcheck=False)  # new rows are 0
    y.resize(total, refcheck=False)
    y[n:] = -1
    axes = (None, context.mesh.axis_names)
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
