# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints that other code bases read; metadata travels along."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import config, models
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models.positions import PositionEmbedding
from vit_jax.weights import (
    documents,
    fit,
    infer,
    metadata,
    npz,
    positions,
    recognise,
    roles,
    safetensors,
    timm_config,
)
from vit_jax.weights.contents import Contents, Metadata, in_memory
from vit_jax.weights.families import BY_NAME, FAMILIES, Family
from vit_jax.weights.layout import POSITIONS, STACKED
from vit_jax.weights.report import Report
from vit_jax.weights.understand import OF_REGISTERS, PATCHES_ONLY, understand

LAYOUTS = ("npz", "timm", "hf", "own")


def save(
    path: Path,
    cfg: ModelConfig,
    params: dict[str, Any],
    about: Metadata,
    layout: str = "",
) -> list[str]:
    """See ``weights.save``."""
    layout = layout or layout_of(path)
    config.choose("layout", layout, dict.fromkeys(LAYOUTS))
    if cfg.image_size == (0, 0):
        raise UserError("model.image_size is (0, 0): say which images the model takes")
    flat = dict(unstacked(params))
    cfg = dataclasses.replace(cfg, layers="loop")
    new = not path.exists()
    try:
        if layout == "npz" or (layout == "own" and about.family not in BY_NAME):
            return _npz(path, cfg, flat, about)
        return _torch(path, cfg, flat, about, layout)
    except OSError as e:
        if new:  # no half of a folder; files appear when they are complete
            shutil.rmtree(path, ignore_errors=True)
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
        "suffix (Hugging Face folder); or give --format=own, npz, timm or hf"
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


class _Layout:
    """A model in the names of one family, before anything is written."""

    def __init__(
        self,
        family: Family,
        cfg: ModelConfig,
        flat: dict[str, np.ndarray],
        about: Metadata,
    ):
        own = about.family == family.name
        # Of another family only what has nothing to do with its names travels along.
        travels = dataclasses.replace(about, arrays=(), family=family.name)
        self.family, self.about = family, about if own else travels
        self.reasons: list[str] = []
        self.itself = False  # whether reading would find this family
        present = frozenset(about.arrays if own else _usual(family, cfg))
        if family.hub and family.hub.kinds[0] in ("vit", "deit"):
            # Their classes have a mask token only if the caller asks for it.
            present = frozenset(n for n in present if not n.endswith("mask_token"))
        names = _first(family, present)
        tower = family.tower if cfg.num_classes or family.inside else ""
        if cfg.num_classes and family.hub and not family.hub.classifier:
            self.reasons.append("its class has no head")
        if "pool_k" in names:
            usual = roles.only_attention(cfg.width, cfg.map_heads or cfg.heads)
            same = lambda n, x: n in usual and np.array_equal(x, usual[n])
            flat = {n: x for n, x in flat.items() if not same(n, x)}
        flat, self.cfg = _with_table(flat, cfg, self.reasons)
        if own and family.waves and names["positions"] not in present:
            flat = _without_waves(flat, cfg)
        rows = infer.positioned_tokens(cfg)
        if OF_REGISTERS in present:
            zeros = np.zeros((1, cfg.registers, cfg.width), np.float32)
            flat[POSITIONS] = np.insert(flat[POSITIONS], [rows], zeros, axis=1)
        elif PATCHES_ONLY in present or (family.timm and cfg.registers):
            flat = _without_rows(flat, rows)
        patch_bias = flat.get("embedding/bias")
        if family.timm and cfg.norm_pre and not np.any(patch_bias):
            # Where a norm follows, timm's patch embedding has no bias.
            flat = {k: v for k, v in flat.items() if v is not patch_bias}
        stages = tuple(cfg.resnet) if cfg.resnet_width and family.timm else None
        sizes = roles.Sizes(cfg.depth, cfg.width, cfg.heads, cfg.map_heads, stages)
        if cfg.mlp != "gelu":
            names = _gated(family, names, present if own else frozenset())
        self.names = names
        arrays, homeless = roles.write(flat, names, family.kinds, sizes, present)
        if homeless:
            self.reasons.append(
                f"it has no place for {len(homeless)} arrays, such as {homeless[:3]}"
            )
        self.arrays = [
            (name[1:] if name.startswith("/") else tower + name, shape, values)
            for name, shape, values in arrays
        ]
        self.files: dict[str, dict[str, Any]] = {}
        if family.hub:
            names = [name for name, _, _ in self.arrays]
            written = documents.to_transformers(self.cfg, about, family, names)
            self.files = dict(
                zip(("config.json", "preprocessor_config.json"), written, strict=True)
            )
        if not self.reasons:
            self._check()

    def _check(self) -> None:
        """Reads it back: what came out otherwise is what the layout cannot hold."""
        arrays = {
            name: in_memory(name, np.broadcast_to(np.float32(0), shape))
            for name, shape, _ in self.arrays
        }
        report = Report(self.family.name)
        about = Metadata() if self.family.hub else metadata.from_dict(
            metadata.to_dict(self.cfg, self.about), "header"
        )  # fmt: skip
        contents = Contents(
            self.family.name, arrays, about, torch=True, files=self.files
        )
        try:
            name, timm = self.family.name, self.family.timm
            taken = recognise.recognise(arrays, timm, name).family.name
            self.itself = taken == name
            if not self.itself:
                self.reasons.append(f"it would be taken for {taken}")
                return
            size = self.cfg.image_size
            found, facts, _ = understand(contents, "", {}, report, size)
            back = infer.infer(found, facts)
            report.check()
        except UserError as e:
            self.reasons.append(str(e))
            return
        for field in metadata.stored_fields():
            old, new = getattr(self.cfg, field), getattr(back, field)
            if old != new:
                self.reasons.append(
                    f"model.{field} is {old!r} and would read as {new!r}"
                )


