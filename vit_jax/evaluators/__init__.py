# SPDX-License-Identifier: Apache-2.0
"""What is measured on a model. An evaluator is a function of a :class:`Context` and its
options.

To add one: a function ``f(context, *, option=default) -> {name: number}`` in a file
here, and a line in ``EVALUATORS``. ``config.eval.evaluators`` chooses them, during
training and for ``python -m vit_jax.evaluate``.
"""

from collections.abc import Callable, Mapping
from typing import Any

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

__all__ = ["EVALUATORS", "Context", "check", "prefix", "run"]

EVALUATORS: dict[str, Callable[..., dict[str, float]]] = {
    "accuracy": accuracy.accuracy,
    "calibration": calibration.calibration,
    "fewshot": fewshot.fewshot,
    "imagenet_v2": label_maps.imagenet_v2,
    "knn": knn.knn,
    "linear_probe": linear_probe.linear_probe,
    "objectnet": label_maps.objectnet,
    "per_class": per_class.per_class,
    "real": label_maps.real,
    "vtab": vtab.vtab,
}


def run(context: Context) -> dict[str, float]:
    """Runs every evaluator of the config; names are ``prefix/name``."""
    metrics = {}
    entries = context.cfg.eval.evaluators
    for entry, options in zip(entries, check(context.cfg), strict=True):
        numbers = EVALUATORS[entry["type"]](context, **options)
        metrics |= {f"{prefix(entry)}/{k}": v for k, v in numbers.items()}
    return metrics


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
        function = choose(f"{knob} type", str(entry.get("type", "")), EVALUATORS)
        given = {k: v for k, v in entry.items() if k != "type"}
        options = arguments(function, given, knob)
        changed(cfg.data, options.get("data"))
        result.append(options)
        if prefix(entry) in seen:
            raise UserError(
                f"{knob} writes its numbers under {prefix(entry)!r}, as an entry before it "
                f"does: give one of them another 'prefix'"
            )
        seen.add(prefix(entry))
    return result
