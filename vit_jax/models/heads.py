# SPDX-License-Identifier: Apache-2.0
"""What reads the encoded tokens z (B, S, D): one function per ``model.head``.

They are called in the scope of the model, so their parameters are at its top level.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.models.attention import MlpBlock, MultiHeadAttention


def read(cfg: ModelConfig, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits and what they are computed from, (B, K) and (B, D), in float32."""
    y = HEADS[cfg.head](cfg, z)
    if cfg.pre_logits:  # hidden layer of the MLP head of pre-training, Section 3.1
        y = nn.tanh(nn.Dense(cfg.width, dtype=cfg.dtype, name="pre_logits")(y))
    return classify(cfg, y)


def classify(cfg: ModelConfig, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The linear layer, starting at zero (Section 3.2); no classes: y itself."""
    y = y.astype(jnp.float32)
    if not cfg.num_classes:
        return y, y
    zeros, constant = nn.initializers.zeros, nn.initializers.constant(cfg.head_bias)
    return nn.Dense(
        cfg.num_classes, kernel_init=zeros, bias_init=constant, name="head"
    )(y), y


def _class_token(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return z[:, 0]


def _mean(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return z.mean(axis=1)


def _attention_pooling(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return MAPHead(cfg, name="MAPHead_0")(z)


def _all_tokens(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return z


def _patches(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return z[:, 1:]


HEADS = {
    "token": _class_token,
    "gap": _mean,
    "map": _attention_pooling,
    "none": _all_tokens,
    "masked_patch": _patches,
}


class MAPHead(nn.Module):
    """Multi-head attention pooling: a learned probe queries the tokens (2106.04560)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c = self.cfg
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c.width))
        probe = jnp.broadcast_to(probe, (len(z), 1, c.width)).astype(z.dtype)
        a = MultiHeadAttention(c, name="MultiHeadDotProductAttention_0")(probe, z)
        y = nn.LayerNorm(c.layer_norm_eps, dtype=c.dtype, name="LayerNorm_0")(a)
        return (a + MlpBlock(c, name="MlpBlock_0")(y))[:, 0]
