# SPDX-License-Identifier: Apache-2.0
"""Masked patch prediction (Section 4.6, Appendix B.1.2): how the input is corrupted.

Which patches, and what the model should predict of them, is decided in objectives.py.
"""

import jax
import jax.numpy as jnp

KEEP, MASK, OTHER = 0, 1, 2


def corrupt(
    x: jax.Array, kind: jax.Array, source: jax.Array, mask_token: jax.Array
) -> jax.Array:
    """Patch embeddings (B, N, D), some of them replaced.

    Args:
      x: patch embeddings before positions are added, (B, N, D).
      kind: (B, N), KEEP, MASK (by ``mask_token``) or OTHER (by another patch).
      source: (B, N), which patch of the same image, read where ``kind`` is OTHER.
      mask_token: the learned [mask] vector, (1, 1, D).
    """
    kind, source = kind[..., None], source[..., None]
    other = jnp.take_along_axis(x, source, axis=1)
    x = jnp.where(kind == OTHER, other, x)
    return jnp.where(kind == MASK, mask_token.astype(x.dtype), x)
