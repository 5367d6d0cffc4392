# SPDX-License-Identifier: Apache-2.0
"""Accuracy of each class, and what is taken for what. K classes."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.evaluators.accuracy import check_classes, class_loss, counted
from vit_jax.evaluators.context import Batch, Context

MAX_CLASSES = 4096  # a confusion matrix of 21,843 classes would take 2 GB


def per_class(
    context: Context,
    *,
    split: str = "test",
    data: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> dict[str, float]:
    """``mean``, ``min`` and ``max`` of the accuracies of the classes that have
    examples.

    ``confusion.npz`` (``confusion[true, predicted]``, ``class_names``) and
    ``per_class.json`` are written where the run has a folder for them.
    """
    del prefix
    class_loss(context)
    config = context.data(data)
    check_classes(context, config)
    matrix, names = confusion(context, config, split)
    count = matrix.sum(1)
    has = count > 0
    accuracy = np.diag(matrix)[has] / count[has]
    context.save("confusion", confusion=matrix, class_names=np.array(names))
    table = {
        names[c]: {"accuracy": matrix[c, c] / count[c], "count": int(count[c])}
        for c in np.flatnonzero(has)
    }
    if context.out and not jax.process_index():
        with open(os.path.join(context.out, "per_class.json"), "w") as f:
            json.dump(table, f, indent=2)
    return {
        "mean": float(accuracy.mean()),
        "min": float(accuracy.min()),
        "max": float(accuracy.max()),
        "classes": float(has.sum()),
    }


def confusion(
    context: Context, data: Any, split: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Counts (K, K) int64 by true and predicted class, and the names of the classes.

    Raises:
      UserError: several labels per image, or too many classes.
    """

    def step(outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        logits, label = outputs["logits"], batch["label"]
        if label.ndim != 1:
            raise UserError(
                "per_class counts one label per image, but the data has several: use the "
                "evaluator 'accuracy'"
            )
        if logits.shape[1] > MAX_CLASSES:
            raise UserError(
                f"per_class keeps a table of classes x classes: {logits.shape[1]} classes "
                f"are more than {MAX_CLASSES}"
            )
        return {"confusion": _step(logits, label, batch["mask"])}

    matrix = np.asarray(context.sum(step, data, split)["confusion"], np.int64)
    return matrix, context.class_names


@jax.jit
def _step(logits: jax.Array, label: jax.Array, mask: jax.Array) -> jax.Array:
    k = logits.shape[1]
    counts = jnp.zeros((k, k), jnp.int32)
    valid = counted(label, mask).astype(jnp.int32)
    return counts.at[label, logits.argmax(1)].add(valid)
