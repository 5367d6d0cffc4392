# SPDX-License-Identifier: Apache-2.0
"""timm and Hugging Face layouts, by the names that their authors document."""

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest
from compiled import apply
from safetensors import numpy as safetensors
from weights_files import assert_same, save_npz, save_torch, small_model

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.models import published
from vit_jax.weights import fit, preprocessing

# Of timm.models.vision_transformer, block 0 standing for all; D 16, M 24, K 5.
TIMM = {
    "cls_token": (1, 1, 16),
    "pos_embed": (1, 5, 16),
    "patch_embed.proj.weight": (16, 3, 8, 8),
    "patch_embed.proj.bias": (16,),
    "blocks.0.norm1.weight": (16,),
    "blocks.0.norm1.bias": (16,),
    "blocks.0.attn.qkv.weight": (48, 16),
    "blocks.0.attn.qkv.bias": (48,),
    "blocks.0.attn.proj.weight": (16, 16),
    "blocks.0.attn.proj.bias": (16,),
    "blocks.0.norm2.weight": (16,),
    "blocks.0.norm2.bias": (16,),
    "blocks.0.mlp.fc1.weight": (24, 16),
    "blocks.0.mlp.fc1.bias": (24,),
    "blocks.0.mlp.fc2.weight": (16, 24),
    "blocks.0.mlp.fc2.bias": (16,),
    "norm.weight": (16,),
    "norm.bias": (16,),
    "head.weight": (5, 16),
    "head.bias": (5,),
}


def save_timm(path, arrays, **header):
    safetensors.save_file(arrays, path, {"format": "pt", **header})
    return str(path)


@pytest.fixture
def exported(tmp_path):
    model, flat = small_model(gelu="exact")
    file = tmp_path / "export" / "m.safetensors"
    weights.save(file, model.cfg, fit.unflatten(flat))
    return file, model, flat, safetensors.load_file(file)


def test_names_and_shapes_of_timm(exported):
    _, _, _, arrays = exported
    one = {k: v.shape for k, v in arrays.items() if not k.startswith("blocks.1")}
    assert one == TIMM
    assert len(arrays) == len(TIMM) + 12


def test_axes_of_timm(exported):
    """The fused projection as timm splits it: (3, heads, head size) along the rows."""
    _, _, flat, arrays = exported
    x = np.random.default_rng(0).normal(size=16)
    qkv = arrays["blocks.1.attn.qkv.weight"] @ x + arrays["blocks.1.attn.qkv.bias"]
    block = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1"
    for got, name in zip(qkv.reshape(3, 2, 8), ("query", "key", "value"), strict=True):
        kernel, bias = (flat[f"{block}/{name}/{p}"] for p in ("kernel", "bias"))
        np.testing.assert_allclose(
            got, np.einsum("d,dkh->kh", x, kernel) + bias, atol=1e-5
        )
    heads = np.random.default_rng(1).normal(size=(2, 8))
    got = arrays["blocks.1.attn.proj.weight"] @ heads.reshape(-1)
    want = np.einsum("kh,khd->d", heads, flat[f"{block}/out/kernel"])
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(
        arrays["patch_embed.proj.weight"][3, 2, 1, 5],
        flat["embedding/kernel"][1, 5, 2, 3],
    )


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_file_without_any_metadata(exported, tmp_path, prefix):
    _, model, flat, arrays = exported
    file = save_timm(
        tmp_path / "x.safetensors", {prefix + k: v for k, v in arrays.items()}
    )
    found = weights.read(file, heads=2)
    assert_same(found.params, flat)
    assert found.cfg == model.cfg  # exact GELU and epsilon 1e-6 are timm's defaults
    with pytest.raises(UserError, match="heads="):
        weights.read(file)


def test_training_knows_the_heads_of_a_torch_file(exported, tmp_path):
    _, model, flat, arrays = exported
    file = save_timm(tmp_path / "x.safetensors", arrays)
    params = weights.load_for_training(file, model.cfg)
    assert_same(params, flat, but=("head/kernel", "head/bias"))


