# SPDX-License-Identifier: Apache-2.0
"""The figures of a run: learning curves from its log; confusion, calibration and errors
from its test images.

K classes, b images of a batch.
"""

import functools
import heapq
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from vit_jax.analysis import drawing
from vit_jax.analysis.drawing import BLUE, COLORS, GREY, ORANGE, WIDTH, Drawing
from vit_jax.analysis.subject import Subject, to_uint8
from vit_jax.errors import UserError
from vit_jax.evaluators.calibration import bin_sums
from vit_jax.evaluators.per_class import count_confusion
from vit_jax.inference import Batch
from vit_jax.workdir import read_metrics

BINS = 15
# Quantities of the learning curves, by the last part of a metric's name.
QUANTITIES = ("loss", "accuracy", "learning_rate", "grad_norm", "images_per_second")


def read_curves(workdir: Any) -> dict[str, np.ndarray]:
    """``metrics.jsonl`` as arrays: names, steps and values, one row per number.

    Where a step was run again after a restart, the later line counts.

    Raises:
      UserError: the run has logged nothing.
    """
    found: dict[tuple[str, int], float] = {}
    for row in read_metrics(str(workdir)):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                found[name, int(row["step"])] = value
    if not found:
        raise UserError(f"{workdir} has no metrics.jsonl with numbers to draw")
    rows = sorted(found)
    return {
        "names": np.array([name for name, _ in rows]),
        "steps": np.array([step for _, step in rows]),
        "values": np.array([found[r] for r in rows], np.float64),
    }


def curve_arrays(subject: Subject) -> dict[str, Any]:
    if subject.run is None:
        raise UserError("the source is not a workdir, so there is no log of a run")
    return read_curves(subject.source)


