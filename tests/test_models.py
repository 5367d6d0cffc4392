# SPDX-License-Identifier: Apache-2.0
"""The model zoo by its exact numbers, and the Vision Transformer by its properties."""

import dataclasses
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import apply

import vit_jax
from vit_jax import models
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.models.attention import MlpBlock, MultiHeadAttention
from vit_jax.models.vit import EncoderBlock, stochastic_depth

TINY = ModelConfig(
    name="", width=24, depth=2, mlp_dim=40, heads=3, patch=8, num_classes=5
)


def tiny(**changes):
    return models.create(dataclasses.replace(TINY, **changes))


def images_of(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-1, 1, shape or (2, 16, 16, 3)), jnp.float32)


def init(model, shape=(2, 16, 16, 3), seed=1):
    """Parameters of which none is zero, so that each one matters. Nothing is compiled."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return fill(shapes, seed)


def fill(shapes, seed=1):
    rng = np.random.default_rng(seed)
    value = lambda path, x: (
        np.float32(path[-1].key == "scale")
        + np.asarray(rng.normal(0, 0.2, x.shape), x.dtype)
    )
    return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.fixture(scope="module")
def basic():
    """A model, its parameters and its logits."""
    model = tiny()
    params = init(model)
    return model, params, apply(model, params, images_of())


# --- the zoo -------------------------------------------------------------------------

# Without a head, with 1000 classes, and with pre_logits too; 21843 classes follow.
COUNTS = {
    "Ti/16": (5_524_416, 5_717_416, 5_754_472, 9_740_115, 9_777_171),
    "S/16": (21_665_664, 22_050_664, 22_198_504, 30_075_219, 30_223_059),
    "S/32": (22_493_952, 22_878_952, 23_026_792, 30_903_507, 31_051_347),
    "B/8": (85_807_872, 86_576_872, 87_167_464, 102_605_139, 103_195_731),
    "B/16": (85_798_656, 86_567_656, 87_158_248, 102_595_923, 103_186_515),
    "B/32": (87_455_232, 88_224_232, 88_814_824, 104_252_499, 104_843_091),
    "L/16": (303_301_632, 304_326_632, 305_376_232, 325_690_707, 326_740_307),
    "L/32": (305_510_400, 306_535_400, 307_585_000, 327_899_475, 328_949_075),
    "H/14": (630_764_800, 632_045_800, 633_685_480, 658_745_683, 660_385_363),
    "R50+B/16": (97_890_112, 98_659_112, 99_249_704, 114_687_379, 115_277_971),
    "R+Ti/16": (6_144_704, 6_337_704, 6_374_760, 10_360_403, 10_397_459),
    "R26+S/32": (36_046_912, 36_431_912, 36_579_752, 44_456_467, 44_604_307),
    "R26+B/32": (100_614_976, 101_383_976, 101_974_568, 117_412_243, 118_002_835),
    "R50+L/32": (327_969_856, 328_994_856, 330_044_456, 350_358_931, 351_408_531),
    "S/16 gap": (21_664_896, 22_049_896, 22_197_736, 30_074_451, 30_222_291),
    "S/32 gap": (22_493_184, 22_878_184, 23_026_024, 30_902_739, 31_050_579),
    "B/16 gap": (85_797_120, 86_566_120, 87_156_712, 102_594_387, 103_184_979),
    "B/32 gap": (87_453_696, 88_222_696, 88_813_288, 104_250_963, 104_841_555),
}

# (name, fields): parameters. The class token of big_vision has no position, ours has:
# there these are 768 fewer.
MORE_COUNTS = {
    ("B/16", "num_classes=1000", "image_size=384"): 86_859_496,
    ("B/16", "num_classes=1000", "image_size=512"): 87_203_560,
    ("B/32", "num_classes=1000", "image_size=384"): 88_297_192,
    ("B/8", "num_classes=1000", "image_size=384"): 87_744_232,
    ("L/16", "num_classes=1000", "image_size=384"): 304_715_752,
    ("L/16", "num_classes=1000", "image_size=512"): 305_174_504,
    ("L/32", "num_classes=1000", "image_size=384"): 306_632_680,
    ("H/14", "num_classes=1000", "image_size=518"): 633_470_440,
    ("R50+B/16", "num_classes=1000", "image_size=384"): 98_950_952,
    ("Ti/16", "num_classes=1000", "image_size=384"): 5_790_376,
    ("S/16", "num_classes=1000", "image_size=384"): 22_196_584,
    ("B/16", "num_classes=1000"): 86_566_888 + 768,
    ("B/16", "num_classes=1000", "pre_logits=True"): 87_157_480 + 768,
    ("B/16", "num_classes=21843"): 102_595_155 + 768,
    ("B/16", "num_classes=1000", "head=gap"): 86_566_120,
    ("B/16", "num_classes=21843", "head=gap"): 102_594_387,
    ("B/16", "num_classes=1000", "head=map"): 93_653_224,
    ("S/16", "num_classes=1000", "head=gap", "positions=sincos2d"): 21_974_632,
    (
        "S/16",
        "num_classes=1000",
        "head=gap",
        "positions=sincos2d",
        "pre_logits=True",
    ): 22_122_472,
    ("g/14", "head=map"): 1_036_448_384,
    ("g/14", "head=map", "num_classes=29593"): 1_078_144_921,
    ("G/14", "head=map"): 1_881_132_416,
    ("G/14", "head=map", "num_classes=29593"): 1_930_404_761,
    ("g/14", "head=gap"): 1_011_199_616,
    ("G/14", "head=gap"): 1_842_772_352,
    ("So400m/14", "head=map"): 427_680_704,
    ("e/14", "head=gap"): 3_805_417_728,
    ("g-opt/16", "head=map", "image_size=256"): 1_163_168_256,
    ("M/16", "head=gap", "num_classes=1000"): 38_836_712,
    ("mu/16", "head=gap", "num_classes=1000"): 76_648,
    # By hand from the formula: nobody has published a count of this one.
    ("G-opt/14", "head=gap"): 1_663_302_144,
}

# With 1000 classes.
RESNET_COUNTS = {
    "R50x1": 25_557_032,
    "R50x2": 98_004_072,
    "R101x1": 44_549_160,
    "R152x1": 60_192_808,
    "R152x4": 936_563_944,
    "R200x3": 568_656_040,
}

# With 1000 classes and without pre_logits; of a ViT 8 and 16 for each block.
ARRAYS = {
    "B/16": 200,
    "R50+B/16": 356,
    "R26+S/32": 287,
    "R+Ti/16": 203,
}


def shapes_of(name, image_size=224, **fields):
    model = vit_jax.create_model(name, image_size=image_size, **fields)
    images = jax.ShapeDtypeStruct((1, *model.cfg.image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.heavy
@pytest.mark.parametrize("row", COUNTS)
def test_parameter_counts_of_the_paper(row):
    name, _, head = row.partition(" ")
    fields = {"head": head or "token", "pre_logits": True, "num_classes": 21_843}
    shapes = shapes_of(name, layers="scan", **fields)  # traces one block, not all
    hidden, large = count(shapes["pre_logits"]), count(shapes["head"])
    small = large // 21_843 * 1000
    body = count(shapes) - hidden - large
    found = (body, body + small, body + small + hidden, body + large)
    assert (*found, count(shapes)) == COUNTS[row]


@pytest.mark.parametrize("row", MORE_COUNTS, ids=" ".join)
def test_more_parameter_counts(row):
    name, *fields = row
    values = dict(field.split("=") for field in fields)
    fields = {k: int(v) if v.isdecimal() else v for k, v in values.items()}
    fields |= {"pre_logits": True} if "pre_logits" in fields else {}
    assert count(shapes_of(name, layers="scan", **fields)) == MORE_COUNTS[row]


@pytest.mark.heavy
@pytest.mark.parametrize("name", RESNET_COUNTS)
def test_parameter_counts_of_resnets(name):
    assert count(shapes_of(name, 32, num_classes=1000)) == RESNET_COUNTS[name]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ARRAYS)
def test_number_of_arrays(name):
    shapes = shapes_of(name, num_classes=1000)
    assert len(jax.tree.leaves(shapes)) == ARRAYS[name]
    if name in COUNTS:
        assert count(shapes) == COUNTS[name][1]  # the loop has what the scan has


def test_pre_logits_are_two_arrays():
    shapes = shapes_of("B/16", layers="scan", num_classes=21_843, pre_logits=True)
    assert {*shapes["pre_logits"]} == {"kernel", "bias"}


def test_the_tables_cover_every_variant():
    names = {row.split()[0] for row in COUNTS} | {row[0] for row in MORE_COUNTS}
    sizes = {name.split("+")[-1].split("/")[0] for name in names}
    assert sizes == set(variants.SIZES)
    hybrids = {name for name in names if "+" in name}
    stems = {(name.split("+")[0], int(name.split("/")[1])) for name in hybrids}
    assert stems == set(variants.STEMS)
    resnets = {name.split("x")[0] for name in RESNET_COUNTS}
    assert resnets | {"R26"} == set(variants.RESNETS)  # R26 is counted as a stem


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B/16", ("B", 16)),
        ("vit-b_16", ("B", 16)),
        ("B/8", ("B", 8)),
        ("ViT_L_32", ("L", 32)),
        ("VIT-TI/16", ("Ti", 16)),
        ("so400m/14", ("So400m", 14)),
        ("vit-g/14", ("g", 14)),
        ("vit-G/14", ("G", 14)),
        ("g-OPT/16", ("g-opt", 16)),
        ("ViT-G-opt/16", ("G-opt", 16)),
        ("e/14", ("e", 14)),
        ("mu/16", ("mu", 16)),
    ],
)
def test_names(name, expected):
    cfg = models.resolve(ModelConfig(name=name))
    size = (cfg.depth, cfg.width, cfg.mlp_dim, cfg.heads)
    assert (variants.SIZES[expected[0]], expected[1]) == (size, cfg.patch)
    assert cfg.resnet_width == 0


@pytest.mark.parametrize(
    ("name", "resnet", "factor", "patch", "tokens"),
    [
        ("R50+ViT-B_16", (3, 4, 9), 1, 1, 14),
        ("r50+vit-l/16", (3, 4, 9), 1, 1, 14),
        ("R50x2+ViT-L/32", (3, 4, 6, 3), 2, 1, 7),
        ("R26_S_32", (2, 2, 2, 2), 1, 1, 7),
        ("R_Ti_16", (), 1, 8, 7),  # stride 32 in spite of the name
        ("r152X4", (3, 8, 36, 3), 4, 1, 7),
    ],
)
def test_names_with_a_resnet(name, resnet, factor, patch, tokens):
    cfg = models.resolve(ModelConfig(name=name))
    assert (cfg.resnet, cfg.resnet_width, cfg.patch) == (resnet, factor, patch)
    assert models.token_grid(cfg, (224, 224)) == (tokens, tokens)
    assert models.token_stride(cfg) == 224 // tokens
    assert models.resolve(cfg) == cfg


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("ViT-X/16", "did you mean 'ViT-"),
        ("ViT-B16", "did you mean 'ViT-B/16'"),
        ("ViT-So400/14", "did you mean 'ViT-So400m/14'"),
        ("R50+ViT-B/8", "did you mean 'R50+ViT-B/"),
        ("R51x1", "did you mean 'R50x1'"),
        ("ViT-B/0", "did you mean 'ViT-B/"),
        ("resnet", "a name is 'ViT-SIZE/PATCH'"),
    ],
)
def test_a_wrong_name_suggests_the_nearest(name, suggestion):
    with pytest.raises(UserError, match="unknown model name") as error:
        vit_jax.create_model(name)
    assert suggestion in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 5}, "model.heads is 5: it does not divide config.model.width 24"),
        ({"patch": 0}, "model.patch is 0"),
        ({"depth": -1}, "model.depth is -1"),
        ({"channels": 0}, "model.channels is 0"),
        ({"num_classes": -2}, "model.num_classes is -2"),
        ({"image_size": (7, 16)}, r"model.image_size is \(7, 16\): smaller than one"),
        ({"image_size": (-8, 16)}, r"model.image_size\[0\] is -8"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"stochastic_depth": -0.1}, "model.stochastic_depth is -0.1"),
        ({"resnet": (2, 0)}, r"model.resnet\[1\] is 0"),
        ({"width": 18, "rope": "pe"}, "model.rope is 'pe'"),
        ({"relative_bias": True, "registers": 1}, "model.relative_bias is True"),
        ({"axial": True}, r"model.axial is True: .*head='gap'"),
        ({"axial": True, "head": "gap", "rope": "pe"}, "model.axial .*model.rope='pe'"),
        ({"name": "R50x1", "axial": True, "depth": 0}, "model.axial .* no attention"),
        ({"distillation": "head", "head": "gap"}, "model.distillation is 'head'"),
        ({"distillation": "head", "pre_logits": True}, "model.distillation is 'head'"),
        ({"head": "map", "map_heads": 5}, "model.map_heads is 5"),
        ({"image_mean": (0.5,)}, r"model.image_mean is \(0.5,\): .*channels=3"),
        ({"image_std": (0.5, 0.0, 0.5)}, r"model.image_std\[1\] is 0.0"),
        ({"width": 27, "positions": "learned2d"}, "model.positions is 'learned2d'"),
        ({"width": 6, "positions": "sincos2d"}, "model.positions is 'sincos2d'"),
        ({"positions": "none", "position_at": "every"}, "model.position_at is 'every'"),
        ({"head": "masked_patch", "pre_logits": True}, "model.pre_logits is True"),
        ({"name": "R50x1", "pre_logits": True, "depth": 0}, "model.pre_logits is True"),
        ({"name": "R50x1", "head": "map", "depth": 0}, "model.head is 'map'"),
        ({"name": "R50x1", "dropout": 0.1, "depth": 0}, "model.dropout is 0.1"),
    ],
)
def test_impossible_sizes_are_refused_by_field(fields, message):
    with pytest.raises(UserError, match=message):
        tiny(**fields)


def test_create_model_takes_the_numbers_of_numpy():
    fields = {"num_classes": np.int64(3), "dropout": np.float64(0.5)}
    cfg = vit_jax.create_model("ViT-Ti/16", image_size=np.int32(32), **fields).cfg
    assert (cfg.num_classes, cfg.dropout, cfg.image_size) == (3, 0.5, (32, 32))
    assert type(cfg.num_classes) is type(cfg.image_size[0]) is int
    with pytest.raises(UserError, match=r"image_size\[0\] is 32.0 of type float"):
        vit_jax.create_model("ViT-Ti/16", image_size=32.0)


def test_create_model_names_unknown_fields():
    with pytest.raises(UserError, match=r"unknown key .*widht.*did you mean 'width'"):
        vit_jax.create_model("ViT-B/16", widht=3)
    model = vit_jax.create_model("mu/16", image_size=[32, 48], num_classes=3)
    assert model.cfg.image_size == (32, 48)


@pytest.mark.process
def test_the_package_imports_nothing_slow():
    code = (
        "import sys, vit_jax; "
        "print([m for m in ('tensorflow', 'jax', 'flax') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- inputs --------------------------------------------------------------------------


def test_any_size_and_number_of_channels():
    images, model = images_of(2, 24, 43, 5), tiny(channels=5)
    params = init(model, images.shape)
    table = params["Transformer"]["posembed_input"]["pos_embedding"]
    assert table.shape == (1, 3 * 5 + 1, 24)
    logits = apply(model, params, images)
    assert logits.shape == (2, 5)
    # The last 3 columns make no whole patch.
    np.testing.assert_allclose(
        logits, apply(model, params, images[:, :, :40]), atol=1e-5
    )


@pytest.mark.parametrize(
    "fields",
    [{"rope": "pe"}, {"rope": "dinov3"}, {"axial": True, "head": "gap"}],
    ids=str,
)
def test_no_images_give_no_logits(fields):
    model = tiny(**fields)
    outputs = lambda x: model.apply(model.init(jax.random.key(0), x), x[:0])
    shapes = jax.eval_shape(outputs, jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32))
    assert shapes.shape == (0, TINY.num_classes)


def test_images_that_do_not_fit_the_model(basic):
    model, params, _ = basic
    apply = lambda *shape: jax.eval_shape(
        model.apply, {"params": params}, images(shape)
    )
    images = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(UserError, match=r"shape.*model.channels"):
        apply(2, 16, 16, 1)
    with pytest.raises(UserError, match="4x16 pixels are smaller than one patch, 8x8"):
        apply(2, 4, 16, 3)
    with pytest.raises(UserError, match=r"images are uint8: .*\[-1, 1\]"):
        model.apply({"params": params}, np.zeros((2, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"positions": "learned"},
        {"positions": "learned", "registers": 3, "distillation": "token"},
        {"positions": "learned2d"},
        {"positions": "relative"},
        {"positions": "none", "relative_bias": True},
    ],
    ids=str,
)
def test_images_of_another_size_name_both_sizes(fields, sized):
    model = tiny(**fields, image_size=(16, 16) if sized else (0, 0))
    params = init(model)
    images = lambda *shape: jax.ShapeDtypeStruct((2, *shape, 3), jnp.float32)
    apply = lambda *size: jax.eval_shape(model.apply, {"params": params}, images(*size))
    message = r"images of 24x32 pixels do not fit .*made for 16x16.*vit_jax.load\("
    with pytest.raises(UserError, match=message):
        apply(24, 32)
    if sized:  # as many patches, but in another shape
        with pytest.raises(UserError, match=r"8x32 .* 16x16"):
            apply(8, 32)


# --- the Transformer -----------------------------------------------------------------


@pytest.mark.heavy
def test_initial_values():
    model = vit_jax.create_model(
        "", width=192, depth=1, mlp_dim=768, heads=3, patch=16, head="map",
        num_classes=10, pre_logits=True, head_bias=-6.9,
    )  # fmt: skip
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    encoder = params["Transformer"]
    block = encoder["encoderblock_0"]
    pooling = params["MAPHead_0"]

    # Flax: truncated at two sigma, then rescaled; fan in is P P C.
    embedding, deviation = params["embedding"]["kernel"], (16 * 16 * 3) ** -0.5
    assert np.std(embedding) == pytest.approx(deviation, rel=0.02)
    assert np.abs(embedding).max() <= 2.001 * deviation / 0.87962566
    table = encoder["posembed_input"]["pos_embedding"]
    assert np.std(table) == pytest.approx(0.02, rel=0.02)
    for attention in (
        block["MultiHeadDotProductAttention_1"],
        pooling["MultiHeadDotProductAttention_0"],
    ):
        limit = (3 / 192) ** 0.5
        for name in ("query", "key", "value", "out"):
            kernel = np.asarray(attention[name]["kernel"])
            assert 0.999 * limit < np.abs(kernel).max() <= limit
            assert np.std(kernel) == pytest.approx(limit / 3**0.5, rel=0.02)
            assert not np.any(attention[name]["bias"])
    for mlp in (block["MlpBlock_3"], pooling["MlpBlock_0"]):
        limit = (6 / (192 + 768)) ** 0.5
        for name in ("Dense_0", "Dense_1"):
            assert 0.999 * limit < np.abs(mlp[name]["kernel"]).max() <= limit
            assert np.std(mlp[name]["bias"]) == pytest.approx(1e-6, rel=0.2)
    limit = (6 / (1 + 192)) ** 0.5
    assert 0.9 * limit < np.abs(pooling["probe"]).max() <= limit
    hidden, head = params["pre_logits"], params["head"]
    assert np.std(hidden["kernel"]) == pytest.approx(192**-0.5, rel=0.02)
    for zeros in (params["embedding"]["bias"], hidden["bias"], head["kernel"]):
        assert not np.any(zeros)
    for norm in (block["LayerNorm_0"], block["LayerNorm_2"], encoder["encoder_norm"]):
        assert np.all(norm["scale"] == 1)
        assert not np.any(norm["bias"])
    assert np.all(head["bias"] == np.float32(-6.9))


def block_and_input(**fields):
    block = EncoderBlock(tiny(**fields).cfg, (16, 16), train=False)
    z = images_of(2, 5, 24, seed=3)
    rate = jnp.float32(0)
    shapes = jax.eval_shape(block.init, jax.random.key(0), z, rate, None)["params"]
    params = fill(shapes)
    return jax.jit(lambda z: block.apply({"params": params}, z, rate, None)[0]), z


def test_permuting_tokens_commutes_with_a_block():
    order = np.array([3, 0, 4, 2, 1])
    block, z = block_and_input()
    np.testing.assert_allclose(block(z)[:, order], block(z[:, order]), atol=1e-5)
    block, z = block_and_input(positions="relative")
    assert np.abs(block(z)[:, order] - block(z[:, order])).max() > 1e-2


def test_the_mlp_is_local_and_attention_is_global():
    """Which outputs (rows) depend on which inputs (columns)."""
    cfg, z = tiny().cfg, images_of(1, 5, 24)

    def dependence(module, *args):
        p = fill(jax.eval_shape(module.init, jax.random.key(0), *args))
        sums = lambda z: module.apply(p, *[z] * len(args))[0].sum(-1)
        return np.any(jax.jit(jax.jacobian(sums))(z)[:, 0], axis=-1)

    np.testing.assert_array_equal(dependence(MlpBlock(cfg), z), np.eye(5))
    assert dependence(MultiHeadAttention(cfg), z, z).all()


def patches_moved(images, order):
    """The image whose patches, 8 x 8, are in another order."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // 8, 8, w // 8, 8, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, -1, 8, 8, c)[:, order]
    x = x.reshape(b, h // 8, w // 8, 8, 8, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h, w, c)


def test_only_positions_tell_the_order_of_patches():
    model = tiny(head="gap")
    images, params = images_of(), init(model)
    both = jnp.concatenate([images, patches_moved(images, np.array([2, 0, 3, 1]))])
    logits, moved = jnp.split(apply(model, params, both), 2)
    assert np.abs(logits - moved).max() > 1e-2
    params["Transformer"]["posembed_input"]["pos_embedding"] *= 0
    logits, moved = jnp.split(apply(model, params, both), 2)
    np.testing.assert_allclose(logits, moved, atol=1e-5)


def test_patches_in_raster_order():
    """x_p E by hand: row by row, and row, column, channel within each patch."""
    images, model = images_of(2, 16, 24, 3), tiny(depth=1)
    params = init(model, images.shape)

    def embed(images):
        which = lambda module, _: module.name == "embedding"
        options = {"mutable": ["intermediates"], "capture_intermediates": which}
        _, seen = apply(model, params, images, **options)
        return np.asarray(seen["intermediates"]["embedding"]["__call__"][0])

    x = np.asarray(images).reshape(2, 2, 8, 3, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    expected = x.reshape(12, 192) @ params["embedding"]["kernel"].reshape(192, 24)
    expected = expected + params["embedding"]["bias"].reshape(1, 24)
    np.testing.assert_allclose(embed(images).reshape(12, 24), expected, atol=1e-4)
    # A shift by a patch moves the embeddings, and does nothing else.
    shifted = embed(jnp.roll(images, 8, axis=2))
    np.testing.assert_allclose(shifted, np.roll(embed(images), 1, axis=2), atol=1e-4)


def test_gelu_and_epsilon_are_those_of_the_config(basic):
    _, params, logits = basic
    other = apply(tiny(layer_norm_eps=1e-2), params, images_of())
    assert 1e-4 < np.abs(other - logits).max() < 0.5
    u = images_of(1, 4, 24) * 3
    difference = {}
    for gelu in ("tanh", "exact"):
        mlp = MlpBlock(tiny(gelu=gelu).cfg)
        p = fill(jax.eval_shape(mlp.init, jax.random.key(0), u))["params"]
        h = np.asarray(u[0]) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None]
        h = np.asarray(h * 0.5 * (1 + jax.scipy.special.erf(h / 2**0.5)))
        expected = h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"][None]
        difference[gelu] = np.abs(apply(mlp, p, u)[0] - expected).max()
    assert difference["exact"] < 2e-6
    assert 1e-4 < difference["tanh"] < 5e-3


# --- ways to compute the same --------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"head": "map", "pre_logits": True},
        {"head": "none"},
        {"head": "masked_patch"},
        {"head": "gap", "resnet": (1,), "patch": 2},
        {"positions": "learned2d", "position_at": "every"},
        {"positions": "sincos2d", "position_at": "shared"},
        {"positions": "relative"},
        {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth": 0.1},
        {"layers": "scan", "stochastic_depth": 0.1},
    ],
    ids=str,
)
def test_bfloat16_reaches_every_block(fields):
    """A float32 table added to the stream would make all that follows float32."""
    model = tiny(dtype="bfloat16", **fields)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    options = {"mutable": ["params", "intermediates"], "capture_intermediates": True}
    (logits, out), variables = jax.eval_shape(
        lambda: model.init_with_output(
            keys, images_of(), train=True, method="forward", **options
        )
    )
    assert logits.dtype == out["pre_logits"].dtype == "float32"
    assert {x.dtype.name for x in jax.tree.leaves(variables["params"])} == {"float32"}
    captured = variables["intermediates"]
    encoder = captured["Transformer"]
    blocks = [v for k, v in encoder.items() if k.startswith("encoderblock")]
    assert len(blocks) == (1 if "layers" in fields else 2)
    for block in blocks:
        attention = block["MultiHeadDotProductAttention_1"]
        assert block["tokens"][0].dtype == "bfloat16"
        assert attention["__call__"][0].dtype == "bfloat16"
        assert attention["attention"][0].dtype == "float32"
        assert block["MlpBlock_3"]["__call__"][0].dtype == "bfloat16"
    assert encoder["__call__"][0].dtype == captured["embedding"]["__call__"][0].dtype
    assert encoder["__call__"][0].dtype == "bfloat16"
    for name, stage in captured.items():
        if name.startswith("block"):
            assert stage["__call__"][0].dtype == "bfloat16"


