# SPDX-License-Identifier: Apache-2.0
"""A model with its parameters on the devices: images in, outputs out.

Evaluation during training, ``evaluate``, ``predict``, ``embed`` and ``analysis`` all use
:class:`Predictor`, so that an image gives the same numbers everywhere. B images, K
classes, D width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from vit_jax import data, models, sharding
from vit_jax.config import DataConfig, ModelConfig
from vit_jax.feed import Feed

Batch = dict[str, jax.Array]

# On a CPU, a forward pass that leaves the cache waits for memory: the largest activation
# of the images that go through it together is at most so many numbers.
IN_CACHE = 3 << 20


def normalize(images: jax.Array | np.ndarray) -> jax.Array:
    """uint8 pixels 0..255 -> float32 in [-1, 1]; float images are in that range already."""
    if images.dtype == jnp.uint8:
        return jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    return jnp.asarray(images)


def outputs(model: Any, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """``{"logits": (B, K), "pre_logits": (B, D)}`` of images (B, H, W, C), uint8 or in
    [-1, 1]."""
    logits, out = model.apply({"params": params}, normalize(images), method="forward")
    return {"logits": logits, "pre_logits": out["pre_logits"]}


def vectors(
    model: Any, params: Any, images: jax.Array, layer: int = 0, pooling: str = "head"
) -> jax.Array:
    """What represents images, float32 (B, D), or (B, h, w, D) for ``pooling="none"``.

    Args:
      model: the model.
      params: its parameters.
      images: as in :func:`outputs`.
      layer: after which block, from 1; 0: after the last norm.
      pooling: "head", what the head reads (of layer 0 only); "class", the class token;
        "mean", the mean of the patches; "none", each patch.
    """
    found: Any = model.apply(
        {"params": params},
        normalize(images),
        method="forward",
        mutable=["intermediates"] if layer else False,
    )
    (_, out), state = found if layer else (found, {})
    if pooling == "head":
        return out["pre_logits"].astype(jnp.float32)
    tokens = out["tokens"]
    if layer:
        encoder = state["intermediates"]["Transformer"]
        if "encoderblock" in encoder:
            tokens = encoder["encoderblock"]["tokens"][0][layer - 1]
        else:
            tokens = encoder[f"encoderblock_{layer - 1}"]["tokens"][0]
    tokens = tokens.astype(jnp.float32)
    if pooling == "class":
        return tokens[:, 0]
    grid = models.token_grid(model.cfg, (images.shape[1], images.shape[2]))
    patches = tokens[:, models.prefix_tokens(model.cfg) :]
    if pooling == "mean":
        return patches.mean(1)
    return patches.reshape(len(images), *grid, -1)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """What computes outputs, and the way of a data set to it.

    ``predictor(images)`` gives what :func:`outputs` describes. Arrays of a batch are
    global: with several processes each one holds its rows.
    """

    params: Any
    # (params, images) -> outputs; jitted
    forward: Callable[[Any, jax.Array], Any]
    mesh: Mesh
    # Called before each batch; what it raises ends the iteration.
    interrupt: Callable[[], None] = lambda: None

    def __call__(self, images: jax.Array | np.ndarray) -> Any:
        return self.forward(self.params, images)  # pyright: ignore[reportArgumentType]

    def batches(self, cfg: DataConfig, split: str, batch: int) -> Iterator[Batch]:
        """Finite batches ``image``, ``label`` and ``mask`` of a split, read ahead.

        Args:
          cfg: the data set.
          split: of it.
          batch: images at a time, rounded up to a multiple of the devices.
        """
        source = data.eval_batches(
            cfg,
            batch=-(-batch // self.mesh.size) * self.mesh.size,
            split=split,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        feed = Feed(source, sharding.batch_sharding(self.mesh))
        try:
            for found in feed:
                self.interrupt()
                yield found
        finally:
            feed.close()


def create(
    cfg: ModelConfig,
    params: Any,
    devices: Sequence[jax.Device] | None = None,
    function: Callable[..., Any] = outputs,
) -> Predictor:
    """A Predictor on all devices, or on some, each of which holds all parameters.

    ``function(model, params, images)`` is what it computes.
    """
    found = np.array(devices or jax.devices())
    mesh = Mesh(found, ("data",), axis_types=(AxisType.Auto,))
    forward = functools.partial(function, models.create(cfg))
    if found.size == 1 and found[0].platform == "cpu":
        forward = _few_at_a_time(forward, cfg)
    replicated = jax.device_put(params, sharding.replicated(mesh))
    return Predictor(replicated, jax.jit(forward), mesh)


def _few_at_a_time(forward: Callable[..., Any], cfg: ModelConfig) -> Callable[..., Any]:
    """The same function, which works through large batches in equal parts."""

    def parts(params: Any, images: jax.Array) -> Any:
        count, height, width, _ = images.shape
        limit = IN_CACHE // models.largest_activation(cfg, (height, width))
        size = max(
            n for n in range(1, count + 1) if not count % n and n <= max(limit, 1)
        )
        if size == count:
            return forward(params, images)
        stacked = images.reshape(-1, size, *images.shape[1:])
        done = jax.lax.map(lambda part: forward(params, part), stacked)
        return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), done)

    return parts
