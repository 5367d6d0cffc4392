# SPDX-License-Identifier: Apache-2.0
"""Few-shot linear evaluation (section 4.1): regularised least squares on frozen
features, solved exactly.

n examples, d features, K classes, r = min(n, d) eigenvectors. The recipe is that of
big_vision's ``fewshot_lsr``: whiten with the training features, append the constant
100, targets in {-1, 1}, W = (X^T X + l2 I)^-1 X^T Y.

Whitened features have mean 0, so the constant column is orthogonal to all others and
its weight is known in closed form. Solving the rest alone gives the same W, and spares
float32 a Gram matrix whose entries differ by 10^8.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import Above0, DataConfig, Positive, choose
from vit_jax.errors import UserError
from vit_jax.evaluators.context import Context, Counts, name_of
from vit_jax.evaluators.features import collect, score

CONSTANT = 100.0  # the appended feature: a bias that is nearly free of regularisation
EPS = 1e-5
L2 = 2.0**10
L2_GRID = tuple(2.0**i for i in range(-10, 20))  # of the older variant

DATASETS: dict[str, dict[str, Any]] = {
    "caltech101": {"name": "caltech101"},
    "cars": {"name": "cars196"},
    "cifar100": {"name": "cifar100"},
    "dtd": {"name": "dtd"},
    "pets": {"name": "oxford_iiit_pet"},
    "uc_merced": {
        "name": "uc_merced",
        "train_split": "train[:1000]",
        "test_split": "train[1000:]",
    },
    # The first 65,000 images hold at least 30 of every class.
    "imagenet": {
        "name": "imagenet2012",
        "train_split": "train[:65000]",
        "test_split": "validation",
    },
}


def fewshot(
    context: Context,
    *,
    datasets: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    data: Mapping[str, Any] | None = None,
    shots: Counts = (1, 5, 10, 25),
    seeds: Positive = 3,
    order: Literal["shuffled", "first"] = "shuffled",
    l2: Above0 = L2,
    choose_l2: bool = False,
) -> dict[str, float]:
    """Accuracy of a linear classifier on n examples per class: ``5shot``,
    ``5shot_std``, ``5shot_seed0``, ...

    Args:
      context: the model; its ``pre_logits`` are the features.
      datasets: keys of ``DATASETS``, or names with their fields of DataConfig; (): the
        run's own data. With several, names become ``cifar100/5shot`` and
        ``average/5shot``.
      data: fields of DataConfig to change for the run's own data.
      shots: examples per class; the sets are nested.
      seeds: how many draws of examples; mean and standard deviation are over them.
      order: "first" takes the first examples of each class instead, as the older code
        did.
      l2: the regularisation.
      choose_l2: as the older code did, tries ``L2_GRID`` and takes for each number of
        shots the value that ranks best on average over the data sets. It is chosen on
        the test sets: compare only with the like.

    Raises:
      UserError: a class has fewer examples than shots, several labels per image,
        unknown names.
    """
    grid = L2_GRID if choose_l2 else (l2,)
    accuracies = {
        name: _one(context, config, shots, seeds if order == "shuffled" else 0, grid)
        for name, config in _configs(context, datasets, data).items()
    }  # each (seeds, shots, l2)
    best = _best([a.mean(0) for a in accuracies.values()])  # (shots,)
    result: dict[str, float] = {}
    at = np.arange(len(shots))
    for name, a in accuracies.items():
        start = f"{name}/" if datasets else ""
        for n, per_seed in zip(shots, a[:, at, best].T, strict=True):
            result[f"{start}{n}shot"] = float(per_seed.mean())
            result[f"{start}{n}shot_std"] = float(per_seed.std())
            for s, value in enumerate(per_seed):
                result[f"{start}{n}shot_seed{s}"] = float(value)
    for i, n in enumerate(shots):
        if len(accuracies) > 1:
            mean = np.mean([a[:, i, best[i]].mean() for a in accuracies.values()])
            result[f"average/{n}shot"] = float(mean)
        if choose_l2:
            result[f"{n}shot_l2"] = grid[best[i]]
    return result


class Ridge(NamedTuple):
    """All solutions W(l2) at once: W = left diag(1 / (eigenvalues + l2)) right."""

    mean: jax.Array  # (d,)
    left: jax.Array  # (d, r), the division by the standard deviation included
    eigenvalues: jax.Array  # (r,)
    right: jax.Array  # (r, K)
    target_sums: jax.Array  # (K,), sum of the targets over the examples
    n: jax.Array  # (), examples


@functools.partial(jax.jit, static_argnames=("num_classes", "form"))
def fit(
    x: jax.Array,
    y: jax.Array,
    *,
    num_classes: int,
    form: Literal["auto", "primal", "dual"] = "auto",
) -> Ridge:
    """Diagonalises the Gram matrix of the examples, after which every l2 is cheap.

    Args:
      x: features (n, d).
      y: labels (n,) int32.
      num_classes: K.
      form: "primal" diagonalises d x d, "dual" n x n; "auto" takes the smaller, as they
        agree.
    """
    n, d = x.shape
    mean = x.mean(0)
    x = x - mean[None]
    std = jnp.sqrt(jnp.square(x).mean(0)) + EPS
    x = x / std[None]
    with jax.default_matmul_precision("highest"):
        if form == "primal" or (form == "auto" and n > d):
            eigenvalues, v = jnp.linalg.eigh(x.T @ x)
            # X^T Y of targets 2 onehot - 1, without the (n, K) matrix Y.
            xy = 2 * jax.ops.segment_sum(x, y, num_classes).T - x.sum(0)[:, None]
            left, right = v / std[:, None], v.T @ xy
        else:
            eigenvalues, u = jnp.linalg.eigh(x @ x.T)
            left = (x.T @ u) / std[:, None]
            right = u.T @ (2 * jax.nn.one_hot(y, num_classes, dtype=x.dtype) - 1)
    counts = jax.ops.segment_sum(jnp.ones_like(y, x.dtype), y, num_classes)
    sums = 2 * counts - n
    # Rounding makes eigenvalues of 0 slightly negative.
    eigenvalues = jnp.maximum(eigenvalues, 0)
    return Ridge(mean, left, eigenvalues, right, sums, jnp.asarray(n, x.dtype))


def predict(ridge: Ridge, x: jax.Array, l2: jax.Array | float) -> jax.Array:
    """Scores (b, K) of features (b, d)."""
    with jax.default_matmul_precision("highest"):
        h = (x - ridge.mean[None]) @ ridge.left
        scores = (h / (ridge.eigenvalues + l2)[None]) @ ridge.right
    square = CONSTANT**2
    return scores + (square * ridge.target_sums / (square * ridge.n + l2))[None]


def choose_examples(
    labels: np.ndarray,
    num_classes: int,
    shots: int,
    seed: int | None,
    name: str = "data",
) -> np.ndarray:
    """Indices (K, shots) of the examples of each class, at random or (seed None) the
    first ones.

    Raises:
      UserError: a class has too few.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    chosen = []
    # One sort finds every class; comparing with each class would take K passes.
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], np.arange(num_classes + 1))
    for c in range(num_classes):
        indices = by_class[starts[c] : starts[c + 1]]
        if len(indices) < shots:
            raise UserError(
                f"class {c} of {name!r} has {len(indices)} training examples, "
                f"fewer than {shots} shots: choose smaller shots"
            )
        chosen.append((indices if rng is None else rng.permutation(indices))[:shots])
    return np.stack(chosen)