def test_bfloat16_is_close_to_float32(basic):
    _, params, logits = basic
    low = apply(tiny(dtype="bfloat16"), params, images_of())
    assert 0 < np.abs(low - logits).max() < 0.05 * np.abs(logits).max()


def stacked(params):
    """The parameters, or what was seen, in the form of ``layers="scan"``."""
    encoder = dict(params["Transformer"])
    blocks = [encoder.pop(k) for k in sorted(encoder) if k.startswith("encoderblock_")]
    encoder["encoderblock"] = jax.tree.map(lambda *x: np.stack(x), *blocks)
    return params | {"Transformer": encoder}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"positions": "relative"},
        {"position_at": "every"},
        {"position_at": "shared"},
    ],
    ids=str,
)
def test_scan_gives_what_the_loop_gives(fields):
    """Also attention and tokens, when one looks at them."""
    images, loop, scan = images_of(), tiny(**fields), tiny(layers="scan", **fields)
    params = init(loop)
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    assert shapes(init(scan)) == shapes(stacked(params))
    logits, seen = apply(loop, params, images, mutable=["intermediates"])
    other, scanned = apply(scan, stacked(params), images, mutable=["intermediates"])
    np.testing.assert_allclose(logits, other, atol=1e-5)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5)
    jax.tree.map(close, stacked(seen["intermediates"]), scanned["intermediates"])


