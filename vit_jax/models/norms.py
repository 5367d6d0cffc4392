# SPDX-License-Identifier: Apache-2.0
"""The norm of a model: one kind, one epsilon, wherever there is one."""

import flax.linen as nn

from vit_jax.config import ModelConfig


def norm(cfg: ModelConfig, name: str, axes: tuple[int, ...] = (-1,)) -> nn.Module:
    """LN, or its root-mean-square form without mean and bias, over the last ``axes``.

    Statistics are float32, the result has the dtype of the computation.
    """
    kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[cfg.norm]
    return kind(
        epsilon=cfg.layer_norm_eps,
        dtype=cfg.dtype,
        reduction_axes=axes,
        feature_axes=axes,
        name=name,
    )