def _configs(
    context: Context,
    datasets: Sequence[str] | Mapping[str, Mapping[str, Any]],
    data: Mapping[str, Any] | None,
) -> dict[str, DataConfig]:
    if not datasets:
        return {"": context.data(data)}
    if not isinstance(datasets, Mapping):
        datasets = {n: choose("fewshot data set", n, DATASETS) for n in datasets}
    size = context.cfg.data.image_size
    # Both sets are resized to a square and cropped: 256 and 224 in the paper.
    transforms = (
        {"op": "resize", "size": round(size * 256 / 224)},
        {"op": "central_crop", "size": size},
    )
    own = {"eval_transforms": transforms}
    return {name: context.other_data(own | dict(d)) for name, d in datasets.items()}


def _one(
    context: Context,
    data: DataConfig,
    shots: Sequence[int],
    seeds: int,
    grid: Sequence[float],
) -> np.ndarray:
    """Accuracy (seeds, shots, l2) on one data set; seeds 0: one draw of the first
    examples."""
    classes = context.describe(data).num_classes
    x, y = collect(context, data, "train")
    draws = [
        choose_examples(y, classes, max(shots), s, name_of(data))
        for s in (range(seeds) if seeds else (None,))
    ]

    ridges = {}
    for n in shots:
        rows = [draw[:, :n].ravel() for draw in draws]
        fits = [
            fit(context.put(x[r]), context.put(y[r]), num_classes=classes) for r in rows
        ]
        ridges[f"{n}"] = jax.tree.map(lambda *a: jnp.stack(a), *fits)
    del x
    l2s = context.put(np.asarray(grid, np.float32))
    found, _ = score(context, data, "test", lambda x: _classify(ridges, x, l2s))
    return np.stack([found[f"{n}"] for n in shots], 1)


@jax.jit
def _classify(
    ridges: Mapping[str, Ridge], x: jax.Array, l2s: jax.Array
) -> dict[str, jax.Array]:
    """Classes (seeds, l2, B) of features (B, D), by the number of shots."""

    # One after the other: all of them at once would be seeds x l2 x batch x K scores.
    def of_seeds(ridges: Ridge) -> jax.Array:
        return jax.lax.map(
            lambda ridge: jax.lax.map(lambda l2: predict(ridge, x, l2).argmax(1), l2s),
            ridges,
        )

    return {n: of_seeds(r) for n, r in ridges.items()}


def _best(accuracies: Sequence[np.ndarray]) -> np.ndarray:
    """Index of the best l2 per number of shots: the highest mean rank over data sets.

    Args:
      accuracies: one (shots, l2) per data set.
    """
    ranks = np.zeros_like(accuracies[0])
    for a in accuracies:
        # Ties share their mean rank: the number below plus half of the equal ones.
        below = (a[:, :, None] > a[:, None, :]).sum(-1)
        equal = (a[:, :, None] == a[:, None, :]).sum(-1)
        ranks += below + equal / 2
    return ranks.argmax(-1)
