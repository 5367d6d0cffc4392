# SPDX-License-Identifier: Apache-2.0
"""What is measured on a model. An evaluator is a function of a :class:`Context` and its
options.

To add one: a function ``f(context, *, option=default) -> {name: number}`` in a file
here, and a row of ``EVALUATORS``. ``config.eval.evaluators`` chooses them, during
training and for ``python -m vit_jax.evaluate``.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vit_jax.config import Config, arguments, choose
from vit_jax.errors import UserError
from vit_jax.evaluators import (
    accuracy,
    calibration,
    fewshot,
    knn,
    label_maps,
    linear_probe,
    per_class,
    vtab,
)
from vit_jax.evaluators.context import Context, changed

__all__ = [
    "EVALUATORS", "Context", "check", "check_run", "lower_is_better", "prefix", "run",
]  # fmt: skip


class Evaluator(NamedTuple):
    """What measures, which of its numbers are better when they are lower, and whether
    it takes the outputs of the model as classes."""

    measure: Callable[..., dict[str, float]]
    lower_is_better: tuple[str, ...] = ()
    of_classes: bool = True


EVALUATORS: dict[str, Evaluator] = {
    "accuracy": Evaluator(accuracy.accuracy, ("loss",)),
    "calibration": Evaluator(calibration.calibration, ("ece", "mce", "brier")),
    "fewshot": Evaluator(fewshot.fewshot, of_classes=False),
    "imagenet_v2": Evaluator(label_maps.imagenet_v2),
    "knn": Evaluator(knn.knn, of_classes=False),
    "linear_probe": Evaluator(linear_probe.linear_probe, of_classes=False),
    "objectnet": Evaluator(label_maps.objectnet),
    "per_class": Evaluator(per_class.per_class),
    "real": Evaluator(label_maps.real),
    "vtab": Evaluator(vtab.vtab, of_classes=False),
}


def run(context: Context) -> dict[str, float]:
    """Runs every evaluator of the config; names are ``prefix/name``."""
    metrics = {}
    entries = context.cfg.eval.evaluators
    for entry, options in zip(entries, check(context.cfg), strict=True):
        numbers = EVALUATORS[entry["type"]].measure(context, **options)
        metrics |= {f"{prefix(entry)}/{k}": v for k, v in numbers.items()}
    return metrics


def lower_is_better(metric: str) -> bool:
    """Whether the best value of a metric that :func:`run` returns, such as
    ``test/loss``, is the lowest."""
    name = metric.rpartition("/")[2]
    return any(name in e.lower_is_better for e in EVALUATORS.values())


def prefix(entry: Mapping[str, Any]) -> str:
    """First part of the names under which an entry's numbers are written.

    ``test`` for the plain accuracy, else the type, unless the entry names its own.
    """
    if entry.get("prefix"):
        return entry["prefix"]
    if entry["type"] != "accuracy":
        return entry["type"]
    # "train/accuracy" is what the training loop measures on augmented images.
    split = entry.get("split", "test")
    return "clean_train" if split == "train" else split


def check(cfg: Config) -> list[dict[str, Any]]:
    """The options of each evaluator; refuses what would fail hours later.

    Raises:
      UserError: an unknown evaluator, a wrong option or a clashing name; it names the
        entry of ``config.eval.evaluators``.
    """
    seen: set[str] = set()
    result = []
    for i, entry in enumerate(cfg.eval.evaluators):
        knob = f"config.eval.evaluators[{i}]"
        measure = choose(f"{knob} type", str(entry.get("type", "")), EVALUATORS).measure
        given = {k: v for k, v in entry.items() if k not in ("type", "prefix")}
        options = arguments(measure, given, knob)
        changed(cfg.data, options.get("data"))
        own = entry.get("prefix", "")
        if not isinstance(own, str) or own == "train" or own.startswith("train/"):
            raise UserError(
                f"{knob}.prefix is {own!r}: it must be a string, and not 'train', under "
                "which training writes"
            )
        result.append(options)
        if prefix(entry) in seen:
            raise UserError(
                f"{knob} writes its numbers under {prefix(entry)!r}, as an entry before it "
                f"does: give one of them another 'prefix'"
            )
        seen.add(prefix(entry))
    return result


def check_run(cfg: Config) -> None:
    """Refuses, before anything is trained, what the first evaluation would.

    Raises:
      UserError: evaluators of classes where the loss trains none, or a best checkpoint
        by what none of them measures.
    """
    entries = cfg.eval.evaluators
    if any(EVALUATORS[entry["type"]].of_classes for entry in entries):
        accuracy.check_loss(cfg)
    best, groups = cfg.checkpoint.keep_best, [f"{prefix(entry)}/" for entry in entries]
    if best and not best.startswith(tuple(groups)):
        raise UserError(
            f"config.checkpoint.keep_best={best!r} is not among what is measured: the "
            f"metrics of config.eval.evaluators begin with {' or '.join(groups) or '-'}"
        )
