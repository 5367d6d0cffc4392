# SPDX-License-Identifier: Apache-2.0
"""Position embeddings: E_pos of equation 1, the alternatives of Appendix D.4, and what
other families do to queries, keys and logits instead.

Letters: h, w rows and columns of patches; S tokens, h w and those before them; B batch;
D width; k heads of size D_h.
"""

import math

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import prefix_tokens, token_grid, token_stride

_INIT = nn.initializers.normal(0.02)


class PositionEmbedding(nn.Module):
    """E_pos, (1, S, D) in float32, for (height, width) images; patches in raster order.

    Raises:
      UserError: the table was made for images of another size.
    """

    cfg: ModelConfig
    image_size: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        table = POSITIONS[self.cfg.positions](self)
        if not self.cfg.registers:
            return table
        zeros = jnp.zeros((1, self.cfg.registers, self.cfg.width))
        before, patches = jnp.split(table, [_rows_before_patches(self.cfg)], axis=1)
        return jnp.concatenate([before, zeros, patches], axis=1)


class RelativePosition(nn.Module):
    """Relative attention: a logit q_i r_(i-j) for every query i and key j.

    One r of size D_h per offset i - j from -(S - 1) to S - 1, shared by the heads of a
    layer. The class token is position 0 of the raster order.
    """

    cfg: ModelConfig
    image_size: tuple[int, int]

    @nn.compact
    def __call__(self, q: jax.Array) -> jax.Array:
        """Scaled queries (B, S, k, D_h) -> logits (B, k, S, S) in float32."""
        _, s, _, head_dim = q.shape
        table = _param(self, "pos_embedding", (2 * s - 1, head_dim))
        i, j = np.indices((s, s))
        r = table[i - j + s - 1].astype(q.dtype)  # (S, S, D_h)
        return jnp.einsum("bikd,ijd->bkij", q, r, preferred_element_type=jnp.float32)


class RelativeBias(nn.Module):
    """BEiT's relative attention: a logit per head and 2-D offset (2106.08254).

    The table ends with the logits of the class token to patches, of patches to it, and
    of it to itself.
    """

    cfg: ModelConfig
    image_size: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        """Logits (1, k, S, S) in float32."""
        h, w = token_grid(self.cfg, self.image_size)
        offsets = (2 * h - 1) * (2 * w - 1)
        table = _param(self, "pos_embedding", (offsets + 3, self.cfg.heads))
        row, column = np.indices((h, w)).reshape(2, h * w)
        rows = row[:, None] - row + h - 1
        columns = column[:, None] - column + w - 1
        index = np.empty((1 + h * w, 1 + h * w), np.int32)
        index[1:, 1:] = rows * (2 * w - 1) + columns
        index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
        return table[index].transpose(2, 0, 1)[None]


def learned(module: PositionEmbedding) -> jax.Array:
    """A vector per token; nothing says which patches are neighbours."""
    cfg = module.cfg
    patches = math.prod(token_grid(cfg, module.image_size))
    shape = (1, _rows_before_patches(cfg) + patches, cfg.width)
    return _param(module, "pos_embedding", shape)


def learned2d(module: PositionEmbedding) -> jax.Array:
    """[X_j; Y_i] for the patch in row i and column j; a vector for the class token."""
    cfg, d = module.cfg, module.cfg.width // 2
    h, w = token_grid(cfg, module.image_size)
    x = jnp.broadcast_to(_param(module, "pos_embedding_x", (1, w, d)), (h, w, d))
    y = jnp.broadcast_to(_param(module, "pos_embedding_y", (h, 1, d)), (h, w, d))
    table = jnp.concatenate([x, y], axis=-1).reshape(1, h * w, 2 * d)
    rows = _rows_before_patches(cfg)
    if not rows:
        return table
    cls = _param(module, "pos_embedding_cls", (1, rows, 2 * d))
    return jnp.concatenate([cls, table], axis=1)


def sincos2d(module: PositionEmbedding) -> jax.Array:
    """Fixed waves of D / 4 frequencies, as in "Better plain ViT baselines", 2205.01580.

    The class token has no position.
    """
    h, w = token_grid(module.cfg, module.image_size)
    d = module.cfg.width // 4
    omega = 10_000.0 ** (-np.arange(d) / max(d - 1, 1))
    y, x = np.indices((h, w)).reshape(2, h * w, 1) * omega.reshape(1, 1, d)
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=-1)
    zeros = np.zeros((_rows_before_patches(module.cfg), 4 * d))
    return jnp.asarray(np.concatenate([zeros, table])[None], jnp.float32)


