# SPDX-License-Identifier: Apache-2.0
"""Position embeddings: E_pos of equation 1 and the alternatives of Appendix D.4.

Letters: h, w rows and columns of patches; S tokens, h w and the class token if there
is one; D width; D_h width of a head.
"""

import math

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.variants import has_class_token, token_grid, token_stride

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
        return POSITIONS[self.cfg.positions](self)


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


def learned(module: PositionEmbedding) -> jax.Array:
    """A vector per token; nothing says which patches are neighbours."""
    cfg = module.cfg
    tokens = math.prod(token_grid(cfg, module.image_size)) + has_class_token(cfg)
    return _param(module, "pos_embedding", (1, tokens, cfg.width))


def learned2d(module: PositionEmbedding) -> jax.Array:
    """[X_j; Y_i] for the patch in row i and column j; a vector for the class token."""
    cfg, d = module.cfg, module.cfg.width // 2
    h, w = token_grid(cfg, module.image_size)
    x = jnp.broadcast_to(_param(module, "pos_embedding_x", (1, w, d)), (h, w, d))
    y = jnp.broadcast_to(_param(module, "pos_embedding_y", (h, 1, d)), (h, w, d))
    table = jnp.concatenate([x, y], axis=-1).reshape(1, h * w, 2 * d)
    if not has_class_token(cfg):
        return table
    cls = _param(module, "pos_embedding_cls", (1, 1, 2 * d))
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
    if has_class_token(module.cfg):
        table = np.concatenate([np.zeros((1, 4 * d)), table])
    return jnp.asarray(table[None], jnp.float32)


# "relative" is not here, because attention adds it; "none" is nothing at all.
POSITIONS = {"learned": learned, "learned2d": learned2d, "sincos2d": sincos2d}


def _param(
    module: PositionEmbedding | RelativePosition, name: str, shape: tuple[int, ...]
) -> jax.Array:
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


def _image_size_of(
    module: PositionEmbedding | RelativePosition,
) -> tuple[int | str, int | str]:
    """The (height, width) that the tables are for, "?" where they cannot tell."""
    cfg, stride = module.cfg, token_stride(module.cfg)
    length = {k: max(v.shape[:-1]) for k, v in module.variables["params"].items()}
    if cfg.positions == "learned2d":
        return (
            length["pos_embedding_y"] * stride,
            length["pos_embedding_x"] * stride,
        )
    tokens = length["pos_embedding"]
    if cfg.positions == "relative":
        tokens = (tokens + 1) // 2
    side = math.sqrt(tokens - has_class_token(cfg))
    pixels = int(side) * stride if side.is_integer() else "?"
    return pixels, pixels
