# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer: equations 1 to 4 in order; 5 to 8 are in attention.py.

Letters: B batch; H, W, C image height, width, channels; P patch side; N patches;
S tokens, N and the class token if there is one; D width; L depth; K classes.

Parameters have the names and shapes of the released files, hence _1, _2 and _3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.models import heads, masked, resnet
from vit_jax.models.attention import MlpBlock, MultiHeadAttention
from vit_jax.models.positions import POSITIONS, PositionEmbedding
from vit_jax.models.variants import check_images, has_class_token


class ViT(nn.Module):
    """Images (B, H, W, C) in [-1, 1] -> logits (B, K) in float32."""

    cfg: ModelConfig
    # Applied to the parameters of each block where it runs: see vit_jax/sharding.py.
    on_block_params: Callable[[Any], Any] | None = None

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        corruption: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Logits of ``forward``, which has the arguments explained."""
        return self.forward(images, train=train, corruption=corruption)[0]

    @nn.compact
    def forward(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        corruption: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits, and {"tokens": (B, S, D) encoded, "pre_logits": (B, D) head input}.

        ``mutable=["intermediates"]`` also returns each block's ``tokens`` (B, S, D) and
        ``attention`` (B, k, S, S).

        Args:
          images: (B, H, W, C) in [-1, 1].
          train: dropout and stochastic depth, which need the random key "dropout".
          corruption: arguments "kind" and "source" of ``masked.corrupt``.

        Raises:
          UserError: the images do not fit the model or its position embeddings.
        """
        c = self.cfg
        check_images(c, images.shape)
        x = resnet.features(c, images) if c.resnet_width else images
        patch = (c.patch, c.patch)
        embed = nn.Conv(
            c.width, patch, patch, padding="VALID", dtype=c.dtype, name="embedding"
        )
        x = embed(x).reshape(len(x), -1, c.width)  # x_p E, (B, N, D)

        if c.head == "masked_patch":
            token = self.param("mask_token", nn.initializers.zeros, (1, 1, c.width))
            if corruption is not None:
                x = masked.corrupt(x, **corruption, mask_token=token)
        if has_class_token(c):
            cls = self.param("cls", nn.initializers.zeros, (1, 1, c.width))
            cls = jnp.broadcast_to(cls.astype(x.dtype), (len(x), 1, c.width))
            x = jnp.concatenate([cls, x], axis=1)  # (B, S, D)

        height, width = images.shape[1:3]
        encoder = Encoder(
            c, (height, width), train, self.on_block_params, name="Transformer"
        )
        z = encoder(x)
        logits, y = heads.read(c, z)
        return logits, {"tokens": z, "pre_logits": y}


class Encoder(nn.Module):
    """Positions, L blocks and the last LayerNorm: (B, S, D) -> (B, S, D)."""

    cfg: ModelConfig
    image_size: tuple[int, int]
    train: bool
    on_block_params: Callable[[Any], Any] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.cfg
        args = (c, self.image_size, self.train)
        shared = None
        if c.positions in POSITIONS and c.position_at != "every":
            shared = PositionEmbedding(c, self.image_size, name="posembed_input")()
        if shared is not None and c.position_at == "stem":
            # Without the cast a float32 table would make the whole stream float32.
            x, shared = x + shared.astype(x.dtype), None
        z = nn.Dropout(c.dropout, deterministic=not self.train)(x)  # z_0, equation 1

        Block = _with_remat(c, _with_params(EncoderBlock, self.on_block_params))
        rates = c.stochastic_depth * jnp.linspace(0, 1, c.depth)
        if c.layers == "scan":
            Blocks = nn.scan(
                Block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=c.depth,
            )
            z, _ = Blocks(*args, name="encoderblock")(z, rates, shared)
        else:
            for i in range(c.depth):
                z, _ = Block(*args, name=f"encoderblock_{i}")(z, rates[i], shared)
        norm = nn.LayerNorm(c.layer_norm_eps, dtype=c.dtype, name="encoder_norm")
        return norm(z)  # equation 4, of every token


class EncoderBlock(nn.Module):
    """z' = MSA(LN(z)) + z and z = MLP(LN(z')) + z', equations 2 and 3."""

    cfg: ModelConfig
    image_size: tuple[int, int]
    train: bool

    @nn.compact
    def __call__(
        self, z: jax.Array, rate: jax.Array, shared: jax.Array | None
    ) -> tuple[jax.Array, None]:
        """One block.

        Args:
          z: (B, S, D).
          rate: of stochastic depth in this block.
          shared: position embeddings that every block adds, (1, S, D).
        """
        c = self.cfg
        norm = partial(nn.LayerNorm, epsilon=c.layer_norm_eps, dtype=c.dtype)
        relative = self.image_size if c.positions == "relative" else None
        attend = MultiHeadAttention(
            c, self.train, relative, name="MultiHeadDotProductAttention_1"
        )
        mlp = MlpBlock(c, self.train, name="MlpBlock_3")

        if c.position_at == "every":
            shared = PositionEmbedding(c, self.image_size, name="posembed_input")()
        if shared is not None:
            z = z + shared.astype(z.dtype)
        y = norm(name="LayerNorm_0")(z)
        z = self._drop(attend(y, y), rate) + z  # equation 2
        y = norm(name="LayerNorm_2")(z)
        z = self._drop(mlp(y), rate) + z  # equation 3
        chex.assert_type(z, c.dtype)
        self.sow("intermediates", "tokens", z)  # kept only if asked for
        return z, None  # a pair, because nn.scan wants one

    def _drop(self, y: jax.Array, rate: jax.Array) -> jax.Array:
        """Dropout, and stochastic depth: no y at all for some of the images."""
        y = nn.Dropout(self.cfg.dropout, deterministic=not self.train)(y)
        if not (self.train and self.cfg.stochastic_depth):
            return y
        return stochastic_depth(y, rate, self.make_rng("dropout"))


def stochastic_depth(y: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """y (B, S, D) of some images, scaled to keep the expectation, and 0 of the others."""
    keep = jax.random.bernoulli(key, 1 - rate, (len(y), 1, 1))
    return y * (keep / (1 - rate)).astype(y.dtype)


def _with_params(
    Block: type[nn.Module], change: Callable[[Any], Any] | None
) -> type[nn.Module]:
    """The block, which reads ``change(parameters)``; does not initialise them."""
    return nn.map_variables(Block, "params", change) if change else Block


def _with_remat(cfg: ModelConfig, Block: type[nn.Module]) -> type[nn.Module]:
    """The block, whose backward pass recomputes activations if so configured."""
    if cfg.remat == "none":
        return Block
    # "dots" keeps what dense layers computed, but not the S x S logits of attention.
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policy = dots if cfg.remat == "dots" else None
    # A scan already keeps XLA from merging the recomputation with the forward pass.
    return nn.remat(Block, policy=policy, prevent_cse=cfg.layers != "scan")
