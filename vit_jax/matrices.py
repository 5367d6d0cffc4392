# SPDX-License-Identifier: Apache-2.0
"""What sees kernels as matrices: Muon, whose updates of them are nearly orthogonal, and
LoRA, whose updates are of low rank.

These are the kernels of the blocks, of attention pooling and of the residual units.
Queries, keys and values (D, k, D_h) are one D x D matrix each, as they are initialised,
not one per head: so Muon's authors and the public recipes have it, and its step size
then does not depend on the number of heads. What reads pixels and what makes logits,
vectors and tables are no such matrices. Layers of a stack are one matrix each.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

# Paths of kernels, and over how many of their last axes inputs and outputs extend.
_WITHIN = r".*(encoderblock(_\d+)?|MAPHead_0)/(.*/)?"
KERNELS = (
    (_WITHIN + r"(query|key|value)/kernel", 1, 2),  # (D, k, D_h)
    (_WITHIN + r"out/kernel", 2, 1),  # (k, D_h, D)
    (_WITHIN + r"(Dense_0|Dense_1|gate)/kernel", 1, 1),  # (D, M), (M, D)
    (r".*unit\d+/conv\w+/kernel", 3, 1),  # (rows, columns, channels, channels)
)
# LoRA's constant: with the division by the rank, the learning rate that is best hardly
# depends on the rank (2106.09685, section 4.1).
ALPHA = 16.0


def path_name(path: Any) -> str:
    """``Transformer/encoderblock_0/...``: of a parameter, or of the factors in its place."""
    keys = (k for k in path if isinstance(k, jax.tree_util.DictKey))
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def axes(name: str) -> tuple[int, int] | None:
    """Over how many of its last axes the inputs and the outputs of a kernel extend; None
    of a parameter that is no matrix."""
    found = (k[1:] for k in KERNELS if re.fullmatch(k[0], name))
    return next(found, None)


def matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(..., inputs, outputs) of a kernel of :func:`axes`."""
    inputs, outputs = axes(name) or (1, 1)
    first, last = len(shape) - inputs - outputs, len(shape) - outputs
    return (*shape[:first], math.prod(shape[first:last]), math.prod(shape[last:]))


def muon(
    others: optax.GradientTransformation, momentum_dtype: Any
) -> optax.GradientTransformation:
    """Muon (kellerjordan.github.io/posts/muon) for matrices, ``others`` for the rest.

    Momentum 0.95 with Nesterov's step, then five Newton-Schulz iterations: every
    singular value of the update comes near 1. Times 0.2 sqrt(max(inputs, outputs)),
    which is about as large as an update of Adam, so that learning rate and weight decay
    mean the same for both (2502.16982).
    """

    def numbers(params: Any) -> Any:
        def number(path: Any, _: Any) -> MuonDimensionNumbers:
            inputs, outputs = axes(path_name(path)) or (1, 1)
            return MuonDimensionNumbers(
                tuple(range(-inputs - outputs, -outputs)), tuple(range(-outputs, 0))
            )

        return jax.tree_util.tree_map_with_path(number, params)

    def rescale(updates: Any) -> Any:
        def one(path: Any, u: jax.Array) -> jax.Array:
            return 0.2 * max(matrix_shape(path_name(path), u.shape)[-2:]) ** 0.5 * u

        return jax.tree_util.tree_map_with_path(one, updates)

    def labels(params: Any) -> Any:
        def label(path: Any, _: Any) -> str:
            return "muon" if axes(path_name(path)) else "others"

        return jax.tree_util.tree_map_with_path(label, params)

    orthogonal = scale_by_muon(
        mu_dtype=momentum_dtype, weight_dimension_numbers=numbers
    )
    matrices = optax.chain(orthogonal, optax.stateless(lambda u, _: rescale(u)))
    return optax.partition({"muon": matrices, "others": others}, labels)


class Factors(NamedTuple):
    """Of a kernel (..., inputs, outputs) that moves by ALPHA / r times a b."""

    a: jax.Array  # (..., inputs, r)
    b: jax.Array  # (..., r, outputs)


class LoraState(NamedTuple):
    """Factors where the parameters have matrices, and the state of what updates them."""

    factors: Any
    inner: Any


def lora(
    inner: optax.GradientTransformationExtraArgs, rank: int, seed: int
) -> optax.GradientTransformationExtraArgs:
    """LoRA (2106.09685): ``inner`` updates two factors in place of every matrix.

    The factors live here and not in the model: the gradient of W + s a b with respect to
    a and b follows from that to W, and W moves by what the product moves. So parameters
    are always merged ones, and all that reads them needs to know nothing of LoRA. A step
    costs what it costs without; what is saved is the state of the optimizer. a starts at
    random and b at 0, so that nothing moves at first.
    """
    scale = ALPHA / rank
    matmul = jax.tree_util.Partial(jnp.matmul, precision="highest")

    def over(f: Any, factors: Any, *trees: Any) -> Any:
        """f(factors, ...) of every parameter; factors are () of what is no matrix."""
        is_leaf = lambda x: isinstance(x, tuple)
        return jax.tree.map(f, factors, *trees, is_leaf=is_leaf)

    def zeros(path: Any, p: jax.Array) -> Any:
        name = path_name(path)
        if not axes(name):
            return ()
        *stack, inputs, outputs = matrix_shape(name, p.shape)
        a, b = (*stack, inputs, rank), (*stack, rank, outputs)
        return Factors(jnp.zeros(a, p.dtype), jnp.zeros(b, p.dtype))

    def init(params: Any) -> LoraState:
        factors = jax.tree_util.tree_map_with_path(zeros, params)
        random = optax.tree.random_like(jax.random.key(seed), factors)
        start = lambda f, r: f and f._replace(a=r.a / f.a.shape[-2] ** 0.5)
        factors = over(start, factors, random)
        return LoraState(factors, inner.init(over(_or, factors, params)))

    def gradient(f: Any, g: Any) -> Any:
        if not f:
            return g
        g = scale * g.reshape(*f.a.shape[:-1], f.b.shape[-1])
        return Factors(matmul(g, f.b.mT), matmul(f.a.mT, g))

    def moved(f: Any, u: Any, g: Any) -> Any:
        """What the kernel of gradient g moves by, where its factors move by u."""
        if not f:
            return u
        product = matmul(u.a, f.b + u.b) + matmul(f.a, u.b)
        return scale * product.reshape(g.shape)

    def update(updates, state, params=None, **extra):
        grads, factors = updates, state.factors
        updates, inner_state = inner.update(
            over(gradient, factors, grads),
            state.inner,
            over(_or, factors, params),
            **extra,
        )
        change = over(moved, factors, updates, grads)
        factors = over(lambda f, u: f and optax.apply_updates(f, u), factors, updates)
        return change, LoraState(factors, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _or(factors: Any, other: Any) -> Any:
    return factors or other
