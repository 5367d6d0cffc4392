# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints that other code bases read; metadata travels along."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import config, models
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.positions import PositionEmbedding
from vit_jax.weights import fit, metadata, npz, safetensors, torch
from vit_jax.weights.contents import Metadata
from vit_jax.weights.layout import POSITIONS, STACKED


def save(
    path: Path,
    cfg: ModelConfig,
    params: dict[str, Any],
    about: Metadata,
    layout: str = "",
) -> list[str]:
    """See ``weights.save``."""
    layout = layout or layout_of(path)
    write = config.choose("layout", layout, LAYOUTS)
    if cfg.image_size == (0, 0):
        raise UserError("model.image_size is (0, 0): say which images the model takes")
    flat = dict(unstacked(params))
    cfg = dataclasses.replace(cfg, layers="loop")
    try:
        return write(path, cfg, flat, about)
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror or e}") from e


def layout_of(path: Path) -> str:
    """The layout that a destination's name asks for.

    Raises:
      UserError: it asks for none.
    """
    if path.suffix == ".npz":
        return "npz"
    if path.suffix == ".safetensors":
        return "timm"
    if not path.suffix or path.is_dir():
        return "hf"
    raise UserError(
        f"{path}: its suffix is none of .npz (released names), .safetensors (timm) or no "
        "suffix (Hugging Face folder); or give --format=npz, timm or hf"
    )


def unstacked(params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(released name, array) of each parameter; layers stacked for ``scan`` are split."""
    for name, values in fit.flatten(params).items():
        values = np.asarray(values)
        if name.startswith(STACKED):
            for i, layer in enumerate(values):
                inner = name.removeprefix(STACKED)
                yield f"Transformer/encoderblock_{i}/{inner}", layer
        else:
            yield name, values


def _npz(
    path: Path, cfg: ModelConfig, flat: dict[str, np.ndarray], about: Metadata
) -> list[str]:
    metadata.check_sidecar(path)
    npz.write(path, sorted(flat.items()))
    metadata.write_json(metadata.sidecar(path), metadata.to_dict(cfg, about))
    return [f"class names and preprocessing: {metadata.sidecar(path)}"]


def _timm(
    path: Path, cfg: ModelConfig, flat: dict[str, np.ndarray], about: Metadata
) -> list[str]:
    torch.exportable(cfg, "timm")
    flat, cfg = _with_table(flat, cfg)
    stages = list(cfg.resnet) if cfg.resnet_width else None
    arrays = torch.to_torch(flat, torch.timm_pairs(cfg.depth, stages))
    header = {"vit_jax": json.dumps(metadata.to_dict(cfg, about), ensure_ascii=False)}
    safetensors.write(path, arrays, header)
    notes = []
    if cfg.gelu == "tanh":
        notes.append(
            "trained with the tanh form of GELU, while timm's default is the exact one: "
            "timm.create_model(..., act_layer='gelu_tanh') gives equal logits"
        )
    if cfg.pre_logits:
        notes.append(
            "timm dropped pre_logits in version 0.9: newer ones refuse its arrays"
        )
    return notes


def _hf(
    path: Path, cfg: ModelConfig, flat: dict[str, np.ndarray], about: Metadata
) -> list[str]:
    torch.exportable(cfg, "hf")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; a Hugging Face model is a folder")
    flat, cfg = _with_table(flat, cfg)
    pairs = torch.hf_pairs(cfg.depth, "vit." if cfg.num_classes else "")
    arrays = torch.to_torch(flat, pairs)
    path.mkdir(parents=True, exist_ok=True)
    model, processor = metadata.to_hf(cfg, about)
    safetensors.write(path / "model.safetensors", arrays, {})
    metadata.write_json(path / "config.json", model)
    metadata.write_json(path / "preprocessor_config.json", processor)
    return []


LAYOUTS = {"npz": _npz, "timm": _timm, "hf": _hf}


def _with_table(
    flat: dict[str, np.ndarray], cfg: ModelConfig
) -> tuple[dict[str, np.ndarray], ModelConfig]:
    """Positions as one table, the only form that torch's models have."""
    if cfg.positions == "learned":
        return flat, cfg
    inside = {k: v for k, v in flat.items() if "posembed_input/" in k}
    rest = {k: v for k, v in flat.items() if k not in inside}
    if cfg.positions == "none":
        rows, columns = models.token_grid(cfg, cfg.image_size)
        length = rows * columns + models.has_class_token(cfg)
        table = np.zeros((1, length, cfg.width), np.float32)
    else:
        params = {k.split("/")[-1]: v for k, v in inside.items()}
        table = np.asarray(
            PositionEmbedding(cfg, cfg.image_size).apply({"params": params})
        )
    rest[POSITIONS] = table
    return rest, dataclasses.replace(cfg, positions="learned")