def _torch(
    path: Path,
    cfg: ModelConfig,
    flat: dict[str, np.ndarray],
    about: Metadata,
    layout: str,
) -> list[str]:
    """Writes the first family of that layout that can hold the model."""
    if not cfg.depth:
        raise UserError(
            f"cannot be written in the {layout} layout: a ResNet is not a ViT"
        )
    own = BY_NAME.get(about.family)
    if layout == "own" and own:
        families = [own]
    else:
        fits = (lambda f: f.hub) if layout == "hf" else (lambda f: f.timm)
        families = [f for f in FAMILIES if fits(f)]
        # Its own, else one that needs nothing added.
        families.sort(key=lambda f: (f.name != about.family, "scale1" in f.has))
    tried = []
    for family in families:
        attempt = _Layout(family, cfg, flat, about)
        if not attempt.reasons:
            return _write(path, attempt)
        tried.append(attempt)
    best = min(tried, key=lambda t: (not t.itself, len(t.reasons)))
    raise UserError(
        f"cannot be written in the {layout} layout: as {best.family.name}, "
        + "; ".join(best.reasons[:3])
    )


def _write(path: Path, layout: _Layout) -> list[str]:
    """A folder, if the family is one of ``transformers`` or the path has no suffix."""
    family, about = layout.family, layout.about
    header, files, notes = {}, layout.files, []
    if not family.hub:
        stored = metadata.to_dict(layout.cfg, about)
        header = {"vit_jax": json.dumps(stored, ensure_ascii=False)}
        notes = _notes(layout.cfg)
    if path.suffix and not path.is_dir() and not family.hub:
        safetensors.write(path, layout.arrays, header)
        return notes
    if path.suffix == ".safetensors" or (path.exists() and not path.is_dir()):
        raise UserError(
            f"{path} is a file; {family.name} is written as a folder: give DEST without a "
            "suffix"
        )
    if family.timm:
        shapes = {name: shape for name, shape, _ in layout.arrays}
        files = {"config.json": timm_config.write(layout.cfg, about, shapes)}
    path.mkdir(parents=True, exist_ok=True)
    safetensors.write(path / "model.safetensors", layout.arrays, header)
    for name, values in files.items():
        metadata.write_json(path / name, values)
    return notes


def _notes(cfg: ModelConfig) -> list[str]:
    notes = []
    if cfg.layer_norm_eps not in (1e-6, 1e-5):
        notes.append(
            f"trained with layer_norm_eps={cfg.layer_norm_eps}, while timm has 1e-6"
        )
    act = {"tanh": "gelu_tanh", "quick": "quick_gelu"}.get(cfg.gelu)
    if act:
        notes.append(
            f"trained with the {cfg.gelu} form of GELU, while timm's default is the exact "
            f"one: timm.create_model(..., act_layer={act!r}) gives equal logits"
        )
    if cfg.image_mean:
        notes.append(
            f"the model was trained with mean {cfg.image_mean}, std {cfg.image_std}"
        )
    if cfg.pre_logits:
        notes.append(
            "timm dropped pre_logits in version 0.9: newer ones refuse its arrays"
        )
    return notes


