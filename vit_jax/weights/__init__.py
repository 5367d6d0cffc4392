# SPDX-License-Identifier: Apache-2.0
"""Loading and saving of weights: any layout in, the released one inside, any out.

A source is a path, a URL (``https://``, ``gs://``,
``hf://owner/name[@revision][/file]``) or an id of the catalogue. Add a format in
``sources.py``, a family of checkpoints in ``families.py``.

============== =============================================================
sources.py     opens a file or folder by its first bytes
layout.py      names of every generation of ``.npz`` -> released names
families.py    one row per family of torch files; recognise.py finds the row,
               roles.py applies it, documents.py reads config.json
infer.py       all that is known -> ModelConfig
fit.py         arrays -> parameters of a model; positions.py: resize
export.py      parameters -> files
report.py      what happened to each array
============== =============================================================
"""

import dataclasses
import operator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import config, models
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.weights import (
    catalogue,
    export,
    fit,
    infer,
    positions,
    preprocessing,
    sources,
)
from vit_jax.weights.contents import Metadata
from vit_jax.weights.report import Report
from vit_jax.weights.understand import (
    OF_REGISTERS,
    PATCHES_ONLY,
    metadata_of,
    understand,
)

__all__ = [
    "Checkpoint",
    "Metadata",
    "Report",
    "load",
    "load_for_finetune",
    "load_for_training",
    "model_config",
    "read",
    "read_metadata",
    "save",
]

Size = int | tuple[int, int] | None

