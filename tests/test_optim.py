# SPDX-License-Identifier: Apache-2.0
"""Update rules and schedules against numbers worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import optim
from vit_jax.config import OptimConfig
from vit_jax.errors import UserError

PARAMS = {
    "Transformer": {
        "encoderblock_0": {
            "Dense_0": {"kernel": jnp.ones((48, 40)), "bias": jnp.ones(40)},
            "LayerNorm_0": {"scale": jnp.ones(48)},
        }
    },
    "head": {"kernel": jnp.ones((40, 32)), "bias": jnp.ones(32)},
}
PLAIN = OptimConfig(
    name="sgd", schedule="constant", learning_rate=0.1, b1=0.0, momentum_dtype="float32"
)


def run(cfg, params, grads, steps=10):
    """Parameters after each of ``grads``, and the last optimizer state."""
    tx, _ = optim.create(cfg, steps, jax.eval_shape(lambda: params))
    state = tx.init(params)

    @jax.jit
    def update(g, state, params, step):
        updates, state = tx.update(g, state, params, step=step)
        return optax.apply_updates(params, updates), state

    history = []
    for step, g in enumerate(grads):
        params, state = update(g, state, params, step)
        history.append(params)
    return history, state


def full(value):
    return jax.tree.map(lambda p: jnp.full_like(p, value), PARAMS)


def leaves(tree):
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): v
        for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }


# Schedules


def lr(cfg, steps, t):
    return float(optim.create_schedule(cfg, steps)(t))


@pytest.mark.parametrize(
    ("t", "expected"), [(0, 0.0), (250, 0.015), (500, 0.03), (5250, 0.015), (10_000, 0)]
)
def test_cosine_has_the_official_check_values(t, expected):
    cfg = OptimConfig(schedule="cosine", learning_rate=0.03, warmup=500)
    assert lr(cfg, 10_000, t) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("t", "expected"),
    [(0, 0.0), (5000, 5e-4), (10_000, 1e-3), (55_000, 5.05e-4), (100_000, 1e-5)],
)
def test_linear_decays_to_its_end_after_the_warmup(t, expected):
    cfg = OptimConfig(
        schedule="linear", learning_rate=1e-3, end_learning_rate=1e-5, warmup=10_000
    )
    assert lr(cfg, 100_000, t) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rsqrt", "constant"])
def test_a_run_without_an_end_in_sight_has_a_rate(schedule):
    """Beyond what an int32 holds."""
    cfg = OptimConfig(schedule=schedule, learning_rate=1.0, timescale=2**40)
    assert lr(cfg, 2**40, 10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (5, 0.5),
        (10, 1),
        (20, 0.5**0.5),
        (40, 0.5),
        (80, 8**-0.5),
        (90, 1 / 6),
        (100, 0),
    ],
)
def test_rsqrt_halves_in_three_timescales_and_cools_down(t, expected):
    cfg = OptimConfig(
        schedule="rsqrt", learning_rate=1.0, warmup=10, timescale=10, cooldown=20
    )
    assert lr(cfg, 100, t) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_constant_schedule_warms_up_and_stays():
    cfg = OptimConfig(schedule="constant", learning_rate=2.0, warmup=4)
    assert [lr(cfg, 9, t) for t in (0, 1, 4, 9)] == [0.0, 0.5, 2.0, 2.0]


def test_a_warmup_below_one_is_a_share_of_the_run():
    cfg = OptimConfig(schedule="constant", learning_rate=1.0, warmup=0.1)
    schedule = optim.create(cfg, 50, {"kernel": 0})[1]
    assert [float(schedule(t)) for t in (0, 2, 5, 49)] == pytest.approx([0, 0.4, 1, 1])


def test_without_warmup_the_first_step_has_the_base_rate():
    assert lr(OptimConfig(schedule="cosine", learning_rate=0.5), 7, 0) == 0.5


# Update rules


def test_adam_with_decoupled_decay_by_hand():
    # Step 1: update = sign(g) = 1.  Step 2, g = -0.5: m = 0.045 - 0.05 = -0.005,
    # m / (1 - 0.81) = -0.0263158, v / (1 - 0.998001) = 0.25, update = -0.0526316.
    cfg = OptimConfig(schedule="constant", learning_rate=0.1, weight_decay=0.1)
    (first, second), _ = run(cfg, PARAMS, [full(0.5), full(-0.5)])
    first, second = first["head"], second["head"]
    np.testing.assert_allclose(first["kernel"], 1 - 0.1 * (1 + 0.1), rtol=1e-6)
    np.testing.assert_allclose(
        second["kernel"], 0.89 - 0.1 * (-0.0526316 + 0.089), rtol=1e-6
    )
    # Only kernels decay.
    np.testing.assert_allclose(first["bias"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(second["bias"], 0.9 + 0.00526316, rtol=1e-6)


def test_sgd_momentum_with_clipping_by_hand():
    # The global norm of (3, 4) is 5: clipped to (0.6, 0.8).
    cfg = dataclasses.replace(PLAIN, b1=0.9, clip=1.0)
    params = {"a": {"kernel": jnp.zeros(())}, "b": {"kernel": jnp.zeros(())}}
    grads = {"a": {"kernel": jnp.float32(3)}, "b": {"kernel": jnp.float32(4)}}
    (first, second), _ = run(cfg, params, [grads, grads])
    assert float(first["a"]["kernel"]) == pytest.approx(-0.06, rel=1e-6)
    assert float(first["b"]["kernel"]) == pytest.approx(-0.08, rel=1e-6)
    assert float(second["a"]["kernel"]) == pytest.approx(-0.06 - 0.114, rel=1e-6)


def test_clipping_leaves_small_gradients_alone():
    (params,), _ = run(
        dataclasses.replace(PLAIN, clip=1.0),
        {"kernel": jnp.zeros(2)},
        [{"kernel": jnp.array([0.3, 0.4])}],
    )
    np.testing.assert_allclose(params["kernel"], [-0.03, -0.04], rtol=1e-6)


def test_sgd_keeps_its_accumulator_in_bfloat16():
    cfg = dataclasses.replace(PLAIN, b1=0.9, momentum_dtype="bfloat16")
    params = {"kernel": jnp.zeros(())}
    (_, second), state = run(cfg, params, [{"kernel": jnp.float32(0.6)}] * 2)
    # 8 bits of mantissa: 0.6 is stored as 0.6015625. -(0.06 + 0.114) to that precision.
    assert float(second["kernel"]) == pytest.approx(-0.174, rel=2**-8)
    dtypes = {v.dtype.name for k, v in leaves(state).items() if "kernel" in k}
    assert dtypes == {"bfloat16"}


def test_adam_keeps_only_the_first_moment_in_bfloat16():
    cfg = OptimConfig(momentum_dtype="bfloat16")
    _, state = run(cfg, PARAMS, [full(0.5)])
    dtypes = {k: v.dtype.name for k, v in leaves(state).items()}
    assert {d for k, d in dtypes.items() if "/mu/" in k} == {"bfloat16"}
    assert {d for k, d in dtypes.items() if "/nu/" in k} == {"float32"}


def test_adam_state_mirrors_the_parameters():
    """Sharding rules look at the end of a path and at the shape."""
    _, state = run(OptimConfig(), PARAMS, [full(0.5)])
    shapes = {k: v.shape for k, v in leaves(state).items()}
    for path, p in leaves(PARAMS).items():
        for moment in ("mu", "nu"):
            found = [s for k, s in shapes.items() if k.endswith(f"{moment}/{path}")]
            assert found == [p.shape]


def test_adafactor_by_hand():
    rng = np.random.default_rng(0)
    g1, g2 = rng.normal(size=(2, 48, 40))
    params = {"kernel": jnp.zeros((48, 40)), "bias": jnp.zeros(40)}
    grads = [
        {"kernel": jnp.float32(g), "bias": jnp.full(40, b)}
        for g, b in [(g1, 2.0), (g2, -3.0)]
    ]
    cfg = OptimConfig(
        name="adafactor",
        schedule="constant",
        learning_rate=1.0,
        decay=((".*", 1.0),),
        momentum_dtype="float32",
    )
    (first, second), state = run(cfg, params, grads)

    def scaled(g, rows, columns):
        return g / np.sqrt(np.outer(rows, columns) / rows.mean())

    b2 = 1 - 2**-0.8  # and 0 at t = 1
    rows, columns = (g1**2).mean(1), (g1**2).mean(0)
    u1 = scaled(g1, rows, columns)
    rows = b2 * rows + (1 - b2) * (g2**2).mean(1)
    columns = b2 * columns + (1 - b2) * (g2**2).mean(0)
    u2 = scaled(g2, rows, columns)
    # First moment without bias correction: 0.1 u, then 0.09 u1 + 0.1 u2.
    np.testing.assert_allclose(first["kernel"], -0.1 * u1, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        second["kernel"] - first["kernel"], -(0.09 * u1 + 0.1 * u2), atol=2e-6
    )
    # A vector is not factored: u = g / sqrt(v).
    np.testing.assert_allclose(first["bias"], -0.1, rtol=1e-5)
    v = b2 * 4 + (1 - b2) * 9
    u = 0.09 - 0.1 * 3 / v**0.5
    np.testing.assert_allclose(second["bias"], -0.1 - u, rtol=1e-5)
    # The factors are what saves the memory.
    sizes = [v.size for k, v in leaves(state).items() if "v" in k and "kernel" in k]
    assert sorted(sizes) == [1, 40, 48]


def test_adafactor_caps_its_second_decay_at_b2():
    cfg = OptimConfig(name="adafactor", schedule="constant")
    params = {"kernel": jnp.zeros(3)}
    tx, _ = optim.create(cfg, 10**7, params)
    state = jax.tree.map(
        lambda x: jnp.full_like(x, 10**6) if x.dtype == jnp.int32 else x,
        tx.init(params),
    )
    grads = {"kernel": jnp.full(3, 2.0)}
    _, state = tx.update(grads, state, params, step=10**6)
    (v,) = [v for k, v in leaves(state).items() if "/v/" in k]
    np.testing.assert_allclose(v, (1 - 0.999) * 4, rtol=1e-3)


@pytest.mark.heavy
@pytest.mark.parametrize("depth", [3, 40])
def test_adafactor_factors_the_layers_of_a_stack_one_by_one(depth):
    """Also where there are so many that a stack of biases looks like a matrix."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (48, 36), "bias": (40,), "heads": (4, 36)}
    blocks = [{k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(depth)]
    loop = {f"encoderblock_{i}": jax.tree.map(jnp.float32, b) for i, b in enumerate(blocks)}  # fmt: skip
    stack = {"encoderblock": jax.tree.map(lambda *x: jnp.float32(np.stack(x)), *blocks)}
    found = []
    for params in (loop, stack):
        cfg = OptimConfig(name="adafactor", schedule="constant", decay=((".*", 1.0),))
        grads = jax.tree.map(lambda p: 0.1 * p, params)
        history, _ = run(cfg, {"Transformer": params, "head": jnp.ones(3)}, [{"Transformer": g, "head": jnp.ones(3)} for g in (params, grads)])  # fmt: skip
        found.append(history[-1]["Transformer"])
    for i in range(depth):
        for name in shapes:
            a, b = found[0][f"encoderblock_{i}"][name], found[1]["encoderblock"][name]
            np.testing.assert_allclose(a, b[i], rtol=1e-6)


# Muon and LoRA: a model's kernels as the matrices they are, and what is none.

BLOCK = {
    "MultiHeadDotProductAttention_1": {
        "query": {"kernel": (6, 3, 2), "bias": (3, 2)},
        "out": {"kernel": (3, 2, 6), "bias": (6,)},
    },
    "MlpBlock_3": {"Dense_0": {"kernel": (6, 4)}, "Dense_1": {"kernel": (4, 6)}},
    "LayerNorm_0": {"scale": (6,)},
}
MODEL = {
    "block1": {"unit1": {"conv2": {"kernel": (2, 2, 3, 5)}}},
    "embedding": {"kernel": (2, 2, 5, 6)},
    "Transformer": {"encoderblock_0": BLOCK, "encoderblock_1": BLOCK},
    "head": {"kernel": (6, 4), "bias": (4,)},
}
MATRICES = {
    "query/kernel": (6, 6),
    "out/kernel": (6, 6),
    "Dense_0/kernel": (6, 4),
    "Dense_1/kernel": (4, 6),
    "conv2/kernel": (12, 5),
}


def random_model(seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.float32(rng.normal(size=shape))
    return jax.tree.map(draw, MODEL, is_leaf=lambda x: isinstance(x, tuple))


def stacked(params):
    """The same with the blocks along a first axis."""
    blocks = jax.tree.map(lambda *x: jnp.stack(x), *params["Transformer"].values())
    return params | {"Transformer": {"encoderblock": blocks}}


def matrix(name, x):
    """The kernel as the matrix it is, in float64; None of what is no matrix."""
    shape = MATRICES.get("/".join(name.split("/")[-2:]))
    return shape and np.float64(x).reshape(shape)


def orthogonal(m):
    """Newton-Schulz steps act on the singular values alone."""
    u, s, v = np.linalg.svd(m, full_matrices=False)
    s /= np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.heavy
def test_muon_by_hand():
    params, grads = random_model(0), [random_model(1), random_model(2)]
    cfg = OptimConfig(
        name="muon", schedule="constant", learning_rate=0.1, weight_decay=0.5
    )
    found, _ = run(cfg, params, grads)
    adam, _ = run(dataclasses.replace(cfg, name="adam"), params, grads)
    for name, start in leaves(params).items():
        first, second = (leaves(p)[name] for p in found)
        w = matrix(name, start)
        if w is None:
            np.testing.assert_allclose(second, leaves(adam[1])[name], rtol=1e-6)
            continue
        g1, g2 = (matrix(name, leaves(g)[name]) for g in grads)
        # The first moment without its bias, and Nesterov's look ahead.
        ahead = 0.95 * (0.0475 * g1 + 0.05 * g2) / (1 - 0.95**3)
        ahead += 0.05 * g2 / (1 - 0.95**2)
        size = 0.2 * max(w.shape) ** 0.5
        for m, after in ((g1, first), (ahead, second)):
            w = w - 0.1 * (size * orthogonal(m) + 0.5 * w)
            np.testing.assert_allclose(after.reshape(w.shape), w, atol=2e-5)


def test_muon_takes_the_layers_of_a_stack_one_by_one():
    cfg = OptimConfig(name="muon", schedule="constant", freeze=("head/.*",))
    params, grads = random_model(0), [random_model(1), random_model(2)]
    loop, _ = run(cfg, params, grads)
    stack, _ = run(cfg, stacked(params), [stacked(g) for g in grads])
    expected, found = leaves(stacked(loop[1])), leaves(stack[1])
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    np.testing.assert_array_equal(found["head/kernel"], params["head"]["kernel"])


def factors(state, name):
    """LoRA's a and b of a kernel."""
    return [
        next(np.float64(x) for k, x in state.items() if k.endswith(f"{name}/{f}"))
        for f in "ab"
    ]


def test_lora_by_hand():
    """Two steps of SGD with decay on the factors a and b of every matrix, rank 2."""
    params, grads = random_model(0), [random_model(1), random_model(2)]
    cfg = dataclasses.replace(PLAIN, lora=2, learning_rate=0.01, weight_decay=0.5)
    found, state = run(cfg, params, grads)
    plain, _ = run(dataclasses.replace(cfg, lora=0), params, grads)
    tx, _ = optim.create(cfg, 10, params)
    start = leaves(tx.init(params))
    for name, w in leaves(params).items():
        w, after = matrix(name, w), leaves(found[1])[name]
        if w is None:  # the head trains as ever, all else stays
            rest = plain[1] if name.startswith("head") else params
            np.testing.assert_array_equal(after, leaves(rest)[name])
            continue
        a, b = factors(start, name)
        assert a.any()
        assert not b.any()
        for g in grads:
            g = 8 * matrix(name, leaves(g)[name])  # 16 / 2
            da, db = g @ b.T + 0.5 * a, a.T @ g + 0.5 * b
            a, b = a - 0.01 * da, b - 0.01 * db
        for x, y in zip(factors(leaves(state), name), (a, b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(after.reshape(w.shape), w + 8 * a @ b, atol=2e-5)


@pytest.mark.heavy
def test_lora_limits_the_rank_and_keeps_no_other_state():
    params = stacked(random_model(0))
    cfg = OptimConfig(lora=1, schedule="constant", clip=1.0, weight_decay=0.1)
    history, state = run(cfg, params, [stacked(random_model(s)) for s in range(1, 6)])
    for name, before in leaves(params).items():
        moved = leaves(history[-1])[name] - before
        if "encoderblock" in name and "kernel" in name:
            shape = MATRICES["/".join(name.split("/")[-2:])]
            singular = np.linalg.svd(moved.reshape(2, *shape), compute_uv=False)
            assert (singular[:, 0] > 1e-4).all()
            assert (singular[:, 1] < 1e-5).all()
    sizes = {k: v.size for k, v in leaves(state).items() if "/mu/" in k}
    assert sum(sizes.values()) < sum(x.size for x in leaves(params).values()) / 2
    # Another seed, other factors.
    inits = [optim.create(cfg, 10, params, seed=s)[0].init(params) for s in (0, 0, 1)]
    a = [next(v for k, v in leaves(i).items() if k.endswith("kernel/a")) for i in inits]
    np.testing.assert_array_equal(a[0], a[1])
    assert (a[0] != a[2]).any()


# What the chain does around the rule


def test_the_rate_is_that_of_the_step_whatever_was_skipped():
    cfg = dataclasses.replace(PLAIN, warmup=4, learning_rate=1.0)
    params = {"kernel": jnp.zeros(())}
    tx, _ = optim.create(cfg, 10, params)
    state = tx.init(params)
    for step, rate in [(0, 0.0), (3, 0.75), (9, 1.0)]:
        updates, state = tx.update({"kernel": jnp.ones(())}, state, params, step=step)
        assert float(updates["kernel"]) == pytest.approx(-rate)


def test_the_backbone_is_all_but_the_heads():
    params = PARAMS | {"head_dist": {"kernel": 0}, "pre_logits": {"kernel": 0}}
    mask = leaves(optim.trainable(OptimConfig(freeze=("backbone",)), params))
    assert {k for k, trained in mask.items() if trained} == {
        "head/kernel",
        "head/bias",
        "head_dist/kernel",
    }


@pytest.mark.parametrize("stacked", [False, True])
def test_layer_decay_falls_from_the_head_to_the_stem(stacked):
    block = {"Dense_0": {"kernel": jnp.ones((3, 2))}}
    blocks = {f"encoderblock_{i}": block for i in range(3)}
    if stacked:
        blocks = {"encoderblock": jax.tree.map(lambda x: jnp.stack([x] * 3), block)}
    norm = {"encoder_norm": {"scale": jnp.ones(2)}}
    params = {
        "embedding": {"kernel": jnp.ones(2)},
        "Transformer": blocks | norm | {"posembed_input": {"pos_embedding": jnp.ones(2)}},
        "head": {"kernel": jnp.ones(2)},
    }  # fmt: skip
    cfg = dataclasses.replace(PLAIN, learning_rate=1.0, layer_decay=0.5)
    (after,), _ = run(cfg, params, [jax.tree.map(jnp.ones_like, params)])
    moved = {k: np.asarray(1 - v) for k, v in leaves(after).items()}
    assert moved["embedding/kernel"][0] == 0.5**4
    assert moved["Transformer/posembed_input/pos_embedding"][0] == 0.5**4
    assert moved["Transformer/encoder_norm/scale"][0] == moved["head/kernel"][0] == 1
    name = "Transformer/encoderblock{}/Dense_0/kernel"
    of_blocks = [moved[name.format("" if stacked else f"_{i}")] for i in range(3)]
    if stacked:
        of_blocks = list(of_blocks[0])
    assert [x.ravel()[0] for x in of_blocks] == [0.5**3, 0.5**2, 0.5]


def test_first_update_uses_the_learning_rate_of_step_zero():
    cfg = OptimConfig(warmup=4, learning_rate=0.1, weight_decay=0.5)
    (first, second), _ = run(cfg, PARAMS, [full(1.0)] * 2)
    for p in jax.tree.leaves(first):
        np.testing.assert_array_equal(p, 1.0)
    # lr(1) = 0.025: 1 - 0.025 (1 + 0.5)
    np.testing.assert_allclose(second["head"]["kernel"], 0.9625, rtol=1e-6)


def test_frozen_parameters_have_no_state_and_do_not_count_in_the_norm():
    cfg = OptimConfig(clip=1.0, freeze=("Transformer/.*",), weight_decay=0.1)
    grads = full(1e6)
    grads["head"] = jax.tree.map(jnp.zeros_like, grads["head"])
    grads["head"]["bias"] = jnp.zeros(32).at[0].set(0.5)
    sgd = dataclasses.replace(
        PLAIN, clip=1.0, freeze=cfg.freeze, weight_decay=cfg.weight_decay
    )
    (params,), _ = run(sgd, PARAMS, [grads])
    for p in jax.tree.leaves(params["Transformer"]):
        np.testing.assert_array_equal(p, 1.0)
    # 0.5 is below the norm of 1, so it is not clipped, whatever the frozen ones have.
    np.testing.assert_allclose(params["head"]["bias"][:2], [0.95, 1.0], rtol=1e-6)
    for name in optim.OPTIMIZERS:
        _, state = run(dataclasses.replace(cfg, name=name), PARAMS, [grads])
        paths = list(leaves(state))
        assert not [k for k in paths if "Transformer" in k]
        assert [k for k in paths if "head" in k]


def test_trainable_marks_what_freeze_leaves():
    mask = leaves(optim.trainable(OptimConfig(freeze=(".*/Dense_0/.*",)), PARAMS))
    assert [k for k, v in mask.items() if not v] == [
        "Transformer/encoderblock_0/Dense_0/bias",
        "Transformer/encoderblock_0/Dense_0/kernel",
    ]


def test_multipliers_scale_update_and_decay_and_the_first_match_counts():
    cfg = dataclasses.replace(
        PLAIN,
        weight_decay=0.5,
        multipliers=(("head/bias", 0.0), ("head/.*", 10.0)),
    )
    (params,), _ = run(cfg, PARAMS, [full(0.2)])
    np.testing.assert_array_equal(params["head"]["bias"], 1.0)
    np.testing.assert_allclose(params["head"]["kernel"], 1 - 1.0 * (0.2 + 0.5))
    scale = params["Transformer"]["encoderblock_0"]["LayerNorm_0"]["scale"]
    np.testing.assert_allclose(scale, 1 - 0.1 * 0.2, rtol=1e-6)


def test_decay_factors_differ_for_the_head_as_in_vit_g():
    cfg = dataclasses.replace(
        PLAIN, weight_decay=0.03, decay=(("head/kernel", 100.0), (".*/kernel", 1.0))
    )
    (params,), _ = run(cfg, PARAMS, [full(0.0)])
    np.testing.assert_allclose(params["head"]["kernel"], 1 - 0.1 * 3.0, rtol=1e-6)
    dense = params["Transformer"]["encoderblock_0"]["Dense_0"]
    np.testing.assert_allclose(dense["kernel"], 1 - 0.1 * 0.03, rtol=1e-6)
    np.testing.assert_array_equal(dense["bias"], 1.0)


# Bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"freeze": ("Transfomer/.*",)},
            ["config.optim.freeze", "Transfomer", "head/bias"],
        ),
        ({"multipliers": (("tail/.*", 2.0),)}, ["optim.multipliers", "tail"]),
        ({"weight_decay": 0.1, "decay": (("kernel", 1.0),)}, ["optim.decay", "kernel"]),
        ({"freeze": ("(",)}, ["optim.freeze", "regular expression"]),
        ({"freeze": (".*",)}, ["optim.freeze", "no parameter to train"]),
        ({"lora": 40}, ["config.optim.lora=40", "below 40", "Dense_0/kernel"]),
        (
            {"lora": 2, "name": "muon"},
            ["config.optim.lora=2", "config.optim.name='muon'", "adam"],
        ),
        (
            {"lora": 2, "freeze": ("Transformer/.*",)},
            ["config.optim.lora=2", "config.optim.freeze=('Transformer/.*',)"],
        ),
        ({"warmup": 10}, ["config.optim.warmup=10", "config.steps=10"]),
        (
            {"schedule": "rsqrt", "warmup": 4, "cooldown": 7},
            ["config.optim.cooldown=7", "only 6 steps"],
        ),
        ({"schedule": "cosine", "cooldown": 2}, ["optim.cooldown", "'cosine'"]),
        (
            {"name": "adamw"},
            ["config.optim.name", "adamw", "did you mean 'adam'", "sgd"],
        ),
        (
            {"schedule": "cosin"},
            ["config.optim.schedule", "did you mean 'cosine'", "rsqrt"],
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(UserError) as e:
        optim.create(OptimConfig(**change), 10, PARAMS)
    for word in words:
        assert word in str(e.value)
