# SPDX-License-Identifier: Apache-2.0
"""Every head against plain numpy, and what they start from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models
from vit_jax.config import ModelConfig
from vit_jax.models import heads

CFG = ModelConfig(name="", width=16, depth=1, mlp_dim=24, heads=2, patch=8)


def create(**fields):
    return models.create(ModelConfig(**(vars(CFG) | fields)))


def filled(model, images, seed=1):
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)
    value = lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype)
    return jax.tree.map(value, shapes)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(
        np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 3)), "float32"
    )


@pytest.fixture(scope="module")
def forward(images):
    """Parameters, logits and what ``forward`` returns, by the fields of the config."""

    def call(**fields):
        model = create(**fields)
        params = filled(model, images)
        apply = jax.jit(lambda p, x: model.apply({"params": p}, x, method="forward"))
        return params, *apply(params, images)

    return call


def test_the_shapes_cover_every_head():
    assert set(SHAPES) == set(heads.HEADS)


# What the head reads for 2 images of 2 x 3 patches.
SHAPES = {
    "token": (2, 16),
    "gap": (2, 16),
    "token_gap": (2, 32),
    "map": (2, 16),
    "none": (2, 6, 16),
    "masked_patch": (2, 6, 16),
}


@pytest.mark.parametrize("pre_logits", [False, True])
@pytest.mark.parametrize("head", SHAPES)
def test_shapes_and_initial_values(head, pre_logits, images):
    pre_logits = pre_logits and head not in ("masked_patch", "token_gap")
    model = create(head=head, num_classes=7, head_bias=-10.0, pre_logits=pre_logits)
    init = lambda: model.init_with_output(jax.random.key(0), images, method="forward")
    (logits, out), variables = jax.eval_shape(init)
    assert out["pre_logits"].shape == SHAPES[head]
    assert logits.shape == (*SHAPES[head][:-1], 7)
    assert logits.dtype == "float32"
    assert ("pre_logits" in variables["params"]) == pre_logits
    start = jax.jit(lambda: init()[1]["params"]["head"])()  # compiles nothing else
    assert not np.any(start["kernel"])
    assert np.all(start["bias"] == -10)


def test_a_new_model_returns_the_bias_of_its_head(images):
    model = create(num_classes=7, head_bias=-6.9)
    logits, _ = jax.jit(model.init_with_output)(jax.random.key(0), images)
    np.testing.assert_array_equal(logits, np.full((2, 7), -6.9, np.float32))


@pytest.mark.parametrize("head", ["token", "gap", "none", "masked_patch"])
def test_what_a_head_reads(head, forward):
    params, logits, out = forward(head=head, num_classes=7)
    z = np.asarray(out["tokens"])
    class_token = head in ("token", "masked_patch")
    assert z.shape == (2, 6 + class_token, 16)
    assert ("cls" in params) == class_token
    assert ("mask_token" in params) == (head == "masked_patch")
    y = {"token": z[:, 0], "gap": z.mean(1), "none": z, "masked_patch": z[:, 1:]}[head]
    np.testing.assert_allclose(out["pre_logits"], y, atol=1e-5)
    expected = y @ params["head"]["kernel"]
    expected = expected + params["head"]["bias"].reshape((1,) * (y.ndim - 1) + (7,))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_pre_logits_are_a_tanh_layer(forward):
    params, logits, out = forward(head="gap", num_classes=7, pre_logits=True)
    hidden, head = params["pre_logits"], params["head"]
    y = np.tanh(out["tokens"].mean(1) @ hidden["kernel"] + hidden["bias"][None])
    np.testing.assert_allclose(out["pre_logits"], y, atol=1e-5)
    np.testing.assert_allclose(
        logits, y @ head["kernel"] + head["bias"][None], atol=1e-5
    )


def test_no_classes_is_what_the_head_would_read(forward):
    params, logits, out = forward(head="token", num_classes=0)
    assert "head" not in params
    np.testing.assert_array_equal(logits, out["tokens"][:, 0])


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_attention_pooling_by_hand(forward):
    """No LayerNorm before the attention and no residual around it."""
    params, _, out = forward(head="map", num_classes=3)
    p, z = params["MAPHead_0"], np.asarray(out["tokens"])
    a = p["MultiHeadDotProductAttention_0"]

    def project(name, x):
        bias = a[name]["bias"].reshape(1, 1, 2, 8)
        return np.einsum("bsd,dkh->bskh", x, a[name]["kernel"]) + bias

    q = project("query", np.broadcast_to(p["probe"], (2, 1, 16)))
    k, v = project("key", z), project("value", z)
    weights = softmax(np.einsum("btkh,bskh->bkts", q, k) / 8**0.5)
    y = np.einsum("bkts,bskh->btkh", weights, v)
    y = np.einsum("btkh,khd->btd", y, a["out"]["kernel"])
    y = (y + a["out"]["bias"].reshape(1, 1, 16))[:, 0]
    norm, mlp = p["LayerNorm_0"], p["MlpBlock_0"]
    h = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    h = h * norm["scale"][None] + norm["bias"][None]
    h = h @ mlp["Dense_0"]["kernel"] + mlp["Dense_0"]["bias"][None]
    h = np.asarray(jax.nn.gelu(h))
    y = y + h @ mlp["Dense_1"]["kernel"] + mlp["Dense_1"]["bias"][None]
    np.testing.assert_allclose(out["pre_logits"], y, atol=1e-5)