def test_training_says_what_it_has_otherwise_than_a_torch_file(
    exported, tmp_path, caplog
):
    """What the file's family usually is, the file does not state: no refusal."""
    _, model, _, arrays = exported
    file = save_timm(tmp_path / "x.safetensors", arrays)
    cfg = dataclasses.replace(model.cfg, gelu="tanh", image_mean=(0.4, 0.5, 0.6))
    weights.load_for_training(file, cfg)
    for flag in ("gelu=exact", "image_mean=()"):
        assert f"set --config.model.{flag}" in caplog.text
    caplog.clear()
    weights.load_for_training(file, model.cfg)
    assert "--config.model" not in caplog.text


def test_training_with_another_number_of_heads_or_other_colours(tmp_path):
    """No array shows them: the folder alone does."""
    folder, model, _ = hf_folder(tmp_path)
    colours = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    with pytest.raises(UserError) as e:
        weights.load_for_training(folder, dataclasses.replace(model.cfg, heads=4))
    for line in (
        "model.heads: file 2, config 4",
        "set --config.model.image_mean=(0.4, 0.5, 0.6)",
        "set --config.model.image_std=(0.2, 0.3, 0.25)",
    ):
        assert line in str(e.value)
    with pytest.raises(UserError, match="heads: the file's config says 2, the caller"):
        weights.read(folder, heads=4)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("width", "mlp_dim", "heads"),
    # Published sizes of another depth: ViT-mu, So400m, H; else heads of 64.
    [(32, 128, 2), (1152, 4304, 16), (1280, 5120, 16), (192, 24, 3), (256, 24, 4)],
)
def test_heads_are_assumed_aloud(tmp_path, width, mlp_dim, heads):
    model, flat = small_model(width=width, mlp_dim=mlp_dim, heads=heads, depth=1)
    weights.save(tmp_path / "m.safetensors", model.cfg, fit.unflatten(flat))
    arrays = safetensors.load_file(tmp_path / "m.safetensors")
    found = weights.read(save_timm(tmp_path / "x.safetensors", arrays))
    assert found.cfg.heads == heads
    (line,) = (x for x in found.report.lines if x.startswith("assumed: "))
    for said in (f"heads={heads}", "gelu=exact", "layer_norm_eps=1e-06", "head=token"):
        assert said in line


def test_heads_that_no_published_model_has_are_asked_for(tmp_path):
    model, flat = small_model(width=64, heads=2, mlp_dim=24, depth=1)
    weights.save(tmp_path / "m.safetensors", model.cfg, fit.unflatten(flat))
    file = save_timm(
        tmp_path / "x.safetensors", safetensors.load_file(tmp_path / "m.safetensors")
    )
    with pytest.raises(
        UserError, match="width 64 is no published model's: pass heads="
    ):
        weights.read(file)
    assert_same(weights.read(file, heads=2).params, flat)


