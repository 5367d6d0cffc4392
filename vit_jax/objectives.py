# SPDX-License-Identifier: Apache-2.0
"""What is minimised.

``OBJECTIVES[name](model, cfg)`` is ``loss_fn(params, batch, key) -> (loss, metrics)``.
B images per batch, K classes, N patches of P x P pixels. ``batch["image"]`` is
(B, H, W, 3) float in [-1, 1], ``batch["label"]`` int32 (B,) or float (B, K) with any
number of positives per row; a label (or row) of -1, or 0 in ``batch["mask"]``, takes an
example out of the loss and the metrics. The loss is a float32 mean over the batch; everything
random (corruption, dropout) is a function of ``key``. Mixup happens before, on the
whole batch, so that it does not depend on the number of micro-batches.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import Config, choose
from vit_jax.errors import UserError

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, Metrics]]

COLORS = 8**3  # 3 bits per channel


def softmax(model: Any, cfg: Config) -> LossFn:
    """Cross-entropy with one label per image, smoothed by ``label_smoothing``."""
    return _classification(model, cfg, "softmax")


def sigmoid(model: Any, cfg: Config) -> LossFn:
    """Binary cross-entropy summed over the classes: any number of labels per image."""
    return _classification(model, cfg, "sigmoid")


def _classification(model: Any, cfg: Config, loss: str) -> LossFn:
    num_classes = model.cfg.num_classes

    def loss_fn(params, batch, key):
        labels = targets = multi_hot(batch["label"], num_classes)
        if cfg.label_smoothing:
            s = cfg.label_smoothing
            targets = (1 - s) * targets + s / num_classes
        logits = model.apply(
            {"params": params}, batch["image"], train=True, rngs={"dropout": key}
        )
        mask = _mask(batch)

        def mean(values):  # (B,), of the examples that count
            return (mask * values).sum() / jnp.maximum(mask.sum(), 1.0)

        metrics = {"accuracy": mean(correct(logits, labels))}
        return mean(example_losses(loss, logits, targets)), metrics

    return loss_fn


def example_losses(loss: str, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Loss of each example, float32 (B,); logits (B, K), labels (B,) or (B, K)."""
    logits = logits.astype(jnp.float32)
    targets = multi_hot(labels, logits.shape[-1])
    return choose("loss", loss, _EXAMPLE_LOSSES)(logits, targets)


_EXAMPLE_LOSSES = {
    "softmax": optax.softmax_cross_entropy,
    "sigmoid": lambda x, y: optax.sigmoid_binary_cross_entropy(x, y).sum(-1),
}


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """float32 (B,): 1 where the highest logit is the label, or one of the labels.

    An image that was mixed counts as the one that has the larger share.
    """
    top = logits.argmax(-1)
    targets = multi_hot(labels, logits.shape[-1])
    share = jnp.take_along_axis(targets, top[:, None], axis=-1)[:, 0]
    return (share >= 0.5).astype(jnp.float32)


def multi_hot(labels: jax.Array, num_classes: int) -> jax.Array:
    """float32 (B, K) in [0, 1]; a label listed twice counts once."""
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return jnp.clip(labels.astype(jnp.float32), 0.0, 1.0)


