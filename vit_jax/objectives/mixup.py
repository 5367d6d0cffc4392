# SPDX-License-Identifier: Apache-2.0
"""Mixtures of images and of their labels (AugReg, arXiv 2106.10270).

Done on the whole batch before it is divided into micro-batches, so that the result does
not depend on their number.
"""

import jax
import jax.numpy as jnp

from vit_jax.config import Config
from vit_jax.objectives.objective import Batch, counts, multi_hot


def mixup_batch(cfg: Config, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """A training batch after :func:`mixup`: float images, labels float (B, K).

    A mixture with an image that does not count does not count.
    """
    labels = multi_hot(batch["label"], cfg.model.num_classes)
    images, labels = mixup(key, batch["image"], labels, cfg.mixup)
    mask = counts(batch)
    mask = mask * jnp.roll(mask, 1)
    return {**batch, "image": images, "label": labels, "mask": mask}


def mixup(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with its neighbour: lambda x_i + (1 - lambda) x_(i-1).

    Labels (B, K) are mixed alike. One lambda ~ Beta(alpha, alpha) per batch, at least
    1/2 so that x_i dominates.
    """
    lam = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    lam = jnp.maximum(lam, 1 - lam)

    def mix(x: jax.Array) -> jax.Array:
        return lam.astype(x.dtype) * x + (1 - lam).astype(x.dtype) * jnp.roll(x, 1, 0)

    return mix(images), mix(labels)
