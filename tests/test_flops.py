# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import pytest

from vit_jax import models
from vit_jax.config import ModelConfig

# Without a head, as the paper counts: G MACs at 224 pixels (paper-spec 1.11).
PAPER = {"B/32": 4.408, "B/16": 17.563, "L/32": 15.377, "L/16": 61.554, "H/14": 167.294}


@pytest.mark.parametrize(("name", "expected"), PAPER.items())
def test_vit_macs_are_the_papers(name, expected):
    cfg = ModelConfig(name=f"ViT-{name}", image_size=(224, 224))
    assert models.macs(cfg) / 1e9 == pytest.approx(expected, abs=5e-4)  # three digits


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("R50x1", {"head": "gap"}),
        ("R50+ViT-B/16", {"head": "map"}),
        ("S/32", {"head": "gap"}),
        ("S/32", {"head": "token_gap", "mlp": "swiglu", "registers": 4}),
        ("S/32", {"distillation": "head", "rope": "eva02"}),
    ],
)
def test_macs_agree_with_what_xla_counts(name, fields):
    """XLA counts norms and activations too, which are a few per cent, but no padding,
    which is 1 %."""
    cfg = ModelConfig(name=name, image_size=(224, 224), num_classes=1000, **fields)
    model = models.create(cfg)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    cost = jax.jit(model.apply).lower(params, images).cost_analysis()
    assert 0.98 < cost["flops"] / (2 * models.macs(cfg)) < 1.05
