# SPDX-License-Identifier: Apache-2.0
"""Files that are no checkpoint: each has its own message, and nothing is unpickled."""

import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file
from weights_files import assert_same, save_npz, save_torch, small_model, timm_arrays

from vit_jax import checkpoint, weights
from vit_jax.config import CheckpointConfig
from vit_jax.errors import UserError
from vit_jax.program import State
from vit_jax.weights import contents, fit


class Bomb:
    """Unpickling this fails the test."""

    def __reduce__(self):
        return (exec, ("raise AssertionError('unpickled')",))


def pickled_npz(path):
    np.savez(path, embedding=np.array([Bomb()], dtype=object))


def torch_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))


def truncated_npz(path):
    np.savez(path, **small_model()[1])
    path.write_bytes(path.read_bytes()[:-2000])


def truncated_safetensors(path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"123")


def damaged_header(path):
    header = b"{'descr': (" + b" " * 53 + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", data)


def nameless_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"")


def zip_of_the_future(path):
    np.savez(path, a=np.zeros(3))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 99  # the version that is needed to read it
    path.write_bytes(bytes(data))


FILES = {
    "html": (b"<!DOCTYPE html><title>Access denied</title>", "web page.*Access denied"),
    "bucket error": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "web page.*AccessDenied",
    ),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 346292833\n",
        "git-lfs pointer.*346,292,833",
    ),
    "empty": (b"", "is empty"),
    "pickle": (pickle.dumps(Bomb()), "Python pickle.*never unpickled"),
    "torch.save": (torch_zip, "asks for 'builtins.exec'.*may run code.*safetensors"),
    "pickled arrays": (pickled_npz, "pickled Python objects"),
    "truncated zip": (truncated_npz, "truncated"),
    "truncated safetensors": (truncated_safetensors, "truncated"),
    "truncated msgpack": (b"\x82\xa6params\x82\xa4head", "msgpack file, is truncated"),
    "header of an array": (damaged_header, "array 'a' is truncated or damaged"),
    # Python 3.11 trips over it, later ones read the name "".
    "member without a name": (nameless_member, "truncated or damaged|it holds ''"),
    "zip of the future": (zip_of_the_future, "damaged.*version 9.9"),
    "one array": (b"\x93NUMPY\x01\x00", "single .npy"),
    "gzip": (b"\x1f\x8b\x08\x00", "gunzip"),
    "keras": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "noise": (b"hello", "begins with"),
}


@pytest.mark.parametrize("case", FILES)
def test_not_a_checkpoint(tmp_path, case):
    content, message = FILES[case]
    file = tmp_path / "x.npz"
    if callable(content):
        content(file)
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        weights.read(file)
    assert str(file) in str(e.value)


def test_folders(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        weights.read(tmp_path / "a")
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"a/pytorch_model.bin .*begins with b'PK'"):
        weights.read(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(UserError, match="SavedModel"):
        weights.read(tmp_path / "b")


def test_missing_file_suggests_the_nearest(tmp_path):
    (tmp_path / "ViT-B_16.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"did you mean .*ViT-B_16"):
        weights.read(tmp_path / "ViT-B_61.npz")
    (tmp_path / "latest.npz").symlink_to("gone.npz")
    with pytest.raises(UserError, match=r"a link to gone.npz, which does not exist$"):
        weights.read(tmp_path / "latest.npz")


def test_no_source(tmp_path, monkeypatch):
    """Not the folder where the command happens to run."""
    save_npz(tmp_path / "x.npz", small_model()[1])
    monkeypatch.chdir(tmp_path)
    for read in (weights.read, weights.read_metadata):
        with pytest.raises(UserError, match="no source is named: give"):
            read("")
    weights.read(".")


def test_more_than_fits_into_memory(tmp_path, monkeypatch):
    file = save_npz(tmp_path / "x.npz", {"embedding/kernel": np.zeros((8, 8, 3, 16))})
    monkeypatch.setattr(contents, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="GiB of memory"):
        weights.read(file)


def test_zip_bomb_is_refused_by_its_directory(tmp_path):
    file = tmp_path / "x.npz"
    np.savez_compressed(file, a=np.zeros(10, np.float32))
    data = bytearray(file.read_bytes())
    at = data.rindex(b"PK\x01\x02")  # the directory entry: uncompressed size at 24
    data[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"claims to unpack to 4,294,967,\d+"):
        weights.read(file)


def test_cached_files_do_not_use_up_the_memory_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    stat = "anon 200\ninactive_file 400\nactive_file 300\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert contents.available_memory() == 800


def test_a_name_twice(tmp_path):
    file = save_npz(tmp_path / "x.npz", small_model()[1])
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(match="Duplicate"):
        archive.writestr("cls.npy", archive.read("cls.npy"))
    with pytest.raises(UserError, match="holds one name twice"):
        weights.read(file)
    entry = serialization.msgpack_serialize({"cls": np.ones(3, np.float32)})[1:]
    (tmp_path / "x.msgpack").write_bytes(b"\x82" + entry + entry)  # a map of two
    with pytest.raises(UserError, match="holds the name 'cls' twice"):
        weights.read(tmp_path / "x.msgpack")


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "msgpack", "pth"])
def test_quantised_weights(tmp_path, suffix):
    arrays = {"embedding": {"kernel": np.ones((8, 8, 3, 16), np.int8)}}
    file = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        np.savez(file, **arrays["embedding"])
    elif suffix == "safetensors":
        save_file(arrays["embedding"], file)
    elif suffix == "msgpack":
        file.write_bytes(serialization.msgpack_serialize(arrays))
    else:
        save_torch(file, arrays)
    with pytest.raises(UserError, match="kernel has type int8: quantised"):
        weights.read(file)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "msgpack"])
