# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of labels: ``softmax`` with one per image, ``sigmoid`` with any number."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import Config, choose
from vit_jax.errors import UserError
from vit_jax.objectives.objective import LossFn, Objective, counts, multi_hot

_EXAMPLE_LOSSES = {
    "softmax": optax.softmax_cross_entropy,
    "sigmoid": lambda x, y: optax.sigmoid_binary_cross_entropy(x, y).sum(-1),
}


def example_losses(loss: str, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Loss of each example, float32 (B,); logits (B, K), labels (B,) or (B, K)."""
    logits = logits.astype(jnp.float32)
    targets = multi_hot(labels, logits.shape[-1])
    return choose("config.loss", loss, _EXAMPLE_LOSSES)(logits, targets)


def _create(loss: str, model: Any, cfg: Config) -> LossFn:
    num_classes = model.cfg.num_classes

    def loss_fn(params, batch, key):
        labels = targets = multi_hot(batch["label"], num_classes)
        if cfg.label_smoothing:
            s = cfg.label_smoothing
            targets = (1 - s) * targets + s / num_classes
        logits = model.apply(
            {"params": params}, batch["image"], train=True, rngs={"dropout": key}
        )
        mask = counts(batch)

        def mean(values):  # (B,), of the examples that count
            return (mask * values).sum() / jnp.maximum(mask.sum(), 1.0)

        metrics = {"accuracy": mean(_top1_hit(logits, labels))}
        return mean(example_losses(loss, logits, targets)), metrics

    return loss_fn


def _top1_hit(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 (B,): 1 where the highest logit is the label, or one of the labels.

    An image that was mixed counts as the one that has the larger share.
    """
    top = logits.argmax(-1)
    share = jnp.take_along_axis(targets, top[:, None], axis=-1)[:, 0]
    return (share >= 0.5).astype(jnp.float32)


def _check_head(cfg: Config) -> None:
    if cfg.model.head in ("none", "masked_patch"):
        raise UserError(
            f"config.model.head={cfg.model.head!r} gives no logits of classes, which "
            f"config.loss={cfg.loss!r} needs: choose 'token', 'gap' or 'map'"
        )


def _check_softmax(cfg: Config, multilabel: bool) -> list[str]:
    _check_head(cfg)
    if cfg.label_smoothing == 1:
        raise UserError(
            "config.label_smoothing=1.0 leaves nothing of the labels: it must be below 1"
        )
    if multilabel:
        raise UserError(
            "config.loss='softmax', but the data has multi-hot labels (several per "
            "image): use --config.loss=sigmoid"
        )
    if cfg.model.num_classes < 2:
        raise UserError(
            f"config.loss='softmax', but the data has {cfg.model.num_classes} class: "
            "there must be at least 2"
        )
    if cfg.label_smoothing:
        return [
            f"train/loss includes config.label_smoothing={cfg.label_smoothing}, "
            "test/loss does not"
        ]
    return []


def _check_sigmoid(cfg: Config, multilabel: bool) -> list[str]:
    _check_head(cfg)
    if cfg.model.head_bias or cfg.pretrained:
        return []
    return [
        f"loss 'sigmoid' starts with every one of {cfg.model.num_classes} classes at 1/2; "
        "--config.model.head_bias=-6.9 (1k classes) or -10 (21k) starts at 1/K"
    ]


def _as_many_as_classes(cfg: Config) -> int:
    return 0


SOFTMAX = Objective(
    create=functools.partial(_create, "softmax"),
    reads_labels=True,
    options=("label_smoothing", "mixup"),
    outputs=_as_many_as_classes,
    check=_check_softmax,
)
SIGMOID = Objective(
    create=functools.partial(_create, "sigmoid"),
    reads_labels=True,
    options=("mixup",),
    outputs=_as_many_as_classes,
    check=_check_sigmoid,
)
