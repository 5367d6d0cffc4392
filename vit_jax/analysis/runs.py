# SPDX-License-Identifier: Apache-2.0
"""The figures of a run: learning curves from its log, errors from its test images."""

import heapq
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.workdir import read_metrics


def read_curves(workdir: str | Path) -> dict[str, np.ndarray]:
    """``metrics.jsonl`` as the arrays of the figure ``curves``: names, steps, values
    (one row per number).

    Where a step was run again after a restart, the later line counts.

    Raises:
      UserError: the run has logged nothing.
    """
    found: dict[tuple[str, int], float] = {}
    for row in read_metrics(str(workdir)):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                found[name, int(row["step"])] = value
    if not found:
        raise UserError(f"{workdir} has no metrics.jsonl with numbers to draw")
    rows = sorted(found)
    return {
        "names": np.array([name for name, _ in rows]),
        "steps": np.array([step for _, step in rows]),
        "values": np.array([found[r] for r in rows], np.float64),
    }


def find_errors(
    forward: Callable[[np.ndarray], Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    class_names: tuple[str, ...],
    count: int = 16,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The confusion matrix, and the ``count`` most and least confident errors.

    Only the images that end up in the figure are kept.

    Args:
      forward: images (b, H, W, C) -> probabilities (b, K).
      batches: ``image`` uint8, ``label`` int (b,), ``mask`` (b,).
      class_names: of the K classes.
      count: errors of each kind.

    Returns:
      The arrays of the figures ``confusion`` and ``errors``.

    Raises:
      UserError: several labels per image.
    """
    k = len(class_names)
    matrix = np.zeros((k, k), np.int64)
    most: list[Any] = []
    least: list[Any] = []
    serial = 0  # breaks ties, so that images are never compared
    for batch in batches:
        if np.ndim(batch["label"]) != 1:
            raise UserError(
                "several labels per image: there is no one true class to confuse"
            )
        p = np.asarray(forward(batch["image"]))
        predicted, confidence = p.argmax(1), p.max(1)
        label = np.asarray(batch["label"])
        valid = (np.asarray(batch["mask"]) > 0) & (label >= 0)
        np.add.at(matrix, (label[valid], predicted[valid]), 1)
        for i in np.flatnonzero(valid & (predicted != label)):
            serial += 1
            entry = (batch["image"][i], label[i], predicted[i], confidence[i])
            for heap, key in ((most, confidence[i]), (least, -confidence[i])):
                heapq.heappush(heap, (float(key), serial, entry))
                if len(heap) > count:
                    heapq.heappop(heap)
    # Few errors: no image is shown twice.
    first = lambda heap, n: [e for *_, e in sorted(heap, reverse=True)[:n]]
    chosen = first(most, min(count, -(-serial // 2))) + first(least, serial // 2)
    names = np.array(class_names)
    images, true, predicted, confidence = (
        zip(*chosen, strict=True) if chosen else ((),) * 4
    )
    shown = {
        "images": np.array(images),
        "confidence": np.array(confidence),
        "true": names[list(true)],
        "predicted": names[list(predicted)],
    }
    return {"confusion": matrix, "class_names": names}, shown
