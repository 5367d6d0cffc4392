# SPDX-License-Identifier: Apache-2.0
"""Is a prediction with probability 0.8 right in 8 of 10 cases? The expected calibration
error.

B batch, K classes. Predictions are put into bins of equal width by the probability of
the predicted class; ECE = sum over bins of (share of examples) |accuracy - mean
confidence| (Guo et al., arXiv 1706.04599).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import objectives
from vit_jax.config import Positive
from vit_jax.errors import UserError
from vit_jax.evaluators.accuracy import classified, hits, labelled
from vit_jax.evaluators.context import Context


def calibration(
    context: Context,
    *,
    split: str = "test",
    data: Mapping[str, Any] | None = None,
    bins: Positive = 15,
) -> dict[str, float]:
    """``ece``, ``mce`` (the worst bin), ``brier``, mean ``confidence`` and
    ``accuracy``.

    With the sigmoid loss the confidence is the sigmoid of the largest logit. The bins
    are written to ``calibration.npz`` where the run has a folder for them.
    """
    config = classified(context, data)
    step = functools.partial(bin_sums, bins=bins, loss=context.cfg.loss)
    s = context.sum(step, config, split, finite=False)
    count = np.asarray(s["count"], np.float64)
    total = count.sum()
    if not total:
        raise UserError("no example of the evaluated split has a label to calibrate on")
    filled = np.maximum(count, 1)
    confidence, right = s["confidence"] / filled, s["right"] / filled
    gap = np.where(count > 0, np.abs(right - confidence), 0)
    context.save("calibration", count=count, confidence=confidence, accuracy=right)
    return {
        "ece": float((count * gap).sum() / total),
        "mce": float(gap.max()),
        "brier": float(s["brier"]) / total,
        "confidence": float(s["confidence"].sum() / total),
        "accuracy": float(s["right"].sum() / total),
    }


@functools.partial(jax.jit, static_argnames=("bins", "loss"))
def bin_sums(
    logits: jax.Array, label: jax.Array, mask: jax.Array, *, bins: int, loss: str
) -> dict[str, jax.Array]:
    logits = logits.astype(jnp.float32)
    valid = labelled(label, mask)
    p = jax.nn.sigmoid(logits) if loss == "sigmoid" else jax.nn.softmax(logits)
    confidence = p.max(1)
    at = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    target = objectives.multi_hot(label, p.shape[1])
    hit = hits(logits.argmax(1)[:, None], label)[:, 0]

    def per_bin(x: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(jnp.where(valid, x, jnp.zeros_like(x)), at, bins)

    return {
        "count": per_bin(jnp.ones_like(at)),
        "right": per_bin(hit.astype(jnp.int32)),
        "confidence": per_bin(confidence),
        "brier": jnp.sum(jnp.where(valid, jnp.square(p - target).sum(1), 0)),
    }
