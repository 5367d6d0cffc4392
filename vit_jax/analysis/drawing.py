# SPDX-License-Identifier: Apache-2.0
"""What the figures have in common: sizes, colours, panels and how a map is shown."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image

from vit_jax.analysis import attention

# Print quality, and the inches of a text column, which every figure fills.
DPI = 300
WIDTH = 7.0
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "image.interpolation": "nearest",
}
BLUE, ORANGE, GREY = "#2f6db3", "#d9822b", "#777777"
COLORS = (BLUE, ORANGE, "#3a8f5c", "#a33f5f", "#6a51a3", GREY, "#b8a000", "#17a2b8")
HEAT = "magma"


class Drawing(NamedTuple):
    """A figure of the report: where its arrays come from, and how they are drawn.

    The first paragraph of the docstring of ``draw`` is the caption.
    """

    # (Subject) -> arrays; raises UserError: why there are none
    arrays: Callable[[Any], dict[str, Any]]
    draw: Callable[..., Figure]


def panels(figure: Figure, rows: int, columns: int) -> list[Any]:
    """Axes without ticks and frames, row by row; pass them to ``remove_unused`` in the
    end."""
    return [blank(a) for a in figure.subplots(rows, columns, squeeze=False).ravel()]


def remove_unused(axes: Sequence[Any]) -> None:
    for axis in axes:
        if not axis.has_data():
            axis.remove()


def blank(axis: Any) -> Any:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return axis


def picture(axis: Any, image: np.ndarray) -> None:
    """An image uint8 or float in [0, 1], (H, W, 1) or (H, W, 3)."""
    grey = image.shape[-1] == 1
    top = 255 if image.dtype == np.uint8 else 1
    shown = image[..., 0] if grey else image
    axis.imshow(shown, cmap="gray" if grey else None, vmin=0, vmax=top)


def clipping(maps: np.ndarray) -> str:
    """What ``attention.bounded`` clipped, in words."""
    top = np.percentile(maps, attention.PERCENTILE, axis=(1, 2), keepdims=True)
    share = (maps > top * (1 + 1e-6)).mean()
    factor = (maps.max((1, 2)) / np.maximum(top[:, 0, 0], 1e-30)).max()
    return (
        f"each map divided by its {attention.PERCENTILE:.0f}th percentile; "
        f"{share:.1%} of the values are clipped, the largest at {factor:.3g}"
    )


def enlarge(map_: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Bilinear, (h, w) -> (height, width) ``size``."""
    image = Image.fromarray(np.asarray(map_, np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def heated(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Images uint8 (n, H, W, C) in grey under their maps (n, h, w) in [0, 1] as colours:
    float (n, H, W, 3) in [0, 1], readable on black pictures and on white ones."""
    heat = np.stack([enlarge(m, images.shape[1:3]) for m in maps])
    grey = images.mean(-1, keepdims=True) / 255
    return 0.3 * grey + 0.7 * colormaps[HEAT](heat)[..., :3]


def wrapped(name: Any, width: int) -> str:
    """A name in lines of at most ``width`` letters, nothing left out."""
    lines = textwrap.wrap(str(name), width, break_on_hyphens=False)
    return "\n".join(lines) or str(name)


def relative_colorbar(figure: Figure, axes: Sequence[Any]) -> None:
    """A colour bar from 0 to the ``attention.PERCENTILE`` of each map."""
    heat = ScalarMappable(cmap=HEAT)
    bar = figure.colorbar(heat, ax=list(axes), shrink=0.7, aspect=40)
    bar.set_ticks([0, 1], labels=["0", f"{attention.PERCENTILE:.0f}th\npercentile"])
