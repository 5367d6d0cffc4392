# SPDX-License-Identifier: Apache-2.0
"""What reads the encoded tokens z (B, S, D): one function per ``model.head``.

They are called in the scope of the model, so their parameters are at its top level.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.models.attention import MlpBlock, MultiHeadAttention
from vit_jax.models.norms import norm
from vit_jax.models.variants import prefix_tokens


def read(cfg: ModelConfig, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits and what they are computed from, (B, K) and (B, D), in float32."""
    y = HEADS[cfg.head](cfg, z)
    if cfg.final_norm == "pooled":
        y = norm(cfg, "fc_norm")(y)
    if cfg.pre_logits:  # hidden layer of the MLP head of pre-training, Section 3.1
        y = nn.tanh(nn.Dense(cfg.width, dtype=cfg.dtype, name="pre_logits")(y))
    logits, y = classify(cfg, y)
    if cfg.distillation == "head":  # of a second token: the mean of both (2012.12877)
        others, t = classify(cfg, z[:, 1], name="head_dist")
        logits, y = (logits + others) / 2, (y + t) / 2
    return logits, y


def classify(
    cfg: ModelConfig, y: jax.Array, name: str = "head"
) -> tuple[jax.Array, jax.Array]:
    """The linear layer, starting at zero (Section 3.2); no classes: y itself."""
    y = y.astype(jnp.float32)
    if not cfg.num_classes:
        return y, y
    zeros, constant = nn.initializers.zeros, nn.initializers.constant(cfg.head_bias)
    return nn.Dense(cfg.num_classes, kernel_init=zeros, bias_init=constant, name=name)(
        y
    ), y


def _class_token(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return z[:, 0]


def _patches(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return z[:, prefix_tokens(cfg) :]


def _mean(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return _patches(cfg, z).mean(axis=1)


def _class_token_and_mean(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return jnp.concatenate([_class_token(cfg, z), _mean(cfg, z)], axis=-1)


def _attention_pooling(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return MAPHead(cfg, name="MAPHead_0")(z)


def _all_tokens(cfg: ModelConfig, z: jax.Array) -> jax.Array:
    return z


HEADS = {
    "token": _class_token,
    "gap": _mean,
    "token_gap": _class_token_and_mean,
    "map": _attention_pooling,
    "none": _all_tokens,
    "masked_patch": _patches,
}


class MAPHead(nn.Module):
    """Multi-head attention pooling: a learned probe queries the tokens (2106.04560)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c = pooling(self.cfg)
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c.width))
        probe = jnp.broadcast_to(probe, (z.shape[0], 1, c.width)).astype(z.dtype)
        a = MultiHeadAttention(c, name="MultiHeadDotProductAttention_0")(probe, z)
        y = norm(c, "LayerNorm_0")(a)
        return (a + MlpBlock(c, name="MlpBlock_0")(y))[:, 0]


def pooling(cfg: ModelConfig) -> ModelConfig:
    """Of the block that pools: sizes of its own, and plain whatever the others are."""
    return dataclasses.replace(
        cfg,
        heads=cfg.map_heads or cfg.heads,
        mlp_dim=cfg.map_mlp_dim or cfg.mlp_dim,
        positions="none",
        relative_bias=False,
        qk_norm=False,
        attention_norm=False,
        mlp="gelu",
        mlp_norm=False,
    )
