# SPDX-License-Identifier: Apache-2.0
"""Class names and preprocessing that travel with the weights.

``transforms`` uses the words of ``data.eval_transforms`` (``resize``, ``central_crop``,
``resize_small``); mean and deviation are the model's. Steps of torch's processors without
a counterpart here are kept by name and refused when an image is prepared; the weights
load all the same.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from vit_jax import config
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.weights import documents
from vit_jax.weights.contents import Metadata, atomic

# The official evaluation: the whole image, bilinear without anti-aliasing, [-1, 1].
DEFAULT_TRANSFORMS: tuple[dict[str, Any], ...] = ({"op": "resize"},)

_TRAINING_ONLY = (
    "name",
    "dropout",
    "attention_dropout",
    "stochastic_depth",
    "dtype",
    "layers",
    "remat",
    "head_bias",
)


def read_json(path: Any, where: str = "") -> dict[str, Any]:
    """``where``: what to call it in messages. Raises: UserError: not a JSON object."""
    try:
        text = path.read_text()
    except (OSError, ValueError) as e:
        raise UserError(f"{where or path} cannot be read: {e}") from e
    return _object(text, where or str(path))


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not readable as JSON: {e}") from e
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold a JSON object, not {type(values).__name__}")
    return values


def sidecar(path: Path) -> Path:
    """``x.json``, which belongs to ``x.npz``."""
    return path.with_suffix(".json")


def of_npz(path: Path) -> Metadata:
    """From the sidecar that ``convert`` writes, if there is one."""
    other = sidecar(path)
    values = _own(other) if other != path else {}
    return from_dict(values, str(other)) if values else Metadata()


def check_sidecar(path: Path) -> None:
    """Raises: UserError: writing ``path`` would replace a stranger's file beside it."""
    other = sidecar(path)
    if other.exists() and not _own(other):
        raise UserError(
            f"{other} exists and is no metadata of a checkpoint, which would replace it: "
            "move it away, or give DEST another name"
        )


def _own(path: Path) -> dict[str, Any]:
    """What a sidecar holds; {} if there is none, or it is not of this code."""
    try:
        values = read_json(path)
    except UserError:
        return {}
    return values if values.get("format") == "vit_jax" else {}


def of_safetensors(header: dict[str, str], where: str) -> Metadata:
    """From the header that ``convert`` writes into safetensors files."""
    if "vit_jax" not in header:
        return Metadata()
    where = f"the entry vit_jax in the header of {where}"
    return from_dict(_object(header["vit_jax"], where), where)


def of_workdir(folder: Any) -> Metadata:
    """From ``config.json`` and ``dataset.json`` of a training run."""
    cfg = config.from_dict(read_json(folder / "config.json"))
    data: dict[str, Any] = {}
    if (folder / "dataset.json").exists():
        data = read_json(folder / "dataset.json")
    model = dataclasses.asdict(cfg.model)
    where = str(folder / "dataset.json")
    if cfg.model.image_size == (0, 0):
        size = documents.pair(cfg.data.image_size)
        model["image_size"] = documents.field(
            data, "image_size", size, documents.pair, where
        )
    # Zeros are filled in from the variant, and read off the arrays.
    model = {k: v for k, v in model.items() if v or k not in _FILLED}
    # Of the data, or what masked patch prediction predicts.
    model.pop("num_classes", None)
    transforms = tuple(dict(t) for t in cfg.data.eval_transforms)
    return Metadata(
        class_names=documents.field(data, "class_names", (), documents.names, where),
        transforms=documents.field(
            data, "eval_transforms", transforms, documents.operations, where
        )
        or DEFAULT_TRANSFORMS,
        model=model,
        multilabel=bool(data.get("multilabel", False)),
    )


_FILLED = (
    "num_classes",
    "width",
    "depth",
    "mlp_dim",
    "heads",
    "patch",
    "resnet",
    "resnet_width",
)


def from_dict(values: dict[str, Any], where: str) -> Metadata:
    """The inverse of :func:`to_dict`. Raises: UserError: naming a wrong field."""
    model = documents.field(values, "model", {}, dict, where)
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    if strange := sorted(set(model) - known):
        raise UserError(f"{where} states unknown model fields {strange}")
    get = lambda key, default, convert: documents.field(
        values, key, default, convert, where
    )
    transforms = get("transforms", (), documents.operations)
    for step in transforms:
        if step["op"] == "normalize":  # where mean and deviation were once
            model |= {"image_mean": step.get("mean"), "image_std": step.get("std")}
    full = config.from_dict({"model": model}).model  # checks types and choices
    return Metadata(
        class_names=get("class_names", (), documents.names),
        transforms=tuple(t for t in transforms if t["op"] != "normalize"),
        model={k: getattr(full, k) for k in model},
        multilabel=bool(values.get("multilabel", False)),
        family=get("family", "", str),
        arrays=get("arrays", (), documents.names),
        resize=get("resize", "", str),
    )


def stored_fields() -> list[str]:
    """Fields of ModelConfig that travel along: those of the architecture."""
    return [
        f.name for f in dataclasses.fields(ModelConfig) if f.name not in _TRAINING_ONLY
    ]


def to_dict(cfg: ModelConfig, about: Metadata) -> dict[str, Any]:
    """What is stored: architecture, class names, preprocessing."""
    return {
        "format": "vit_jax",
        "model": {field: getattr(cfg, field) for field in stored_fields()},
        "class_names": list(about.class_names),
        "transforms": list(about.transforms or DEFAULT_TRANSFORMS),
        "multilabel": about.multilabel,
        "family": about.family,
        "arrays": list(about.arrays),
        "resize": about.resize,
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic(path) as partial:
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
