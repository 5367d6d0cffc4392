# SPDX-License-Identifier: Apache-2.0
"""Runs an exported model in PyTorch.

    python reference_torch.py hf|timm|own MODEL IO OUT

A program of its own, because an environment with both PyTorch and JAX is rare.
``MODEL`` is a folder for hf, a folder or
``FILE,ARCHITECTURE,JSON of arguments`` for timm; ``IO``
an npz with ``images`` (B, H, W, C); ``OUT`` receives ``logits``. For own, ``MODEL`` is a
folder of such folders, each with an ``io.npz``; ``OUT`` receives ``NAME/logits`` or, of a
model without classes, ``NAME/tokens`` and what else it returns.
"""

import enum
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Stub(types.ModuleType):
    """timm and transformers import torchvision for images, which nothing here uses."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            names = [
                "nearest",
                "nearest_exact",
                "bilinear",
                "bicubic",
                "box",
                "hamming",
                "lanczos",
            ]
            return _MODES.setdefault(0, enum.Enum(name, {n.upper(): n for n in names}))
        return _Anything(name, (object,), {})


_MODES = {}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def hf(model):
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(model, attn_implementation="eager")


def timm(model):
    from safetensors.torch import load_file
    from timm import create_model

    if "," not in model:  # which loads strictly
        return create_model(f"local-dir:{model}", pretrained=True)
    file, architecture, arguments = model.split(",", 2)
    net = create_model(architecture, **json.loads(arguments))
    net.load_state_dict(load_file(file), strict=True)
    return net


def own(folder):
    """Outputs of a model by the class and the arguments in its config.json alone."""
    import timm
    import transformers

    config = json.loads((folder / "config.json").read_text())
    images = np.load(folder / "io.npz")["images"]
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    if "architecture" in config:
        net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        tokens = net.forward_features(images)
        features = net.forward_head(tokens, pre_logits=True)
        return {"features": features} | (
            {"logits": net(images)} if config["num_classes"] else {}
        )
    (name,) = config["architectures"]
    read = getattr(transformers, name).from_pretrained
    # What no config.json can say.
    plain = {"add_pooling_layer": False} if name == "ViTModel" else {}
    net, info = read(folder, output_loading_info=True, **plain)
    if plain and "pooler.dense.weight" in info["unexpected_keys"]:
        net, info = read(folder, output_loading_info=True)
    assert not any(info.values()), (folder.name, info)
    inputs = {"pixel_values": images}
    if name.startswith("Siglip2"):
        b, c, h, w = images.shape
        side = config["patch_size"]
        cut = images.reshape(b, c, h // side, side, w // side, side)
        cut = cut.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, side * side * c)
        inputs = {
            "pixel_values": cut,
            "pixel_attention_mask": torch.ones(cut.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([[h // side, w // side]] * b),
        }
    found = net.eval()(**inputs)
    wanted = {
        "logits": "logits",
        "image_embeds": "image_embeds",
        "pooler_output": "features",
        "last_hidden_state": "tokens",
    }
    return {
        ours: getattr(found, theirs)
        for theirs, ours in wanted.items()
        if getattr(found, theirs, None) is not None
    }


def main(kind, model, io, out):
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: it is for another torch
        sys.modules.pop("torchvision", None)
        sys.meta_path.insert(0, _Finder())
    if kind == "own":
        with torch.no_grad():
            outputs = {
                f"{folder.name}/{name}": values.numpy()
                for folder in sorted(Path(model).iterdir())
                for name, values in own(folder).items()
            }
        return np.savez(out, **outputs)
    net = {"hf": hf, "timm": timm}[kind](model).eval()
    images = torch.from_numpy(np.load(io)["images"].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits = net(images)
    logits = getattr(logits, "logits", logits)
    np.savez(out, logits=logits.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