def test_names_do_not_reach_the_terminal_raw(tmp_path, suffix):
    name = "Transformer/a\n\x1b[31mred"
    _, flat, torch_arrays = timm_arrays(tmp_path)
    arrays = torch_arrays if suffix == "safetensors" else flat
    arrays = {**arrays, name: np.ones(3, np.float32)}
    file = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        np.savez(file, **arrays)
    elif suffix == "safetensors":
        save_file(arrays, file)
    else:
        file.write_bytes(serialization.msgpack_serialize(arrays))
    with pytest.raises(UserError, match="names an array") as e:
        weights.read(file)
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x81\xa1a\xdd\x7f\xff\xff\xff" + b"\x90" * 3_000_000, "1,000,000 entries"),
        (b"\x81\xa1a\xdd\x7f\xff\xff\xff", "ends too early"),
        (b"\x81\xa1a\xc6\x7f\xff\xff\xff", "stated, but not there"),
        (b"\x81\xa1a" * 1000, "nested more than"),
        (b"\xdf\xff\xff\xff\xff" + b"\xa1a\xc0" * 9, "ends too early"),
        (b"\x81\xa1a\xc0 more", "5 bytes follow"),
    ],
)
def test_msgpack_takes_no_more_than_its_size(tmp_path, data, message):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UserError, match=message):
        weights.read(tmp_path / "x")