@pytest.fixture(scope="module")
def gradient():
    """Gradient with dropout, of a model with these fields, and the program text."""

    def compute(**fields):
        model = tiny(dropout=0.2, stochastic_depth=0.2, **fields)
        options = {"train": True, "rngs": {"dropout": jax.random.key(2)}}
        loss = lambda p: model.apply({"params": p}, images_of(), **options)[:, 0].sum()
        gradient, params = jax.grad(loss), init(model)
        return jax.jit(gradient)(params), str(jax.make_jaxpr(gradient)(params))

    plain = {layers: compute(layers=layers) for layers in ("loop", "scan")}
    return compute, plain


@pytest.mark.heavy
@pytest.mark.parametrize(("remat", "layers"), [("full", "loop"), ("dots", "scan")])
def test_remat_gives_the_same_gradients(remat, layers, gradient):
    """With the same dropout: the recomputation must draw the same numbers."""
    compute, plain = gradient
    again, program = compute(layers=layers, remat=remat)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, plain[layers][0], again)
    assert "checkpoint" in program or "remat" in program
    assert ("policy=None" in program) == (remat == "full")
    assert "checkpoint" not in plain[layers][1]
    assert "remat" not in plain[layers][1]


@pytest.mark.heavy
@pytest.mark.parametrize("layers", ["loop", "scan"])
def test_on_block_params_changes_what_blocks_read(layers):
    """Whatever else happens to the blocks; the names of parameters stay."""
    cfg = tiny(layers=layers, remat="full").cfg
    params = init(models.create(cfg))
    twice = lambda tree: jax.tree.map(lambda x: 2 * x, tree)
    doubled = {
        k: twice(v) if k.startswith("encoderblock") else v
        for k, v in params["Transformer"].items()
    }
    looking = {"mutable": ["intermediates"]}
    expected, seen = apply(
        models.create(cfg), params | {"Transformer": doubled}, images_of(), **looking
    )
    logits, again = apply(models.create(cfg, twice), params, images_of(), **looking)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert jax.tree.structure(seen) == jax.tree.structure(again)


