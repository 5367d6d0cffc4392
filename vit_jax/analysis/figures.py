# SPDX-License-Identifier: Apache-2.0
"""Arrays in, figures out. ``draw(name, arrays)`` makes the figure that ``name.npz``
holds.

To add one: a function of arrays that returns a matplotlib Figure, and a line in
``FIGURES``. The first line of its docstring is the caption of the HTML report.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit_jax.analysis import embeddings
from vit_jax.config import choose

DPI = 300  # print quality
WIDTH = 7.0  # inches, a text column
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "image.interpolation": "nearest",
}
_BLUE, _ORANGE, _GREY = "#2f6db3", "#d9822b", "#777777"


def draw(name: str, arrays: Mapping[str, Any]) -> Figure:
    """The figure ``name`` of the arrays that its function takes."""
    with matplotlib.rc_context(_STYLE):
        return choose("figure", name, FIGURES)(**arrays)


def caption(name: str) -> str:
    """One sentence that says what a figure shows."""
    return (inspect.getdoc(FIGURES[name]) or "").split("\n")[0]


def filters(components: np.ndarray, share: np.ndarray) -> Figure:
    """The principal components of the filters that read the pixels, the strongest first."""
    columns = min(7, len(components))
    rows = -(-len(components) // columns)
    figure = Figure((WIDTH * columns / 7, WIDTH / 7 * rows + 0.35), layout="compressed")
    shown = embeddings.displayable(components)
    if shown.shape[-1] not in (1, 3):
        shown = shown.mean(-1, keepdims=True)
    for axis, image in zip(_panels(figure, rows, columns), shown, strict=False):
        grey = image.shape[-1] == 1
        axis.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=1)
    figure.suptitle(
        f"Embedding filters: first {len(components)} principal components, "
        f"{share.sum():.0%} of the variance"
    )
    return figure


def positions(similarity: np.ndarray) -> Figure:
    """Cosine similarity of each patch's position embedding (one tile) with all others."""
    h, w = similarity.shape[:2]
    gap = 1
    canvas = np.full((h * (h + gap) - gap, w * (w + gap) - gap), np.nan)
    for i in range(h):
        for j in range(w):
            top, left = i * (h + gap), j * (w + gap)
            canvas[top : top + h, left : left + w] = similarity[i, j]
    figure = Figure((4.6, 4.6 * h / w * 0.88 + 0.2), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(canvas, vmin=-1, vmax=1, cmap="viridis")
    for ticks, labels, n in (
        (axis.set_xticks, axis.set_xticklabels, w),
        (axis.set_yticks, axis.set_yticklabels, h),
    ):
        every = range(0, n, -(-n // 16))
        ticks([t * (n + gap) + (n - 1) / 2 for t in every])
        labels([str(t + 1) for t in every])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("input patch column")
    axis.set_ylabel("input patch row")
    figure.colorbar(image, label="cosine similarity", shrink=0.85)
    return figure


def distance(distance: np.ndarray, uniform: float, images: int) -> Figure:
    """Mean attention distance in pixels of each head (a dot), by depth."""
    layers, heads = distance.shape
    figure = Figure((4.4, 3.4), layout="constrained")
    axis = figure.subplots()
    x = np.arange(1, layers + 1)
    axis.plot(x, distance.mean(1), color=_ORANGE, lw=1.2, label="mean over heads")
    axis.scatter(
        np.repeat(x, heads), distance.ravel(), 14, _BLUE, alpha=0.75, linewidths=0,
        label=f"one of {heads} heads", zorder=3,
    )  # fmt: skip
    axis.axhline(
        float(uniform), color=_GREY, lw=0.8, ls="--", label="uniform attention"
    )
    axis.set_ylim(0, max(float(uniform), float(distance.max())) * 1.12)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("network depth (layer)")
    axis.set_ylabel("mean attention distance (pixels)")
    axis.set_title(f"average over {int(images)} images")
    axis.set_xlim(0.4, layers + 0.6)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def rollout(images: np.ndarray, maps: np.ndarray) -> Figure:
    """Attention rollout from the output to the input image, beside the image."""
    pairs = min(3, len(images))
    rows = -(-len(images) // pairs)
    figure = Figure((WIDTH * pairs / 3, WIDTH / 6 * rows + 0.3), layout="compressed")
    panels = _panels(figure, rows, 2 * pairs)
    for i, (image, shown) in enumerate(
        zip(images, overlays(images, maps), strict=True)
    ):
        for axis, picture, title in (
            (panels[2 * i], image, "input"),
            (panels[2 * i + 1], shown, "attention"),
        ):
            _picture(axis, picture)
            if i < pairs:
                axis.set_title(title)
    return figure


def rollout_grid(images: np.ndarray, maps: np.ndarray) -> Figure:
    """Attention rollout over random images: what the output takes is left bright."""
    columns = min(16, 2 * math.ceil(math.sqrt(len(images) / 2)))
    rows = -(-2 * len(images) // columns)
    figure = Figure((WIDTH, WIDTH / columns * rows), layout="compressed")
    panels = _panels(figure, rows, columns)
    for i, (image, shown) in enumerate(
        zip(images, overlays(images, maps), strict=True)
    ):
        _picture(panels[2 * i], image)
        _picture(panels[2 * i + 1], shown)
    return figure


def heads(image: np.ndarray, maps: np.ndarray) -> Figure:
    """Attention of the class token, without one of the mean patch, by layer and head."""
    layers, count = maps.shape[:2]
    cell = min(0.6, WIDTH / (count + 1))
    figure = Figure((cell * count + 1.6, cell * layers + 0.5), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[1.4, cell * count + 0.2])
    left, right = parts
    _picture(_blank(left.subplots()), image)
    axes = right.subplots(layers, count, squeeze=False)
    for layer in range(layers):
        for head in range(count):
            axis = _blank(axes[layer, head])
            # Each panel has its own scale: heads differ by orders of magnitude.
            axis.imshow(maps[layer, head], cmap="magma", vmin=0)
        axes[layer, 0].set_ylabel(str(layer + 1), rotation=0, ha="right", va="center")
    right.supylabel("layer", fontsize=8)
    right.suptitle("heads", fontsize=8)
    return figure


def curves(names: np.ndarray, steps: np.ndarray, values: np.ndarray) -> Figure:
    """Learning curves of the run: loss, accuracy and learning rate by step."""
    table = np.asarray(names)
    quantities = ("loss", "accuracy", "learning_rate", "grad_norm")
    kinds = [q for q in quantities if any(n.split("/")[-1] == q for n in table)]
    columns = 2 if len(kinds) > 1 else 1
    rows = max(1, -(-len(kinds) // columns))
    figure = Figure((3.5 * columns, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(kinds) :]:
        axis.set_axis_off()
    for axis, kind in zip(axes, kinds, strict=False):
        found = [n for n in dict.fromkeys(table.tolist()) if n.split("/")[-1] == kind]
        for color, name in zip(_cycle(), found, strict=False):
            at = table == name
            dots = {"marker": "o", "ms": 2.5} if at.sum() <= 40 else {}
            axis.plot(steps[at], values[at], lw=1, label=name, color=color, **dots)
        axis.set_xlabel("step")
        axis.set_title(kind.replace("_", " "))
        if len(found) > 1:
            axis.legend()
        if kind in ("learning_rate", "grad_norm"):
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return figure


def confusion(confusion: np.ndarray, class_names: np.ndarray) -> Figure:
    """What is taken for what: each row is a true class and sums to 100 %."""
    k = len(confusion)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    named = k <= 60
    side = min(9.0, max(3.2, 0.42 * k)) if named else 6.0
    figure = Figure((side + 1.2, side + 0.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if named:
        axis.set_xticks(range(k), class_names, rotation=90)
        axis.set_yticks(range(k), class_names)
    if k <= 25:
        for i, j in np.argwhere(share >= 0.005):
            color = "white" if share[i, j] > 0.5 else "black"
            axis.text(j, i, f"{share[i, j] * 100:.0f}", ha="center", va="center",
                      color=color, fontsize=6)  # fmt: skip
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    accuracy = np.trace(confusion) / max(confusion.sum(), 1)
    axis.set_title(f"{int(confusion.sum()):,} images, accuracy {accuracy:.2%}")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    return figure


def errors(
    images: np.ndarray, confidence: np.ndarray, true: np.ndarray, predicted: np.ndarray
) -> Figure:
    """Wrong predictions: the most confident ones above, the least confident ones below."""
    half = -(-len(images) // 2)
    columns = min(8, max(half, 1))
    above = -(-half // columns)
    rows = above + -(-(len(images) - half) // columns)
    cell = WIDTH / 8
    figure = Figure(
        (cell * columns, cell * 1.4 * max(rows, 1) + 0.3), layout="compressed"
    )
    figure.suptitle(
        f"The {half} most confident errors, then the {len(images) - half} least confident: "
        "predicted class, its probability, true class",
        fontsize=7,
    )
    panels = _panels(figure, max(rows, 1), columns)
    for i, image in enumerate(images):
        axis = panels[i if i < half else above * columns + i - half]
        _picture(axis, image)
        axis.set_title(
            f"{_short(predicted[i])} {confidence[i]:.0%}\nis {_short(true[i])}",
            fontsize=6,
        )
    return figure


FIGURES: dict[str, Callable[..., Figure]] = {
    "filters": filters,
    "positions": positions,
    "distance": distance,
    "rollout": rollout,
    "rollout_grid": rollout_grid,
    "heads": heads,
    "curves": curves,
    "confusion": confusion,
    "errors": errors,
}


def overlays(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Images uint8 (n, H, W, C) darkened where the map (n, h, w) is small, as in Figure
    6.

    The map is scaled by its maximum, enlarged bilinearly and multiplied onto the image.
    """
    maps = maps / np.maximum(maps.max((1, 2), keepdims=True), 1e-30)
    big = np.stack([enlarge(m, images.shape[1:3]) for m in maps])
    return (images * big[..., None]).astype(np.uint8)


def enlarge(picture: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Bilinear, (h, w) -> size, with pixel centres at half-integers."""
    for axis, n in enumerate(size):
        old = picture.shape[axis]
        at = np.clip((np.arange(n) + 0.5) * old / n - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(2)])
        picture = picture.take(low, axis) * (1 - part) + picture.take(high, axis) * part
    return picture


def _panels(figure: Figure, rows: int, columns: int) -> list[Any]:
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        _blank(axis)
        axis.set_visible(False)
    return [_Panel(axis) for axis in axes]


class _Panel:
    """An axis that appears when something is put on it, so that unused ones stay empty."""

    def __init__(self, axis: Any):
        self._axis = axis

    def __getattr__(self, name: str) -> Any:
        self._axis.set_visible(True)
        return getattr(self._axis, name)


def _blank(axis: Any) -> Any:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return axis


def _picture(axis: Any, image: np.ndarray) -> None:
    grey = image.shape[-1] == 1
    axis.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None)


def _cycle() -> list[str]:
    return [
        _BLUE,
        _ORANGE,
        "#3a8f5c",
        "#a33f5f",
        "#6a51a3",
        _GREY,
        "#b8a000",
        "#17a2b8",
    ]


def _short(name: Any) -> str:
    text = str(name)
    return text if len(text) <= 14 else text[:13] + "…"
