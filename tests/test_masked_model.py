# SPDX-License-Identifier: Apache-2.0
"""How the model corrupts patches; the choice of patches is tested with objectives."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import models
from vit_jax.config import ModelConfig
from vit_jax.models import masked


def test_corrupt_by_hand():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 3)).astype(np.float32)
    token = rng.normal(size=(1, 1, 3)).astype(np.float32)
    kind = np.array([[0, 1, 2, 2], [2, 0, 0, 1]])
    source = np.array([[3, 3, 0, 1], [1, 0, 2, 0]])
    expected = x.copy()
    for b in range(2):
        for n in range(4):
            if kind[b, n] == masked.MASK:
                expected[b, n] = token[0, 0]
            elif kind[b, n] == masked.OTHER:
                expected[b, n] = x[b, source[b, n]]  # the original, not a corrupted one
    found = masked.corrupt(*map(jnp.asarray, (x, kind, source, token)))
    np.testing.assert_array_equal(found, expected)


def test_corrupt_keeps_the_dtype():
    x = jnp.ones((1, 2, 3), jnp.bfloat16)
    kind = jnp.array([[0, 1]])
    assert masked.corrupt(x, kind, kind, jnp.zeros((1, 1, 3))).dtype == jnp.bfloat16


def test_the_model_corrupts_patch_embeddings_before_positions():
    cfg = ModelConfig(
        name="", width=16, depth=1, mlp_dim=24, heads=2, patch=8,
        head="masked_patch", num_classes=5,
    )  # fmt: skip
    model = models.create(cfg)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape)), shapes)
    params["mask_token"] = params["embedding"]["bias"].reshape(1, 1, 16)

    @jax.jit
    def logits(images, kind, source):
        corruption = {"kind": kind, "source": source}
        return model.apply({"params": params}, images, corruption=corruption)

    keep, source = jnp.zeros((2, 4), int), jnp.array([[1, 0, 3, 2]] * 2)
    plain = logits(images, keep, source)
    assert plain.shape == (2, 4, 5)
    uncorrupted = jax.jit(lambda x: model.apply({"params": params}, x))(images)
    np.testing.assert_allclose(plain, uncorrupted, atol=1e-5)

    # The mask token being the bias of E, masking is blackening the first patch ...
    black = images.at[:, :8, :8].set(0)
    found = logits(images, keep.at[:, 0].set(masked.MASK), source)
    np.testing.assert_allclose(found, logits(black, keep, source), atol=1e-5)
    assert np.abs(found - plain).max() > 1e-2
    # ... and another patch is that part of the image, at the position of this one.
    copied = images.at[:, :8, :8].set(images[:, :8, 8:])
    found = logits(images, keep.at[:, 0].set(masked.OTHER), source)
    np.testing.assert_allclose(found, logits(copied, keep, source), atol=1e-5)

    def loss(params):
        corruption = {"kind": keep + masked.MASK, "source": source}
        return model.apply({"params": params}, images, corruption=corruption).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert np.any(gradient["mask_token"])
    assert not np.any(gradient["embedding"]["kernel"])  # every patch is masked