def test_looking_inside_does_not_change_the_logits(basic):
    model, params, logits = basic
    looking, seen = apply(model, params, images_of(), mutable=["intermediates"])
    np.testing.assert_array_equal(looking, logits)
    blocks = seen["intermediates"]["Transformer"]
    assert set(blocks) == {"encoderblock_0", "encoderblock_1"}
    for block in blocks.values():
        (weights,) = block["MultiHeadDotProductAttention_1"]["attention"]
        assert weights.shape == (2, 3, 5, 5)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        assert block["tokens"][0].shape == (2, 5, 24)


def test_forward_returns_what_the_head_reads(basic):
    model, params, logits = basic
    again, out = apply(model, params, images_of(), method="forward")
    np.testing.assert_array_equal(logits, again)
    head, norm = params["head"], params["Transformer"]["encoder_norm"]
    np.testing.assert_array_equal(out["pre_logits"], out["tokens"][:, 0])
    expected = out["pre_logits"] @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    z = np.asarray(out["tokens"]) - norm["bias"].reshape(1, 1, 24)
    z = z / norm["scale"].reshape(1, 1, 24)  # undoes the last LayerNorm
    np.testing.assert_allclose(z.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(-1), 1, atol=1e-3)


# --- randomness ----------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("field", ["dropout", "attention_dropout", "stochastic_depth"])
def test_dropout_only_in_training(field, basic):
    _, params, logits = basic
    model, images = tiny(**{field: 0.5}), images_of()
    np.testing.assert_array_equal(apply(model, params, images), logits)

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, images, train=True, rngs=rngs)

    a, b = train(0), train(3)
    assert np.abs(a - logits).max() > 1e-3
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(a, train(0))


