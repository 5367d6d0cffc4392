# SPDX-License-Identifier: Apache-2.0
"""Every generation and spelling of the same weights gives the same parameters."""

import ml_dtypes
import numpy as np
import pytest
from compiled import apply
from flax import serialization
from weights_files import POSITIONS, SMALL, assert_same, save_npz, small_model

import vit_jax
from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.weights import fit, layout, positions


def linen(flat):
    """Names of today's official code and of big_vision: counted per kind."""
    new = {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
    new |= {"LayerNorm_2": "LayerNorm_1", "MlpBlock_3": "MlpBlock_0"}
    result = {}
    for name, value in flat.items():
        for a, b in new.items():
            name = name.replace(a, b)
        result[name] = value
    return result


def big_vision(flat):
    """Class token folded: the table has no row for it and stands at the top level."""
    flat = linen(flat)
    table = flat.pop(POSITIONS)
    if "cls" in flat:
        flat["cls"] = flat["cls"] + table[:, :1]
        table = table[:, 1:]
    return flat | {"pos_embedding": table}


def stacked(flat):
    result = {k: v for k, v in flat.items() if "encoderblock_" not in k}
    for name in flat:
        if "encoderblock_0/" in name:
            layers = [flat[name.replace("_0/", f"_{i}/", 1)] for i in range(2)]
            result[name.replace("encoderblock_0/", "encoderblock/", 1)] = np.stack(
                layers
            )
    return result


def prefixed(prefix, extra=()):
    return lambda flat: {prefix + k: v for k, v in flat.items()} | dict(extra)


def old_position_name(flat):
    flat = dict(flat)
    return flat | {"Transformer/pos_embedding": flat.pop(POSITIONS)}


OPTIMIZER = {"opt/0/mu/head/kernel": np.zeros((16, 5), np.float32)}
GENERATIONS = {
    "original": lambda flat: flat,
    "linen": linen,
    "scan": stacked,
    "scan, linen": lambda flat: stacked(linen(flat)),
    "params/": prefixed("params/", OPTIMIZER),
    "params/, linen": lambda flat: prefixed("params/", OPTIMIZER)(linen(flat)),
    "opt/target/": prefixed("opt/target/", {"opt/state/step": np.int64(3)}),
    "old name of the table": old_position_name,
    "two towers": prefixed("params/img/", {"params/txt/embedding": np.zeros(3)}),
}


@pytest.fixture(scope="module")
def token():
    return small_model(pre_logits=True)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_generations(token, tmp_path, generation):
    model, flat = token
    file = save_npz(tmp_path / "x.npz", GENERATIONS[generation](flat))
    found = weights.read(file)
    assert_same(found.params, flat)
    assert found.cfg == model.cfg


def test_folded_class_token_gives_the_same_logits(token, tmp_path):
    model, flat = token
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    want = apply(model, fit.unflatten(flat), images)
    other, params = vit_jax.load(save_npz(tmp_path / "x.npz", big_vision(flat)))
    np.testing.assert_allclose(apply(other, params, images), want, atol=1e-5)
    assert not np.asarray(params["Transformer"]["posembed_input"]["pos_embedding"])[
        0, 0
    ].any()


def test_axial_attention_is_recognised(tmp_path):
    _, flat = small_model(head="gap", axial=True)
    found = weights.read(save_npz(tmp_path / "x.npz", flat))
    assert (found.cfg.axial, found.cfg.depth) == (True, 2)
    assert_same(found.params, flat)


def test_mean_pooling_of_big_vision(tmp_path):
    _, flat = small_model(head="gap")
    found = weights.read(
        save_npz(tmp_path / "x.npz", prefixed("params/")(big_vision(flat)))
    )
    assert found.cfg.head == "gap"
    assert_same(found.params, flat)


@pytest.mark.parametrize("inline", [False, True])
def test_attention_pooling(tmp_path, inline):
    model, flat = small_model(head="map", pre_logits=False)
    names = big_vision(flat)
    if inline:
        names = {k.removeprefix("MAPHead_0/"): v for k, v in names.items()}
    found = weights.read(save_npz(tmp_path / "x.npz", names))
    assert found.cfg == model.cfg
    assert_same(found.params, flat)


def test_subtree_by_name(token, tmp_path):
    _, flat = token
    two = prefixed("params/img/")(flat) | prefixed("params/other/")(flat)
    file = save_npz(tmp_path / "x.npz", two)
    assert_same(weights.read(f"{file}:img").params, flat)
    assert_same(weights.read(f"{file}:other").params, flat)
    with pytest.raises(UserError, match=r"x.npz:img"):
        weights.read(f"{file}:txt")


def test_bfloat16_is_recovered(token, tmp_path):
    _, flat = token
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in flat.items()}
    file = save_npz(tmp_path / "x.npz", half)
    assert np.load(file)["head/bias"].dtype.kind == "V"  # numpy lost the type
    assert_same(
        weights.read(file).params, {k: v.astype(np.float32) for k, v in half.items()}
    )


