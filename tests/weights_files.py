# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints for the tests of weights/, written with numpy alone."""

import struct
import zipfile

import numpy as np
from safetensors.numpy import load_file

import vit_jax
from vit_jax import weights
from vit_jax.weights import fit

SMALL = dict(width=16, depth=2, mlp_dim=24, heads=2, patch=8, num_classes=5)
POSITIONS = "Transformer/posembed_input/pos_embedding"


def small_model(image_size=16, **fields):
    """(model, flat parameters) with random values everywhere, nothing zero or one."""
    model = vit_jax.create_model("", image_size=image_size, **{**SMALL, **fields})
    shapes = fit.flatten(fit._shapes(model.cfg))
    rng = np.random.default_rng(0)
    flat = {
        k: rng.normal(0.1, 0.5, s.shape).astype(np.float32) for k, s in shapes.items()
    }
    return model, flat


def save_npz(path, flat):
    np.savez(path, **flat)
    return str(path)


def assert_same(params, flat, but=()):
    """Every array equal to the bit, except those whose name is in ``but``."""
    params = fit.flatten(params)
    assert params.keys() == flat.keys()
    for name in flat.keys() - set(but):
        np.testing.assert_array_equal(np.asarray(params[name]), flat[name], name)


class Instructions(bytes):
    """Part of a pickle, written as it is."""


def pickled(value, storages) -> bytes:
    """The instructions that ``torch.save`` writes for ``value``; arrays are added to
    ``storages``."""
    if isinstance(value, Instructions):
        return value
    if isinstance(value, dict):
        items = b"".join(pickled(x, storages) for pair in value.items() for x in pair)
        return b"}(" + items + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(pickled(x, storages) for x in value) + b"t"
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    kind = {"<f4": "Float", "<f8": "Double", "<i8": "Long", "|i1": "Char"}
    kind |= {"<f2": "Half", "|V2": "BFloat16"}
    name = kind[value.dtype.str] + "Storage"
    # As torch does for transposed tensors: in the order in memory, not of the axes.
    storages.append(value.tobytes(order="A"))
    strides = tuple(s // value.itemsize for s in value.strides)
    key, count = str(len(storages) - 1), value.size
    storage = pickled(("storage", Instructions(f"ctorch\n{name}\n".encode())), storages)
    storage = (
        storage[:-1] + b"".join(pickled(x, []) for x in (key, "cpu", count)) + b"tQ"
    )
    ordered = Instructions(b"ccollections\nOrderedDict\n)R")
    args = (Instructions(storage), 0, value.shape, strides, False, ordered)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + pickled(args, storages) + b"R"


def save_torch(path, value):
    """What ``torch.save(value, path)`` writes, for arrays in place of tensors."""
    storages = []
    program = b"\x80\x02" + pickled(value, storages) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for i, data in enumerate(storages):
            archive.writestr(f"archive/data/{i}", data)
        archive.writestr("archive/version", "3\n")
    return path


def timm_arrays(tmp_path, **fields):
    """(model, flat parameters, the same under timm's names)."""
    model, flat = small_model(**fields)
    weights.save(
        tmp_path / "timm.safetensors", model.cfg, fit.unflatten(flat), layout="timm"
    )
    return model, flat, load_file(tmp_path / "timm.safetensors")