def test_dropout_is_after_positions_and_every_dense_layer_but_qkv():
    """Appendix B.1: E_pos; attention weights if asked; out; GELU; second MLP layer."""
    model = tiny(dropout=0.1, attention_dropout=0.2, pre_logits=True)
    found = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and not context.module.deterministic:
            found.append((context.module.rate, args[0].shape))
        return call(*args, **kwargs)

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: model.init(keys, images_of(), train=True))
    tokens, hidden = (0.1, (2, 5, 24)), (0.1, (2, 5, 40))
    attention = (0.2, (2, 3, 5, 5))
    assert found == [tokens, *2 * [attention, tokens, hidden, tokens]]


@pytest.mark.heavy
@pytest.mark.parametrize("layers", ["loop", "scan"])
def test_stochastic_depth_grows_with_depth(layers):
    model = tiny(stochastic_depth=0.6, depth=3, layers=layers, positions="none")
    images = jnp.broadcast_to(images_of(1, 8, 8, 3), (2_000, 8, 8, 3))
    params = init(model, images.shape)
    options = {"train": True, "rngs": {"dropout": jax.random.key(0)}}
    _, seen = apply(model, params, images, mutable=["intermediates"], **options)
    encoder = seen["intermediates"]["Transformer"]
    if layers == "loop":
        encoder = stacked(seen["intermediates"])["Transformer"]
    z = np.asarray(encoder["encoderblock"]["tokens"][0])
    assert np.ptp(z[0], axis=0).max() == 0  # the first block drops nothing
    # An image stays as it is where both branches of a block are dropped.
    same = [np.all(z[i] == z[i - 1], axis=(1, 2)) for i in (1, 2)]
    assert np.mean(same[0]) == pytest.approx(0.3**2, abs=0.03)
    assert np.mean(same[1]) == pytest.approx(0.6**2, abs=0.04)
    both = np.mean(same[0] & same[1])  # independent from block to block
    assert both == pytest.approx(0.3**2 * 0.6**2, abs=0.02)