# What a loaded model may differ in from the file without another architecture, or what
# the caller may say where the file does not.
_FREE = (
    "dropout",
    "attention_dropout",
    "stochastic_depth",
    "dtype",
    "layers",
    "remat",
    "image_size",
    "patch",
    *infer.ASKABLE,
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: what ``load`` returns, and what it knows besides."""

    cfg: ModelConfig
    params: dict[str, Any]  # numpy arrays, float32
    metadata: Metadata
    report: Report


def load(
    source: str | Path, image_size: Size = None, resize: str = "", **overrides: Any
) -> tuple[models.ViT | models.ResNet, dict[str, Any]]:
    """Model and parameters exactly as ``source`` holds them, the head included.

    Args:
      source: npz, safetensors or msgpack file; Hugging Face folder; workdir or Orbax
        checkpoint of this project; local or remote; ``file.npz:img`` names a subtree,
        ``file.pth:heads=12`` says what the arrays do not show.
      image_size: side, or (height, width), to resize the position embeddings to.
      resize: the rule for that, of ``positions.RULES``; "": the family's own.
      **overrides: of ``ModelConfig``, where they change no array: ``dtype``,
        ``layers``, ``remat``, dropout; or where the file does not say: ``heads``,
        ``positions``, ``gelu``, ``layer_norm_eps``, ``image_mean``, and so on. ``patch``
        resizes the patch embedding (FlexiViT).

    Returns:
      (model, params): ``model.apply({"params": params}, images)`` gives logits.

    Raises:
      UserError: naming everything that is wrong with the file.
    """
    for key in overrides:
        if key not in _FREE and hasattr(ModelConfig, key):
            raise UserError(
                f"load(..., {key}=...) would change the arrays, and load never does: use "
                f"load_for_finetune, or one of {sorted(_FREE)}"
            )
    found = _read(
        source,
        image_size,
        overrides,
        new_head=False,
        resize=resize,
        convert=_to_device,
    )
    found.report.log()
    return models.create(found.cfg), found.params


def load_for_finetune(
    source: str | Path,
    num_classes: int,
    image_size: Size = None,
    **overrides: Any,
) -> tuple[models.ViT | models.ResNet, dict[str, Any]]:
    """Model and parameters to be fine-tuned: a new zero head, no ``pre_logits``.

    Args:
      source: as in :func:`load`.
      num_classes: outputs of the new head; 0: none, the model returns features.
      image_size: as in :func:`load`.
      **overrides: of ``ModelConfig``, for example ``dropout``, ``head="gap"``,
        ``pre_logits=True`` (kept from the file if it has it), ``head_bias``, ``dtype``,
        ``layers="scan"``, ``channels=1``.

    Raises:
      UserError: naming everything that is wrong with the file.
    """
    overrides = {"pre_logits": False, **overrides, "num_classes": num_classes}
    found = _read(source, image_size, overrides, new_head=True, convert=_to_device)
    found.report.log()
    return models.create(found.cfg), found.params


def load_for_training(source: str | Path, cfg: ModelConfig) -> dict[str, Any]:
    """Parameters of the model ``cfg`` that start from ``source``, as numpy arrays.

    The head is new. The architecture is the config's, which must be the file's (see
    :func:`model_config`); the image size, head, positions, layers, channels (to 1) and
    everything without arrays may differ.

    Raises:
      UserError: naming each field in which the file contradicts the config.
    """
    cfg = models.resolve(cfg)
    where, said = _parsed(source)
    with sources.open_source(where) as (contents, tree):
        report = Report(contents.where)
        asked = {field: getattr(cfg, field) for field in ("heads", "map_heads")} | said
        arrays, facts, about = understand(contents, tree, asked, report, cfg.image_size)
        stored = infer.infer(arrays, facts)
        _compare(stored, cfg, facts, report)
        report.check()
        if cfg.image_size == (0, 0):
            cfg = dataclasses.replace(cfg, image_size=stored.image_size)
        params = fit.fit(
            arrays, stored, cfg, report, new_head=True, resize=about.resize
        )
    report.log()
    return params


# Fields that a model takes from the file that it starts from: all but those of the head,
# of positions and of training.
_TAKEN = tuple(
    {f.name for f in dataclasses.fields(ModelConfig)}
    - {"name", "num_classes", "image_size", "channels", "class_token", "distillation"}
    - {"head", "map_heads", "map_mlp_dim", "pre_logits", "head_bias", "final_norm"}
    - {"positions", "position_at", "dropout", "attention_dropout", "stochastic_depth"}
    - {"dtype", "layers", "remat"}
)


def _compare(
    stored: ModelConfig, cfg: ModelConfig, facts: infer.Facts, report: Report
) -> None:
    """Reports, with flags, what the config has otherwise than the file: a problem where
    the file states or shows it, a warning where it is assumed."""
    for field in (f.name for f in dataclasses.fields(ModelConfig) if f.name in _TAKEN):
        old, new = getattr(stored, field), getattr(cfg, field)
        line = f"config {new}: set --config.model.{field}={old}"
        if old != new and field in facts.known:
            report.problem(f"model.{field}: file {old}, {line}")
        elif old != new and field in report.assumed:
            report.warn(f"model.{field}: assumed {old} of the file, {line}")
    if cfg.channels not in (1, stored.channels):
        report.problem(f"model.channels: file {stored.channels}, config {cfg.channels}")


def model_config(
    source: str | Path, image_size: Size = None, **overrides: Any
) -> ModelConfig:
    """The model that ``source`` holds, without reading its values.

    Args:
      source: as in :func:`load`.
      image_size: as in :func:`load`.
      **overrides: as in :func:`load`, for what the file does not say.

    Raises:
      UserError: naming everything that is wrong with the file.
    """
    where, said = _parsed(source)
    overrides = _checked(said | overrides)
    with sources.open_source(where) as (contents, tree):
        report = Report(contents.where)
        size = _pair(image_size or 0)
        arrays, facts, _ = understand(contents, tree, overrides, report, size)
        stored = infer.infer(arrays, facts)
        report.check()
    return stored


def read(source: str | Path, image_size: Size = None, **overrides: Any) -> Checkpoint:
    """Like :func:`load`, on the host, with metadata and the report."""
    return _read(source, image_size, overrides, new_head=False)


def read_metadata(source: str | Path) -> Metadata:
    """Class names and preprocessing, without the weights where they lie beside them."""
    return metadata_of(_parsed(source)[0])


def save(
    path: str | Path,
    cfg: ModelConfig,
    params: dict[str, Any],
    about: Metadata | None = None,
    layout: str = "",
) -> list[str]:
    """Writes a model as ``.npz`` (released names), timm or Hugging Face safetensors.

    Args:
      path: file, for "hf" folder, and for "timm" and "own" either.
      cfg: of the model.
      params: its parameters.
      about: class names and preprocessing, which travel along.
      layout: "npz", "timm", "hf", or "own": as the file that it was loaded from; "": by
        the suffix of ``path``.

    Returns:
      Lines about what a reader of the file should know.

    Raises:
      UserError: unknown layout, or one that has no such model.
    """
    return export.save(
        Path(path), models.resolve(cfg), params, about or Metadata(), layout
    )


def _read(
    source: str | Path,
    image_size: Size,
    overrides: dict[str, Any],
    *,
    new_head: bool,
    resize: str = "",
    convert: Any = lambda x: x,
) -> Checkpoint:
    size = _pair(
        image_size if image_size is not None else overrides.pop("image_size", 0)
    )
    where, said = _parsed(source)
    overrides = _checked(said | overrides)
    if resize:
        config.choose("resize", resize, dict.fromkeys(positions.RULES))
    asked = {k: v for k, v in overrides.items() if k in infer.ASKABLE}
    if new_head:  # what belongs to the head may be another than in the file
        asked = {k: v for k, v in asked.items() if k in _TAKEN}
    with sources.open_source(where) as (contents, tree):
        report = Report(contents.where)
        arrays, facts, about = understand(contents, tree, asked, report, size)
        stored = infer.infer(arrays, facts)
        report.check()
        sized = {"image_size": size} if size != (0, 0) else {}
        wanted = models.resolve(dataclasses.replace(stored, **overrides, **sized))
        params = fit.fit(
            arrays,
            stored,
            wanted,
            report,
            new_head=new_head,
            resize=resize or about.resize,
            convert=convert,
        )
    rows = infer.extra_rows(stored, arrays) - infer.positioned_tokens(stored)
    if about.family and rows and not {PATCHES_ONLY, OF_REGISTERS} & {*about.arrays}:
        table = PATCHES_ONLY if rows < 0 else OF_REGISTERS
        about = dataclasses.replace(about, arrays=(*about.arrays, table))
    resized = preprocessing.rescaled(
        about.transforms, stored.image_size, wanted.image_size
    )
    about = dataclasses.replace(about, transforms=resized)
    if new_head:
        about = dataclasses.replace(about, class_names=())
    elif about.class_names and len(about.class_names) != wanted.num_classes:
        line = f"{len(about.class_names)} class names for {wanted.num_classes} classes"
        if wanted.num_classes:
            report.problem(line)
            report.check()
        report.warn(f"ignored: {line}")
        about = dataclasses.replace(about, class_names=())
    return Checkpoint(wanted, params, about, report)


def _parsed(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Where a source is, and what is said beside it: ``clip.pt:heads=12``."""
    name, _, heads = str(source).rpartition(":heads=")
    if name and heads.isdecimal():
        return catalogue.resolve(name), {"heads": int(heads)}
    return catalogue.resolve(str(source)), {}


def _checked(overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides with the types and choices of ModelConfig."""
    cfg = config.from_dict({"model": overrides}).model
    return {key: getattr(cfg, key) for key in overrides}


def _pair(size: Any) -> tuple[int, int]:
    try:
        pair = tuple(size) if hasattr(size, "__iter__") else (size, size)
        height, width = map(operator.index, pair)  # numpy's integers as well
    except (TypeError, ValueError):
        height = width = -1
    if min(height, width) < 0:
        raise UserError(f"image_size is {size!r}: it must be a side or (height, width)")
    return height, width


def _to_device(values: np.ndarray) -> jax.Array:
    return jnp.asarray(values)