def test_timm_folder(exported, tmp_path):
    _, _, flat, arrays = exported
    about = {
        "architecture": "vit_tiny",
        "model_args": {"num_heads": 2},
        "pretrained_cfg": {
            "input_size": [3, 16, 16],
            "crop_pct": 0.8,
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "label_names": list("vwxyz"),
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_timm(tmp_path / "model.safetensors", arrays)
    found = weights.read(tmp_path)
    assert_same(found.params, flat)
    assert found.metadata.class_names == tuple("vwxyz")
    ops = [t["op"] for t in found.metadata.transforms]
    assert ops == ["resize_small", "central_crop"]
    assert found.cfg.image_mean == found.cfg.image_std == ()  # 0.5, the usual ones
    assert found.metadata.transforms[0]["size"] == 20


def timm_folder(folder, arrays, pretrained=None, **fields):
    about = {
        "architecture": "vit_tiny",
        "model_args": {"num_heads": 2},
        "pretrained_cfg": {"input_size": [3, 16, 16], **(pretrained or {})},
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(about))
    save_timm(folder / "model.safetensors", arrays)
    return folder


@pytest.mark.parametrize(
    ("stated", "op", "size"),
    [
        ({"crop_pct": 1.0, "crop_mode": "center"}, "resize_small", 16),
        ({"crop_pct": 0.8}, "resize_small", 20),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, "resize", [16, 16]),
        ({"crop_pct": 0.8, "crop_mode": "squash"}, "resize", [20, 20]),
        ({"input_size": None, "crop_pct": None}, "resize_small", None),
    ],
)
def test_crops_of_timm(exported, tmp_path, stated, op, size):
    found = weights.read(timm_folder(tmp_path, exported[3], stated))
    first, second = found.metadata.transforms
    assert (first["op"], first.get("size")) == (op, size)
    assert second == {"op": "central_crop"}


def test_sizes_of_the_preprocessing_grow_with_the_images(exported, tmp_path):
    folder = timm_folder(tmp_path, exported[3], {"crop_pct": 0.8})
    assert weights.read(folder, 32).metadata.transforms[0]["size"] == 40
    assert weights.read(folder, (32, 48)).metadata.transforms[0]["size"] == 60
    folder = timm_folder(
        tmp_path, exported[3], {"crop_pct": 0.8, "crop_mode": "squash"}
    )
    assert weights.read(folder, (32, 48)).metadata.transforms[0]["size"] == [40, 60]


def test_pooling_of_timm(exported, tmp_path):
    arrays = exported[3]
    for pool, head in (("token", "token"), ("avg", "gap"), ("", "none")):
        found = weights.read(timm_folder(tmp_path, arrays, global_pool=pool))
        assert (found.cfg.head, found.cfg.class_token) == (head, head != "token")
    with pytest.raises(UserError, match=r"head is stated as 'map'.*with a class token"):
        weights.read(timm_folder(tmp_path, arrays, global_pool="map"))
    with pytest.raises(UserError, match="unknown global_pool"):
        weights.read(timm_folder(tmp_path, arrays, global_pool="max"))


def test_heads_of_an_architecture_are_those_of_its_width(
    exported, tmp_path, monkeypatch
):
    """Where config.json gives no more than its name."""
    folder = timm_folder(tmp_path, exported[3], architecture="vit_mine", model_args={})
    row = {"width": 16, "heads": 2}
    monkeypatch.setitem(published.ARCHITECTURES, "vit_mine", row)
    assert weights.read(folder).cfg.heads == 2
    row["width"] = 32
    with pytest.raises(UserError, match="pass heads="):
        weights.read(folder)


def test_positions_that_timm_has_not(exported, tmp_path):
    """No table is no positions where config.json says so, else perhaps waves."""
    arrays = {k: v for k, v in exported[3].items() if k != "pos_embed"}
    arguments = {"num_heads": 2, "pos_embed": "none"}
    found = weights.read(timm_folder(tmp_path, arrays, model_args=arguments))
    assert found.cfg.positions == "none"
    assert not found.report.warnings
    found = weights.read(timm_folder(tmp_path, arrays))
    assert found.cfg.positions == "sincos2d"
    assert "the file has no position table" in found.report.warnings[0]


@pytest.mark.parametrize(
    ("stated", "ops"),
    [
        ({}, [{"op": "resize", "method": "bilinear"}]),
        ({"resample": 3}, [{"op": "resize", "method": "bicubic"}]),
        ({"do_resize": False, "do_center_crop": True}, [{"op": "central_crop"}]),
        ({"size": {"shortest_edge": 20}}, [{"op": "resize_small", "size": 20}]),
        (
            {"size": 20, "do_center_crop": True, "crop_size": 16},
            [
                {"op": "resize", "size": [20, 20]},
                {"op": "central_crop", "size": [16, 16]},
            ],
        ),
    ],
)
def test_preprocessor_of_hugging_face(tmp_path, stated, ops):
    folder, _, _ = hf_folder(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"a": 1} | stated))
    found = weights.read(folder).metadata.transforms
    assert len(found) == len(ops)
    for got, want in zip(found, ops, strict=True):
        assert want.items() <= got.items()