def _first(family: Family, present: frozenset[str]) -> dict[str, str]:
    """One spelling per role: the one in ``present``, else the first."""
    names, tails = {}, ("", ".weight", "weight")
    there = lambda name: any(name + tail in present for tail in tails)
    for role, spellings in family.names.items():
        options = spellings.split("|")
        # What a file has once for all blocks is written for each.
        options = [o for o in options if ("{i}" in o) == ("{i}" in options[0])]
        known = [o for o in options if there(o)]
        # In a file without a tower nothing is outside it.
        known += [o for o in options if there(o.removeprefix("/"))]
        names[role] = (known or options)[0]
    return names


def _gated(
    family: Family, names: dict[str, str], present: frozenset[str]
) -> dict[str, str]:
    """The spelling of a gated MLP: gate and value apart, or in one array."""
    if "up" not in family.names:  # of parallel blocks, where none is gated
        return names
    up, down = (family.names[role].split("|") for role in ("up", "down"))
    weights_in = [name for name in up if name.endswith("weights_in")]
    if weights_in and not present:
        names = {**names, "up": weights_in[0]}
        names["down"] = next(name for name in down if name.endswith("weights_out"))
    if f"{names.get('gate')}.weight" not in present and (present or weights_in):
        packed = {"up": "gate_up"}
        return {packed.get(k, k): v for k, v in names.items() if k != "gate"}
    if present or "gate" not in names:
        return names
    beside = {"fc1_g": "fc1_x", "gate_proj": "up_proj", "w1": "w2", "fc1": "fc3"}
    leaf = beside[names["gate"].rsplit(".", 1)[-1]]
    return {**names, "up": next(name for name in up if name.endswith(leaf))}


def _usual(family: Family, cfg: ModelConfig) -> tuple[str, ...]:
    """Arrays that a family always has though they follow from none of ours."""
    if "scale1" in family.has:
        return family.names["scale1"].split("|")[0], family.names["scale2"].split("|")[
            0
        ]
    return ()


def _without_waves(
    flat: dict[str, np.ndarray], cfg: ModelConfig
) -> dict[str, np.ndarray]:
    """Without positions that are computed, unless they have been trained."""
    table = positions.waves(models.token_grid(cfg, cfg.image_size), cfg.width)
    if not np.array_equal(flat[POSITIONS], table):
        return flat
    return {n: x for n, x in flat.items() if n != POSITIONS}


def _without_rows(flat: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """A table of the patches alone; the row of the class token goes into the token."""
    table = flat.get(POSITIONS)
    if table is None or not rows or rows > 1:
        return flat
    own = table[:, :1]
    cls = flat["cls"] + own if own.any() else flat["cls"]
    return flat | {POSITIONS: table[:, rows:], "cls": cls}


def _with_table(
    flat: dict[str, np.ndarray], cfg: ModelConfig, reasons: list[str]
) -> tuple[dict[str, np.ndarray], ModelConfig]:
    """Positions as one table, the only form that torch's models have."""
    if cfg.position_at != "stem" or cfg.positions == "relative":
        reasons.append(
            f"model.positions={cfg.positions!r} at {cfg.position_at!r} is no table that "
            "is added once"
        )
    computed = cfg.rope != "none" or cfg.relative_bias
    if reasons or cfg.positions == "learned" or computed:
        return flat, cfg
    inside = {k: v for k, v in flat.items() if "posembed_input/" in k}
    rest = {k: v for k, v in flat.items() if k not in inside}
    if cfg.positions == "none":
        rows, columns = models.token_grid(cfg, cfg.image_size)
        length = rows * columns + infer.positioned_tokens(cfg)
        table = np.zeros((1, length, cfg.width), np.float32)
    else:
        params = {k.split("/")[-1]: v for k, v in inside.items()}
        table = np.asarray(
            PositionEmbedding(cfg, cfg.image_size).apply({"params": params})
        )
    rest[POSITIONS] = table
    return rest, dataclasses.replace(cfg, positions="learned")
