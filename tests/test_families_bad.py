# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of families that contradict themselves: one line says what is wrong."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from vit_jax import weights
from vit_jax.errors import UserError

FAMILIES = Path(__file__).parent / "golden" / "families"
DINOV2, BEIT = FAMILIES / "hf_dinov2_reg_a", FAMILIES / "timm_beit_a"


def refused(source, match, **options):
    with pytest.raises(UserError, match=match) as e:
        weights.read(source, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture
def folder(tmp_path):
    """A copy of a DINOv2 with registers, and its arrays."""
    shutil.copytree(DINOV2, tmp_path / "dinov2")
    return tmp_path / "dinov2", load_file(DINOV2 / "model.safetensors")


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (["layers.0.blocks.0.attn.relative_position_bias_table"], "a Swin Transformer"),
        (["stages.0.blocks.0.conv_dw.weight"], "a ConvNeXt"),
        (["layer1.0.conv1.weight", "fc.weight"], "a ResNet"),
        (["blocks.0.attns.1.norm.weight"], "a ViT with branches side by side"),
        (["blocks.1.attn.lambda_q1"], "a ViT with differential attention"),
        (["rope.freqs"], "a ViT with mixed rotary positions"),
        (["patch_embed.backbone.bn1.weight"], "a hybrid with another stem"),
        (["blocks.2.proj.weight"], "a Hiera or MViT"),
        (["encoder.layer.0.attention.self.query.weight"], "a text model such as BERT"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_family_that_is_not_covered(tmp_path, names, looks, beside):
    """Also where all else is there that a ViT has."""
    file = tmp_path / "x.safetensors"
    arrays = load_file(BEIT / "model.safetensors") if beside else {}
    save_file(arrays | {name: np.zeros((4, 4), np.float32) for name in names}, file)
    message = refused(file, f"looks like {looks}, which is none of the families")
    assert names[0] in message


@pytest.mark.parametrize("around", ["neck.", "video.", "model."])
def test_what_stands_around_and_beside_an_encoder_is_no_other_network(folder, around):
    path, arrays = folder
    want = weights.read(path).params
    text = "text.transformer.encoder.layer.0.attention.self.query.weight"
    arrays = {around + name: values for name, values in arrays.items()}
    save_file(arrays | {text: np.zeros((4, 4), np.float32)}, path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, weights.read(path).params, want)


def test_unknown_part_of_a_known_family(folder):
    path, arrays = folder
    arrays["encoder.layer.0.gizmo.weight"] = np.zeros(3, np.float32)
    save_file(arrays, path / "model.safetensors")
    refused(
        path,
        r"dinov2 with registers .* has nothing like encoder.layer.0.gizmo.weight \(3,\)$",
    )


@pytest.mark.parametrize(
    ("entry", "value", "match"),
    [
        (
            "hidden_size",
            96,
            "model.width: the file's config says 96, the arrays show 48",
        ),
        ("num_hidden_layers", 3, "model.depth: .* says 3, the arrays show 2"),
        ("num_register_tokens", 9, "model.registers: .* says 9, the arrays show 4"),
        ("num_attention_heads", 5, "heads=5 does not divide"),
        ("patch_size", 4, "model.patch: .* says 4, the arrays show 8"),
        ("model_type", "clip", "model_type 'clip', but the arrays are those of dinov2"),
        ("image_size", 64, r"says \(64, 64\), which is 8 x 8 patches, but"),
    ],
)
def test_config_that_contradicts_the_arrays(folder, entry, value, match):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {entry: value}))
    refused(path, match)


def test_positions_that_no_rule_fits(folder):
    path, arrays = folder
    table = "embeddings.position_embeddings"
    arrays[table] = np.ascontiguousarray(arrays[table][:, :-3])
    save_file(arrays, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    del config["image_size"]
    (path / "config.json").write_text(json.dumps(config))
    match = r"position_embeddings of shape \(1, 14, 48\) is made for no square grid"
    refused(path, match)
    refused(path, match, image_size=64)


def test_a_part_that_only_the_name_of_an_architecture_tells(folder):
    path, _ = folder
    config = {"architecture": "eva02_enormous_patch14_clip_224", "pretrained_cfg": {}}
    (path / "config.json").write_text(json.dumps(config))
    save_file(load_file(BEIT / "model.safetensors"), path / "model.safetensors")
    refused(path, "eva02_enormous_patch14_clip_224 has norms of what attention")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"global_pool": "avgmax"}, "unknown global_pool .* 'avgmax'"),
        (
            {"global_pool": "avg", "pool_include_prefix": True},
            "'avg' with pool_include",
        ),
        ({"norm_layer": "simplenorm"}, "norm_layer is 'simplenorm'"),
        ({"act_layer": "relu"}, "unknown act_layer .* 'relu'"),
    ],
)
def test_a_part_that_only_an_argument_of_timm_tells(tmp_path, arguments, part):
    shutil.copytree(BEIT, tmp_path / "beit")
    config = json.loads((BEIT / "config.json").read_text())
    config["model_args"] |= arguments
    (tmp_path / "beit" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "beit", part)