@pytest.mark.parametrize(
    ("stated", "mean", "std"),
    [
        ({}, (), ()),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (), ()),
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3),
        ({"image_mean": 0.25, "image_std": 1}, (0.25,) * 3, (1.0,) * 3),
    ],
)
def test_mean_and_deviation_are_the_models(tmp_path, stated, mean, std):
    folder, _, _ = hf_folder(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps({"a": 1} | stated))
    cfg = weights.read(folder).cfg
    assert (cfg.image_mean, cfg.image_std) == (mean, std)


@pytest.mark.parametrize(
    "stated",
    [
        {"do_rescale": False},
        {"rescale_factor": 1},
        {"resample": 1},
        {"size": {"longest_edge": 20}},
    ],
)
def test_preprocessing_that_is_refused_where_it_is_needed(tmp_path, stated):
    folder, _, _ = hf_folder(tmp_path)
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    found = weights.read(folder)
    ((key, _),) = stated.items()
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(UserError, match=f"{key}=.* of .*preprocessor_config.json"):
        preprocessing.prepare(image, found.metadata.transforms, (16, 16))


@pytest.mark.parametrize(
    "stated",
    [
        {"image_mean": ["a"]},
        {"image_mean": [0.5, float("nan"), 0.5]},
        {"image_std": 0},
        {"image_std": [0.5, -0.5, 0.5]},
        {"crop_size": {"height": 3}},
        {"size": [1, 2, 3]},
    ],
)
def test_damaged_preprocessor(tmp_path, stated):
    folder, _, _ = hf_folder(tmp_path)
    ((key, _),) = stated.items()
    text = json.dumps({"do_center_crop": True, **stated})
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(UserError, match=f"preprocessor_config.json: {key} is"):
        weights.read(folder)


def test_layer_scale_is_folded(exported, tmp_path):
    _, _, flat, arrays = exported
    gamma = np.linspace(0.5, 2, 16, dtype=np.float32)
    arrays = dict(arrays) | {"blocks.0.ls2.gamma": gamma}
    found = weights.read(save_timm(tmp_path / "x.safetensors", arrays), heads=2)
    mlp = "Transformer/encoderblock_0/MlpBlock_3/Dense_1"
    want = flat | {f"{mlp}/{p}": flat[f"{mlp}/{p}"] * gamma for p in ("kernel", "bias")}
    assert_same(found.params, want)
    assert any(line.startswith("folded") for line in found.report.lines)


@pytest.mark.parametrize(
    "name", ["something.else", "blocks.0.attn.gizmo", "blocks.0.cls_attn.weight"]
)
def test_parts_that_no_model_here_has(exported, tmp_path, name):
    arrays = dict(exported[3]) | {name: np.ones(16, np.float32)}
    with pytest.raises(UserError, match=f"timm has nothing like {name}"):
        weights.read(save_timm(tmp_path / "x.safetensors", arrays), heads=2)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_every_value_is_read_once(exported, tmp_path, monkeypatch, suffix):
    """Also where three of our arrays are one of the file's."""
    arrays, taken = exported[3], []
    fromfile, frombuffer = np.fromfile, np.frombuffer

    def counted(function):
        def call(*args, **options):
            taken.append(function(*args, **options))
            return taken[-1]

        return call

    file = tmp_path / f"x.{suffix}"
    save_torch(file, arrays) if suffix == "pth" else save_timm(file, arrays)
    monkeypatch.setattr(np, "fromfile", counted(fromfile))
    monkeypatch.setattr(np, "frombuffer", counted(frombuffer))
    weights.read(file, heads=2)
    expected = sum(x.nbytes for x in arrays.values())
    assert sum(x.nbytes for x in taken) == expected


def test_bfloat16(exported, tmp_path):
    _, _, flat, arrays = exported
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in arrays.items()}
    found = weights.read(save_timm(tmp_path / "x.safetensors", half), heads=2)
    want = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in flat.items()}
    assert_same(found.params, want)


def test_neither_layout(tmp_path):
    file = save_timm(
        tmp_path / "x.safetensors", {"conv1.weight": np.ones((3, 3), "f4")}
    )
    with pytest.raises(UserError, match=r"none of the families.*conv1.weight"):
        weights.read(file)


def hf_folder(tmp_path, **changes):
    model, flat = small_model(gelu="exact", layer_norm_eps=1e-12)
    folder = tmp_path / "hf"
    weights.save(folder, model.cfg, fit.unflatten(flat))
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    return folder, model, flat


