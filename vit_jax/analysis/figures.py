# SPDX-License-Identifier: Apache-2.0
"""All figures by name. ``draw(name, arrays)`` draws what ``name.npz`` holds.

To add one: in a file here, a function from a Subject to arrays, one from these arrays to
a matplotlib Figure, and a row of ``FIGURES``.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vit_jax.analysis import embeddings, maps, runs
from vit_jax.analysis.drawing import STYLE, Drawing
from vit_jax.config import choose

FIGURES: dict[str, Drawing] = {
    "filters": embeddings.FILTERS,
    "positions": embeddings.POSITION_SIMILARITY,
    "distance": maps.DISTANCE,
    "rollout": maps.ROLLOUT,
    "rollout_grid": maps.ROLLOUT_GRID,
    "heads": maps.HEADS,
    "patches": maps.PATCHES,
    "curves": runs.CURVES,
    "confusion": runs.CONFUSION,
    "calibration": runs.CALIBRATION,
    "errors": runs.ERRORS,
}


def draw(name: str, arrays: Mapping[str, Any]) -> Figure:
    """The figure ``name`` of the arrays that its function takes."""
    with matplotlib.rc_context(STYLE):
        return choose("figure", name, FIGURES).draw(**arrays)


def caption(name: str) -> str:
    """What a figure shows: the first paragraph of the docstring of its function."""
    text = inspect.getdoc(FIGURES[name].draw) or ""
    return " ".join(text.split("\n\n")[0].split())
