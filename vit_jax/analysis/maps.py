# SPDX-License-Identifier: Apache-2.0
"""The figures of attention: distance (Figure 7 right), rollout (Figures 6 and 14), each
head, and the tokens of the patches.

n images, L layers, k heads, h x w patches, D width.
"""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit_jax.analysis import attention, drawing
from vit_jax.analysis.drawing import BLUE, GREY, ORANGE, WIDTH, Drawing
from vit_jax.analysis.subject import Subject

# Images of the rollout figure, as in Figure 6; random images of its grid, as in
# Figure 14.
CHOSEN = 6
GRID = 64


def distance_arrays(subject: Subject) -> dict[str, Any]:
    geometry = attention.geometry(subject.model, subject.size)
    return {
        "distance": subject.summary.distance,
        "uniform": attention.patch_distances(*geometry).mean(),
        "images": len(subject.images),
        "model": subject.name,
    }


def draw_distance(
    distance: np.ndarray, uniform: float, images: int, model: str = ""
) -> Figure:
    """Mean attention distance in pixels of each head (a dot), by depth."""
    layers, heads = distance.shape
    figure = Figure((WIDTH, 3.6), layout="constrained")
    axis = figure.subplots()
    x = np.arange(1, layers + 1)
    axis.plot(x, distance.mean(1), color=ORANGE, lw=1.2, label="mean over heads")
    axis.scatter(
        np.repeat(x, heads), distance.ravel(), 14, BLUE, alpha=0.75, linewidths=0,
        label=f"one of {heads} heads", zorder=3,
    )  # fmt: skip
    axis.axhline(float(uniform), color=GREY, lw=0.8, ls="--", label="uniform attention")
    axis.set_ylim(0, max(float(uniform), float(distance.max())) * 1.12)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("network depth (layer)")
    axis.set_ylabel("mean attention distance (pixels)")
    title = f"{model}, average over" if str(model) else "Average over"
    axis.set_title(f"{title} {int(images)} image{'s' * (int(images) != 1)}")
    axis.set_xlim(0.4, layers + 0.6)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def rollout_arrays(subject: Subject) -> dict[str, Any]:
    """The first images of ``--images``; of a data set, those whose attention is most
    concentrated."""
    maps = subject.summary.maps
    chosen = np.arange(min(CHOSEN, len(maps)))
    if not subject.places:
        flat = maps.reshape(len(maps), -1)
        p = flat / flat.sum(1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(1)
        chosen = np.sort(entropy.argsort()[:CHOSEN])
    return _shown(subject, chosen)


def grid_arrays(subject: Subject) -> dict[str, Any]:
    count = len(subject.images)
    rng = np.random.default_rng(subject.seed)
    return _shown(subject, np.sort(rng.permutation(count)[:GRID]))


def _shown(subject: Subject, chosen: np.ndarray) -> dict[str, Any]:
    images = subject.images[chosen]
    predicted = np.array(subject.predicted(images), str)
    maps = subject.summary.maps[chosen]
    return {"images": images, "maps": maps, "predicted": predicted}


def draw_rollout(
    images: np.ndarray, maps: np.ndarray, predicted: np.ndarray | tuple[()] = ()
) -> Figure:
    """Attention rollout: the image, how much of each patch reaches the output, and both
    together."""
    across = min(2, len(images))
    rows = -(-len(images) // across)
    names = [drawing.wrapped(p, 40 // across) for p in predicted]
    lines = max((n.count("\n") + 1 for n in names), default=0)
    height = rows * (2.1 / across + 0.1 * lines) + 0.7
    figure = Figure((WIDTH, height), layout="compressed")
    axes = drawing.panels(figure, rows, 3 * across)
    scaled = attention.bounded(maps)
    both = drawing.heated(images, scaled)
    for i, image in enumerate(images):
        left, middle, right = axes[3 * i : 3 * i + 3]
        drawing.picture(left, image)
        middle.imshow(scaled[i], cmap=drawing.HEAT, vmin=0, vmax=1)
        drawing.picture(right, both[i])
        if names:
            left.set_xlabel(names[i], fontsize=6, labelpad=2)
        if i < across:
            titles = ("input", "attention", "both")
            for axis, title in zip((left, middle, right), titles, strict=True):
                axis.set_title(title)
    drawing.remove_unused(axes)
    drawing.relative_colorbar(figure, [a for a in axes if a.figure])
    figure.suptitle(f"Attention rollout: {drawing.clipping(maps)}", fontsize=7)
    return figure


def draw_grid(
    images: np.ndarray, maps: np.ndarray, predicted: np.ndarray | tuple[()] = ()
) -> Figure:
    """Attention rollout over random images: in each pair the image, and the attention
    over it."""
    pairs = min(8, math.ceil(math.sqrt(len(images) / 2)) or 1)
    rows = -(-len(images) // pairs)
    cell = WIDTH / (2 * pairs)
    names = [drawing.wrapped(p, 200 // (2 * pairs)) for p in predicted]
    lines = max((n.count("\n") + 1 for n in names), default=0)
    figure = Figure((WIDTH, rows * (cell + 0.08 * lines) + 0.4), layout="compressed")
    axes = drawing.panels(figure, rows, 2 * pairs)
    both = drawing.heated(images, attention.bounded(maps))
    for i, image in enumerate(images):
        left, right = axes[2 * i : 2 * i + 2]
        drawing.picture(left, image)
        drawing.picture(right, both[i])
        if names:
            left.set_title(names[i], fontsize=4.5, pad=1.5, loc="left")
    drawing.remove_unused(axes)
    figure.suptitle(
        f"Pairs of image and attention; {drawing.clipping(maps)}", fontsize=7
    )
    return figure


def head_arrays(subject: Subject) -> dict[str, Any]:
    image = subject.images[:1]
    model, params = attention.unrolled(subject.model, subject.params)
    weights = attention.capture(model, params, image)[:, 0]
    grid, _ = attention.geometry(model, subject.size)
    maps = attention.token_map(weights, grid, class_token=subject.class_token)
    return {"image": image[0], "maps": np.asarray(maps)}


def draw_heads(image: np.ndarray, maps: np.ndarray) -> Figure:
    """Attention of the class token, without one of the mean patch, by layer and head."""
    layers, count = maps.shape[:2]
    aside = 1.5
    cell = min(1.1, (WIDTH - aside - 0.7) / count)
    figure = Figure(
        (WIDTH, max(cell * layers + 0.7, aside + 0.4)), layout="constrained"
    )
    widths = [aside, WIDTH - aside]
    parts: Any = figure.subfigures(1, 2, width_ratios=widths)
    left, right = parts
    axis = drawing.blank(left.subplots())
    drawing.picture(axis, image)
    axis.set_title("input")
    axes = right.subplots(layers, count, squeeze=False)
    for layer in range(layers):
        # Each panel has its own scale: heads differ by orders of magnitude.
        scaled = attention.bounded(maps[layer])
        for head in range(count):
            axis = drawing.blank(axes[layer, head])
            axis.imshow(scaled[head], cmap=drawing.HEAT, vmin=0, vmax=1)
            if not layer:
                axis.set_title(str(head + 1))
        axes[layer, 0].set_ylabel(str(layer + 1), rotation=0, ha="right", va="center")
    right.supylabel("layer", fontsize=8)
    right.suptitle("attention by head", fontsize=8)
    drawing.relative_colorbar(right, axes.ravel().tolist())
    return figure


def patch_arrays(subject: Subject) -> dict[str, Any]:
    images = subject.images[:CHOSEN]
    return {"images": images, "tokens": subject.patch_tokens(images)}


def draw_patches(images: np.ndarray, tokens: np.ndarray) -> Figure:
    """The tokens of the patches after the last layer: their first three principal
    components as red, green and blue."""
    across = min(3, len(images))
    rows = -(-len(images) // across)
    height = 1.15 * rows * 3 / across * tokens.shape[1] / tokens.shape[2]
    figure = Figure((WIDTH, height + 0.6), layout="compressed")
    axes = drawing.panels(figure, rows, 2 * across)
    colors, share = principal_colors(tokens)
    for i, image in enumerate(images):
        drawing.picture(axes[2 * i], image)
        drawing.picture(axes[2 * i + 1], colors[i])
        if i < across:
            axes[2 * i].set_title("input")
            axes[2 * i + 1].set_title("patch tokens")
    drawing.remove_unused(axes)
    figure.suptitle(
        f"Patch tokens: three principal components over all images, {share:.0%} of the "
        "variance"
    )
    return figure


def principal_colors(tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Tokens (n, h, w, D) -> colours (n, h, w, 3) in [0, 1], and the share of the
    variance that they show.

    Each component is stretched from its 2nd to its 98th percentile. The sign is
    arbitrary: the patches in the middle of the images are made the brighter ones.
    """
    n, h, w, width = tokens.shape
    x = tokens.reshape(-1, width).astype(np.float64)
    x = x - x.mean(0, keepdims=True)
    values, vectors = np.linalg.eigh(x.T @ x)
    top = vectors[:, ::-1][:, :3]
    found = (x @ top).reshape(n, h, w, -1)
    middle = found[:, h // 4 : -(h // 4) or None, w // 4 : -(w // 4) or None]
    found = found * np.where(middle.mean((0, 1, 2)) < found.mean((0, 1, 2)), -1, 1)
    low, high = np.percentile(found, (2, 98), axis=(0, 1, 2))
    colors = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    share = values[::-1][:3].sum() / max(values.sum(), 1e-30)
    return colors, float(share)


DISTANCE = Drawing(distance_arrays, draw_distance)
ROLLOUT = Drawing(rollout_arrays, draw_rollout)
ROLLOUT_GRID = Drawing(grid_arrays, draw_grid)
HEADS = Drawing(head_arrays, draw_heads)
PATCHES = Drawing(patch_arrays, draw_patches)