def mixup_batch(
    cfg: Config, key: jax.Array, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """A training batch after :func:`mixup`: float images, labels float (B, K).

    A mixture with an image that does not count does not count.
    """
    labels = multi_hot(batch["label"], cfg.model.num_classes)
    images, labels = mixup(key, batch["image"], labels, cfg.mixup)
    mask = _mask(batch)
    mask = mask * jnp.roll(mask, 1)
    return {**batch, "image": images, "label": labels, "mask": mask}


def counted(cfg: Config, batch: Mapping[str, jax.Array]) -> jax.Array:
    """float32 (): how many examples the loss of this batch is a mean over."""
    if cfg.loss == "masked_patch":  # which reads no labels
        return jnp.float32(len(batch["label"]))
    return _mask(batch).sum()


def _mask(batch: Mapping[str, jax.Array]) -> jax.Array:
    """float32 (B,): 1 for the examples that count."""
    labels = batch["label"]
    if "mask" in batch:
        return batch["mask"].astype(jnp.float32)
    return (labels >= 0).reshape(len(labels), -1).all(-1).astype(jnp.float32)


def mixup(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with its neighbour: lambda x_i + (1 - lambda) x_(i-1).

    Labels (B, K) are mixed alike. One lambda ~ Beta(alpha, alpha) per batch, at least
    1/2 so that x_i dominates (AugReg, arXiv 2106.10270).
    """
    lam = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    lam = jnp.maximum(lam, 1 - lam)

    def mix(x: jax.Array) -> jax.Array:
        return lam.astype(x.dtype) * x + (1 - lam).astype(x.dtype) * jnp.roll(x, 1, 0)

    return mix(images), mix(labels)


def masked_patch(model: Any, cfg: Config) -> LossFn:
    """Masked patch prediction (Appendix B.1.2): predict chosen patches from the rest.

    The model returns one prediction per patch, (B, N, outputs). The loss is the mean
    over all chosen patches, those that were left unchanged included.
    """
    if model.cfg.resnet_width:
        raise UserError(
            f"loss 'masked_patch' corrupts patches of pixels, which {model.cfg.name!r} "
            "does not have: choose a model.name without ResNet stem"
        )
    patch, target = model.cfg.patch, cfg.masked_target
    loss_of = choose("masked_target", target, MASKED_TARGETS)

    def loss_fn(params, batch, key):
        corruption_key, dropout_key = jax.random.split(key)
        images = batch["image"]
        patches = to_patches(images, patch)  # (B, N, P, P, 3)
        b, n = patches.shape[:2]
        chosen, corruption = corrupt(corruption_key, b, n, cfg.masked_share)
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


def corrupt(
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


MASKED_TARGETS = {"mean": _mean_color, "downsampled": _downsampled, "pixels": _pixels}

OBJECTIVES = {"softmax": softmax, "sigmoid": sigmoid, "masked_patch": masked_patch}


def masked_outputs(cfg: Config) -> int:
    """Width of the head, predictions per patch; ``cfg.model`` must be resolved."""
    patch = cfg.model.patch
    if cfg.masked_target == "downsampled" and patch % 4:
        raise UserError(
            f"masked_target 'downsampled' needs a patch side divisible by 4, "
            f"{cfg.model.name!r} has {patch}: use masked_target 'mean' or 'pixels'"
        )
    sizes = {"mean": COLORS, "downsampled": 16 * COLORS, "pixels": patch * patch * 3}
    return choose("masked_target", cfg.masked_target, sizes)


def check(cfg: Config, multilabel: bool, num_classes: int) -> list[str]:
    """Refuses combinations of loss, head and data that cannot be meant.

    Args:
      cfg: the run.
      multilabel: whether the labels are multi-hot.
      num_classes: of the data set.

    Returns:
      Hints for the log: allowed, but probably not wanted.

    Raises:
      UserError: names the knob.
    """
    choose("loss", cfg.loss, OBJECTIVES)
    masked = cfg.loss == "masked_patch"
    if masked != (cfg.model.head == "masked_patch"):
        raise UserError(
            f"loss {cfg.loss!r} and model.head {cfg.model.head!r} do not fit: "
            "loss 'masked_patch' and model.head 'masked_patch' go together"
        )
    if cfg.label_smoothing == 1:
        raise UserError("label_smoothing is 1.0, which leaves nothing of the labels")
    if cfg.label_smoothing and cfg.loss != "softmax":
        raise UserError(
            f"label_smoothing is {cfg.label_smoothing} but loss is {cfg.loss!r}: "
            "only loss 'softmax' smooths labels"
        )
    if masked:
        if cfg.mixup:
            raise UserError(
                f"mixup is {cfg.mixup} but loss 'masked_patch' has no labels to mix"
            )
        if cfg.model.channels != 3:
            raise UserError(
                f"model.channels is {cfg.model.channels} but loss 'masked_patch' "
                "predicts colours of 3 channels"
            )
        return []
    if cfg.model.head == "none":
        raise UserError(
            f"model.head is 'none', which gives features and no logits: "
            f"loss {cfg.loss!r} needs 'token', 'gap' or 'map'"
        )
    if multilabel and cfg.loss == "softmax":
        raise UserError(
            "loss is 'softmax' but the data has multi-hot labels (several per image): "
            "use --config.loss=sigmoid"
        )
    if num_classes < 2 and cfg.loss == "softmax":
        raise UserError(
            f"loss is 'softmax' but the data has {num_classes} class: "
            "there must be at least 2"
        )
    if cfg.loss == "sigmoid" and not cfg.model.head_bias and not cfg.pretrained:
        return [
            f"loss 'sigmoid' starts with every one of {num_classes} classes at 1/2; "
            "--config.model.head_bias=-6.9 (1k classes) or -10 (21k) starts at 1/K"
        ]
    return []