def draw_curves(names: np.ndarray, steps: np.ndarray, values: np.ndarray) -> Figure:
    """Learning curves of the run by step: loss, accuracy, learning rate, norm of the
    gradient and speed."""
    table = np.asarray(names)
    last = np.array([n.split("/")[-1] for n in table])
    kinds = [q for q in QUANTITIES if q in last]
    columns = 2 if len(kinds) > 1 else 1
    rows = max(1, -(-len(kinds) // columns))
    figure = Figure((WIDTH, 2.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis, kind in zip(axes, kinds, strict=False):
        found = list(dict.fromkeys(table[last == kind].tolist()))
        for color, name in zip(COLORS, found, strict=False):
            at = table == name
            dots = {"marker": "o", "ms": 2.5} if at.sum() <= 40 else {}
            axis.plot(steps[at], values[at], lw=1, label=name, color=color, **dots)
        axis.set_xlabel("step")
        axis.set_title(kind.replace("_", " "))
        if len(found) > 1:
            axis.legend()
        if kind in ("learning_rate", "grad_norm"):
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        # The label of the last tick must not reach into the next plot.
        axis.margins(x=0.06)
    drawing.remove_unused(axes)
    return figure


class Tested(NamedTuple):
    """What one pass over the test images leaves: the arrays of three figures."""

    confusion: dict[str, np.ndarray]
    calibration: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]


def measure(
    logits: Callable[[jax.Array], jax.Array],
    probabilities: Callable[[jax.Array], np.ndarray],
    batches: Iterable[Batch],
    class_names: tuple[str, ...],
    loss: str = "softmax",
    count: int = 16,
) -> Tested:
    """The confusion matrix, the calibration, and the ``count`` most and least confident
    errors.

    Only the images that end up in the figure are kept.

    Args:
      logits: images (b, H, W, C) -> (b, K).
      probabilities: logits (b, K) -> (b, K).
      batches: ``image``, ``label`` int (b,), ``mask`` (b,).
      class_names: of the K classes.
      loss: "softmax" or "sigmoid".
      count: errors of each kind.

    Raises:
      UserError: several labels per image, or more classes than there are names.
    """
    total: Any = None
    errors = _Errors(count)
    for batch in batches:
        label = batch["label"]
        if label.ndim != 1:
            raise UserError(
                "several labels per image: there is no one true class to confuse"
            )
        found = logits(batch["image"])
        part = {
            "confusion": count_confusion(found, label, batch["mask"]),
            **bin_sums(found, label, batch["mask"], bins=BINS, loss=loss),
        }
        part = jax.tree.map(np.asarray, part)
        total = part if total is None else jax.tree.map(np.add, total, part)
        errors.add(batch, probabilities(found))
    if total is None:
        raise UserError("there are no test images")
    names = np.array(class_names)
    filled = np.maximum(total["count"], 1)
    return Tested(
        {"confusion": total["confusion"].astype(np.int64), "class_names": names},
        {
            "count": total["count"],
            "confidence": total["confidence"] / filled,
            "accuracy": total["right"] / filled,
        },
        errors.arrays(names),
    )


class _Errors:
    """The ``count`` most and the ``count`` least confident errors met so far."""

    def __init__(self, count: int):
        self._count = count
        self._met = 0
        self._most: list[Any] = []
        self._least: list[Any] = []

    def add(self, batch: Batch, p: np.ndarray) -> None:
        """``p``: probabilities (b, K)."""
        label = np.asarray(batch["label"])
        predicted, confidence = p.argmax(1), p.max(1)
        valid = (np.asarray(batch["mask"]) > 0) & (label >= 0)
        for i in np.flatnonzero(valid & (predicted != label)):
            self._met += 1
            image = to_uint8(np.asarray(batch["image"][i]))
            entry = (image, label[i], predicted[i], confidence[i])
            for heap, key in (
                (self._most, confidence[i]),
                (self._least, -confidence[i]),
            ):
                # The number breaks ties, so that images are never compared.
                heapq.heappush(heap, (float(key), self._met, entry))
                if len(heap) > self._count:
                    heapq.heappop(heap)

    def arrays(self, names: np.ndarray) -> dict[str, np.ndarray]:
        """Of few errors, half and half, so that no image is shown twice."""
        first = lambda heap, n: [e for *_, e in sorted(heap, reverse=True)[:n]]
        chosen = first(self._most, min(self._count, -(-self._met // 2)))
        chosen += first(self._least, self._met // 2)
        shown, true, predicted, confidence = (
            zip(*chosen, strict=True) if chosen else ((),) * 4
        )
        return {
            "images": np.array(shown),
            "confidence": np.array(confidence),
            "true": names[list(true)],
            "predicted": names[list(predicted)],
        }


@functools.lru_cache(1)
def _tested(subject: Subject) -> Tested:
    names = subject.class_names
    return measure(
        lambda images: subject.predictor(images)["logits"],
        subject.probabilities,
        subject.labelled(),
        names,
        "sigmoid" if subject.about.multilabel else "softmax",
    )


def confusion_arrays(subject: Subject) -> dict[str, Any]:
    if len(subject.class_names) > 1000:
        raise UserError(f"{len(subject.class_names)} classes are too many to show")
    return _tested(subject).confusion


def draw_confusion(confusion: np.ndarray, class_names: np.ndarray) -> Figure:
    """Which classes are confused: each row is a true class with its number of images,
    and sums to 100 %."""
    k = len(confusion)
    count = confusion.sum(1)
    share = confusion / np.maximum(count[:, None], 1)
    named = k <= 60
    height = WIDTH - 1.2
    if named:
        longest = max(len(str(n)) for n in class_names)
        height = max(2.4, min(9.0, 0.3 * k)) + 0.06 * longest + 0.6
    figure = Figure((WIDTH, height), layout="compressed")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = 8 if k <= 20 else 5
    if named:
        axis.set_xticks(range(k), class_names, rotation=90, fontsize=size)
        labels = [f"{n} ({c:,})" for n, c in zip(class_names, count, strict=True)]
        axis.set_yticks(range(k), labels, fontsize=size)
    if k <= 25:
        for i, j in np.argwhere(share >= 0.005):
            color = "white" if share[i, j] > 0.5 else "black"
            axis.text(j, i, f"{share[i, j] * 100:.0f}", ha="center", va="center",
                      color=color, fontsize=6)  # fmt: skip
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class (images)")
    accuracy = np.trace(confusion) / max(confusion.sum(), 1)
    axis.set_title(f"{int(confusion.sum()):,} images, accuracy {accuracy:.2%}")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    return figure


def calibration_arrays(subject: Subject) -> dict[str, Any]:
    return _tested(subject).calibration


def draw_calibration(
    count: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray
) -> Figure:
    """Reliability: of the predictions with a given confidence, the share that is right;
    below, how many there are."""
    count = np.asarray(count)
    bins, total = len(count), max(count.sum(), 1)
    gap = np.where(count > 0, np.abs(accuracy - confidence), 0)
    figure = Figure((WIDTH, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    edges = np.arange(bins + 1) / bins
    has = count > 0
    bar = {"align": "edge", "width": 1 / bins, "edgecolor": "white", "linewidth": 0.5}
    upper.bar(
        edges[:-1][has], accuracy[has], color=BLUE, label="share that is right", **bar
    )
    upper.plot(
        confidence[has], confidence[has], "_", color=ORANGE, ms=12, mew=2,
        label="mean confidence",
    )  # fmt: skip
    upper.plot([0, 1], [0, 1], ls="--", lw=0.8, color=GREY, label="perfect calibration")
    upper.set_ylim(0, 1.02)
    upper.set_ylabel("accuracy")
    upper.legend(loc="upper left")
    upper.set_title(
        f"{int(count.sum()):,} images, expected calibration error "
        f"{(count * gap).sum() / total:.2%}, largest gap {gap.max():.2%}"
    )
    lower.bar(edges[:-1], count, color=GREY, **bar)
    lower.set_xlim(0, 1)
    lower.set_ylabel("images")
    lower.set_xlabel("confidence (probability of the predicted class)")
    return figure


def error_arrays(subject: Subject) -> dict[str, Any]:
    shown = _tested(subject).errors
    if not len(shown["images"]):
        raise UserError("there are no errors: every test image is right")
    return shown


def draw_errors(
    images: np.ndarray, confidence: np.ndarray, true: np.ndarray, predicted: np.ndarray
) -> Figure:
    """Wrong predictions: the most confident ones above, the least confident ones below."""
    half = -(-len(images) // 2)
    columns = max(4, min(8, half))
    above = -(-half // columns)
    rows = above + -(-(len(images) - half) // columns)
    titles = [
        f"{drawing.wrapped(p, 112 // columns)}\n{c:.0%}, is\n{drawing.wrapped(t, 112 // columns)}"
        for p, c, t in zip(predicted, confidence, true, strict=True)
    ]
    lines = max(t.count("\n") + 1 for t in titles)
    cell = WIDTH / columns
    figure = Figure((WIDTH, rows * (cell + 0.1 * lines) + 0.4), layout="compressed")
    axes = drawing.panels(figure, rows, columns)
    for i, image in enumerate(images):
        axis = axes[i if i < half else above * columns + i - half]
        drawing.picture(axis, image)
        axis.set_title(titles[i], fontsize=6)
    drawing.remove_unused(axes)
    figure.suptitle(
        f"The {half} most confident errors, then the {len(images) - half} least "
        "confident:\npredicted class, its probability, true class"
    )
    return figure


CURVES = Drawing(curve_arrays, draw_curves)
CONFUSION = Drawing(confusion_arrays, draw_confusion)
CALIBRATION = Drawing(calibration_arrays, draw_calibration)
ERRORS = Drawing(error_arrays, draw_errors)