def test_names_of_more_classes_than_the_head_has(tmp_path):
    shutil.copytree(BEIT, tmp_path / "beit")
    config = json.loads((BEIT / "config.json").read_text())
    config["pretrained_cfg"]["label_names"] = [f"class {i}" for i in range(9)]
    (tmp_path / "beit" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "beit", "9 class names for 5 classes")


def test_heads_beside_the_name_of_a_file(tmp_path):
    """As the commands take it: no array of this file shows them."""
    file = BEIT.parent / "orig_openai_clip_a" / "model.safetensors"
    refused(file, "pass heads= .FILE:heads=12 to a command")
    found, same = weights.read(f"{file}:heads=3"), weights.read(file, heads=3)
    assert found.cfg == same.cfg
    assert found.cfg.heads == 3
    refused(f"{file}:heads=5", "heads=5 does not divide")


def test_two_families_in_one_folder(folder):
    path, arrays = folder
    other = load_file(BEIT / "model.safetensors")
    save_file({**arrays, **other}, path / "model.safetensors")
    refused(path, "has nothing like .* other arrays .as in a file of beit: two models")
    save_file(other, path / "model.safetensors")
    refused(path, "says model_type 'dinov2_with_registers', but the arrays are .* beit")
    # Named, it is a file among strangers, whose config.json is another model's.
    assert weights.read(path / "model.safetensors", heads=3).metadata.family == "beit"


def test_missing_parts(folder):
    path, arrays = folder
    (path / "model.safetensors").unlink()
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(arrays)
    index = {name: parts[name in names[9:]] for name in names}
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    save_file({name: arrays[name] for name in names[:9]}, path / parts[0])
    refused(path, rf"\['{parts[1]}'\] are missing, which its index names")
    # All of the last part but the final norm, without which it would be another model.
    save_file({name: arrays[name] for name in names[9:-2]}, path / parts[1])
    refused(path, rf"names 2 arrays .* such as 'layernorm.bias' of {parts[1]}")
    save_file({name: arrays[name] for name in names[9:]}, path / parts[1])
    weights.read(path)


def test_assumptions_about_a_bare_file(tmp_path):
    """Nothing in it says what the pixels were scaled by."""
    shutil.copy(BEIT / "model.safetensors", tmp_path / "x.safetensors")
    (line,) = weights.read(tmp_path / "x.safetensors").report.assumptions
    assert "image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)" in line
    assert "gelu=exact" in line


def stranger(path, arrays):
    """A network that no family is: its arrays begin as a ViT's do."""
    (path / "config.json").unlink()
    other = {"patch_embed.proj.weight": np.zeros((8, 3, 4, 4), np.float32)}
    other["layers.0.blocks.0.attn.qkv.weight"] = np.zeros((24, 8), np.float32)
    save_file(other, path / "model.safetensors")
    return "looks like a Swin Transformer, .* anything like layers.0.blocks.0.attn.qkv"


def contradiction(path, arrays):
    config = json.loads((path / "config.json").read_text()) | {"hidden_size": 96}
    (path / "config.json").write_text(json.dumps(config))
    return "model.width: the file's config says 96, the arrays show 48"


def odd_table(path, arrays):
    name = "embeddings.position_embeddings"
    short = {name: np.ascontiguousarray(arrays[name][:, :-3])}
    save_file(arrays | short, path / "model.safetensors")
    return r"says \(32, 32\), which is 4 x 4 patches, but .* has shape \(1, 14, 48\)"


def mixture(path, arrays):
    save_file(
        arrays | load_file(BEIT / "model.safetensors"), path / "model.safetensors"
    )
    return "has nothing like .* other arrays .as in a file of beit: two models in one"


def mixed_files(path, arrays):
    save_file(load_file(BEIT / "model.safetensors"), path / "model.safetensors")
    return "model_type 'dinov2_with_registers', but the arrays are those of beit"


def missing_part(path, arrays):
    index = {name: f"part{i % 2}.safetensors" for i, name in enumerate(sorted(arrays))}
    (path / "model.safetensors").unlink()
    text = json.dumps({"weight_map": index})
    (path / "model.safetensors.index.json").write_text(text)
    part = {n: arrays[n] for n, file in index.items() if file == "part0.safetensors"}
    save_file(part, path / "part0.safetensors")
    return r"\['part1.safetensors'\] are missing, which its index names"


@pytest.mark.parametrize("program", ["predict", "convert", "evaluate"])
@pytest.mark.parametrize(
    "spoil",
    [stranger, contradiction, odd_table, mixture, mixed_files, missing_part],
    ids=lambda spoil: spoil.__name__,
)
def test_commands_answer_with_one_line(folder, tmp_path, command, program, spoil):
    path, arrays = folder
    match = spoil(path, arrays)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    before = sorted(tmp_path.rglob("*"))
    arguments = {
        "predict": [tmp_path / "image.png"],
        "convert": [tmp_path / "new.npz"],
        "evaluate": ["--config=configs/digits.py"],
    }[program]
    ended = command(path, *arguments, module=f"vit_jax.{program}")
    assert re.search(match, ended.error), ended.error
    assert ended.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