def test_names_of_hugging_face(tmp_path):
    """Against the golden file, which ``transformers`` wrote."""
    golden = __file__.rsplit("/", 1)[0] + "/golden/hf_vit/model.safetensors"
    theirs = {re.sub(r"\.[12]\.", ".0.", k) for k in safetensors.load_file(golden)}
    folder, _, _ = hf_folder(tmp_path)
    ours = safetensors.load_file(folder / "model.safetensors")
    assert {k.replace(".1.", ".0.") for k in ours} == theirs


@pytest.mark.parametrize("blocks", ["layers", "encoder.layer"])
def test_names_of_transformers_5(tmp_path, blocks):
    """As ``model.state_dict()`` has them, not only what ``save_pretrained`` writes."""
    folder, model, flat = hf_folder(tmp_path)
    new = {"encoder.layer": blocks, "attention.output.dense": "attention.o_proj"}
    new |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        new[f"attention.attention.{name}"] = f"attention.{letter}_proj"
    arrays = safetensors.load_file(folder / "model.safetensors")
    for old, name in new.items():
        arrays = {k.replace(old, name): v for k, v in arrays.items()}
    assert f"vit.{blocks}.1.attention.q_proj.weight" in arrays
    safetensors.save_file(arrays, folder / "model.safetensors")
    found = weights.read(folder)
    assert_same(found.params, flat)
    assert found.cfg == model.cfg


