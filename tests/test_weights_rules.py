# SPDX-License-Identifier: Apache-2.0
"""Which array survives loading: head, pre_logits, class token, positions."""

import logging

import jax
import numpy as np
import pytest
from weights_files import POSITIONS, SMALL, assert_same, save_npz, small_model

import vit_jax
from vit_jax import weights
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.weights import fit, positions

PRE = ("pre_logits/kernel", "pre_logits/bias")
HEAD = ("head/kernel", "head/bias")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{(head, pre_logits): (path, flat parameters)}"""
    folder = tmp_path_factory.mktemp("files")
    result = {}
    for head in ("token", "gap", "map"):
        for pre in (False, True):
            _, flat = small_model(head=head, pre_logits=pre)
            result[head, pre] = (save_npz(folder / f"{head}{pre}.npz", flat), flat)
    return result


def finetune(source, num_classes=3, **overrides):
    found = weights._read(
        source, None, {"num_classes": num_classes, **overrides}, new_head=True
    )
    return fit.flatten(found.params), found.report.lines


def config(**fields):
    values = {**SMALL, "name": "", "image_size": (16, 16), **fields}
    return ModelConfig(**values)


@pytest.mark.parametrize("classes", [5, 3, 0])
@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("has", [False, True])
def test_pre_logits_and_head(files, has, wants, classes):
    """{has, lacks pre_logits} x {wanted, not} x {same, other, no classes}."""
    path, flat = files["token", has]
    got, lines = finetune(path, classes, pre_logits=wants)
    assert set(PRE) <= got.keys() if wants else not set(PRE) & got.keys()
    if has and wants:
        np.testing.assert_array_equal(got[PRE[0]], flat[PRE[0]])
    if wants and not has:
        assert got[PRE[0]].any()  # a hidden layer of zeros would never learn
        assert any(x.startswith("re-initialised: pre_logits/kernel") for x in lines)
    if has and not wants:
        assert any(x.startswith("ignored: pre_logits/kernel") for x in lines)
    if classes:
        assert got["head/kernel"].shape == (16, classes)
        assert not got["head/kernel"].any()
        assert any("re-initialised: head" in x for x in lines)
    else:
        assert "head/kernel" not in got
        assert any(x.startswith("ignored: head/kernel") for x in lines)
    rest = {k: v for k, v in flat.items() if k not in PRE + HEAD}
    for name, value in rest.items():
        np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("wanted", ["token", "gap", "map"])
@pytest.mark.parametrize("has", ["token", "gap", "map"])
def test_class_token_and_its_row(files, has, wanted):
    path, flat = files[has, False]
    got, _ = finetune(path, head=wanted)
    old, new = flat[POSITIONS][0], got[POSITIONS][0]
    patches = old[has == "token" :]
    np.testing.assert_array_equal(new[wanted == "token" :], patches)
    assert ("cls" in got) == (wanted == "token")
    assert ("MAPHead_0/probe" in got) == (wanted == "map")
    if wanted == "token":
        if has == "token":
            np.testing.assert_array_equal(new[0], old[0])
        else:
            assert new[0].any()  # as a new model begins
    if wanted == has == "map":
        np.testing.assert_array_equal(got["MAPHead_0/probe"], flat["MAPHead_0/probe"])


@pytest.mark.parametrize("image_size", [16, 24])
@pytest.mark.parametrize("head", ["token", "gap"])
def test_load_never_touches_the_head(files, head, image_size):
    path, flat = files[head, True]
    found = weights.read(path, image_size)
    grid = (image_size // 8,) * 2
    table = positions.resize_table(flat[POSITIONS], (2, 2), grid)
    assert table.shape[1] == grid[0] ** 2 + (head == "token")
    assert_same(found.params, flat | {POSITIONS: table})
    assert found.cfg.num_classes == 5
    resized = [x for x in found.report.lines if "resized" in x]
    assert len(resized) == (image_size != 16)


def test_image_size_is_one_integer_or_two(files):
    path, _ = files["token", False]
    for size in (np.int64(24), [24, np.int32(24)], (24, 24)):
        assert weights.read(path, size).cfg.image_size == (24, 24)
    for size in (3.5, (24, 24, 3), (24.0, 24), "24", -8, (24, None)):
        with pytest.raises(UserError, match="must be a side"):
            weights.read(path, size)


def test_load_without_a_head_gives_features(files, tmp_path):
    _, flat = files["token", True]
    body = {k: v for k, v in flat.items() if k not in HEAD}
    model, params = vit_jax.load(save_npz(tmp_path / "x.npz", body))
    assert model.cfg.num_classes == 0
    shape = jax.eval_shape(
        lambda: model.apply({"params": params}, np.zeros((2, 16, 16, 3), np.float32))
    ).shape
    assert shape == (2, 16)


@pytest.mark.parametrize("key", ["num_classes", "pre_logits", "width"])
def test_load_refuses_what_would_change_arrays(files, key):
    with pytest.raises(UserError, match="load_for_finetune"):
        vit_jax.load(files["token", False][0], **{key: "gap"})


def test_load_knows_other_names_of_a_field(files):
    with pytest.raises(UserError, match="did you mean 'image_size'"):
        vit_jax.load(files["token", False][0], img_size=24)


def test_load_refuses_another_head(files):
    with pytest.raises(UserError, match="head is stated as 'gap', but the arrays"):
        vit_jax.load(files["token", False][0], head="gap")


def test_overrides_without_arrays(files):
    path, _ = files["token", False]
    model, params = vit_jax.load_for_finetune(
        path, 3, 24, dropout=0.1, dtype="bfloat16", layers="scan", head_bias=-2.0
    )
    assert (model.cfg.dropout, model.cfg.dtype) == (0.1, "bfloat16")
    assert model.cfg.image_size == (24, 24)
    assert "encoderblock" in params["Transformer"]
    assert (np.asarray(params["head"]["bias"]) == -2).all()
    with pytest.raises(UserError, match="did you mean 'dropout'"):
        vit_jax.load_for_finetune(path, 3, dropuot=0.1)


def test_colour_weights_for_grey_images(files):
    path, flat = files["token", False]
    got, lines = finetune(path, channels=1)
    want = flat["embedding/kernel"].sum(axis=2, keepdims=True)
    np.testing.assert_array_equal(got["embedding/kernel"], want)
    assert any(line.startswith("summed") for line in lines)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Transformer/encoderblock_1/LayerNorm_2/bias", "missing"),
        ("Transformer/encoder_norm/scale", "missing"),
        ("Transformer/encoderblock_0/adapter/kernel", "unexpected"),
        ("extra", "unexpected"),
    ],
)
def test_unexplained_arrays_are_errors(files, tmp_path, name, what):
    _, flat = files["token", False]
    flat = dict(flat)
    if what == "missing":
        del flat[name]
    else:
        flat[name] = np.ones(3, np.float32)
    file = save_npz(tmp_path / "x.npz", flat)
    for call in (
        lambda: weights.read(file),
        lambda: finetune(file),
        lambda: weights.load_for_training(file, config()),
    ):
        with pytest.raises(UserError, match=f"{what} {name}"):
            call()


def test_all_problems_at_once(files, tmp_path):
    _, flat = files["token", False]
    flat = dict(flat)
    del flat["Transformer/encoder_norm/scale"]
    flat["Transformer/encoderblock_1/LayerNorm_0/bias"] = np.ones(7, np.float32)
    flat["extra"] = np.ones(3, np.float32)
    with pytest.raises(UserError) as e:
        weights.read(save_npz(tmp_path / "x.npz", flat))
    assert "3 problems" in str(e.value)
    for part in ("encoder_norm/scale", "has shape (7,), not (16,)", "unexpected extra"):
        assert part in str(e.value)


def test_zero_head_is_announced(files, tmp_path, caplog):
    _, flat = files["token", False]
    zero = flat | {"head/kernel": np.zeros((16, 5), np.float32)}
    with caplog.at_level(logging.WARNING, "vit_jax.weights"):
        vit_jax.load(save_npz(tmp_path / "x.npz", zero))
    assert "the head is all zeros" in caplog.text
    assert "load_for_finetune" in caplog.text


def test_what_was_asked_for_is_no_warning(files, caplog):
    with caplog.at_level(logging.INFO, "vit_jax.weights"):
        vit_jax.load_for_finetune(files["token", True][0], 3, 24)
    said = {r.getMessage().split(": ")[1]: r.levelname for r in caplog.records}
    assert said == dict.fromkeys(("re-initialised", "ignored", "resized"), "INFO")


def test_training_starts_from_a_file(files):
    path, flat = files["token", True]
    cfg = config(num_classes=3, image_size=(24, 24), layers="scan", dropout=0.1)
    params = weights.load_for_training(path, cfg)
    got = fit.flatten(params)
    model = vit_jax.create_model(
        "", **{**SMALL, "num_classes": 3, "layers": "scan"}, image_size=24
    )
    want = fit.flatten(fit._shapes(model.cfg))
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    assert all(isinstance(v, np.ndarray) for v in got.values())
    np.testing.assert_array_equal(got["embedding/kernel"], flat["embedding/kernel"])
    assert not got["head/kernel"].any()


def test_training_names_each_contradiction(files):
    path, _ = files["token", False]
    cfg = config(width=32, heads=4, mlp_dim=48)
    with pytest.raises(UserError) as e:
        weights.load_for_training(path, cfg)
    for line in ("model.width: file 16, config 32", "model.heads: file 2, config 4"):
        assert line in str(e.value)
