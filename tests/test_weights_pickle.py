# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save``, built by hand: read without running anything."""

import json
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file
from weights_files import (
    Instructions,
    assert_same,
    pickled,
    save_torch,
    small_model,
    timm_arrays,
)

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.weights import fit

NAMESPACE = Instructions(b"cargparse\nNamespace\n)\x81}b")


def nested(name):
    def put(arrays):
        return {name: arrays, "epoch": 3, "args": NAMESPACE, "loss": 0.5}

    return put


def prefixed(prefix):
    return lambda arrays: {f"{prefix}{k}": v for k, v in arrays.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda arrays: arrays,
        nested("model"),
        nested("state_dict"),
        nested("teacher"),
        nested("student"),
        prefixed("module."),
        lambda arrays: nested("state_dict")(prefixed("module.model.")(arrays)),
        lambda arrays: {**prefixed("module.backbone.")(arrays), "module.x.y": arrays["norm.bias"]},
    ],
)  # fmt: skip
def test_wherever_the_parameters_are(tmp_path, wrap):
    _, flat, arrays = timm_arrays(tmp_path)
    file = save_torch(tmp_path / "x.pth", wrap(arrays))
    assert_same(weights.read(file, heads=2).params, flat)


def test_one_of_several_models(tmp_path):
    _, flat, arrays = timm_arrays(tmp_path)
    other = {k: v + 1 for k, v in arrays.items()}
    file = save_torch(tmp_path / "x.pth", {"student": other, "teacher": arrays})
    with pytest.raises(
        UserError, match=r"'student', 'teacher': name one as .*:teacher"
    ):
        weights.read(file)
    assert_same(weights.read(f"{file}:teacher", heads=2).params, flat)
    with pytest.raises(UserError, match="'student', 'teacher'"):
        weights.read(f"{file}:model")


def test_a_name_twice(tmp_path):
    class Twice(dict):
        def items(self):
            return [*super().items(), ("norm.bias", np.ones(16, np.float32))]

    file = save_torch(tmp_path / "x.pth", Twice(timm_arrays(tmp_path)[2]))
    with pytest.raises(UserError, match=r"the name 'norm.bias' twice"):
        weights.read(file, heads=2)


@pytest.mark.parametrize("dtype", ["<f8", "<f2", "V2"])
def test_types_and_strides(tmp_path, dtype):
    model, flat = small_model()
    flat = {k: v.astype(np.float16).astype(np.float32) for k, v in flat.items()}
    if dtype == "V2":  # bfloat16: the upper half of a float32
        flat = {
            k: (v.view(np.uint32) & 0xFFFF0000).view("<f4") for k, v in flat.items()
        }
    weights.save(
        tmp_path / "x.safetensors", model.cfg, fit.unflatten(flat), layout="timm"
    )
    arrays = load_file(tmp_path / "x.safetensors")
    narrow = lambda v: (
        (v.view(np.uint32) >> 16).astype(np.uint16).view("V2")
        if dtype == "V2"
        else v.astype(dtype)
    )
    arrays = {k: narrow(v) for k, v in arrays.items()}
    name = "blocks.0.mlp.fc1.weight"
    arrays[name] = np.asfortranarray(arrays[name])
    arrays["steps"] = np.array([3], np.int64)
    file = save_torch(tmp_path / "x.pt", arrays)
    assert_same(weights.read(file, heads=2).params, flat)


def test_a_hugging_face_folder(tmp_path):
    model, flat = small_model(gelu="tanh", layer_norm_eps=1e-5)
    folder = tmp_path / "hf"
    weights.save(folder, model.cfg, fit.unflatten(flat))
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(arrays)
    save_torch(folder / "pytorch_model.bin", arrays)
    found = weights.read(folder)
    assert_same(found.params, flat)
    assert found.cfg == model.cfg
    (folder / "pytorch_model.bin").unlink()
    parts = {"a.bin": names[:9], "b.bin": names[9:]}
    for file, part in parts.items():
        save_torch(folder / file, {k: arrays[k] for k in part})
    index = {"weight_map": {k: file for file, part in parts.items() for k in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(weights.read(folder).params, flat)


def program(code):
    return lambda path: save_torch(path, Instructions(code))


def tensor(offset=0, shape=(2, 3), strides=(3, 1), key="0"):
    def write(path):
        values = {"a": np.zeros((2, 3, 1, 1), np.float32)}
        with zipfile.ZipFile(save_torch(path, values)) as archive:
            members = {n: archive.read(n) for n in archive.namelist()}
        old = pickled((0, (2, 3, 1, 1), (3, 1, 1, 1)), [])[1:-1]
        new = pickled((offset, (*shape, 1, 1), (*strides, 1, 1)), [])[1:-1]
        code = members["archive/data.pkl"]
        assert old in code
        code = code.replace(old, new).replace(pickled("0", []), pickled(key, []))
        members["archive/data.pkl"] = code
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    return write


BAD = {
    "another class": (program(b"cposix\nsystem\nX\x01\0\0\0x\x85R"), "asks for 'posix.system'"),
    "a new name": (program(b"\x8c\x02os\x8c\x06system\x93"), "asks for 'os.system'"),
    "an old instruction": (program(b"(S'ls'\nios\nsystem\n"), "an instruction STRING"),
    "a call of a number": (program(b"J\1\0\0\0)R"), "no name"),
    "an empty stack": (program(b"R"), "more is taken than there is"),
    "no mark": (program(b"t"), "truncated or damaged"),
    "a long name": (program(b"}X\xff\1\0\0" + b"a" * 511 + b"Ns"), "a name of 511"),
    "no model": (program(b"}"), "without the weights of a Vision Transformer"),
    "beyond its values": (tensor(offset=1), r"claims shape \(2, 3, 1, 1\)"),
    "strides too long": (tensor(strides=(99, 1)), "claims shape"),
    "more than its values": (tensor(shape=(2000, 3000), strides=(0, 0)), "claims shape"),
    "a negative shape": (tensor(shape=(-2, 3)), "a tensor of shape"),
    "another storage": (tensor(key="7"), "the values of 'a' are missing"),
    "outside": (tensor(key="../data.pkl"), "the values of 'a' are missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_programs_that_are_no_weights(tmp_path, case):
    write, message = BAD[case]
    write(tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as e:
        weights.read(tmp_path / "x.pth")
    assert "\n" not in str(e.value)


def test_bombs_of_a_program_end(tmp_path):
    """Dicts in dicts, each twice: 2 to the power of 64 if they were all visited. And
    instructions without end."""
    file = tmp_path / "x.pth"
    twice = b"".join(
        b"}(X\1\0\0\0ah%cX\1\0\0\0bh%cuq%c" % (i, i, i + 1) for i in range(64)
    )
    program(b"}q\0" + twice)(file)
    with pytest.raises(UserError, match="without the weights"):
        weights.read(file)
    program(b"N0" * 600_000)(file)
    with pytest.raises(UserError, match="instruction"):
        weights.read(file)