def test_config_of_hugging_face_is_honoured(tmp_path):
    labels = {str(i): name for i, name in enumerate("vwxyz")}
    folder, _, flat = hf_folder(
        tmp_path, hidden_act="gelu_new", layer_norm_eps=1e-5, id2label=labels
    )
    found = weights.read(folder)
    assert_same(found.params, flat)
    assert (found.cfg.gelu, found.cfg.layer_norm_eps) == ("tanh", 1e-5)
    assert found.metadata.class_names == tuple("vwxyz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deit"}, "model_type 'deit'.*those of vit"),
        ({"hidden_act": "relu"}, "hidden_act"),
        (
            {"hidden_size": 32},
            "model.width: the file's config says 32, the arrays show 16",
        ),
        ({"num_hidden_layers": 3}, "model.depth: the file's config says 3"),
        ({"patch_size": 4}, "model.patch: the file's config says 4"),
        ({"image_size": 24}, r"model.image_size: the file's config says \(24, 24\)"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": 4.5}, "num_attention_heads is 4.5"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"layer_norm_eps": -1}, "layer_norm_eps is -1"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"layer_norm_eps": 1e9}, "layer_norm_eps is 1000000000"),
        ({"num_attention_heads": 3}, "heads=3 does not divide"),
        ({"num_attention_heads": "x"}, "num_attention_heads is 'x'"),
        ({"layer_norm_eps": []}, "layer_norm_eps is"),
        ({"image_size": [3, 16, 16]}, r"config.json: image_size is \[3, 16, 16\]"),
        ({"id2label": ["a"]}, "id2label is"),
        ({"id2label": {"a": "b"}}, "id2label is"),
    ],
)
def test_config_that_no_model_here_fits(tmp_path, change, message):
    folder, _, _ = hf_folder(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        weights.read(folder)


def test_null_is_not_stated(tmp_path):
    nothing = dict.fromkeys(["layer_norm_eps", "id2label", "image_size"])
    folder, model, _ = hf_folder(tmp_path, **nothing)
    assert weights.read(folder).cfg == model.cfg


@pytest.mark.parametrize("text", ["garbage", "[]"])
def test_header_of_another_kind(exported, tmp_path, text):
    file = save_timm(tmp_path / "x.safetensors", exported[3], vit_jax=text)
    with pytest.raises(UserError, match=r"header of .*x.safetensors .*JSON"):
        weights.read(file, heads=2)


@pytest.mark.parametrize("heads", [{}, {"heads": 2}])
@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("name", ["norm.weight", "head.bias", "blocks.0.ls1.gamma"])
def test_array_of_another_shape(exported, tmp_path, name, shape, heads):
    arrays = dict(exported[3]) | {name: np.ones(shape, np.float32)}
    with pytest.raises(UserError, match=f"heads=|{name}"):
        weights.read(save_timm(tmp_path / "x.safetensors", arrays), **heads)


def test_pooler_is_pre_logits(tmp_path):
    model, flat = small_model(num_classes=0, pre_logits=True, gelu="exact")
    weights.save(tmp_path / "hf", model.cfg, fit.unflatten(flat))
    arrays = safetensors.load_file(tmp_path / "hf" / "model.safetensors")
    assert "pooler.dense.weight" in arrays
    assert "embeddings.cls_token" in arrays
    found = weights.read(tmp_path / "hf")
    assert_same(found.params, flat)
    assert found.cfg.pre_logits
    config = tmp_path / "hf" / "config.json"
    config.write_text(config.read_text().replace('"tanh"', '"relu"'))
    with pytest.raises(UserError, match="pooler_act is 'relu', not 'tanh'"):
        weights.read(tmp_path / "hf")


def test_pooler_beside_a_classifier_is_ignored(tmp_path):
    """``ViTForImageClassification`` has no pooler: it drops the arrays."""
    folder, model, flat = hf_folder(tmp_path)
    arrays = safetensors.load_file(folder / "model.safetensors")
    arrays |= {"vit.pooler.dense.weight": np.ones((16, 16), np.float32)}
    arrays |= {"vit.pooler.dense.bias": np.ones(16, np.float32)}
    safetensors.save_file(arrays, folder / "model.safetensors")
    found = weights.read(folder)
    assert_same(found.params, flat)
    assert found.cfg == model.cfg
    assert sum("ignored: vit.pooler" in line for line in found.report.lines) == 2


def test_several_files(tmp_path):
    folder, _, flat = hf_folder(tmp_path)
    arrays = safetensors.load_file(folder / "model.safetensors")
    names = sorted(arrays)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        safetensors.save_file({k: arrays[k] for k in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {k: file for file, part in parts.items() for k in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(weights.read(folder).params, flat)
    both = {k: arrays[k] + 1 for k in names[8:]}
    safetensors.save_file(both, folder / "b.safetensors")
    with pytest.raises(UserError, match=rf"b.safetensors holds '{names[8]}', as an"):
        weights.read(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b.safetensors.*missing"):
        weights.read(folder)


def test_what_the_layouts_cannot_hold(tmp_path):
    def refuse(where, message, **fields):
        model, flat = small_model(**fields)
        with pytest.raises(UserError, match=message):
            weights.save(tmp_path / where, model.cfg, fit.unflatten(flat))

    refuse("hf", "pre_logits", pre_logits=True, gelu="exact")
    refuse("hf", "model.head is 'gap' and would read as", head="gap", class_token=True)
    refuse("hf", "no place for 15 arrays.*block1", resnet=(1,), image_size=32, patch=1)
    refuse(
        "hf",
        "model.positions='learned2d' at 'every'",
        positions="learned2d",
        position_at="every",
    )
    refuse("x.safetensors", "positions='relative'", positions="relative")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
@pytest.mark.parametrize("positions", ["sincos2d", "learned2d", "none"])
def test_other_positions_become_a_table(tmp_path, positions):
    model, flat = small_model(positions=positions, image_size=(16, 24))
    weights.save(tmp_path / "x.safetensors", model.cfg, fit.unflatten(flat))
    found = weights.read(tmp_path / "x.safetensors")
    assert found.cfg.positions == "learned"
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 24, 3)).astype(np.float32)
    from vit_jax import models

    other = models.create(found.cfg)
    want = apply(model, fit.unflatten(flat), images)
    np.testing.assert_allclose(apply(other, found.params, images), want, atol=1e-5)


def test_sidecar_must_not_contradict(tmp_path):
    _, flat = small_model()
    file = save_npz(tmp_path / "x.npz", flat)
    about = {"format": "vit_jax", "model": {"heads": 4}}
    (tmp_path / "x.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="heads: the file's config says 4, the arrays"):
        weights.read(file)
