# SPDX-License-Identifier: Apache-2.0
"""Masked patch prediction (Appendix B.1.2): predict chosen patches from the rest.

B images per batch, N patches of P x P pixels. ``config.masked_target`` says what is
predicted of a patch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax import models
from vit_jax.config import Config, choose
from vit_jax.errors import UserError
from vit_jax.objectives.objective import LossFn, Metrics, Objective

# Three bits per channel.
COLORS = 8**3


def create(model: Any, cfg: Config) -> LossFn:
    """The model returns one prediction per patch, (B, N, outputs). The loss is the mean
    over all chosen patches, those that were left unchanged included.
    """
    patch, loss_of = model.cfg.patch, _target(cfg).losses

    def loss_fn(params, batch, key):
        corruption_key, dropout_key = jax.random.split(key)
        images = batch["image"]
        patches = to_patches(images, patch)  # (B, N, P, P, 3)
        b, n = patches.shape[:2]
        chosen, corruption = draw_corruption(corruption_key, b, n, cfg.masked_share)
        predictions = model.apply(
            {"params": params},
            images,
            train=True,
            corruption=corruption,
            rngs={"dropout": dropout_key},
        ).astype(jnp.float32)
        values = loss_of(predictions, patches)  # float32 (B, N) each
        # Every image has the same number of chosen patches, so this is also the mean
        # over micro-batches.
        weights = chosen.astype(jnp.float32) / chosen.sum()
        means = {k: (weights * v).sum() for k, v in values.items()}
        return means.pop("loss"), means

    return loss_fn


def draw_corruption(
    key: jax.Array, batch: int, num_patches: int, share: float = 0.5
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Chooses ``round(share * N)`` patches per image, at least 1, and their fate.

    Returns:
      chosen: bool (B, N), the patches to predict.
      corruption: ``kind`` int32 (B, N), 0 left unchanged, 1 the mask token (80 % of the
        chosen), 2 the embedding of another patch (10 %); ``source`` int32 (B, N), which
        other patch of the same image that is.
    """
    order_key, kind_key, source_key = jax.random.split(key, 3)
    shape = (batch, num_patches)
    rank = jax.random.uniform(order_key, shape).argsort(-1).argsort(-1)
    chosen = rank < max(1, round(share * num_patches))
    u = jax.random.uniform(kind_key, shape)
    kind = jnp.where(u < 0.8, 1, jnp.where(u < 0.9, 2, 0))
    kind = jnp.where(chosen, kind, 0).astype(jnp.int32)
    offset = jax.random.randint(source_key, shape, 1, max(num_patches, 2))
    source = (jnp.arange(num_patches)[None] + offset) % num_patches
    return chosen, {"kind": kind, "source": source.astype(jnp.int32)}


def to_patches(images: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, C) to (B, N, P, P, C) in raster order; whole patches only."""
    b, height, width, c = images.shape
    h, w = height // patch, width // patch
    x = images[:, : h * patch, : w * patch].reshape(b, h, patch, w, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * w, patch, patch, c)


def color_classes(means: jax.Array) -> jax.Array:
    """Colours (..., 3) in [-1, 1] to classes 64 R + 8 G + B with R, G, B in 0..7."""
    bins = jnp.floor(8 * (means + 1) / 2).astype(jnp.int32).clip(0, 7)
    return (bins * jnp.array([64, 8, 1]).reshape((1,) * (bins.ndim - 1) + (3,))).sum(-1)


def _mean_color(predictions: jax.Array, patches: jax.Array) -> Metrics:
    """512-way prediction of the mean colour."""
    labels = color_classes(patches.mean((2, 3)))  # (B, N)
    loss = optax.softmax_cross_entropy_with_integer_labels(predictions, labels)
    return {"loss": loss, "accuracy": _equal(predictions.argmax(-1), labels)}


def _downsampled(predictions: jax.Array, patches: jax.Array) -> Metrics:
    """16 parallel 512-way predictions: the patch, averaged down to 4 x 4."""
    b, n, p, _, c = patches.shape
    small = patches.reshape(b, n, 4, p // 4, 4, p // 4, c).mean((3, 5))
    labels = color_classes(small.reshape(b, n, 16, c))  # (B, N, 16)
    logits = predictions.reshape(b, n, 16, COLORS)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = _equal(logits.argmax(-1), labels)
    return {"loss": loss.mean(-1), "accuracy": hits.mean(-1)}


def _pixels(predictions: jax.Array, patches: jax.Array) -> Metrics:
    """L2 regression of the patch: mean squared error per value, values in [-1, 1]."""
    error = predictions - patches.reshape(predictions.shape)
    return {"loss": jnp.square(error).mean(-1)}


def _equal(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a == b).astype(jnp.float32)


class Target(NamedTuple):
    """What is predicted of a patch."""

    # (predictions (B, N, outputs), patches (B, N, P, P, 3)) -> float32 (B, N) each
    losses: Callable[[jax.Array, jax.Array], Metrics]
    # P -> predictions per patch
    outputs: Callable[[int], int]


TARGETS = {
    "mean": Target(_mean_color, lambda patch: COLORS),
    "downsampled": Target(_downsampled, lambda patch: 16 * COLORS),
    "pixels": Target(_pixels, lambda patch: patch * patch * 3),
}


def _target(cfg: Config) -> Target:
    return choose("config.masked_target", cfg.masked_target, TARGETS)


def outputs(cfg: Config) -> int:
    """Width of the head, predictions per patch; ``cfg.model`` must be resolved."""
    model = cfg.model
    if models.has_stem(model):
        raise UserError(
            f"config.loss='masked_patch' corrupts patches of pixels, which {model.name!r} "
            "does not have: choose a config.model.name without a ResNet"
        )
    if cfg.masked_target == "downsampled" and model.patch % 4:
        raise UserError(
            "config.masked_target='downsampled' needs a patch side divisible by 4, "
            f"{model.name!r} has {model.patch}: use 'mean' or 'pixels'"
        )
    return _target(cfg).outputs(model.patch)


def check(cfg: Config, multilabel: bool) -> list[str]:
    """Refuses a head or a number of channels that does not fit."""
    if cfg.model.head != "masked_patch":
        raise UserError(
            f"config.model.head={cfg.model.head!r} does not fit config.loss="
            "'masked_patch': give --config.model.head=masked_patch as well"
        )
    if cfg.model.channels != 3:
        raise UserError(
            f"config.model.channels={cfg.model.channels}, but config.loss="
            "'masked_patch' predicts colours of 3 channels"
        )
    return []


MASKED_PATCH = Objective(
    create=create,
    reads_labels=False,
    options=("masked_target", "masked_share"),
    outputs=outputs,
    check=check,
)
