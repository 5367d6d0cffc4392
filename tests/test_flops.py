# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import pytest

from vit_jax import config, models
from vit_jax.config import Config, ModelConfig
from vit_jax.program import build

# Without a head, as the paper counts: G MACs at 224 pixels (paper-spec 1.11).
PAPER = {"B/32": 4.408, "B/16": 17.563, "L/32": 15.377, "L/16": 61.554, "H/14": 167.294}


@pytest.mark.parametrize(("name", "expected"), PAPER.items())
def test_vit_macs_are_the_papers(name, expected):
    cfg = ModelConfig(name=f"ViT-{name}", image_size=(224, 224))
    assert models.macs(cfg) / 1e9 == pytest.approx(expected, abs=5e-4)  # three digits


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("R50x1", {"head": "gap"}),
        ("R50+ViT-B/16", {"head": "map"}),
        ("S/32", {"head": "gap"}),
        ("S/32", {"head": "gap", "axial": True}),
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
    traced = models.traced_flops(jax.make_jaxpr(model.apply)(params, images))
    assert traced == 2 * models.macs(cfg)


def test_scanned_and_recomputed_blocks_are_counted():
    """A backward pass is two forward passes, but for the gradient of the images; full
    rematerialization adds one of the blocks but for the last product, which no gradient
    needs."""
    fields = {"name": "S/32", "depth": 2, "image_size": (64, 64), "num_classes": 10}
    images = jnp.zeros((1, 64, 64, 3))

    def step(**more):
        model = models.create(ModelConfig(**fields, **more))
        params = jax.eval_shape(model.init, jax.random.key(0), images)
        loss = jax.grad(lambda p: model.apply(p, images).sum())
        return models.traced_flops(jax.make_jaxpr(loss)(params))

    cfg = ModelConfig(**fields)
    embedding, head = 4 * 32 * 32 * 3 * 384, 10 * 384
    blocks = models.macs(cfg) - embedding - head
    assert step() == 2 * (3 * models.macs(cfg) - embedding)
    assert step(layers="scan") == step()
    last = 2 * 5 * 384 * 1536
    assert step(layers="scan", remat="full") == step() + 2 * (blocks - last)


@pytest.mark.heavy
def test_a_step_that_trains_the_head_alone_costs_little_more_than_inference():
    model = {"name": "ViT-B/16", "image_size": (224, 224), "num_classes": 1000}
    cfg = Config(batch=8, model=ModelConfig(**model, attention="xla"))
    cfg = config.replace(cfg, data__source="synthetic", optim__freeze=("backbone",))
    program = build(cfg, jax.devices()[:1])
    shapes = program.state_shape, program.batch_shape
    found = models.traced_flops(jax.make_jaxpr(program.train_step)(*shapes))
    assert found == 8 * (2 * models.macs(cfg.model) + 2 * 768 * 1000)
