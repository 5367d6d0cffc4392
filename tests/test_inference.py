# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest
from compiled import apply
from weights_files import small_model

from vit_jax import inference, models
from vit_jax.config import ModelConfig
from vit_jax.weights import fit


@pytest.mark.heavy
@pytest.mark.parametrize("count", [1, 4, 6, 7])
def test_large_batches_go_through_a_cpu_in_parts(count, monkeypatch):
    model, flat = small_model()
    size = model.cfg.image_size
    limit = 4 * models.largest_activation(model.cfg, size)
    monkeypatch.setattr(inference, "IN_CACHE", limit)
    params = fit.unflatten(flat)
    predictor = inference.create(model.cfg, params, devices=jax.devices()[:1])
    x = np.random.default_rng(0).uniform(-1, 1, (count, *size, 3)).astype(np.float32)
    logits, out = apply(model, params, x, method="forward")
    found = predictor(x)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
    np.testing.assert_allclose(found["pre_logits"], out["pre_logits"], atol=1e-5)
    jaxpr = str(jax.make_jaxpr(predictor.forward)(params, x))
    parts = {1: 1, 4: 1, 6: 2, 7: 7}[count]
    assert ("scan[" in jaxpr) == (parts > 1)
    assert f"length={parts}\n" in jaxpr or parts == 1


@pytest.mark.parametrize(
    ("name", "size", "numbers"),
    [
        ("ViT-B/16", 224, 197 * 3072),
        ("ViT-B/16", 384, 577 * 577 * 12),
        ("R50x1", 224, 112 * 112 * 64),
    ],
)
def test_largest_activation(name, size, numbers):
    cfg = models.resolve(ModelConfig(name=name, image_size=(size, size)))
    assert models.largest_activation(cfg, (size, size)) == numbers
