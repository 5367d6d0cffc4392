# SPDX-License-Identifier: Apache-2.0
"""What an objective is, and the arithmetic of labels that several of them share.

B images per batch, K classes. ``batch["image"]`` is (B, H, W, 3) float in [-1, 1],
``batch["label"]`` int32 (B,) or float (B, K) with any number of positives per row. A
label of -1 (or a row of them), or 0 in ``batch["mask"]``, takes an example out of the
loss and the metrics.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.config import Config

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
# (params, batch, key) -> (loss, metrics): float32 means over the examples that count;
# everything random (corruption, dropout) is a function of the key.
LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]


@dataclass(frozen=True)
class Objective:
    """Something to minimise; to the rest of the program no more than this record."""

    # (model, config) -> the loss function of that model.
    create: Callable[[Any, Config], LossFn]
    # Whether it reads labels; if not, the data need not say what classes it has.
    reads_labels: bool
    # Fields of Config that this objective reads; others refuse them.
    options: tuple[str, ...]
    # (config with a resolved model) -> width of the head; 0: the number of classes.
    outputs: Callable[[Config], int]
    # (config, labels are multi-hot) -> hints; raises UserError for what cannot be meant.
    check: Callable[[Config, bool], list[str]]

    def num_counted(self, batch: Batch) -> jax.Array:
        """float32 (): how many examples the loss of a batch is a mean over."""
        if not self.reads_labels:
            return jnp.float32(len(batch["image"]))
        return counts(batch).sum()


def counts(batch: Batch) -> jax.Array:
    """float32 (B,): 1 for the examples that count."""
    labels = batch["label"]
    if "mask" in batch:
        return batch["mask"].astype(jnp.float32)
    return (labels >= 0).reshape(len(labels), -1).all(-1).astype(jnp.float32)


def multi_hot(labels: jax.Array, num_classes: int) -> jax.Array:
    """float32 (B, K) in [0, 1]; a label listed twice counts once."""
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return jnp.clip(labels.astype(jnp.float32), 0.0, 1.0)
