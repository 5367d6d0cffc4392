# SPDX-License-Identifier: Apache-2.0
"""The images that a model takes, and what it was trained with."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import token_grid, token_stride


def standardize(cfg: ModelConfig, images: jax.Array) -> jax.Array:
    """Images (B, H, W, C) in [-1, 1] -> (pixels / 255 - image_mean) / image_std.

    Raises:
      UserError: images of this shape or type cannot go through the model.
    """
    _check(cfg, images)
    if {*cfg.image_mean, *cfg.image_std} <= {0.5}:
        return images
    shape = (1, 1, 1, cfg.channels)
    mean = np.broadcast_to(cfg.image_mean or 0.5, shape)
    std = np.broadcast_to(cfg.image_std or 0.5, shape)
    scale, shift = np.float32(0.5 / std), np.float32((0.5 - mean) / std)
    return images.astype(jnp.float32) * scale + shift


def _check(cfg: ModelConfig, images: jax.Array) -> None:
    shape = images.shape
    if len(shape) != 4 or shape[3] != cfg.channels:
        raise UserError(
            f"images have the shape {shape}: the model wants (batch, height, width, "
            f"{cfg.channels}), the last being config.model.channels"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"images are {images.dtype}: the model wants numbers in [-1, 1], which is "
            "images / 127.5 - 1 for bytes"
        )
    if 0 in token_grid(cfg, shape[1:3]):
        raise UserError(
            f"images of {shape[1]}x{shape[2]} pixels are smaller than one patch, "
            f"{token_stride(cfg)}x{token_stride(cfg)} (config.model.name {cfg.name!r}, "
            f"config.model.patch {cfg.patch})"
        )
