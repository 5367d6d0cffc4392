# SPDX-License-Identifier: Apache-2.0
"""What the linear embedding and the position embeddings have learned (Figure 7 left and
centre).

P patch side, C channels, D width, h x w patches.
"""

from typing import Any

import numpy as np

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models.positions import POSITIONS, PositionEmbedding


def filter_components(
    kernel: np.ndarray, count: int = 28, *, center: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the D embedding filters.

    Args:
      kernel: (P, P, C, D).
      count: how many, at most.
      center: subtract the mean filter first; the paper does not say whether it did.

    Returns:
      Unit vectors (count, P, P, C), the strongest first, and the share of the variance
      of each (count,). The sign is arbitrary: the largest entry is made positive.
    """
    *shape, width = kernel.shape
    x = np.asarray(kernel, np.float64).reshape(-1, width).T  # (D, P P C)
    if center:
        x = x - x.mean(0, keepdims=True)
    _, s, v = np.linalg.svd(x, full_matrices=False)
    v = v * np.sign(v[np.arange(len(v)), np.abs(v).argmax(1)])[:, None]
    share = np.square(s) / max(np.square(s).sum(), 1e-30)
    return v[:count].reshape(-1, *shape).astype(np.float32), share[:count]


def first_filters(params: Any) -> tuple[np.ndarray, str]:
    """The filters that read pixels, (P, P, C, D), and their name: of a hybrid, the
    first convolution."""
    name = "conv_root" if "conv_root" in params else "embedding"
    return np.asarray(params[name]["kernel"]), f"{name}/kernel"


def displayable(filters: np.ndarray) -> np.ndarray:
    """Filters (..., P, P, C) as colours in [0, 1]: 0 is mid-grey, each scaled by its
    largest entry."""
    scale = np.abs(filters).max((-3, -2, -1), keepdims=True)
    return 0.5 + 0.5 * filters / np.maximum(scale, 1e-30)


def position_table(model: Any, params: Any, image_size: tuple[int, int]) -> np.ndarray:
    """E_pos without the class token, (h, w, D), learned or not.

    Raises:
      UserError: the model has none, saying what it has instead.
    """
    cfg = model.cfg
    if models.is_resnet(cfg):
        raise UserError("the checkpoint is a ResNet: it has no position embeddings")
    if cfg.positions not in POSITIONS:
        what = {
            "none": "the model has none (model.positions='none')",
            "relative": "positions are in the attention (model.positions='relative')",
        }
        raise UserError(f"no position embeddings to compare: {what[cfg.positions]}")
    if cfg.position_at == "every":
        raise UserError(
            "no single table of position embeddings to compare: every layer has its own "
            "(model.position_at='every')"
        )
    own = params["Transformer"].get("posembed_input", {})
    table = PositionEmbedding(cfg, image_size).apply({"params": own})
    grid = models.token_grid(cfg, image_size)
    return np.asarray(table)[0, -grid[0] * grid[1] :].reshape(*grid, -1)


def position_similarity(table: np.ndarray) -> np.ndarray:
    """Cosine similarity of E_pos (h, w, D): ``[i, j, a, b]`` compares patch (i, j) with
    (a, b)."""
    norm = np.linalg.norm(table, axis=-1, keepdims=True)
    unit = table / np.maximum(norm, 1e-12)
    return np.einsum("ijd,abd->ijab", unit, unit)