@pytest.mark.parametrize("resnet", [(), (1, 1)])
def test_hybrids_and_their_old_group_norms(tmp_path, resnet):
    model, flat = small_model(32, resnet=resnet, resnet_width=1, patch=1)
    old = {
        k: v.reshape(1, 1, 1, -1) if "/gn" in f"/{k}" else v for k, v in flat.items()
    }
    found = weights.read(save_npz(tmp_path / "x.npz", old))
    assert found.cfg == model.cfg
    assert_same(found.params, flat)


def test_resnet_baseline(tmp_path):
    model = vit_jax.create_model("", resnet=(1, 2), num_classes=5, image_size=224)
    flat = fit.flatten(fit.initial(model.cfg))
    found = weights.read(save_npz(tmp_path / "x.npz", flat))
    assert found.cfg == model.cfg
    assert_same(found.params, flat)


@pytest.mark.parametrize("layers", ["loop", "scan"])
@pytest.mark.parametrize("stored", ["loop", "scan"])
def test_layers_to_and_from_scan(token, tmp_path, layers, stored):
    _, flat = token
    file = save_npz(tmp_path / "x.npz", stacked(flat) if stored == "scan" else flat)
    found = weights.read(file, layers=layers)
    assert_same(found.params, stacked(flat) if layers == "scan" else flat)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"params": t},
        lambda t: {"target": {"params": t}, "state": {"step": np.int32(3)}},
        lambda t: (t, {"mu": {"head": np.zeros(3)}}, 7),  # what the official code saves
    ],
)
def test_flax_msgpack(token, tmp_path, wrap):
    _, flat = token
    file = tmp_path / "checkpoint_7"
    file.write_bytes(serialization.to_bytes(wrap(fit.unflatten(linen(flat)))))
    assert_same(weights.read(file).params, flat)
    assert_same(weights.read(tmp_path).params, flat)


def test_renaming_is_idempotent(token):
    _, flat = token
    once = layout.rename(list(linen(flat)))
    assert set(once.values()) == flat.keys()
    assert layout.rename(list(flat)) == {k: k for k in flat}


@pytest.mark.parametrize(
    ("positions", "at"),
    [
        ("learned2d", "stem"),
        ("learned2d", "every"),
        ("relative", "stem"),
        ("learned", "every"),
    ],
)
def test_other_positions(tmp_path, positions, at):
    size = (16, 24) if positions == "learned2d" else 16
    model, flat = small_model(size, positions=positions, position_at=at)
    found = weights.read(save_npz(tmp_path / "x.npz", flat))
    assert found.cfg == model.cfg
    assert_same(found.params, flat)


def test_no_table_means_waves_and_says_so(tmp_path):
    _, flat = small_model(positions="sincos2d", head="gap")
    file = save_npz(tmp_path / "x.npz", flat)
    found = weights.read(file, image_size=16)
    assert found.cfg.positions == "sincos2d"
    assert any("positions='none'" in line for line in found.report.lines)
    assert weights.read(file, 16, positions="none").cfg.positions == "none"


def test_names_of_the_table_are_found(tmp_path):
    sizes = {k: v for k, v in SMALL.items() if k == "num_classes"}
    model = vit_jax.create_model("ViT-mu/16", image_size=32, **sizes)
    flat = fit.flatten(fit.initial(model.cfg))
    assert weights.read(save_npz(tmp_path / "x.npz", flat)).cfg == model.cfg


def test_not_square(tmp_path):
    _, flat = small_model(image_size=(24, 32))
    file = save_npz(tmp_path / "x.npz", flat)
    assert_same(weights.read(file, (24, 32)).params, flat)
    with pytest.raises(UserError, match="image_size="):
        weights.read(file)


def test_square_table_for_other_images_of_as_many_patches(tmp_path):
    """2 x 2 and 1 x 4 patches: only metadata can say that a table is no square."""
    model, flat = small_model(image_size=16)
    found = weights.read(save_npz(tmp_path / "x.npz", flat), (8, 32))
    want = positions.resize_table(flat[POSITIONS], (2, 2), (1, 4))
    assert_same(found.params, flat | {POSITIONS: want})
    assert "from 2 x 2 to 1 x 4" in found.report.lines[0]
    model, flat = small_model(image_size=(8, 32))
    weights.save(tmp_path / "y.npz", model.cfg, fit.unflatten(flat))
    assert_same(weights.read(tmp_path / "y.npz", (8, 32)).params, flat)
