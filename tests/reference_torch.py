# SPDX-License-Identifier: Apache-2.0
"""Runs an exported model in PyTorch.

    python reference_torch.py hf|timm MODEL IO OUT

A program of its own, because an environment with both PyTorch and JAX is rare.
``MODEL`` is a folder for hf, a folder or
``FILE,ARCHITECTURE,JSON of arguments`` for timm; ``IO``
an npz with ``images`` (B, H, W, C); ``OUT`` receives ``logits``.
"""

import enum
import importlib.abc
import importlib.machinery
import json
import sys
import types

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


def main(kind, model, io, out):
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: it is for another torch
        sys.modules.pop("torchvision", None)
        sys.meta_path.insert(0, _Finder())
    net = {"hf": hf, "timm": timm}[kind](model).eval()
    images = torch.from_numpy(np.load(io)["images"].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits = net(images)
    logits = getattr(logits, "logits", logits)
    np.savez(out, logits=logits.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
