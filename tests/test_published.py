# SPDX-License-Identifier: Apache-2.0
"""The names of timm and Hugging Face, and the parameters behind them to the last one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax import models
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models import published
from vit_jax.weights import timm_config
from vit_jax.weights.families import FAMILIES
from vit_jax.weights.infer import guess_heads


def count(name, **fields):  # a scan is traced once
    model = vit_jax.create_model(name, layers="scan", **fields)
    images = jax.ShapeDtypeStruct((1, *model.cfg.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)), model.cfg


# What the published files have that is folded here (+), or lack and is zero here (-).
SCALES = lambda c: 2 * c.depth * c.width  # LayerScale
MASK = lambda c: c.width  # the unused mask token
KEYS = lambda c: -c.depth * c.width  # no biases of keys
QKV = lambda c: -3 * c.depth * c.width  # nor of queries and values
BLOCKS = lambda c: -c.depth * (5 * c.width + 2 * c.mlp_dim)  # no bias in a block
PATCH = lambda c: -c.width  # no bias of the patch embedding
HEAD = lambda c: -c.num_classes  # nor of the projection that is the head
CLASS = lambda c: -c.width  # the class token has no position
CLIP = (PATCH, HEAD)
DINO = (SCALES, MASK)

# As numel() of the checkpoints that timm, Hugging Face's transformers, OpenAI's clip and
# the DINOv2 and DINOv3 repositories load; millions with two digits: timm's
# results/results-imagenet.csv (param_count).
PUBLISHED = [
    ("vit_small_patch14_dinov2", 0, DINO, 22_056_576),
    ("vit_base_patch14_dinov2", 0, DINO, 86_580_480),
    ("vit_large_patch14_dinov2", 0, DINO, 304_368_640),
    ("vit_giant_patch14_dinov2", 0, DINO, 1_136_480_768),
    ("vit_large_patch14_reg4_dinov2", 0, DINO, 304_372_736),
    ("facebook/dinov3-vits16-pretrain-lvd1689m", 0, (*DINO, KEYS), 21_596_544),
    ("facebook/dinov3-vitb16-pretrain-lvd1689m", 0, (*DINO, KEYS), 85_660_416),
    ("facebook/dinov3-vitl16-pretrain-lvd1689m", 0, (*DINO, KEYS), 303_129_600),
    ("facebook/dinov3-vith16plus-pretrain-lvd1689m", 0, (*DINO, KEYS), 840_592_640),
    ("facebook/dinov3-vit7b16-pretrain-lvd1689m", 0, (*DINO, QKV), 6_716_035_072),
    ("facebook/webssl-dino2b-full2b-224", 0, DINO, 2_084_237_568),
    ("facebook/webssl-dino3b-full2b-224", 0, DINO, 2_948_317_184),
    ("facebook/webssl-dino5b-full2b-224", 0, DINO, 4_938_338_816),
    ("facebook/webssl-dino7b-full8b-224", 0, DINO, 6_450_170_880),
    ("openai/clip-vit-base-patch32", 512, CLIP, 87_849_216),
    ("openai/clip-vit-base-patch16", 512, CLIP, 86_192_640),
    ("openai/clip-vit-large-patch14", 768, CLIP, 303_966_208),
    ("openai/clip-vit-large-patch14-336", 768, CLIP, 304_293_888),
    ("vit_huge_patch14_clip_224", 1024, CLIP, 632_076_800),
    ("google/siglip-base-patch16-224", 0, (), 92_884_224),
    ("google/siglip-so400m-patch14-384", 0, (), 428_225_600),
    ("deit_tiny_patch16_224", 1000, (), 5_717_416),
    ("deit_tiny_distilled_patch16_224", 1000, (), 5_910_800),
    ("deit_small_distilled_patch16_224", 1000, (), 22_436_432),
    ("deit_base_distilled_patch16_224", 1000, (), 87_338_192),
    ("deit3_base_patch16_224", 1000, (SCALES, CLASS), 86_585_320),
    ("beit_base_patch16_224", 1000, (SCALES, KEYS), 86_530_984),
    ("eva02_large_patch14_448", 1000, (KEYS,), 305.08),
    ("aimv2_large_patch14_224", 0, (BLOCKS,), 309_197_824),
    ("facebook/ijepa_vith14_1k", 0, (), 630_762_240),
]


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "classes", "folded", "expected"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(name, classes, folded, expected):
    ours, cfg = count(name, num_classes=classes)
    theirs = ours + sum(part(cfg) for part in folded)
    if isinstance(expected, float):
        theirs = round(theirs / 1e6, 2)
    assert theirs == expected


def test_every_row_makes_a_model():
    """And resolves to itself, whatever is asked for again."""
    for name, row in published.ARCHITECTURES.items():
        cfg = models.resolve(ModelConfig(name=name))
        assert models.resolve(cfg) == cfg
        for field, value in row.items():
            if field != "image_size":
                assert getattr(cfg, field) == value, (name, field)
        assert vit_jax.create_model(name).cfg.image_size == row["image_size"]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("mocov3", "mocov3_"),
        ("dinov2", "webssl_|franca_|vit_.*_dinov2"),
        ("dinov3", "vit_.*_dinov3"),
    ],
)
def test_heads_that_no_file_states_are_those_of_its_family(family, names):
    known = next(row for row in FAMILIES if row.name == family)
    rows = {n: r for n, r in published.ARCHITECTURES.items() if re.match(names, n)}
    assert len(rows) > 1
    for name, row in rows.items():
        given = (row["width"], row["mlp_dim"], known.heads, known.head_width, name)
        assert guess_heads(*given) == row["heads"]


def test_a_file_of_timm_is_the_model_that_its_name_makes():
    """What no array shows: config.json of the Hub often has nothing but the name."""
    fields = (
        "heads",
        "map_heads",
        "layer_norm_eps",
        "rope",
        "rope_grid",
        "rope_offset",
    )
    for name, row in published.TIMM.items():
        known = timm_config.known_by(name, "config.json", row["width"])
        for field in (*fields, *["gelu"] * (row.get("mlp", "gelu") == "gelu")):
            default = getattr(ModelConfig, field)
            expected = row.get(field, default)
            assert known.get(field, default) == expected, (name, field)


@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [
        ("vit_base_patch16_224", "B", (16, 224)),
        ("timm/vit_base_patch16_384.augreg_in21k_ft_in1k", "B", (16, 384)),
        ("vit_base_patch16", "B", (16, 224)),
        ("VIT_LARGE_PATCH32_384", "L", (32, 384)),
        ("google/vit-large-patch16-224-in21k", "L", (16, 224)),
        ("openai/clip-vit-base-patch16", "B", (16, 224)),
        ("facebook/dinov2-small", "S", (14, 518)),
        ("vit_small_patch14_dinov2.lvd142m", "S", (14, 518)),
    ],
)
def test_familiar_names(name, size, sides):
    cfg = vit_jax.create_model(name).cfg
    assert models.sizes.SIZES[size] == (cfg.depth, cfg.width, cfg.mlp_dim, cfg.heads)
    assert (cfg.patch, cfg.image_size) == (sides[0], (sides[1], sides[1]))


def test_what_is_asked_for_wins_over_the_name():
    model = vit_jax.create_model(
        "openai/clip-vit-base-patch32", gelu="tanh", num_classes=512, image_size=64
    )
    cfg = model.cfg
    assert (cfg.gelu, cfg.norm_pre, cfg.layer_norm_eps) == ("tanh", True, 1e-5)
    assert (cfg.num_classes, cfg.image_size) == (512, (64, 64))
    # A config does not remember what was said, only what is not the default.
    cfg = models.resolve(ModelConfig(name="vit_base_patch16_224", layer_norm_eps=1e-3))
    assert (cfg.gelu, cfg.layer_norm_eps) == ("exact", 1e-3)


@pytest.mark.parametrize("name", ["vit_base_patch17_224", "dinov2", "vit_small_dinov2"])
def test_names_that_nobody_gave_are_refused(name):
    with pytest.raises(UserError, match="unknown model name") as error:
        vit_jax.create_model(name)
    assert "\n" not in str(error.value)


def test_list_models():
    everything = vit_jax.list_models()
    assert len(set(everything)) == len(everything)
    assert {"ViT-B/16", "R50+ViT-B/16", "R50x1"} < set(everything)
    found = vit_jax.list_models("*SMALL*dinov2*")
    assert found == ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"]
    for name in everything:
        vit_jax.create_model(name)
    checkpoints = vit_jax.list_models("*b*16*", pretrained=True)
    assert checkpoints
    assert not set(checkpoints) & set(everything)
