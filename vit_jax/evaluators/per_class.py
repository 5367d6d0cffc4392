# SPDX-License-Identifier: Apache-2.0
"""Accuracy of each class, and which classes are confused. K classes."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.evaluators.accuracy import check_single, classified, labelled
from vit_jax.evaluators.context import Context

# A confusion matrix of 21,843 classes would take 2 GB.
MAX_CLASSES = 4096


def per_class(
    context: Context, *, split: str = "test", data: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """``mean``, ``min`` and ``max`` of the accuracies of the ``classes`` that have
    examples.

    ``confusion.npz`` (``confusion[true, predicted]``, ``class_names``) and
    ``per_class.json`` are written where the run has a folder for them.

    Raises:
      UserError: several labels per image, or too many classes.
    """
    config = classified(context, data)
    names = context.class_names
    if len(names) > MAX_CLASSES:
        raise UserError(
            f"per_class keeps a table of classes x classes: {len(names)} classes are more "
            f"than {MAX_CLASSES}"
        )

    def step(
        logits: jax.Array, label: jax.Array, mask: jax.Array
    ) -> dict[str, jax.Array]:
        check_single(label, "per_class")
        return {"confusion": count_confusion(logits, label, mask)}

    matrix = np.asarray(context.sum(step, config, split)["confusion"], np.int64)
    count = matrix.sum(1)
    has = count > 0
    if not has.any():
        raise UserError("no example of the evaluated split has a label to count")
    accuracy = np.diag(matrix)[has] / count[has]
    table = {
        names[c]: {"accuracy": matrix[c, c] / count[c], "count": int(count[c])}
        for c in np.flatnonzero(has)
    }
    context.save("confusion", confusion=matrix, class_names=np.array(names))
    context.write("per_class.json", json.dumps(table, indent=2).encode())
    return {
        "mean": float(accuracy.mean()),
        "min": float(accuracy.min()),
        "max": float(accuracy.max()),
        "classes": float(has.sum()),
    }


@jax.jit
def count_confusion(logits: jax.Array, label: jax.Array, mask: jax.Array) -> jax.Array:
    """Images of a batch by true and predicted class: (B, K), (B,), (B,) -> int32 (K, K)."""
    k = logits.shape[1]
    valid = labelled(label, mask).astype(jnp.int32)
    return jnp.zeros((k, k), jnp.int32).at[label, logits.argmax(1)].add(valid)
