# SPDX-License-Identifier: Apache-2.0
"""What the linear embedding and the position embeddings have learned (Figure 7 left and
centre).

P patch side, C channels, D width, h x w patches.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vit_jax import models
from vit_jax.analysis import drawing
from vit_jax.analysis.drawing import Drawing
from vit_jax.analysis.subject import Subject
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


def first_filters(params: Any) -> np.ndarray:
    """The filters that read pixels, (P, P, C, D); of a hybrid, its first convolution."""
    name = "conv_root" if "conv_root" in params else "embedding"
    return np.asarray(params[name]["kernel"])


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
            "none": "the model has none (config.model.positions='none')",
            "relative": "positions are in the attention (config.model.positions='relative')",
        }
        raise UserError(f"no position embeddings to compare: {what[cfg.positions]}")
    if cfg.position_at == "every":
        raise UserError(
            "no single table of position embeddings to compare: every layer has its own "
            "(config.model.position_at='every')"
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


def filter_arrays(subject: Subject) -> dict[str, Any]:
    """Of a model that sees grey pictures, the filters summed over the channels: only
    that sum was trained, the rest is noise."""
    kernel = first_filters(subject.params)
    if subject.sees_grey():
        kernel = kernel.sum(2, keepdims=True)
    components, share = filter_components(kernel)
    return {"components": components, "share": share}


def draw_filters(components: np.ndarray, share: np.ndarray) -> Figure:
    """The principal components of the filters that read the pixels, the strongest
    first; grey is 0."""
    columns = min(7, len(components))
    rows = -(-len(components) // columns)
    shown = displayable(components)
    if shown.shape[-1] not in (1, 3):
        shown = shown.mean(-1, keepdims=True)
    cell = drawing.WIDTH / 7
    figure = Figure((drawing.WIDTH, cell * rows + 0.35), layout="compressed")
    axes = drawing.panels(figure, rows, columns)
    for axis, image, part in zip(axes, shown, share, strict=False):
        drawing.picture(axis, image)
        axis.set_xlabel(f"{part:.1%}", fontsize=6, labelpad=2)
    drawing.remove_unused(axes)
    figure.suptitle(
        f"Embedding filters: the first {len(components)} principal components and the "
        f"share of the variance of each, {share.sum():.0%} in all"
    )
    return figure


def position_arrays(subject: Subject) -> dict[str, Any]:
    table = position_table(subject.model, subject.params, subject.size)
    return {"similarity": position_similarity(table)}


def draw_positions(similarity: np.ndarray) -> Figure:
    """Cosine similarity of each patch's position embedding (one tile) with all others."""
    h, w = similarity.shape[:2]
    gap = 1
    canvas = np.full((h * (h + gap) - gap, w * (w + gap) - gap), np.nan)
    for i in range(h):
        for j in range(w):
            top, left = i * (h + gap), j * (w + gap)
            canvas[top : top + h, left : left + w] = similarity[i, j]
    side = 5.6
    figure = Figure((drawing.WIDTH, side * h / w + 0.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(canvas, vmin=-1, vmax=1, cmap="viridis")
    for ticks, n, size in ((axis.set_xticks, w, w), (axis.set_yticks, h, h)):
        every = range(0, n, -(-n // 16))
        at = [t * (size + gap) + (size - 1) / 2 for t in every]
        ticks(at, [str(t + 1) for t in every])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("column of the patch")
    axis.set_ylabel("row of the patch")
    axis.set_title(f"Similarity of the position embeddings of {h} x {w} patches")
    figure.colorbar(image, label="cosine similarity", shrink=0.85)
    return figure


FILTERS = Drawing(filter_arrays, draw_filters)
POSITION_SIMILARITY = Drawing(position_arrays, draw_positions)