def test_stochastic_depth_keeps_the_expectation():
    y = jnp.ones((4_000, 2, 3))
    out = np.asarray(stochastic_depth(y, jnp.float32(0.25), jax.random.key(0)))
    np.testing.assert_allclose(np.unique(out), [0, 4 / 3], rtol=1e-6)
    assert np.ptp(out, axis=(1, 2)).max() == 0  # whole images
    assert np.mean(out) == pytest.approx(1, abs=0.03)


# --- other people's numbers ----------------------------------------------------------


def golden_params(path):
    """Released names to ours, by hand; the real thing is vit_jax.weights."""
    renumber = {
        "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
        "LayerNorm_1": "LayerNorm_2",
        "MlpBlock_0": "MlpBlock_3",
    }
    tree = {}
    for key, value in np.load(path).items():
        parts = [renumber.get(p, p) for p in key.removeprefix("params/").split("/")]
        if parts == ["pos_embedding"]:
            parts = ["Transformer", "posembed_input", "pos_embedding"]
        if value.ndim == 4 and parts[-1] in ("scale", "bias"):
            value = value.reshape(-1)  # GroupNorm
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = value
    return tree


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("vt_token_rep", {"pre_logits": True}),
        ("vt_hybrid", {"patch": 1, "resnet": (1, 1)}),
        ("bv_gap_rep", {"pre_logits": True, "head": "gap"}),
        ("bv_gap_rep", {"pre_logits": True, "head": "gap", "layers": "scan"}),
    ],
)
def test_golden_logits(case, fields, shared):
    sizes = {"patch": 8, "width": 48, "depth": 3, "heads": 3, "mlp_dim": 96}
    model = vit_jax.create_model("", **(sizes | {"num_classes": 7} | fields))
    params = golden_params(shared / "golden" / f"{case}.weights.npz")
    if "layers" in fields:
        params = stacked(params)
    io = np.load(shared / "golden" / f"{case}.io.npz")
    logits, out = apply(model, params, io["images"], method="forward")
    np.testing.assert_allclose(logits, io["logits"], atol=1e-4)
    np.testing.assert_allclose(out["pre_logits"], io["features"], atol=1e-4)
