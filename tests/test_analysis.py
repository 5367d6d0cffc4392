# SPDX-License-Identifier: Apache-2.0
"""Rollout, distance and embeddings against closed forms; capture on every kind of model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models
from vit_jax.analysis import attention, embeddings
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError

RNG = np.random.default_rng(0)
TINY = ModelConfig(
    name="", num_classes=3, image_size=(16, 24), width=16, depth=3, mlp_dim=32, heads=2, patch=8
)  # fmt: skip
HYBRID = dataclasses.replace(
    TINY, image_size=(32, 32), resnet=(1, 1), resnet_width=1, patch=1
)


@pytest.fixture(autouse=True)
def _same_numbers_for_each_test():
    global RNG
    RNG = np.random.default_rng(1)


def random_weights(*shape):
    w = RNG.random(shape)
    return w / w.sum(-1, keepdims=True)


def make(cfg, seed=0):
    """A model whose attention is far from uniform."""
    model = models.create(cfg)
    images = RNG.uniform(-1, 1, (5, *cfg.image_size, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(seed), images[:1])["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    leaves = [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return model, jax.tree.unflatten(tree, leaves), images


def test_rollout_of_one_layer_is_the_closed_form():
    w = random_weights(1, 2, 3, 5, 5)  # L, B, k, S, S
    expected = w[0].mean(1)
    np.testing.assert_allclose(
        attention.rollout(w, identity=False), expected, rtol=1e-6
    )
    expected = 0.5 * expected + 0.5 * np.eye(5)
    np.testing.assert_allclose(attention.rollout(w), expected, rtol=1e-6)


def test_rollout_multiplies_later_layers_from_the_left():
    w = random_weights(3, 2, 3, 5, 5)
    a = w.mean(2) / 2 + np.eye(5) / 2
    expected = a[2] @ a[1] @ a[0]
    got = attention.rollout(w)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(attention.rollout(list(w[:, 0])), expected[0], rtol=1e-5)
    np.testing.assert_allclose(attention.rollout(w[:, :, ::-1]), got, rtol=1e-5)


def test_uniform_attention_gives_a_flat_map():
    w = np.full((4, 1, 2, 7, 7), 1 / 7)
    shown = attention.token_map(attention.rollout(w, identity=False), (2, 3))
    np.testing.assert_allclose(shown, np.full((1, 2, 3), 1 / 7), rtol=1e-6)


def test_token_map_takes_the_class_row_or_the_mean_of_all():
    r = RNG.random((2, 7, 7))
    got = attention.token_map(r, (2, 3))
    np.testing.assert_allclose(got, r[:, 0, 1:].reshape(2, 2, 3), rtol=1e-6)
    got = attention.token_map(r[:, 1:, 1:], (2, 3))
    np.testing.assert_allclose(got, r[:, 1:, 1:].mean(1).reshape(2, 2, 3), rtol=1e-6)
    with pytest.raises(
        UserError, match=r"attention over 5 tokens does not fit .* 2 x 3"
    ):
        attention.token_map(r[:, :5, :5], (2, 3))
    with pytest.raises(UserError, match="at least one layer"):
        attention.rollout([])


def test_registers_are_left_out_of_maps_and_distances():
    """A class token, a distillation token and two registers, then 2 x 3 patches."""
    w = random_weights(1, 2, 3, 10, 10)
    got = attention.token_map(w[0], (2, 3))
    np.testing.assert_allclose(got, w[0][..., 0, 4:].reshape(2, 3, 2, 3), rtol=1e-6)
    got = attention.token_map(w[0], (2, 3), class_token=False)
    rows = w[0][..., 4:, 4:].mean(-2).reshape(2, 3, 2, 3)
    np.testing.assert_allclose(got, rows, rtol=1e-6)
    patches = w[..., 4:, 4:] / w[..., 4:, 4:].sum(-1, keepdims=True)
    np.testing.assert_allclose(
        attention.mean_distance(w, (2, 3), 8),
        attention.mean_distance(patches, (2, 3), 8),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("grid", "patch", "expected"),
    # 1 x 2: half of the weight at distance 0, half at 10. The others: section 8.8 of
    # the paper's spec.
    [((1, 2), 10, 5.0), ((14, 14), 16, 116.49), ((7, 7), 32, 115.50)],
)
@pytest.mark.parametrize("class_token", [0, 1])
def test_distance_of_uniform_and_identity_heads(grid, patch, expected, class_token):
    s = grid[0] * grid[1] + class_token
    uniform, identity = np.full((s, s), 1 / s), np.eye(s)
    w = np.stack([uniform, identity])[None]  # one layer, two heads
    got = attention.mean_distance(w, grid, patch)
    np.testing.assert_allclose(got, [[expected, 0]], atol=0.005)


def test_distance_is_the_sum_over_keys_and_the_mean_over_queries_and_images():
    w = random_weights(2, 3, 4, 7, 7)
    for renormalize in (True, False):
        expected = np.zeros((2, 4))
        for layer, image, head in np.ndindex(2, 3, 4):
            a = w[layer, image, head, 1:, 1:]
            if renormalize:
                a = a / a.sum(1, keepdims=True)
            for q, j in np.ndindex(6, 6):
                rows, columns = q // 3 - j // 3, q % 3 - j % 3
                expected[layer, head] += a[q, j] * 8 * np.hypot(rows, columns) / 6 / 3
        got = attention.mean_distance(w, (2, 3), 8, renormalize=renormalize)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("cfg", [TINY, HYBRID, dataclasses.replace(TINY, head="gap")])
def test_capture_gives_rows_of_one_and_leaves_the_logits_alone(cfg):
    model, params, images = make(cfg)
    grid, stride = attention.geometry(model, cfg.image_size)
    tokens = grid[0] * grid[1] + (cfg.head == "token")
    assert stride == 8
    w = attention.capture(model, params, images)
    assert w.shape == (3, 5, 2, tokens, tokens)
    assert w.dtype == jnp.float32
    np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-5)
    assert w.std() > 0.01  # not uniform, so the tests below mean something
    apply = lambda **kw: jax.jit(lambda p, x: model.apply({"params": p}, x, **kw))
    plain = apply()(params, images)
    captured, _ = apply(mutable=["intermediates"])(params, images)
    np.testing.assert_allclose(plain, captured, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def looped():
    return make(TINY)


def test_scanned_layers_give_the_same_attention(looped):
    model, params, images = looped
    encoder = dict(params["Transformer"])
    blocks = [encoder.pop(f"encoderblock_{i}") for i in range(3)]
    encoder["encoderblock"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    scanned = models.create(dataclasses.replace(model.cfg, layers="scan"))
    stacked = {**params, "Transformer": encoder}
    expected = attention.capture(model, params, images)
    got = attention.capture(scanned, stacked, images)
    np.testing.assert_array_equal(got, expected)
    # What scan itself collects is understood as well.
    collect = lambda p, x: scanned.apply({"params": p}, x, mutable=["intermediates"])
    _, state = jax.jit(collect)(stacked, images)
    layers = attention.of(state["intermediates"])
    np.testing.assert_allclose(np.stack(layers), expected, atol=1e-5)


def test_summary_of_batches_is_that_of_all_images(looped):
    model, params, images = looped
    w = attention.capture(model, params, images)
    grid, stride = attention.geometry(model, (16, 24))
    got = attention.summarize(
        model, params, [images[:1], images[1:4], images[4:]], batch=2
    )
    expected = attention.mean_distance(w, grid, stride)
    np.testing.assert_allclose(got.distance, expected, rtol=1e-4)
    rollout = attention.rollout(w)
    np.testing.assert_allclose(got.rollout, rollout.mean(0), rtol=1e-4)
    maps = attention.token_map(rollout, grid)
    np.testing.assert_allclose(got.maps, maps, rtol=1e-4)


def test_summary_takes_no_more_memory_for_more_images(looped, monkeypatch):
    """One compiled function for batches of one size; only reductions leave it."""
    model, params, images = looped
    calls = []
    run = attention._summarize

    def spy(*args):
        calls.append(run(*args))
        return calls[-1]

    monkeypatch.setattr(attention, "_summarize", spy)
    compiled = run._cache_size()
    attention.summarize(model, params, [images] * 3, batch=2)
    assert len(calls) == 8
    assert run._cache_size() <= compiled + 1
    assert [x.shape for x in calls[0]] == [(3, 2), (7, 7), (2, 2, 3)]


def test_uint8_and_float_images_are_the_same(looped):
    model, params, _ = looped
    pixels = RNG.integers(0, 256, (2, 16, 24, 3), np.uint8)
    a = attention.capture(model, params, pixels)
    b = attention.capture(model, params, (pixels / 127.5 - 1).astype(np.float32))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_attention_in_a_resnet():
    model = models.create(ModelConfig(name="R50x1", num_classes=3))
    with pytest.raises(
        UserError, match="the checkpoint is a ResNet: it has no attention"
    ):
        attention.capture(model, {}, np.zeros((1, 32, 32, 3)))
    with pytest.raises(UserError, match="the checkpoint is a ResNet: it has no pos"):
        embeddings.position_table(model, {}, (32, 32))
    with pytest.raises(UserError, match="no images"):
        attention.summarize(models.create(TINY), {}, [])


# Embeddings ---------------------------------------------------------------------


def test_filter_components_recover_what_filters_are_made_of():
    basis = np.linalg.qr(RNG.normal(size=(4 * 4 * 3, 2)))[0].T
    weights = RNG.normal(size=(40, 2)) * [5, 1]
    kernel = (weights @ basis + 3.0).T.reshape(
        4, 4, 3, 40
    )  # 3.0: taken off by centring
    components, share = embeddings.filter_components(kernel, 3)
    assert components.shape == (3, 4, 4, 3)
    flat = components.reshape(3, -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=1e-6)
    # The two components span the two directions, in either sign.
    np.testing.assert_allclose(np.linalg.svd(flat[:2] @ basis.T)[1], 1, atol=1e-5)
    assert share[0] > share[1] > 1e-3
    assert share[2] < 1e-12
    shown = embeddings.displayable(components)
    assert shown.min() >= 0
    assert shown.max() <= 1
    np.testing.assert_allclose(np.abs(shown - 0.5).max((1, 2, 3)), 0.5, rtol=1e-6)


def test_position_similarity():
    table = RNG.normal(size=(3, 4, 8))
    got = embeddings.position_similarity(table)
    assert got.shape == (3, 4, 3, 4)
    a, b = table[1, 2], table[2, 0]
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(got[1, 2, 2, 0], expected)
    for i, j in np.ndindex(3, 4):
        np.testing.assert_allclose(got[i, j, i, j], 1)


@pytest.mark.parametrize("positions", ["learned", "learned2d", "sincos2d"])
@pytest.mark.parametrize("head", ["token", "gap"])
def test_position_table_leaves_the_class_token_out(positions, head):
    cfg = dataclasses.replace(TINY, positions=positions, head=head)
    model = models.create(cfg)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 24, 3)))
    params = jax.tree.map(lambda s: RNG.normal(size=s.shape), shapes["params"])
    table = embeddings.position_table(model, params, (16, 24))
    assert table.shape == (2, 3, 16)
    if positions == "learned":
        stored = params["Transformer"]["posembed_input"]["pos_embedding"][0, -6:]
        np.testing.assert_allclose(table.reshape(6, 16), stored, rtol=1e-6)
    if (
        positions == "sincos2d"
    ):  # separable: a part that sees the column, one for the row
        s = embeddings.position_similarity(table)
        np.testing.assert_allclose(
            s[0, 0, 1, 1] - s[0, 0, 1, 0], s[0, 0, 0, 1] - 1, atol=1e-6
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "none"}, "the model has none"),
        ({"positions": "relative"}, "positions are in the attention"),
        ({"position_at": "every"}, "every layer has its own"),
    ],
)
def test_models_without_a_table_say_why(change, message):
    model = models.create(dataclasses.replace(TINY, **change))
    with pytest.raises(UserError, match=message):
        embeddings.position_table(model, {}, (16, 24))
