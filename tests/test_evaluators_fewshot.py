# SPDX-License-Identifier: Apache-2.0
"""The closed-form few-shot classifier against its definition, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_context import context

from vit_jax.errors import UserError
from vit_jax.evaluators import EVALUATORS, fewshot

D, K = 12, 4


def data(n, seed, spread=1.5):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(K, D))
    y = rng.permutation(np.arange(n) % K)
    return centres[y] + spread * rng.normal(size=(n, D)), y


def reference(x, y, test, l2, classes=K):
    """Section 6.1 as written: whiten, append 100, W = (X^T X + l2 I)^-1 X^T Y, in
    float64."""
    mean, std = x.mean(0), x.std(0) + 1e-5
    append = lambda x: np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=100)
    a = append(x)
    targets = 2 * np.eye(classes)[y] - 1
    w = np.linalg.solve(a.T @ a + l2 * np.eye(a.shape[1]), a.T @ targets)
    return append(test) @ w


@pytest.mark.parametrize("form", ["primal", "dual", "auto"])
@pytest.mark.parametrize("n", [8, 60], ids=["wide", "tall"])
@pytest.mark.parametrize("l2", [2.0**-6, 2.0**10])
def test_both_forms_equal_the_definition(form, n, l2):
    x, y = data(n, 0)
    test, _ = data(30, 1)
    with jax.enable_x64(True):
        ridge = fewshot.fit(jnp.asarray(x), jnp.asarray(y), num_classes=K, form=form)
        got = fewshot.predict(ridge, jnp.asarray(test), l2)
        np.testing.assert_allclose(
            got, reference(x, y, test, l2), rtol=1e-9, atol=1e-10
        )


@pytest.mark.parametrize("n", [8, 60], ids=["wide", "tall"])
def test_float32_forms_agree_to_1e_6(n):
    x, y = data(n, 0)
    test, _ = data(30, 1)
    scores = {}
    for form in ("primal", "dual"):
        ridge = fewshot.fit(
            jnp.asarray(x, jnp.float32), jnp.asarray(y), num_classes=K, form=form
        )
        scores[form] = fewshot.predict(
            ridge, jnp.asarray(test, jnp.float32), fewshot.L2
        )
        expected = reference(x, y, test, fewshot.L2)
        np.testing.assert_allclose(scores[form], expected, atol=1e-6)
    np.testing.assert_allclose(scores["primal"], scores["dual"], atol=1e-6)


def test_adding_a_constant_or_permuting_changes_nothing():
    x, y = data(40, 0)
    test, _ = data(30, 1)

    def scores(x, y, test):
        with jax.enable_x64(True):
            ridge = fewshot.fit(jnp.asarray(x), jnp.asarray(y), num_classes=K)
            return np.asarray(fewshot.predict(ridge, jnp.asarray(test), 1.0))

    plain = scores(x, y, test)
    np.testing.assert_allclose(scores(x + 3.7, y, test + 3.7), plain, atol=1e-10)
    order = np.random.default_rng(2).permutation(40)
    np.testing.assert_allclose(scores(x[order], y[order], test), plain, atol=1e-10)


def run(train, test, **options):
    fake = context({"train": train, "test": test}, np.zeros((D, K)))
    return EVALUATORS["fewshot"].measure(fake, **options)


@pytest.mark.parametrize("order", ["shuffled", "first"])
def test_the_evaluator_equals_numpy(order):
    (x, y), (test, labels) = data(120, 0), data(37, 1)
    got = run((x, y), (test, labels), shots=(1, 5), order=order, l2=8.0)
    for n in (1, 5):
        accuracies = []
        for seed in range(3) if order == "shuffled" else (None,):
            rng = np.random.default_rng(seed)
            chosen = []
            for c in range(K):
                indices = np.flatnonzero(y == c)
                chosen.append(
                    (indices if seed is None else rng.permutation(indices))[:n]
                )
            i = np.concatenate(chosen)
            right = reference(x[i], y[i], test, 8.0).argmax(1) == labels
            accuracies.append(right.mean())
        assert got[f"{n}shot"] == pytest.approx(np.mean(accuracies), abs=1e-12)
        assert got[f"{n}shot_std"] == pytest.approx(np.std(accuracies), abs=1e-12)
        seeds = [got[f"{n}shot_seed{s}"] for s in range(len(accuracies))]
        np.testing.assert_allclose(seeds, accuracies)


def test_separable_features_reach_100_percent():
    train, test = data(120, 0, spread=0.05), data(37, 1, spread=0.05)
    got = run(train, test)
    assert [got[f"{n}shot"] for n in (1, 5, 10, 25)] == [1.0] * 4


def test_shots_are_nested():
    labels = np.random.default_rng(0).permutation(np.arange(200) % K)
    big = fewshot.choose_examples(labels, K, 25, seed=1)
    small = fewshot.choose_examples(labels, K, 5, seed=1)
    np.testing.assert_array_equal(big[:, :5], small)
    assert (labels[big] == np.arange(K)[:, None]).all()
    first = fewshot.choose_examples(labels, K, 3, seed=None)
    np.testing.assert_array_equal(first[2], np.flatnonzero(labels == 2)[:3])


@pytest.mark.heavy
def test_chosen_l2_has_the_best_mean_rank():
    a = np.array([[0.1, 0.5, 0.5], [0.9, 0.8, 0.7]])  # (shots, l2) of one data set
    b = np.array([[0.1, 0.2, 0.9], [0.3, 0.2, 0.1]])
    np.testing.assert_array_equal(fewshot._best([a, b]), [2, 0])
    ties = np.array([[0.5, 0.5, 0.1]])
    np.testing.assert_array_equal(fewshot._best([ties, ties[:, ::-1]]), [1])
    got = run(data(120, 0), data(37, 1), shots=(2,), choose_l2=True)
    assert got["2shot_l2"] in fewshot.L2_GRID
    best = max(
        run(data(120, 0), data(37, 1), shots=(2,), l2=l2)["2shot"]
        for l2 in fewshot.L2_GRID[::3]
    )
    assert got["2shot"] >= best


def test_several_data_sets(monkeypatch):
    info = context({"train": data(8, 0)}, np.zeros((D, K))).info
    monkeypatch.setattr("vit_jax.data.describe", lambda cfg: info)
    splits = {
        ("easy", "train"): data(40, 0, 0.05), ("easy", "test"): data(37, 1, 0.05),
        ("hard", "train"): data(40, 0, 9.0), ("hard", "test"): data(37, 1, 9.0),
    }  # fmt: skip
    sets = {"a": {"name": "easy"}, "b": {"name": "hard", "train_split": "train[:40]"}}
    got = EVALUATORS["fewshot"].measure(
        context(splits, np.zeros((D, K))), datasets=sets, shots=(5,), choose_l2=True
    )
    assert got["a/5shot"] == 1.0 > got["b/5shot"]
    assert got["average/5shot"] == pytest.approx((1 + got["b/5shot"]) / 2)
    assert {"a/5shot_seed2", "b/5shot_std", "5shot_l2"} <= set(got)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": (25,)}, "class 0 of .* has 10 training examples, fewer than 25 shots"),
        ({"datasets": ("cifar10O",)}, "unknown fewshot data set 'cifar10O': did you mean 'cifar100'"),
    ],
)  # fmt: skip
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        run(data(40, 0), data(37, 1), **options)
