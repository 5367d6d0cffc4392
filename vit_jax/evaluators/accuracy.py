# SPDX-License-Identifier: Apache-2.0
"""Top-1 and top-5 accuracy and loss, for one label per image and for several (section
4.1).

B batch, K classes. An example counts if it has a label at all, and is right if the
class with the largest logit is one of its labels; with one label per image this is the
usual accuracy, with several it is that of ImageNet-ReaL and of multi-label training.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax import objectives
from vit_jax.config import Config, DataConfig
from vit_jax.errors import UserError
from vit_jax.evaluators.context import Context, name_of


def accuracy(
    context: Context, *, split: str = "test", data: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """``accuracy``, ``top5`` (from 6 classes on), ``loss`` and ``count`` over a split.

    Exact on any number of devices and processes: padding is masked, nothing is dropped.
    ``loss`` is nan if an output is.
    """
    config = classified(context, data)
    step = functools.partial(_step, loss=context.cfg.loss)
    return means(context.sum(step, config, split, finite=False))


def classified(context: Context, data: Mapping[str, Any] | None) -> DataConfig:
    """The run's data with some fields changed, if the outputs of the model are its
    classes.

    Raises:
      UserError: the model has no classes, another number of them, or another order.
    """
    config = context.data(data)
    check_classes(context, config)
    check_order(context, config)
    return config


def check_order(context: Context, data: DataConfig) -> None:
    """Raises UserError where the data has the names of the outputs in another order."""
    own, of_data = context.class_names, context.describe(data).class_names
    if own != of_data and sorted(own) == sorted(of_data):
        i = next(i for i, (a, b) in enumerate(zip(own, of_data, strict=True)) if a != b)
        raise UserError(
            f"the data set {name_of(data)!r} has the classes of the model in another order: "
            f"class {i} is {of_data[i]!r} there and {own[i]!r} in the model, so no number "
            "would be right"
        )


def check_classes(context: Context, data: DataConfig) -> None:
    """Refuses labels that mean something else than the outputs of the model.

    Raises:
      UserError: the model has no classes, or another number of them.
    """
    check_loss(context.cfg)
    count, outputs = context.describe(data).num_classes, len(context.class_names)
    if count != outputs:
        raise UserError(
            f"the data set {name_of(data)!r} has {count} classes and the model {outputs}: choose "
            "the evaluators 'fewshot', 'knn' or 'linear_probe', which bring their own classifier"
        )


def check_single(label: jax.Array, evaluator: str) -> None:
    """Raises UserError where images have several labels."""
    if label.ndim != 1:
        raise UserError(
            f"{evaluator} counts one label per image, but the data has several: use the "
            "evaluator 'accuracy'"
        )


def check_loss(cfg: Config) -> None:
    """UserError if the loss of a run trains no classes."""
    if not objectives.of(cfg).reads_labels:
        raise UserError(
            f"config.loss={cfg.loss!r} trains no classes: choose the evaluators "
            "'fewshot', 'knn' or 'linear_probe' in config.eval.evaluators"
        )


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of summed ``top1``, ``top5``, ``loss``, ``losses`` and ``count``."""
    count = int(sums["count"])
    if not count:
        raise UserError(
            "no example of the evaluated split has a label, so there is no accuracy"
        )
    result = {"accuracy": float(sums["top1"]) / count}
    if "top5" in sums:
        result["top5"] = float(sums["top5"]) / count
    if "loss" in sums:
        result["loss"] = float(sums["loss"]) / int(sums["losses"])
    return result | {"count": float(count)}


def likeliest(logits: jax.Array) -> jax.Array:
    """The classes with the largest logits, best first: (B, K) -> (B, 5), or (B, 1) where
    five of them would be nearly all."""
    return jax.lax.top_k(logits, 5 if logits.shape[1] > 5 else 1)[1]


def hits(classes: jax.Array, label: jax.Array) -> jax.Array:
    """Which classes (B, n) are a label of their image: label (B,) or (B, K) -> bool
    (B, n)."""
    if label.ndim == 1:
        return classes == label[:, None]
    return jnp.take_along_axis(label > 0, classes, axis=1)


def labelled(label: jax.Array, mask: jax.Array) -> jax.Array:
    """Which examples count: not padding, and with at least one label. -> (B,) bool."""
    has = label >= 0 if label.ndim == 1 else (label > 0).any(1)
    return has & (mask > 0)


def top_sums(hit: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
    """What ``means`` reads of one batch.

    Args:
      hit: (B, n) whether each of the n likeliest classes is right.
      valid: (B,) which examples count.
    """
    count = lambda x: jnp.sum(x & valid, dtype=jnp.int32)
    sums = {"top1": count(hit[:, 0]), "count": count(valid)}
    return sums | {"top5": count(hit.any(1))} if hit.shape[1] == 5 else sums


@functools.partial(jax.jit, static_argnames="loss")
def _step(
    logits: jax.Array, label: jax.Array, mask: jax.Array, *, loss: str
) -> dict[str, jax.Array]:
    valid = labelled(label, mask)
    # An image without a label still has a sigmoid loss: all classes are wrong.
    with_loss = mask > 0 if loss == "sigmoid" and label.ndim == 2 else valid
    losses = objectives.example_losses(loss, logits, label)
    return top_sums(hits(likeliest(logits), label), valid) | {
        "loss": jnp.sum(jnp.where(with_loss, losses, 0)),
        "losses": jnp.sum(with_loss, dtype=jnp.int32),
    }
