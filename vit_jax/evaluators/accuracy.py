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
from vit_jax.config import DataConfig
from vit_jax.errors import UserError
from vit_jax.evaluators.context import Batch, Context, name_of
from vit_jax.evaluators.features import num_classes


def accuracy(
    context: Context,
    *,
    split: str = "test",
    data: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> dict[str, float]:
    """``accuracy``, ``top5`` (from 6 classes on), ``loss`` and ``count`` over a split.

    Exact on any number of devices and processes: padding is masked, nothing is dropped.
    ``loss`` is nan if an output is.
    """
    del prefix  # belongs to the name under which the caller writes the numbers
    config = context.data(data)
    loss = class_loss(context)
    check_classes(context, config)

    def step(outputs: Mapping[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
        return _step(outputs["logits"], batch["label"], batch["mask"], loss=loss)

    return means(context.sum(step, config, split, finite=False))


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


def class_loss(context: Context) -> str:
    """The loss that the numbers report; masked patch prediction has no classes to be
    right about."""
    if not objectives.of(context.cfg).reads_labels:
        raise UserError(
            f"config.loss={context.cfg.loss!r} trains no classes: choose the evaluators "
            "'fewshot', 'knn' or 'linear_probe' in config.eval.evaluators"
        )
    return context.cfg.loss


def check_classes(context: Context, data: DataConfig) -> None:
    """Refuses labels that mean something else than the outputs of the model.

    Raises:
      UserError: another number of classes.
    """
    count, outputs = num_classes(context, data), len(context.class_names)
    if count != outputs:
        raise UserError(
            f"the data set {name_of(data)!r} has {count} classes and the model {outputs}: choose "
            "the evaluators 'fewshot', 'knn' or 'linear_probe', which bring their own classifier"
        )


def correct(logits: jax.Array, label: jax.Array, k: int) -> jax.Array:
    """Whether one of the k largest logits is a label. (B, K), (B,) or (B, K) -> (B,)
    bool."""
    top = jax.lax.top_k(logits, k)[1]  # (B, k)
    if label.ndim == 1:
        return (top == label[:, None]).any(1)
    return jnp.take_along_axis(label > 0, top, axis=1).any(1)


def counted(label: jax.Array, mask: jax.Array) -> jax.Array:
    """Which examples count: not padding, and with at least one label. -> (B,) bool."""
    labelled = label >= 0 if label.ndim == 1 else (label > 0).any(1)
    return labelled & (mask > 0)


@functools.partial(jax.jit, static_argnames="loss")
def _step(
    logits: jax.Array, label: jax.Array, mask: jax.Array, *, loss: str
) -> dict[str, jax.Array]:
    valid = counted(label, mask)
    # An image without a label still has a sigmoid loss: all classes are wrong.
    with_loss = mask > 0 if loss == "sigmoid" and label.ndim == 2 else valid
    losses = objectives.example_losses(loss, logits, label)
    sums = {
        "top1": jnp.sum(correct(logits, label, 1) & valid, dtype=jnp.int32),
        "count": jnp.sum(valid, dtype=jnp.int32),
        "loss": jnp.sum(jnp.where(with_loss, losses, 0)),
        "losses": jnp.sum(with_loss, dtype=jnp.int32),
    }
    if logits.shape[1] > 5:
        sums["top5"] = jnp.sum(correct(logits, label, 5) & valid, dtype=jnp.int32)
    return sums
