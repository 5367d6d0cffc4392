# SPDX-License-Identifier: Apache-2.0
"""Linear probe: multinomial logistic regression on frozen features, fitted with L-BFGS.

N training examples, D features, K classes. The loss is convex and uses all examples at
once, so there is no learning rate, no seed and no order: the only knob is the strength
of the regularisation, chosen on held-out training examples.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.config import Positive, Range
from vit_jax.evaluators.context import Amounts, Context
from vit_jax.evaluators.features import Bank, bank, collect, moments, score

L2_GRID = (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def linear_probe(
    context: Context,
    *,
    data: Mapping[str, Any] | None = None,
    l2: Amounts = L2_GRID,
    iterations: Positive = 100,
    held_out: Annotated[float, Range(0, 0.5, above=True)] = 0.2,
    train_split: str = "train",
    split: str = "test",
) -> dict[str, float]:
    """``accuracy`` on the test split, the chosen ``l2`` and its ``held_out_accuracy``.

    Args:
      context: the model; its ``pre_logits`` are the features.
      data: fields of DataConfig to change.
      l2: strengths to try; the loss is the mean cross-entropy + l2/2 |W|^2 on
        standardised features.
      iterations: of L-BFGS, at most, per strength; each one starts where the one before
        ended.
      held_out: share of the training examples on which the strength is chosen, every
        1/held_out-th one; afterwards all of them are used.
      train_split: examples to fit on.
      split: examples to test on.
    """
    config = context.data(data)
    x, y = collect(context, config, train_split)
    scale = tuple(map(context.put, moments(x)))
    zeros = context.put(
        np.zeros((x.shape[1] + 1, context.describe(config).num_classes), np.float32)
    )
    kept = np.arange(len(x)) % round(1 / held_out) != 0
    examples = bank(context, x, y)
    del x, y
    fit_on = functools.partial(_fit, examples, scale, iterations=iterations)

    best, best_l2, weights = -1.0, l2[0], zeros
    if len(l2) > 1:
        for strength in sorted(l2, reverse=True):
            weights = fit_on(weights, _select(context, examples, kept, True), strength)
            rest = _select(context, examples, kept, False)
            a = float(_accuracy(examples, scale, weights, rest))
            if a > best:
                best, best_l2 = a, strength
    weights = fit_on(weights, _select(context, examples, None, True), best_l2)

    found, count = score(
        context, config, split, lambda x: {"accuracy": _classify(weights, scale, x)}
    )
    result = {
        "accuracy": float(found["accuracy"]),
        "l2": best_l2,
        "count": float(count),
    }
    return result if best < 0 else result | {"held_out_accuracy": best}


Scale = tuple[jax.Array, jax.Array]  # mean and standard deviation, (D,) each


def _scores(weights: jax.Array, scale: Scale, x: jax.Array) -> jax.Array:
    """(..., D) -> (..., K); the last row of the weights is the bias."""
    shape = (1,) * (x.ndim - 1) + (-1,)
    z = (x.astype(jnp.float32) - scale[0].reshape(shape)) / (
        scale[1].reshape(shape) + 1e-6
    )
    scores = jnp.einsum("...d,dk->...k", z, weights[:-1], precision="highest")
    return scores + weights[-1].reshape(shape)


def _select(
    context: Context, examples: Bank, kept: np.ndarray | None, value: bool
) -> jax.Array:
    """Which rows of the bank to use, shaped like ``examples.y``."""
    rows = np.zeros(examples.y.size, np.float32)
    if kept is None:
        rows[:] = 1
    else:
        rows[: len(kept)] = kept == value
    chosen = context.put(
        rows.reshape(examples.y.shape), None, context.predictor.mesh.axis_names
    )
    return _used(chosen, examples.y)


@jax.jit
def _used(chosen: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(y >= 0, chosen, 0.0)


@functools.partial(jax.jit, static_argnames="iterations")
def _fit(
    examples: Bank,
    scale: Scale,
    start: jax.Array,
    used: jax.Array,
    l2: jax.Array | float,
    *,
    iterations: int,
) -> jax.Array:
    """Weights (D + 1, K) at the minimum."""
    total = used.sum()

    # Without the checkpoint the gradient would keep the scores of all chunks, N x K.
    @jax.checkpoint
    def chunk_loss(weights: jax.Array, chunk: Any) -> jax.Array:
        (x, y), w = chunk
        losses = optax.softmax_cross_entropy_with_integer_labels(
            _scores(weights, scale, x), jnp.maximum(y, 0)
        )
        return (w * losses).sum()

    def loss(weights: jax.Array) -> jax.Array:
        def add(sum_, chunk):
            return sum_ + chunk_loss(weights, chunk), None

        summed, _ = jax.lax.scan(add, jnp.zeros(()), (examples, used))
        return summed / total + l2 / 2 * jnp.square(weights[:-1]).sum()

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        weights, state, i, _ = carry
        found: Any = value_and_grad(weights, state=state)
        value, grad = found
        updates, state = optimizer.update(
            grad, state, weights, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(weights, updates), state, i + 1, jnp.abs(grad).max()

    def unfinished(carry: Any) -> jax.Array:
        return (carry[2] < iterations) & (carry[3] > 1e-6)

    carry = (start, optimizer.init(start), 0, jnp.asarray(jnp.inf))
    return jax.lax.while_loop(unfinished, step, carry)[0]


@jax.jit
def _accuracy(
    examples: Bank, scale: Scale, weights: jax.Array, used: jax.Array
) -> jax.Array:
    def add(sum_, chunk):
        (x, y), w = chunk
        hit = _scores(weights, scale, x).argmax(-1) == y
        return sum_ + (w * hit).sum(), None

    return jax.lax.scan(add, jnp.zeros(()), (examples, used))[0] / used.sum()


@jax.jit
def _classify(weights: jax.Array, scale: Scale, x: jax.Array) -> jax.Array:
    return _scores(weights, scale, x).argmax(1)
