# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer: equations 1 to 4 in order; 5 to 8 are in attention.py.

Letters: B batch; H, W, C image height, width, channels; P patch side; N patches;
S tokens, N and those before them; D width; L depth; K classes.

Parameters have the names and shapes of the released files, hence _1, _2 and _3.
"""

from collections.abc import Callable
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.models import heads, masked, resnet
from vit_jax.models.attention import Attend, MlpBlock, MultiHeadAttention
from vit_jax.models.images import standardize
from vit_jax.models.norms import norm
from vit_jax.models.positions import POSITIONS, PositionEmbedding, rotation
from vit_jax.models.variants import has_class_token, has_stem, token_grid


class ViT(nn.Module):
    """Images (B, H, W, C) in [-1, 1] -> logits (B, K) in float32."""

    cfg: ModelConfig
    # Applied to the parameters of each block where it runs: see vit_jax/sharding.py.
    on_block_params: Callable[[Any], Any] | None = None
    # What computes attention in the blocks: see vit_jax/kernels.py.
    attend: Attend | None = None

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        corruption: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Only the logits; see ``forward``."""
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
        x = standardize(c, images)
        if has_stem(c):
            x = resnet.features(c, x)
        patch = (c.patch, c.patch)
        embed = nn.Conv(
            c.width, patch, patch, padding="VALID", dtype=c.dtype, name="embedding"
        )
        x = jax.lax.collapse(embed(x), 1, 3)  # x_p E, (B, N, D)
        if c.patch_norm:
            x = norm(c, "embedding_norm")(x)

        if c.head == "masked_patch":
            token = self.param("mask_token", nn.initializers.zeros, (1, 1, c.width))
            if corruption is not None:
                x = masked.corrupt(x, **corruption, mask_token=token)
        x = jnp.concatenate([*self._prefix(x), x], axis=1)  # (B, S, D)

        height, width = images.shape[1:3]
        encoder = Encoder(
            c,
            (height, width),
            train,
            self.on_block_params,
            self.attend,
            name="Transformer",
        )
        z = encoder(x)
        logits, y = heads.read(c, z)
        return logits, {"tokens": z, "pre_logits": y}

    def _prefix(self, x: jax.Array) -> list[jax.Array]:
        """The learned tokens that come before the patches x, each (B, n, D)."""
        c = self.cfg
        # Registers have no positions: equal ones would stay equal.
        zeros, normal = nn.initializers.zeros, nn.initializers.normal(0.02)
        tokens = []
        for name, count, init in (
            ("cls", int(has_class_token(c)), zeros),
            ("dist", int(c.distillation != "none"), normal),
            ("registers", c.registers, normal),
        ):
            if count:
                token = self.param(name, init, (1, count, c.width)).astype(x.dtype)
                tokens.append(jnp.broadcast_to(token, (x.shape[0], count, c.width)))
        return tokens


class Encoder(nn.Module):
    """Positions, L blocks and the last LayerNorm: (B, S, D) -> (B, S, D)."""

    cfg: ModelConfig
    image_size: tuple[int, int]
    train: bool
    on_block_params: Callable[[Any], Any] | None = None
    attend: Attend | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.cfg
        args = (c, self.image_size, self.train, self.attend)
        shared = None
        if c.positions in POSITIONS and c.position_at != "every":
            shared = PositionEmbedding(c, self.image_size, name="posembed_input")()
        if shared is not None and c.position_at == "stem":
            # Without the cast a float32 table would make the whole stream float32.
            x, shared = x + shared.astype(x.dtype), None
        z = nn.Dropout(c.dropout, deterministic=not self.train)(x)  # z_0, equation 1
        if c.norm_pre:
            z = norm(c, "norm_pre")(z)
        turn = rotation(c, self.image_size)

        Block = AxialBlock if c.axial else EncoderBlock
        Block = _with_remat(c, _with_params(Block, self.on_block_params))
        rates = c.stochastic_depth * jnp.linspace(0, 1, c.depth)
        if c.layers == "scan":
            Blocks = nn.scan(
                Block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=c.depth,
            )
            z, _ = Blocks(*args, name="encoderblock")(z, rates, shared, turn)
        else:
            for i in range(c.depth):
                z, _ = Block(*args, name=f"encoderblock_{i}")(z, rates[i], shared, turn)
        if c.final_norm == "tokens":
            z = norm(c, "encoder_norm")(z)  # equation 4, of every token
        return z