def test_msgpack_is_what_flax_writes(tmp_path, monkeypatch):
    """Also large arrays, which it cuts into chunks, and every other kind of value."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    _, flat = small_model()
    other = {"step": 70_000, "rate": -1.5, "state": [1, None, "x", {"a": True}, -3]}
    other |= {"count": np.array(3), "float": np.float32(3), "none": np.zeros((0, 2))}
    tree = {"target": fit.unflatten(flat), "state": other}
    (tmp_path / "x").write_bytes(serialization.msgpack_serialize(tree))
    assert_same(weights.read(tmp_path / "x").params, flat)


def test_header_that_lies_about_the_shape(tmp_path):
    file = tmp_path / "x.npz"
    with zipfile.ZipFile(file, "w") as archive, archive.open("a.npy", "w") as member:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 10**6)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(b"1234")
    with pytest.raises(UserError, match="claims shape"):
        weights.read(file)


def test_flipped_bit(tmp_path):
    file = tmp_path / "x.npz"
    np.savez(file, **small_model()[1])
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged"):
        weights.read(file)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("checkpoints/3/params/manifest.ocdbt", None),
        ("checkpoints/3/params/manifest.ocdbt", b""),
        ("checkpoints/3/params/_METADATA", b"{"),
        ("checkpoints/3/params/_METADATA", b"\xff\xfe"),
        ("checkpoints/3/params/d", None),
    ],
)
def test_damaged_workdir(workdir, tmp_path, file, damage):
    shutil.copytree(workdir, tmp_path / "run")
    file = tmp_path / "run" / file
    if damage is not None:
        file.write_bytes(damage)
    elif file.is_dir():
        shutil.rmtree(file)
    else:
        file.unlink()
    with pytest.raises(UserError, match=r"run.* damaged"):
        weights.read(tmp_path / "run")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workdir")
    saver = checkpoint.Checkpointer(str(folder), CheckpointConfig())
    params = fit.unflatten(small_model()[1])
    saver.save(State(params, {}, np.int32(3), {}), 3)
    saver.wait()
    saver.close()
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["cat", "dog"]', ""),  # a stranger's file
        ("{", ""),
        ('{"format": "vit_jax", "class_names": 5}', "x.json: class_names is 5"),
        ('{"format": "vit_jax", "transforms": ["x"]}', "transforms is .*operations"),
        ('{"format": "vit_jax", "transforms": null}', ""),
        ('{"format": "vit_jax", "model": 3}', "model is 3"),
        ('{"format": "vit_jax", "model": {"head": "gap"}}', "head is stated as 'gap'"),
        (
            '{"format": "vit_jax", "model": {"image_mean": [NaN]}}',
            "image_mean.0. is nan",
        ),
    ],
)
def test_file_beside_an_npz(tmp_path, text, message):
    file = save_npz(tmp_path / "x.npz", small_model()[1])
    (tmp_path / "x.json").write_text(text)
    if message:
        with pytest.raises(UserError, match=message):
            weights.read(file)
    else:
        assert weights.read(file).metadata.class_names == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, bad):
    _, flat = small_model()
    flat["cls"][0, 0, :2] = bad
    with pytest.raises(UserError, match="cls has 2 values that are not finite"):
        weights.read(save_npz(tmp_path / "x.npz", flat))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("embedding/kernel", (8, 4, 3, 16), "square patches"),
        ("embedding/kernel", (8, 8, 16), "has shape"),
        (
            "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel",
            (16, 9),
            r"not \(16, 24\)",
        ),
        (
            "Transformer/encoderblock_0/MlpBlock_3/Dense_1/kernel",
            (9, 16),
            r"not \(24, 16\)",
        ),
        ("Transformer/posembed_input/pos_embedding", (1, 5, 8), r"not \(1, 5, 16\)"),
        ("Transformer/posembed_input/pos_embedding", (1, 7, 16), "no square grid"),
        ("head/bias", (4,), r"not \(5,\)"),
    ],
)
def test_shapes_that_contradict_each_other(tmp_path, name, shape, message):
    _, flat = small_model()
    flat = {**flat, name: np.ones(shape, np.float32)}
    with pytest.raises(UserError, match=message):
        weights.read(save_npz(tmp_path / "x.npz", flat))


@pytest.mark.parametrize("lost", ["encoderblock_1/", "encoderblock_0/"])
def test_a_whole_block_is_missing(tmp_path, lost):
    _, flat = small_model(depth=3)
    flat = {k: v for k, v in flat.items() if lost not in k}
    with pytest.raises(UserError, match="is missing"):
        weights.read(save_npz(tmp_path / "x.npz", flat))


@pytest.mark.parametrize(
    ("name", "gap"),
    [
        ("Transformer/encoderblock_999999999/LayerNorm_0/bias", "encoderblock_2"),
        ("block900000000/unit1/gn1/scale", "block1"),
        ("block1/unit900000000/gn1/scale", "block1/unit1"),
        ("blocks.999999999.norm1.weight", "block 2"),
        ("patch_embed.backbone.stages.9.blocks.999999999.norm1.weight", "stage 0"),
    ],
)
def test_a_number_in_a_name_is_not_a_number_of_layers(tmp_path, name, gap):
    """Memory and time go with the file, not with what it says: this ends at once."""
    model, flat = small_model()
    if "." in name:
        file = tmp_path / "x.safetensors"
        weights.save(file, model.cfg, fit.unflatten(flat), layout="timm")
        header, data = _split(file.read_bytes())
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        file.write_bytes(_joined(header, data))
    else:
        root = {"conv_root/kernel": np.zeros((7, 7, 3, 64))} if "unit" in name else {}
        file = save_npz(tmp_path / "x.npz", {**flat, **root, name: np.zeros(3)})
    with pytest.raises(UserError, match=f"{gap} is missing"):
        weights.read(file)


def _split(data):
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _joined(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_other_networks(tmp_path):
    mlp = {"stem/kernel": np.zeros((3, 3)), "head/kernel": np.zeros((3, 2))}
    with pytest.raises(UserError, match="no Vision Transformer"):
        weights.read(save_npz(tmp_path / "x.npz", mlp))
    bit = {"resnet/root_block/standardized_conv2d/kernel": np.zeros((7, 7, 3, 64))}
    bit |= {"resnet/block1/unit01/a": np.zeros(3)}
    with pytest.raises(UserError, match="BiT ResNet-v2"):
        weights.read(save_npz(tmp_path / "x.npz", bit))
    mixer = {"embedding/kernel": np.zeros((8, 8, 3, 16)), "MixerBlock_0/a": np.zeros(3)}
    with pytest.raises(UserError, match="MixerBlock_0"):
        weights.read(save_npz(tmp_path / "x.npz", mixer))
