# SPDX-License-Identifier: Apache-2.0
"""Attention weights and what is computed from them: rollout and attention distance.

L layers, B images, k heads, S tokens: first those that are no patches (class token,
distillation token, registers), then the N = h w patches in raster order.
``weights[l, b, head, q, j]`` is how much query q takes from key j.

>>> weights = attention.capture(model, params, images)
>>> attention.mean_distance(weights, grid=(14, 14), patch=16)  # (L, k) in pixels
>>> attention.token_map(attention.rollout(weights), grid=(14, 14))  # (B, 14, 14)
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import inference, models
from vit_jax.errors import UserError

Array = jax.Array | np.ndarray

# Maps are shown relative to this percentile of theirs: one artefact token can hold a
# thousand times the attention of an object.
PERCENTILE = 98.0


def rollout(weights: Array | Sequence[Array], *, identity: bool = True) -> jax.Array:
    """Attention rollout (Abnar and Zuidema 2020, Appendix D.8): R_l = A_l' R_(l-1).

    Args:
      weights: (L, B, k, S, S), or a sequence of (B, k, S, S), one per layer; B may be
        left out.
      identity: mix half of the residual connection into each layer, A' = A/2 + I/2 with
        A the mean over heads. The paper does not say whether it did.

    Returns:
      R_L (B, S, S): each row sums to 1 and says which input tokens an output token is
      made of.
    """
    result = None
    for layer in weights:
        a = jnp.asarray(layer, jnp.float32).mean(-3)
        if identity:
            a = (a + jnp.eye(a.shape[-1])[(None,) * (a.ndim - 2)]) / 2
        result = a if result is None else jnp.matmul(a, result, precision="highest")
    if result is None:
        raise UserError("rollout needs the attention of at least one layer")
    return result


def token_map(
    rows: Array, grid: tuple[int, int], *, class_token: bool = True
) -> jax.Array:
    """Picture of a token matrix (..., S, S): what the class token takes from each
    patch, (..., h, w).

    Where the model has none (heads that average the tokens), it is the mean over what
    the patches take. Registers and the distillation token lie between the class token
    and the patches, and are left out.
    """
    patches = math.prod(grid)
    prefix = _prefix(rows.shape[-1], grid)
    rows = jnp.asarray(rows)
    row = rows[..., 0, :] if prefix and class_token else rows[..., prefix:, :].mean(-2)
    return row[..., -patches:].reshape(*row.shape[:-1], *grid)


def bounded(maps: np.ndarray) -> np.ndarray:
    """Maps (n, h, w) in [0, 1] for the eye: each divided by its ``PERCENTILE``, and
    larger values clipped."""
    top = np.percentile(maps, PERCENTILE, axis=(1, 2), keepdims=True)
    top = np.where(top > 0, top, maps.max((1, 2), keepdims=True))
    return np.clip(maps / np.maximum(top, 1e-30), 0, 1)


def mean_distance(
    weights: Array | Sequence[Array],
    grid: tuple[int, int],
    patch: int,
    *,
    renormalize: bool = True,
) -> jax.Array:
    """Mean attention distance (Figure 7 right, Figure 11), (L, k) in pixels.

    The distance from a query patch to a key patch, weighted by attention, averaged over
    queries and images. A uniform head has 116.49 on a 14 x 14 grid of 16 pixels, an
    identity head 0.

    Args:
      weights: (L, B, k, S, S) or a sequence of (B, k, S, S); B may be left out.
      grid: patches, (h, w).
      patch: pixels from a patch to the next one.
      renormalize: without the other tokens, attention to the patches is scaled to sum
        to 1 again. The paper does not say whether it did.
    """
    return jnp.stack([_layer_distance(w, grid, patch, renormalize) for w in weights])


def patch_distances(grid: tuple[int, int], patch: int) -> np.ndarray:
    """Euclidean distance in pixels between patch centres, (N, N)."""
    at = np.indices(grid).reshape(2, -1).T.astype(np.float64)
    squares = np.square(at[:, None] - at[None]).sum(-1)
    return (patch * np.sqrt(squares)).astype(np.float32)


def of(intermediates: Any) -> list[jax.Array]:
    """The attention of each layer, (B, k, S, S), out of what
    ``mutable=["intermediates"]`` collected.

    Both layouts are understood: one subtree per layer, and one with a leading layer
    axis.
    """
    encoder = intermediates["Transformer"]
    weights = lambda block: block["MultiHeadDotProductAttention_1"]["attention"][0]
    if "encoderblock" in encoder:
        return list(weights(encoder["encoderblock"]))
    depth = sum(name.startswith("encoderblock_") for name in encoder)
    return [weights(encoder[f"encoderblock_{i}"]) for i in range(depth)]


def capture(model: Any, params: Any, images: Array) -> jax.Array:
    """Attention weights (L, B, k, S, S) float32 of a few images; B/16 takes 22 MB per
    image.

    Args:
      model: a ViT or hybrid.
      params: its parameters.
      images: (B, H, W, C), uint8 or float in [-1, 1].
    """
    model, params = unrolled(model, params)
    return _capture(model, params, jnp.asarray(images))


class Summary(NamedTuple):
    """What ``summarize`` keeps of many images."""

    distance: np.ndarray  # (L, k) pixels, mean over images
    maps: np.ndarray  # (images, h, w), rollout of the class token
    rollout: np.ndarray  # (S, S), mean over images


def summarize(
    model: Any, params: Any, images: Iterable[Array], *, batch: int = 16
) -> Summary:
    """Attention distance and rollout of any number of images.

    Everything is reduced inside one compiled function: (L, k), (S, S) and a map per
    image leave it, not attention weights. So 128 images through B/16 need no more
    memory than 16 of them.

    Args:
      model: a ViT or hybrid.
      params: its parameters.
      images: arrays (b, H, W, C), uint8 or float in [-1, 1], of any b.
      batch: images per step.
    """
    model, params = unrolled(model, params)
    distance: Any = 0.0
    mean: Any = 0.0
    maps, count = [], 0
    for chunk, used in _rebatch(images, batch):
        part = _summarize(model, params, chunk, used)
        distance, mean = distance + part[0], mean + part[1]
        maps.append(part[2])
        count += int(used.sum())
    if not count:
        raise UserError("there are no images to compute attention on")
    return Summary(
        np.asarray(distance) / count,
        np.concatenate(maps)[:count],
        np.asarray(mean) / count,
    )


def geometry(model: Any, image_size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Grid (h, w) of patches and pixels from one to the next, the ResNet of a hybrid
    included."""
    return models.token_grid(model.cfg, image_size), models.token_stride(model.cfg)