class EncoderBlock(nn.Module):
    """z' = MSA(LN(z)) + z and z = MLP(LN(z')) + z', equations 2 and 3."""

    cfg: ModelConfig
    image_size: tuple[int, int]
    train: bool
    attend: Attend | None = None
    # Along what patches attend; "": to all tokens.
    along: Literal["", "rows", "columns"] = ""

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        rate: jax.Array,
        shared: jax.Array | None,
        turn: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, None]:
        """One block.

        Args:
          z: (B, S, D).
          rate: of stochastic depth in this block.
          shared: position embeddings that every block adds, (1, S, D).
          turn: the ``positions.rotation`` of queries and keys.
        """
        c = self.cfg
        name = "MultiHeadDotProductAttention_1"
        attend = MultiHeadAttention(
            c, self.train, self.image_size, self.attend, name=name
        )
        if self.along:
            attend = _along(self.along, token_grid(c, self.image_size), attend)
        mlp = MlpBlock(c, self.train, name="MlpBlock_3")

        if c.position_at == "every":
            shared = PositionEmbedding(c, self.image_size, name="posembed_input")()
        if shared is not None:
            z = z + shared.astype(z.dtype)
        y = norm(c, "LayerNorm_0")(z)
        if c.parallel:
            z = self._drop(attend(y, y, turn) + mlp(y), rate) + z
        else:
            z = self._drop(attend(y, y, turn), rate) + z  # equation 2
            y = norm(c, "LayerNorm_2")(z)
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


class AxialBlock(nn.Module):
    """Two blocks in place of one: in the first the patches of a row attend to each
    other, in the second those of a column (Section D.6, 1912.12180)."""

    cfg: ModelConfig
    image_size: tuple[int, int]
    train: bool
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        rate: jax.Array,
        shared: jax.Array | None,
        turn: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, None]:
        """Like that of :class:`EncoderBlock`."""
        args = (self.cfg, self.image_size, self.train, self.attend)
        z, _ = EncoderBlock(*args, along="rows", name="rows")(z, rate, shared, turn)
        columns = EncoderBlock(*args, along="columns", name="columns")
        z, _ = columns(z, rate, shared, turn)
        self.sow("intermediates", "tokens", z)
        return z, None


def _along(
    lines: Literal["rows", "columns"],
    grid: tuple[int, int],
    attend: Callable[..., jax.Array],
) -> Callable[..., jax.Array]:
    """``attend`` of each line of patches by itself: lines are images to it."""

    def turned(z: jax.Array) -> jax.Array:
        return z.swapaxes(1, 2) if lines == "columns" else z

    def attend_along(y: jax.Array, _: jax.Array, turn: Any) -> jax.Array:
        # How many images there are may be a symbol, which ``len`` cannot give.
        y = turned(y.reshape(y.shape[0], *grid, y.shape[-1]))
        z = jax.lax.collapse(y, 0, 2)
        z = turned(attend(z, z, turn).reshape(y.shape))
        return jax.lax.collapse(z, 1, 3)

    return attend_along


def stochastic_depth(y: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """y (B, S, D) of some images, scaled to keep the expectation, and 0 of the others."""
    keep = jax.random.bernoulli(key, 1 - rate, (y.shape[0], 1, 1))
    return y * (keep / (1 - rate)).astype(y.dtype)


def _with_params(
    Block: type[nn.Module], change: Callable[[Any], Any] | None
) -> type[nn.Module]:
    """The block reading ``change(params)``. Do not use it to initialise."""
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
