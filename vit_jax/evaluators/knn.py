# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours on frozen features: what the representation knows without any
training.

B batch, N training examples, D features, K classes, k neighbours. Similarity is the
cosine; neighbours vote with weight exp(similarity / temperature), as in DINO
(arXiv 2104.14294).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.config import Above0
from vit_jax.errors import UserError
from vit_jax.evaluators.context import Context, Counts, name_of
from vit_jax.evaluators.features import Bank, bank, collect, score


def knn(
    context: Context,
    *,
    data: Mapping[str, Any] | None = None,
    k: Counts = (10, 20),
    temperature: Above0 = 0.07,
    train_split: str = "train",
    split: str = "test",
) -> dict[str, float]:
    """``accuracy_k10``, ``accuracy_k20``: test examples classified by their nearest
    training examples.

    The training features are divided over the devices; test features are streamed.

    Raises:
      UserError: more neighbours than training examples, several labels per image.
    """
    config = context.data(data)
    x, y = collect(context, config, train_split)
    if max(k) > len(x):
        raise UserError(
            f"knn k is {tuple(k)}: choose at most the {len(x)} training examples of "
            f"{name_of(config)!r}"
        )
    neighbours = bank(context, x, y)
    del x, y
    vote = functools.partial(
        _vote,
        k=tuple(k),
        temperature=temperature,
        classes=context.describe(config).num_classes,
        mesh=context.predictor.mesh,
    )
    found, count = score(context, config, split, lambda x: vote(neighbours, x))
    return {n: float(v) for n, v in found.items()} | {"count": float(count)}


@functools.partial(jax.jit, static_argnames=("k", "temperature", "classes", "mesh"))
def _vote(
    neighbours: Bank,
    x: jax.Array,
    *,
    k: tuple[int, ...],
    temperature: float,
    classes: int,
    mesh: Mesh,
) -> dict[str, jax.Array]:
    """The class (B,) of each of the features (B, D), for each number of neighbours."""
    # Every device compares the whole batch with its own neighbours: moving the batch is
    # cheap, moving the neighbours is not.
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
    similarity, labels = nearest_neighbours(neighbours, x, max(k))
    weights = jnp.exp((similarity - similarity[:, :1]) / temperature)  # (B, k)
    rows = jnp.arange(len(x))[:, None]
    result = {}
    for n in k:
        votes = jnp.zeros((len(x), classes))
        votes = votes.at[rows, labels[:, :n]].add(weights[:, :n])
        result[f"accuracy_k{n}"] = votes.argmax(1)
    return result


def nearest_neighbours(
    neighbours: Bank, x: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """Cosine similarity (B, k) and labels (B, k) of the k nearest rows, nearest first."""
    x = _unit(x)

    def merge(best: Any, chunk: Bank) -> tuple[Any, None]:
        similarity = jnp.einsum("bd,smd->bsm", x, _unit(chunk.x), precision="highest")
        similarity = jnp.where(chunk.y[None] < 0, -jnp.inf, similarity)
        # The best of each device first, so that only they travel.
        top, at = jax.lax.top_k(similarity, min(k, similarity.shape[-1]))  # (B, S, k)
        label = chunk.y[jnp.arange(len(chunk.y))[None, :, None], at]
        top = jnp.concatenate([best[0], top.reshape(len(x), -1)], 1)
        label = jnp.concatenate([best[1], label.reshape(len(x), -1)], 1)
        top, at = jax.lax.top_k(top, k)
        return (top, jnp.take_along_axis(label, at, 1)), None

    none = jnp.full((len(x), k), -jnp.inf), jnp.zeros((len(x), k), jnp.int32)
    return jax.lax.scan(merge, none, neighbours)[0]


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-12)
