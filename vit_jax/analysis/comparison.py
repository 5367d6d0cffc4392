# SPDX-License-Identifier: Apache-2.0
"""The figures of a study: rows beside each other, over all of their seeds.

n rows, s seeds; nan stands for a run that diverged or is not done.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vit_jax.analysis.drawing import BLUE, COLORS, GREY, ORANGE, STYLE, WIDTH
from vit_jax.config import choose


def draw(kind: str, arrays: Mapping[str, Any]) -> Figure:
    """The figure of a kind of ``KINDS`` from what its function takes."""
    with matplotlib.rc_context(STYLE):
        return choose("kind of figure", kind, KINDS)(**arrays)


def draw_bars(names: Sequence[str], values: Any, metric: str) -> Figure:
    """One line per row: the mean with its standard deviation, and every seed.

    Args:
      names: of the rows.
      values: (n, s).
      metric: what they are.
    """
    figure = Figure((WIDTH, 0.6 + 0.27 * len(names)), layout="constrained")
    axis = figure.subplots()
    for i, seeds in enumerate(np.asarray(values, np.float64)):
        found = seeds[np.isfinite(seeds)]
        if not len(found):
            axis.text(0.01, i, "diverged or not done", color=GREY, va="center", transform=axis.get_yaxis_transform())  # fmt: skip
            continue
        std = found.std(ddof=1) if len(found) > 1 else 0.0
        axis.errorbar(found.mean(), i, xerr=std, fmt="o", ms=4, color=BLUE, capsize=2.5, lw=1.2)  # fmt: skip
        axis.scatter(found, np.full(len(found), i), 9, ORANGE, zorder=3, linewidths=0)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel(
        f"{metric}: mean and standard deviation (blue), every seed (orange)"
    )
    axis.grid(axis="x", lw=0.4, alpha=0.5)
    return figure


def draw_lines(
    names: Sequence[str],
    lines: Sequence[str],
    x: Sequence[float],
    values: Any,
    x_label: str,
    metric: str,
) -> Figure:
    """Means with standard deviations against a number, one line per family of rows.

    Args:
      names: of the rows.
      lines: the family of each row.
      x: its place.
      values: (n, s).
      x_label: what x is.
      metric: what the values are.
    """
    del names
    figure = Figure((WIDTH, 3.6), layout="constrained")
    axis = figure.subplots()
    values, at = np.asarray(values, np.float64), np.asarray(x, np.float64)
    for color, line in zip(COLORS, dict.fromkeys(lines), strict=False):
        rows = [i for i, name in enumerate(lines) if name == line]
        rows = [i for i in rows if np.isfinite(values[i]).any()]
        rows.sort(key=lambda i: at[i])
        found = [values[i][np.isfinite(values[i])] for i in rows]
        means = [v.mean() for v in found]
        stds = [v.std(ddof=1) if len(v) > 1 else 0.0 for v in found]
        axis.errorbar(at[rows], means, stds, marker="o", ms=4, lw=1.2, capsize=2.5, color=color, label=line)  # fmt: skip
    axis.set_xscale("log")
    places = np.unique(at)
    if len(places) < len(at):  # chosen numbers, such as of images, that lines share
        axis.set_xticks(places, [f"{place:,.0f}" for place in places])
        axis.minorticks_off()
    if metric == "speed/images_per_second":
        axis.set_yscale("log")
    axis.set_xlabel(x_label)
    axis.set_ylabel(metric)
    axis.grid(lw=0.4, alpha=0.5)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def draw_curves(names: Sequence[str], logs: Any, metric: str) -> Figure:
    """A number during training, one line per row: the mean, and the range of the seeds.

    Args:
      names: of the rows.
      logs: of each row and seed, (step, value) pairs.
      metric: what they are.
    """
    figure = Figure((WIDTH, 3.4), layout="constrained")
    axis = figure.subplots()
    for color, name, seeds in zip(COLORS, names, logs, strict=False):
        seeds = [dict(log) for log in seeds if log]
        if not seeds:
            continue
        steps = sorted(set.intersection(*map(set, seeds)))
        curves = np.array([[log[step] for step in steps] for log in seeds])
        axis.plot(steps, curves.mean(0), marker="o", ms=3, lw=1.2, color=color, label=name)  # fmt: skip
        axis.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)  # fmt: skip
    axis.set_xlabel("step")
    axis.set_ylabel(f"{metric}: mean and range of the seeds")
    axis.grid(lw=0.4, alpha=0.5)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_heads(names: Sequence[str], heads: Any) -> Figure:
    """The attention distance of every head by depth, a panel per row.

    Args:
      names: of the rows.
      heads: of each row and seed, (layer, distance relative to uniform attention).
    """
    figure = Figure((WIDTH, 3.0), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name, seeds in zip(axes, names, heads, strict=True):
        points = np.array([p for seed in seeds for p in seed]).reshape(-1, 2)
        layers = np.unique(points[:, 0])
        axis.scatter(*points.T, 14, BLUE, alpha=0.75, linewidths=0, zorder=3)
        means = [points[points[:, 0] == layer, 1].mean() for layer in layers]
        axis.plot(layers, means, color=ORANGE, lw=1.2)
        axis.axhline(1, color=GREY, lw=0.8, ls="--")
        axis.set_xticks(layers)
        axis.set_xlabel("layer")
        axis.set_title(f"{name}, {len(seeds)} seeds")
    every = [d for seeds in heads for seed in seeds for _, d in seed]
    axes[0].set_ylim(0, 1.05 * max([1, *every]))
    axes[0].set_ylabel("attention distance, uniform = 1")
    return figure


KINDS = {
    "bars": draw_bars,
    "lines": draw_lines,
    "curves": draw_curves,
    "distance": draw_heads,
}
