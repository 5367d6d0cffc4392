# SPDX-License-Identifier: Apache-2.0
"""The two halves of a block: multi-head attention (equations 5 to 8) and the MLP.

Letters: B batch; S keys, T queries; D width; k heads; D_h = D / k; M MLP width.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.config import ModelConfig
from vit_jax.models.norms import norm
from vit_jax.models.positions import RELATIVE, RelativeBias, rotate

_XAVIER = nn.initializers.xavier_uniform()

# Equations 5 to 7 of tokens (B, S, D), in one: (tokens, kernels, biases) -> (B, S, D);
# kernels (D, k, D_h) and biases (k, D_h) of queries, keys and values.
Attend = Callable[[jax.Array, Sequence[jax.Array], Sequence[jax.Array]], jax.Array]


@jax.custom_jvp
def materialize(x: jax.Array) -> jax.Array:
    """``x``, which XLA for TPUs then computes once rather than anew for each tile read.

    Left alone it merges a projection into the product that reads it. Kept apart, an
    H/14 step compiled for v5e takes 7 % fewer cycles. Gradients, which are merged well,
    and other platforms are left alone.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, tpu=barrier, default=lambda x: x)


materialize.defjvp(lambda primals, tangents: (materialize(*primals), *tangents))


class MultiHeadAttention(nn.Module):
    """MSA(z) is ``attend(z, z)``: ``queries`` (B, T, D) ask ``tokens`` (B, S, D).

    Queries, keys and values are three projections rather than one, which compiles to
    faster code for TPUs and gives each the initialisation of a square matrix.
    ``image_size`` is read where attention is relative to positions; ``rotation`` is
    that of ``positions.rotation``.

    The plain einsums are what ``jax.nn.dot_product_attention`` is on CPUs and TPUs too
    (a block compiled for a v5e: 5.8 and 5.9 ms), so that looking at A costs nothing
    unless it is asked for, and looking does not change it.
    """

    cfg: ModelConfig
    train: bool = False
    image_size: tuple[int, int] = (0, 0)
    # Computes equations 5 to 7 where only the heads are asked for.
    attend: Attend | None = None

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        tokens: jax.Array,
        rotation: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        c = self.cfg
        head_dim = c.width // c.heads
        dense = partial(nn.DenseGeneral, dtype=c.dtype, kernel_init=_XAVIER)

        watched = self.is_mutable_collection("intermediates")
        if self.attend and not watched and not beyond_attend(c, self.train):
            return self._joined(tokens)
        q = dense((c.heads, head_dim), name="query")(queries)  # (B, T, k, D_h), eq. 5
        k = dense((c.heads, head_dim), name="key")(tokens)  # (B, S, k, D_h)
        v = dense((c.heads, head_dim), name="value")(tokens)
        if c.qk_norm:
            q, k = norm(c, "query_norm")(q), norm(c, "key_norm")(k)
        if rotation is not None:
            q, k = rotate(c, q, *rotation), rotate(c, k, *rotation)
        q, k, v = materialize(q), materialize(k), materialize(v)
        q = q / head_dim**0.5
        logits = jnp.einsum("btkd,bskd->bkts", q, k, preferred_element_type=jnp.float32)
        if c.positions in RELATIVE:
            relative = RELATIVE[c.positions]
            logits += relative(c, self.image_size, name="posembed_relative")(q)
        if c.relative_bias:
            logits += RelativeBias(c, self.image_size, name="posembed_bias")()
        weights = nn.softmax(logits)  # A, (B, k, T, S) in float32, equation 6
        self.sow("intermediates", "attention", weights)  # kept only if asked for
        weights = nn.Dropout(c.attention_dropout, deterministic=not self.train)(weights)
        heads = jnp.einsum("bkts,bskd->btkd", weights.astype(v.dtype), v)  # equation 7
        if c.attention_norm:
            heads = norm(c, "norm", axes=(-2, -1))(heads)
        return dense(c.width, axis=(-2, -1), name="out")(heads)  # (B, T, D), eq. 8

    def _joined(self, tokens: jax.Array) -> jax.Array:
        """Equations 5 to 8 by ``attend``, of the same parameters."""
        c = self.cfg
        inner = (c.heads, c.width // c.heads)
        assert self.attend
        names = ("query", "key", "value")
        found = [_Dense((c.width, *inner), inner, name=n)() for n in names]
        heads = self.attend(tokens, *zip(*found, strict=True))  # (B, S, D)
        kernel, bias = _Dense((*inner, c.width), (c.width,), name="out")()
        kernel = kernel.reshape(c.width, c.width).astype(c.dtype)
        return heads @ kernel + bias.astype(c.dtype).reshape(1, 1, -1)


class _Dense(nn.Module):
    """The parameters of a dense layer that something else multiplies with."""

    kernel: Sequence[int]
    bias: Sequence[int]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        zeros = nn.initializers.zeros
        return (
            self.param("kernel", _XAVIER, self.kernel),
            self.param("bias", zeros, self.bias),
        )


def beyond_attend(cfg: ModelConfig, train: bool) -> str:
    """The knob that asks for more than ``Attend`` computes; "" if none does."""
    asked = {
        "qk_norm": cfg.qk_norm,
        "rope": cfg.rope != "none",
        "positions": cfg.positions in RELATIVE,
        "relative_bias": cfg.relative_bias,
        "attention_norm": cfg.attention_norm,
        "axial": cfg.axial,
        "attention_dropout": train and cfg.attention_dropout > 0,
    }
    return next((f"config.model.{k}" for k, more in asked.items() if more), "")


class MlpBlock(nn.Module):
    """D -> M -> D, with a GELU between, or with a gate."""

    cfg: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c = self.cfg
        bias_init = nn.initializers.normal(1e-6)
        dense = partial(
            nn.Dense, dtype=c.dtype, kernel_init=_XAVIER, bias_init=bias_init
        )
        y = materialize(dense(c.mlp_dim, name="Dense_0")(z))
        activation = nn.silu if c.mlp == "swiglu" else GELUS[c.gelu]
        if c.mlp == "gelu":
            y = activation(y)
        else:
            y = activation(materialize(dense(c.mlp_dim, name="gate")(z))) * y
        y = nn.Dropout(c.dropout, deterministic=not self.train)(y)
        if c.mlp_norm:
            y = norm(c, "norm")(y)
        return dense(c.width, name="Dense_1")(y)


GELUS = {
    "tanh": partial(nn.gelu, approximate=True),
    "exact": partial(nn.gelu, approximate=False),
    "quick": lambda x: x * nn.sigmoid(1.702 * x),
}