def unrolled(model: Any, params: Any) -> tuple[Any, Any]:
    """The same model with one subtree of parameters per layer.

    A scan would stack the attention of all layers before anything could be reduced.

    Raises:
      UserError: the model has no attention, or none between all patches.
    """
    if models.is_resnet(model.cfg):
        raise UserError("the checkpoint is a ResNet: it has no attention to look at")
    if model.cfg.axial:
        raise UserError(
            "the checkpoint has axial attention (config.model.axial): no layer has "
            "attention between all patches to look at"
        )
    if model.cfg.layers == "loop":
        return model, params
    encoder = dict(params["Transformer"])
    stacked = encoder.pop("encoderblock")
    for i in range(model.cfg.depth):
        encoder[f"encoderblock_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
    loop = models.create(dataclasses.replace(model.cfg, layers="loop"))
    return loop, {**params, "Transformer": encoder}


def _layer_distance(
    weights: Array, grid: tuple[int, int], patch: int, renormalize: bool
) -> jax.Array:
    """(B, k, S, S) or (k, S, S) -> (k,)."""
    prefix = _prefix(weights.shape[-1], grid)
    a = jnp.asarray(weights, jnp.float32)[..., prefix:, prefix:]
    if renormalize:
        a = a / jnp.maximum(a.sum(-1, keepdims=True), 1e-20)
    distance = jnp.einsum(
        "...qj,qj->...", a, patch_distances(grid, patch), precision="highest"
    ) / math.prod(grid)
    return distance.reshape(-1, distance.shape[-1]).mean(0)


def _prefix(tokens: int, grid: tuple[int, int]) -> int:
    """How many tokens come before those of the patches."""
    prefix = tokens - math.prod(grid)
    if prefix < 0:
        raise UserError(
            f"attention over {tokens} tokens does not fit a grid of {grid[0]} x {grid[1]} "
            "patches"
        )
    return prefix


@functools.partial(jax.jit, static_argnums=0)
def _capture(model: Any, params: Any, images: jax.Array) -> jax.Array:
    return jnp.stack(_attention(model, params, images))


@functools.partial(jax.jit, static_argnums=0)
def _summarize(
    model: Any, params: Any, images: jax.Array, used: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of distance (L, k) and rollout (S, S) over the images that are used, and
    maps (B, h, w)."""
    height, width = images.shape[1:3]
    grid, patch = geometry(model, (height, width))
    weights = _attention(model, params, images)
    each = jax.vmap(lambda *w: mean_distance(w, grid, patch))(*weights)  # (B, L, k)
    r = rollout(weights)
    weighted = lambda x: jnp.einsum("b...,b->...", x, used, precision="highest")
    class_token = models.has_class_token(model.cfg)
    maps = token_map(r, grid, class_token=class_token)
    return weighted(each), weighted(r), maps


def _attention(model: Any, params: Any, images: jax.Array) -> list[jax.Array]:
    images = inference.normalize(images)
    _, state = model.apply({"params": params}, images, mutable=["intermediates"])
    return of(state["intermediates"])


def _rebatch(
    images: Iterable[Array], batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Arrays of any length -> arrays of ``batch`` images, the last one padded, and
    which are real."""
    held: list[np.ndarray] = []
    for chunk in images:
        held.extend(np.asarray(chunk))
        while len(held) >= batch:
            yield np.stack(held[:batch]), np.ones(batch, np.float32)
            del held[:batch]
    if held:
        used = np.arange(batch) < len(held)
        padding = [np.zeros_like(held[0])] * (batch - len(held))
        yield np.stack(held + padding), used.astype(np.float32)