# A position kind is added to the tokens or, in RELATIVE, to the logits of attention;
# "none" is nothing at all.
POSITIONS = {"learned": learned, "learned2d": learned2d, "sincos2d": sincos2d}
RELATIVE = {"relative": RelativePosition}


def rotation(
    cfg: ModelConfig, image_size: tuple[int, int]
) -> tuple[jax.Array, jax.Array] | None:
    """Cosines and sines of ``model.rope``, each (1, S, 1, D_h / 2) in float32, or None.

    A patch is turned by its row times D_h / 4 frequencies theta^(-4 i / D_h), and by
    its column times the same ones. Tokens without a position are turned by nothing.
    """
    if cfg.rope == "none":
        return None
    grid = token_grid(cfg, image_size)
    row, column = (
        _coordinates(cfg, count, reference)
        for count, reference in zip(grid, cfg.rope_grid, strict=True)
    )
    row, column = np.meshgrid(row, column, indexing="ij")
    axes = (column, row) if cfg.rope == "pe" else (row, column)
    head_dim = cfg.width // cfg.heads
    theta = cfg.rope_theta or (100.0 if cfg.rope == "dinov3" else 10_000.0)
    frequencies = theta ** (-4 * np.arange(head_dim // 4) / head_dim)
    angles = np.concatenate([a.reshape(-1, 1) * frequencies for a in axes], axis=-1)
    angles = np.pad(angles, ((prefix_tokens(cfg), 0), (0, 0)))[None, :, None]
    return jnp.float32(np.cos(angles)), jnp.float32(np.sin(angles))


def rotate(cfg: ModelConfig, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Queries or keys (B, S, k, D_h), whose pairs of entries are turned by the angles.

    "dinov3" pairs the two halves of D_h, the others entries next to each other.
    """
    halves, pairs = cfg.rope == "dinov3", x.shape[-1] // 2
    shape = (*x.shape[:-1], *((2, pairs) if halves else (pairs, 2)))
    axis = -2 if halves else -1
    a, b = jnp.moveaxis(x.reshape(shape).astype(jnp.float32), axis, 0)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis)
    return turned.reshape(x.shape).astype(x.dtype)


def _coordinates(cfg: ModelConfig, count: int, reference: int) -> np.ndarray:
    """Where ``model.rope`` sees the ``count`` rows or columns of the patches."""
    i = np.arange(count)
    if cfg.rope == "dinov3":  # centres of the patches from -1 to 1, as angles
        return 2 * np.pi * (2 * (i + 0.5) / count - 1)
    return (i + cfg.rope_offset) * (reference or count) / count


def _rows_before_patches(cfg: ModelConfig) -> int:
    """Tokens before the patches that have a position: all but the registers."""
    return prefix_tokens(cfg) - cfg.registers


_Table = PositionEmbedding | RelativePosition | RelativeBias


def _param(module: _Table, name: str, shape: tuple[int, ...]) -> jax.Array:
    """A learned table; one of another size is a UserError that speaks of images."""
    cfg, size = module.cfg, module.image_size
    made_for, sized = cfg.image_size, cfg.image_size != (0, 0)
    if not sized or token_grid(cfg, made_for) == token_grid(cfg, size):
        try:
            return module.param(name, _INIT, shape)
        except flax.errors.ScopeParamShapeError:
            made_for = _image_size_of(module)
    raise UserError(
        f"images of {size[0]}x{size[1]} pixels do not fit position embeddings made for "
        f"{made_for[0]}x{made_for[1]}: resize them with vit_jax.load(source, "
        f"image_size={size}), or create the model with image_size={size}"
    )


def _image_size_of(module: _Table) -> tuple[int | str, int | str]:
    """The (height, width) that the tables are for, "?" where they cannot tell."""
    cfg, stride = module.cfg, token_stride(module.cfg)
    length = {k: max(v.shape[:-1]) for k, v in module.variables["params"].items()}
    if "pos_embedding_x" in length:
        return (
            length["pos_embedding_y"] * stride,
            length["pos_embedding_x"] * stride,
        )
    tokens = length["pos_embedding"]
    if isinstance(module, RelativeBias):
        side = (math.sqrt(tokens - 3) + 1) / 2
    elif isinstance(module, RelativePosition):
        side = math.sqrt((tokens + 1) // 2 - prefix_tokens(cfg))
    else:
        side = math.sqrt(tokens - _rows_before_patches(cfg))
    pixels = int(side) * stride if side.is_integer() else "?"
    return pixels, pixels
