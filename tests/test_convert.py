# SPDX-License-Identifier: Apache-2.0
"""Exports: names of the releases, the same bits on every way round, metadata."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
from safetensors.numpy import save_file
from weights_files import save_npz, small_model

import vit_jax
from vit_jax import convert, weights
from vit_jax.config import Config, DataConfig
from vit_jax.errors import UserError
from vit_jax.weights import export, fit
from vit_jax.weights.contents import Metadata

NAMES = Metadata(
    class_names=("cat", "dög", "eel", "fox", "gnu"),
    transforms=(
        {"op": "resize_small", "size": 20, "method": "area"},
        {"op": "central_crop"},
    ),
)


def same_bits(a, b):
    a, b = np.load(a), np.load(b)
    assert set(a.files) == set(b.files)
    for name in a.files:
        assert a[name].dtype == b[name].dtype == np.float32
        np.testing.assert_array_equal(
            a[name].view(np.uint32), b[name].view(np.uint32), name
        )


def start(tmp_path, **fields):
    model, flat = small_model(**fields)
    flat["cls" if "cls" in flat else "embedding/bias"][
        ..., 0
    ] = -0.0  # its sign is a bit
    file = tmp_path / "start.npz"
    weights.save(file, model.cfg, fit.unflatten(flat), NAMES)
    return file, model, flat


@pytest.mark.parametrize("through", ["hf", "timm.safetensors", "other.npz"])
def test_there_and_back(tmp_path, through):
    file, model, _ = start(tmp_path, gelu="exact", layer_norm_eps=1e-5)
    convert.convert(str(file), str(tmp_path / through))
    convert.convert(str(tmp_path / through), str(tmp_path / "end.npz"))
    same_bits(file, tmp_path / "end.npz")
    found = weights.read(tmp_path / "end.npz")
    assert found.cfg == model.cfg
    assert found.metadata.class_names == NAMES.class_names
    assert found.metadata.transforms == NAMES.transforms


@pytest.mark.heavy
@pytest.mark.parametrize(
    "fields",
    [
        {"head": "gap", "pre_logits": True},
        {"head": "map"},
        {"resnet": (1, 1), "patch": 1, "image_size": 32},
        {"resnet_width": 1, "image_size": 64},
        {"image_size": (16, 24), "layers": "scan"},
    ],
)
def test_there_and_back_through_timm(tmp_path, fields):
    file, model, _ = start(tmp_path, **fields)
    convert.convert(str(file), str(tmp_path / "m.safetensors"))
    said = convert.convert(str(tmp_path / "m.safetensors"), str(tmp_path / "end.npz"))
    # timm standardises the kernels of a stem a little otherwise.
    assert any("standardised kernels" in x for x in said) == (
        bool({"resnet", "resnet_width"} & fields.keys())
    )
    same_bits(file, tmp_path / "end.npz")
    found = weights.read(tmp_path / "end.npz", layers=model.cfg.layers)
    assert found.cfg == model.cfg


@pytest.mark.parametrize("mlp", ["swiglu", "geglu"])
def test_gated_mlps_of_no_family_through_timm(tmp_path, mlp):
    file, _, _ = start(tmp_path, mlp=mlp)
    convert.convert(str(file), str(tmp_path / "m.safetensors"))
    convert.convert(str(tmp_path / "m.safetensors"), str(tmp_path / "end.npz"))
    same_bits(file, tmp_path / "end.npz")


def test_official_loader_reads_it(tmp_path):
    """Plain arrays, "/" names, no pickle, blocks numbered as in the releases."""
    file, _, flat = start(tmp_path)
    with np.load(file, allow_pickle=False) as arrays:
        assert set(arrays.files) == flat.keys()
        block = "Transformer/encoderblock_1"
        for child in (
            "LayerNorm_0/scale",
            "MultiHeadDotProductAttention_1/query/kernel",
            "LayerNorm_2/bias",
            "MlpBlock_3/Dense_1/kernel",
        ):
            assert f"{block}/{child}" in arrays.files


def keys_of_b16(block, rest):
    attention = [
        f"MultiHeadDotProductAttention_1/{x}/{p}"
        for x in ("query", "key", "value", "out")
        for p in ("kernel", "bias")
    ]
    norms = [f"LayerNorm_{i}/{p}" for i in (0, 2) for p in ("scale", "bias")]
    mlp = [f"MlpBlock_3/Dense_{i}/{p}" for i in (0, 1) for p in ("kernel", "bias")]
    inside = [f"{block}_{i}/{x}" for i in range(12) for x in attention + norms + mlp]
    return {*inside, *rest}


REST = [
    "cls",
    "embedding/kernel",
    "embedding/bias",
    "Transformer/posembed_input/pos_embedding",
    "Transformer/encoder_norm/scale",
    "Transformer/encoder_norm/bias",
    "pre_logits/kernel",
    "pre_logits/bias",
    "head/kernel",
    "head/bias",
]


@pytest.mark.parametrize(("name", "count"), [("ViT-B/16", 202), ("R50+ViT-B/16", 358)])
def test_keys_of_the_releases(name, count):
    """Sections 3.2 and 2.6 of the specification, on shapes: what npz would hold."""
    model = vit_jax.create_model(
        name, num_classes=21843, image_size=224, pre_logits=True
    )
    shapes = {k: v.shape for k, v in fit.flatten(fit._shapes(model.cfg)).items()}
    want = keys_of_b16("Transformer/encoderblock", REST)
    if name.startswith("R50"):
        want |= {"conv_root/kernel", "gn_root/scale", "gn_root/bias"}
        for i, units in enumerate((3, 4, 9), 1):
            for j in range(1, units + 1):
                parts = ["1", "2", "3"] + ["_proj"] * (j == 1)
                unit = f"block{i}/unit{j}"
                want |= {f"{unit}/conv{p}/kernel" for p in parts}
                want |= {f"{unit}/gn{p}/{x}" for p in parts for x in ("scale", "bias")}
    assert shapes.keys() == want
    assert len(want) == count
    query = "Transformer/encoderblock_11/MultiHeadDotProductAttention_1/query/kernel"
    assert shapes[query] == (768, 12, 64)
    assert shapes["Transformer/posembed_input/pos_embedding"] == (1, 197, 768)
    flat = {k: np.broadcast_to(np.float32(0), s) for k, s in shapes.items()}
    from vit_jax.weights import export

    assert {k for k, _ in export.unstacked(fit.unflatten(flat))} == want


def test_headers_are_those_of_the_package(tmp_path):
    """Our own writer against the safetensors package: same arrays, same metadata."""
    file, _, flat = start(tmp_path)
    convert.convert(str(file), str(tmp_path / "m.safetensors"))
    arrays = safetensors.load_file(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(arrays["head.weight"], flat["head/kernel"].T)
    assert (tmp_path / "m.safetensors").stat().st_size == len(
        safetensors.save(arrays)
    ) + _extra(tmp_path / "m.safetensors", arrays)


def _extra(path, arrays):
    """How much longer our header is than one without metadata."""
    ours = int.from_bytes(path.read_bytes()[:8], "little")
    theirs = int.from_bytes(safetensors.save(arrays)[:8], "little")
    return ours - theirs


@pytest.mark.heavy
def test_workdir_to_npz(tmp_path):
    """What training leaves behind: names and preprocessing travel from its files."""
    from vit_jax import checkpoint, config
    from vit_jax.program import State

    model, flat = small_model(layers="scan", dropout=0.1)
    cfg = Config(
        # The head reads the class token, which the switch may say as well.
        model=dataclasses.replace(model.cfg, class_token=True),
        data=DataConfig(image_size=16, eval_transforms=NAMES.transforms),
    )
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json(cfg))
    (workdir / "dataset.json").write_text(
        json.dumps({"class_names": NAMES.class_names, "image_size": [16, 16]})
    )
    params = jax.tree.map(jax.numpy.asarray, fit.unflatten(flat))
    saver = checkpoint.Checkpointer(str(workdir), cfg.checkpoint)
    saver.save(State(params, {}, jax.numpy.int32(3), {}), 3)
    saver.wait()
    saver.close()
    for source in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "3"):
        found = weights.read(source)
        assert found.cfg == model.cfg
        for name, value in fit.flatten(found.params).items():
            np.testing.assert_array_equal(value, flat[name], name)
    convert.convert(str(workdir), str(tmp_path / "x.npz"))
    found = weights.read(tmp_path / "x.npz")
    assert found.metadata.class_names == NAMES.class_names
    assert found.metadata.transforms == NAMES.transforms
    layer = fit.flatten(found.params)["Transformer/encoderblock_1/LayerNorm_0/bias"]
    np.testing.assert_array_equal(
        layer, flat["Transformer/encoderblock/LayerNorm_0/bias"][1]
    )


@pytest.mark.parametrize(
    ("dest", "layout", "message"),
    [
        ("x.bin", "", r"none of \.npz"),
        ("x.npz", "tf", "unknown layout 'tf'"),
        ("start.npz", "hf", "start.npz exists"),
        ("full", "hf", "full exists"),
    ],
)
def test_destinations(tmp_path, dest, layout, message):
    file, _, _ = start(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match=message):
        convert.convert(str(file), str(tmp_path / dest), layout)


@pytest.mark.parametrize("dest", ["dir.npz", "start.npz/x", "start.npz/x.npz"])
def test_destinations_that_cannot_be_written(tmp_path, dest):
    file, _, _ = start(tmp_path)
    (tmp_path / "dir.npz").mkdir()
    with pytest.raises(UserError, match=f"{dest} cannot be written"):
        convert.convert(str(file), str(tmp_path / dest))
    assert list((tmp_path / "dir.npz").iterdir()) == []


@pytest.mark.parametrize("text", ["[1]", "no JSON", '{"name": "other"}'])
def test_file_of_a_stranger_is_not_replaced(tmp_path, text):
    file, _, _ = start(tmp_path)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x.json exists"):
        convert.convert(str(file), str(tmp_path / "x.npz"))
    assert (tmp_path / "x.json").read_text() == text
    assert not (tmp_path / "x.npz").exists()
    (tmp_path / "x.json").unlink()
    convert.convert(str(file), str(tmp_path / "x.npz"))
    before = (tmp_path / "x.npz").read_bytes()
    with pytest.raises(UserError, match=r"x.npz exists"):
        convert.convert(str(file), str(tmp_path / "x.npz"))
    assert (tmp_path / "x.npz").read_bytes() == before


def test_full_disk_leaves_no_half_of_a_folder(tmp_path, monkeypatch):
    file, _, _ = start(tmp_path)

    def full(path, *args):
        path.mkdir(exist_ok=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_torch", full)
    (tmp_path / "kept").mkdir()
    for name in ("hf", "kept"):
        with pytest.raises(UserError, match="No space left on device"):
            convert.convert(str(file), str(tmp_path / name))
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / "kept").exists()


def test_failure_leaves_nothing(tmp_path):
    flat = start(tmp_path)[2]
    flat["Transformer/encoder_norm/bias"][:] = np.nan
    bad = save_npz(tmp_path / "bad.npz", flat)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match="not finite"):
        convert.convert(bad, str(tmp_path / "y.npz"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_command(tmp_path, command):
    file, _, _ = start(tmp_path)
    run = functools.partial(command, module="vit_jax.convert")
    done = run(file, tmp_path / "a.npz", "--image_size=24")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'a.npz'}\n"
    assert "resized" in done.stderr
    assert "none.npz" in run(tmp_path / "none.npz", tmp_path / "b.npz").error


FAMILIES = Path(__file__).parent / "golden" / "families"


@pytest.mark.parametrize(
    ("case", "dest"),
    [
        ("hf_dinov2_reg_a", "folder"),
        ("timm_dinov3_a", "x.safetensors"),
        ("timm_beit_a", "x.safetensors"),
    ],
)
def test_own_format_of_a_family(command, tmp_path, case, dest):
    """By command: the family's own names; and what comes back is the same bits."""
    source = FAMILIES / case
    done = command(source, tmp_path / dest, "--format=own", module="vit_jax.convert")
    assert done.returncode == 0, done
    file = tmp_path / dest / "model.safetensors"
    ours = safetensors.load_file(file if file.exists() else tmp_path / dest)
    theirs = safetensors.load_file(next(source.glob("*.safetensors")))
    assert all(any(t.endswith(name) for t in theirs) for name in ours)
    a, b = weights.read(source), weights.read(tmp_path / dest)
    assert a.cfg == b.cfg
    a, b = fit.flatten(a.params), fit.flatten(b.params)
    assert all(np.array_equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_a_family_in_the_names_of_timm(tmp_path):
    """Whose arrays have other axes than the same ones of the family."""
    source = f"{FAMILIES / 'orig_openai_clip_a' / 'model.safetensors'}:heads=3"
    convert.convert(source, str(tmp_path / "x.safetensors"))
    a, b = weights.read(source), weights.read(tmp_path / "x.safetensors")
    assert a.cfg == b.cfg
    assert a.metadata.transforms == b.metadata.transforms
    a, b = fit.flatten(a.params), fit.flatten(b.params)
    assert all(np.array_equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_own_format_of_a_folder_is_no_file(command, tmp_path):
    source, dest = FAMILIES / "hf_dinov2_reg_a", tmp_path / "x.safetensors"
    done = command(source, dest, "--format=own", module="vit_jax.convert")
    assert "written as a folder: give DEST without a suffix" in done.error
    assert not dest.exists()


def test_folder_of_timm_names_an_architecture_and_its_sizes(command, tmp_path):
    """BEiT is a class of its own, which timm builds by name, in any size."""
    source, dest = FAMILIES / "timm_beit_a", tmp_path / "x"
    command(source, dest, "--format=timm", module="vit_jax.convert")
    config = json.loads((dest / "config.json").read_text())
    assert config["architecture"].startswith("beit_")
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
    assert config["model_args"].items() >= sizes.items()
    assert vit_jax.load(dest)[0] == vit_jax.load(source)[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_norm_eps": 1e-5, "norm_pre": True, "gelu": "quick"},
        {"head": "gap", "class_token": True, "final_norm": "pooled"},
        {"head": "map", "gelu": "exact", "registers": 1},
        {"distillation": "head"},
    ],
)
def test_timm_folder_states_the_model(command, tmp_path, fields):
    """``config.json`` alone, without the header of the weights, names every switch."""
    file, model, _ = start(tmp_path, **fields)
    done = command(file, tmp_path / "m", "--format=timm", module="vit_jax.convert")
    assert done.returncode == 0, done
    arrays = tmp_path / "m" / "model.safetensors"
    save_file(safetensors.load_file(arrays), arrays)
    found = weights.read(tmp_path / "m")
    assert found.cfg == model.cfg
    assert found.metadata.class_names == NAMES.class_names


@pytest.mark.process
@pytest.mark.slow
def test_memory_of_a_large_model(tmp_path):
    """Reading and writing ViT-L/16 (1.2 GB) needs at most 2.2 times the file."""
    script = (
        "import sys, resource, numpy as np\n"
        "from vit_jax import convert\n"
        "convert.convert(sys.argv[1], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    model = vit_jax.create_model("ViT-L/16", num_classes=1000, image_size=224)
    shapes = fit.flatten(fit._shapes(model.cfg))
    ones = {k: np.broadcast_to(np.float32(1), v.shape) for k, v in shapes.items()}
    weights.save(tmp_path / "x.npz", model.cfg, fit.unflatten(ones))
    for a, b in (
        ("x.npz", "y.npz"),
        ("x.npz", "y.safetensors"),
        ("y.safetensors", "z.npz"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / a, tmp_path / b],
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout.split()[-1]) < 2.2 * (tmp_path / a).stat().st_size
