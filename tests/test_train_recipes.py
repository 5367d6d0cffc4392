# SPDX-License-Identifier: Apache-2.0
"""What the recipes rely on in the real program: accumulation, averaging, losses."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from vit_jax import objectives
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig, replace
from vit_jax.data import DataInfo
from vit_jax.errors import UserError
from vit_jax.program import build

pytestmark = pytest.mark.heavy

K, B, SIZE = 10, 64, 16
CFG = Config(
    model=ModelConfig(
        name="", width=16, depth=1, mlp_dim=32, heads=2, patch=4, num_classes=K
    ),
    data=DataConfig(source="synthetic", image_size=SIZE, num_classes=K),
    optim=OptimConfig(
        name="sgd", schedule="constant", learning_rate=0.1, weight_decay=0.01
    ),
    steps=100,
    batch=B,
)


def batch(seed=0, labels=None):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (B, SIZE, SIZE, 3), np.uint8)
    if labels is None:
        labels = rng.integers(0, K, B).astype(np.int32)
    return {"image": images, "label": labels}


def place(program, data):
    return jax.device_put(data, program.batch_sharding)


def steps(cfg, count=1, devices=8, data=None):
    """The program, and state and metrics after ``count`` steps on different batches."""
    program = build(cfg, jax.devices()[:devices])
    state, seen = program.init(), []
    for i in range(count):
        state, metrics = program.train_step(state, place(program, data or batch(i)))
        seen.append({k: float(v) for k, v in metrics.items()})
    return program, state, seen


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


# Accumulation


@pytest.fixture(scope="module")
def at_once():
    _, state, metrics = steps(replace(CFG, mixup=0.5), count=2)
    return state.params, metrics


def test_accumulation_equals_the_large_batch(at_once):
    """On 8 devices, mixup included: the same up to the order of float32 sums."""
    params, metrics = at_once
    _, state, seen = steps(replace(CFG, mixup=0.5, accumulate=4), count=2)
    close(state.params, params, rtol=1e-5, atol=1e-6)
    for a, b in zip(seen, metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.fixture
def drawn(monkeypatch):
    """In place of a loss, the number ``u`` that its key draws, and its square."""

    def draw(model, cfg):
        def loss_fn(params, batch, key):
            u = jax.random.uniform(key)
            zero = sum(p.sum() for p in jax.tree.leaves(params)) * 0.0
            return zero, {"u": u, "squared": u**2}

        return loss_fn

    softmax = dataclasses.replace(objectives.OBJECTIVES["softmax"], create=draw)
    monkeypatch.setitem(objectives.OBJECTIVES, "softmax", softmax)


def test_the_first_step_has_another_key_than_the_initialisation(drawn):
    _, _, (first,) = steps(CFG, devices=1)
    key = jax.random.fold_in(jax.random.key(CFG.seed), 0)
    assert first["u"] != jax.random.uniform(jax.random.fold_in(key, 1))


def test_every_micro_batch_has_its_own_key(drawn):
    _, _, seen = steps(replace(CFG, accumulate=8), count=2, devices=1)
    for m in seen:  # the variance of equal draws would be 0
        assert m["squared"] - m["u"] ** 2 > 1e-3
    assert seen[0]["u"] != seen[1]["u"]


def test_accumulation_saves_memory():
    def temporary(n):
        cfg = replace(CFG, accumulate=n)
        p = build(cfg, jax.devices()[:1])
        lowered = jax.jit(p.train_step).lower(p.state_shape, p.batch_shape)
        analysis = lowered.compile().memory_analysis()
        assert analysis
        return analysis.temp_size_in_bytes

    assert temporary(8) < temporary(1) / 2


# Polyak averaging, freezing, skipping


@pytest.fixture(scope="module")
def special():
    """One program with everything that needs a look at the state."""
    optim = OptimConfig(
        schedule="constant", learning_rate=0.01, polyak=0.75, freeze=("embedding/.*",)
    )
    return build(replace(CFG, optim=optim, max_bad_steps=3), jax.devices()[:1])


def host(tree):
    return jax.tree.map(np.array, tree)


def test_polyak_average_starts_at_the_parameters_and_follows_them(special):
    state = special.init()
    average = host(state.params)
    close(state.ema, average, rtol=0)
    for i in range(3):
        state, _ = special.train_step(state, place(special, batch(i)))
        average = jax.tree.map(
            lambda a, p: 0.75 * a + 0.25 * p, average, host(state.params)
        )
    close(state.ema, average, rtol=1e-5, atol=1e-7)


def test_frozen_parameters_stay_and_carry_no_optimizer_state(special):
    state = special.init()
    before = host(state.params)
    paths = [
        jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(state.opt_state)
    ]
    assert not [p for p in paths if "embedding']" in p and "pos_" not in p]
    assert [p for p in paths if "pos_embedding" in p]
    state, _ = special.train_step(state, place(special, batch()))
    close(state.params["embedding"], before["embedding"], rtol=0)
    head = np.abs(np.array(state.params["head"]["kernel"])).max()
    assert head > 0


def test_a_step_that_is_not_finite_changes_nothing_but_the_step(special):
    state, _ = special.train_step(special.init(), place(special, batch()))
    before = host(state)
    bad = {**batch(), "image": np.full((B, SIZE, SIZE, 3), np.nan, np.float32)}
    program = special.train_step
    state, metrics = program(state, place(special, bad))
    assert float(metrics["skipped"]) == 1
    assert int(state.step) == 2
    for part in ("params", "opt_state", "ema"):
        close(getattr(state, part), getattr(before, part), rtol=0)
    state, metrics = program(state, place(special, batch()))
    assert float(metrics["skipped"]) == 0
    assert any(
        (np.array(a) != b).any()
        for a, b in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True
        )
    )


def test_a_step_whose_update_is_not_finite_is_skipped(special):
    """Loss and gradient are; the optimizer state is what overflows."""
    state, _ = special.train_step(special.init(), place(special, batch()))
    opt_state = jax.tree.map(
        lambda x: x * np.float32(np.inf) if x.dtype == np.float32 else x,
        state.opt_state,
    )
    before = host(state.params)
    state = jax.device_put(state._replace(opt_state=opt_state), special.state_sharding)
    state, metrics = special.train_step(state, place(special, batch(1)))
    assert np.isfinite(metrics["loss"] + metrics["grad_norm"])
    assert float(metrics["skipped"]) == 1
    close(state.params, before, rtol=0)


def test_the_rate_that_is_logged_is_the_one_that_was_applied():
    """After a skipped step as well. The same gradient again and again: dropout is off,
    and the head alone moves, so little that its gradient stays."""
    optim = OptimConfig(
        name="sgd", b1=0.0, schedule="linear", learning_rate=1e-6, freeze=("backbone",)
    )
    program = build(replace(CFG, optim=optim, steps=4), jax.devices()[:1])
    bad = {**batch(), "image": np.full((B, SIZE, SIZE, 3), np.nan, np.float32)}
    state, moved, logged = program.init(), [], []
    for data in (batch(), bad, batch(), batch()):
        before = host(state.params["head"]["bias"])
        state, metrics = program.train_step(state, place(program, data))
        moved.append(np.abs(host(state.params["head"]["bias"]) - before).max())
        logged.append(float(metrics["learning_rate"]))
    assert logged == pytest.approx([1e-6, 0.75e-6, 0.5e-6, 0.25e-6])
    assert moved == pytest.approx(moved[0] * np.array([1, 0, 0.5, 0.25]), rel=1e-3)


def test_what_is_frozen_costs_no_backward_pass_and_has_no_part_in_the_norm():
    def step_of(freeze):
        cfg = replace(CFG, model__depth=2, optim__freeze=freeze)
        program = build(cfg, jax.devices()[:1])
        lowered = program.train_step.lower(program.state_shape, program.batch_shape)
        cost = lowered.cost_analysis()
        _, metrics = program.train_step(program.init(), place(program, batch()))
        return cost["flops"], float(metrics["grad_norm"]), program

    (full, norm, program), (frozen, head_norm, _) = step_of(()), step_of(("backbone",))
    assert frozen < 0.4 * full
    state, labels = program.init(), np.asarray(batch()["label"])
    out = program.forward(state.params, batch()["image"])
    # The gradient of the cross-entropy with respect to a zero head.
    error = (np.full((B, K), 1 / K) - np.eye(K)[labels]) / B
    kernel = np.asarray(out["pre_logits"]).T @ error
    expected = np.sqrt((kernel**2).sum() + (error.sum(0) ** 2).sum())
    assert head_norm == pytest.approx(expected, rel=1e-5)
    assert head_norm <= norm


def test_lora_changes_plain_parameters_and_keeps_those_of_no_matrix():
    """Also their average; nothing but the optimizer knows of factors."""
    optim = dataclasses.replace(CFG.optim, name="adam", lora=2, polyak=0.5)
    program, state, _ = steps(replace(CFG, optim=optim), count=3, devices=1)
    start = program.init()
    for old, new in ((start.params, state.params), (start.ema, state.ema)):
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), old, new)
        for path, c in jax.tree_util.tree_leaves_with_path(changed):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            block = "encoderblock" in name and name.endswith("kernel")
            assert c == (block or name.startswith("head/")), name


# First-step losses with the real head


def test_first_loss_is_ln_k_and_the_first_rate_is_that_of_step_zero():
    cfg = replace(CFG, optim__warmup=10, model__dropout=0.1)
    _, _, (first, second) = steps(cfg, count=2, devices=1)
    assert first["loss"] == pytest.approx(math.log(K), rel=1e-6)
    assert first["learning_rate"] == 0
    # Rate 0: nothing was learned yet.
    assert second["loss"] == pytest.approx(math.log(K), rel=1e-6)
    assert second["learning_rate"] == pytest.approx(0.01)


def test_first_sigmoid_loss_has_the_closed_form():
    cfg = replace(CFG, loss="sigmoid", model__head_bias=-6.9, model__num_classes=1000)
    _, _, (first,) = steps(cfg, devices=1)
    expected = 999 * math.log1p(math.exp(-6.9)) + math.log1p(math.exp(6.9))
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["loss"] == pytest.approx(7.91, abs=5e-3)


# Masked patch prediction learns


def test_masked_patch_prediction_learns_far_below_the_entropy_of_the_colors():
    """Images of one of 8 colours: a chosen patch follows from those that are left."""
    cfg = replace(
        CFG,
        loss="masked_patch",
        model__head="masked_patch",
        optim=OptimConfig(schedule="constant", learning_rate=3e-3, clip=1.0),
    )
    program = build(cfg, jax.devices()[:1])
    rng = np.random.default_rng(0)
    state, losses = program.init(), []
    for _ in range(120):
        color = rng.integers(0, 2, (B, 1, 1, 3)).astype(np.uint8) * 255
        images = np.broadcast_to(color, (B, SIZE, SIZE, 3))
        data = {"image": images, "label": np.zeros(B, np.int32)}
        state, metrics = program.train_step(state, place(program, data))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(math.log(512), rel=0.01)
    assert losses[-1] < 0.2 * math.log(8)


# Bad input


def test_multi_hot_labels_with_a_softmax_recipe_are_refused():
    info = DataInfo(K, tuple("abcdefghij"), 100, 100, multilabel=True)
    with pytest.raises(UserError, match="multi-hot"):
        build(CFG, jax.devices()[:1], info)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accumulate": 7}, "accumulate"),
        ({"accumulate": 16}, "accumulate"),  # 4 images for 8 devices
        ({"optim__freeze": ("encoder/.*",)}, "optim.freeze"),
        ({"optim__warmup": 100}, "config.optim.warmup=100"),
    ],
)
def test_what_cannot_work_is_refused_when_the_program_is_built(change, words):
    with pytest.raises(UserError, match=words):
        build(replace(CFG, **change))
