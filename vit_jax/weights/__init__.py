# SPDX-License-Identifier: Apache-2.0
"""The door for weights: any checkpoint layout in, the released layout inside, any out.

A source is a path, a URL (``https://``, ``gs://``,
``hf://owner/name[@revision][/file]``) or an id of the catalogue. Add a format in
``sources.py``, a torch layout in ``torch.py``.

============== =============================================================
sources.py     opens a file or folder by its first bytes
npz.py         released ``.npz``; torch.py: timm and Hugging Face
layout.py      names of every generation -> released names
infer.py       shapes -> ModelConfig
fit.py         arrays -> parameters of a model; positions.py: resize
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
    layout,
    preprocessing,
    sources,
)
from vit_jax.weights.contents import Array, Contents, Metadata
from vit_jax.weights.report import Report

__all__ = [
    "Checkpoint",
    "Metadata",
    "Report",
    "load",
    "load_for_finetune",
    "load_for_training",
    "read",
    "read_metadata",
    "save",
]

Size = int | tuple[int, int] | None

# What a loaded model may differ in from the file without any array changing.
_FREE = (
    "heads",
    "positions",
    "position_at",
    "dropout",
    "attention_dropout",
    "stochastic_depth",
    "gelu",
    "layer_norm_eps",
    "dtype",
    "layers",
    "remat",
    "image_size",
)
_STATED = ("heads", "positions", "position_at", "gelu", "layer_norm_eps")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: what ``load`` returns, and what it knows besides."""

    cfg: ModelConfig
    params: dict[str, Any]  # numpy arrays, float32
    metadata: Metadata
    report: Report


def load(
    source: str | Path, image_size: Size = None, **overrides: Any
) -> tuple[models.ViT | models.ResNet, dict[str, Any]]:
    """Model and parameters exactly as ``source`` holds them, the head included.

    Args:
      source: npz, safetensors or msgpack file; Hugging Face folder; workdir or Orbax
        checkpoint of this project; local or remote; ``file.npz:img`` names a subtree.
      image_size: side, or (height, width), to resize the position embeddings to.
      **overrides: of ``ModelConfig``, where they change no array: ``dtype``,
        ``layers``, ``remat``, dropout; or where the file does not say: ``heads``,
        ``positions``, ``gelu``, ``layer_norm_eps``.

    Returns:
      (model, params): ``model.apply({"params": params}, images)`` gives logits.

    Raises:
      UserError: naming everything that is wrong with the file.
    """
    for key in overrides:
        if key not in _FREE:
            raise UserError(
                f"load(..., {key}=...) would change the arrays, and load never does: use "
                f"load_for_finetune, or one of {sorted(_FREE)}"
            )
    found = _read(source, image_size, overrides, new_head=False, convert=_to_device)
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

    The head is new. The architecture is the config's, which must be the file's; the
    image size, head, positions, layers, channels (to 1) and everything without arrays
    may differ.

    Raises:
      UserError: naming each field in which the file contradicts the config.
    """
    cfg = models.resolve(cfg)
    source = catalogue.resolve(str(source))
    with sources.open_source(source, {"heads": cfg.heads}) as (contents, tree):
        about = contents.metadata
        report = Report(contents.where)
        arrays = _canonical(contents, tree, report)
        known = dict(about.model)
        stored = infer.infer(arrays, known, (0, 0), report)
        for field in fit.ARCHITECTURE:
            old, new = getattr(stored, field), getattr(cfg, field)
            if old != new:
                report.problem(f"model.{field}: file {old}, config {new}")
        if cfg.channels not in (1, stored.channels):
            report.problem(
                f"model.channels: file {stored.channels}, config {cfg.channels}"
            )
        for field in ("gelu", "layer_norm_eps"):
            old, new = getattr(stored, field), getattr(cfg, field)
            if about.layout and old != new:
                report.warn(
                    f"the file was trained with {field}={old!r} but model.{field} is {new!r}"
                )
        report.check()
        if cfg.image_size == (0, 0):
            cfg = dataclasses.replace(cfg, image_size=stored.image_size)
        params = fit.fit(arrays, stored, cfg, report, new_head=True)
    report.log()
    return params


def read(source: str | Path, image_size: Size = None, **overrides: Any) -> Checkpoint:
    """Like :func:`load`, on the host, with metadata and the report."""
    return _read(source, image_size, overrides, new_head=False)


def read_metadata(source: str | Path) -> Metadata:
    """Class names and preprocessing; see :func:`sources.read_metadata`."""
    return sources.read_metadata(catalogue.resolve(str(source)))


def save(
    path: str | Path,
    cfg: ModelConfig,
    params: dict[str, Any],
    about: Metadata | None = None,
    layout: str = "",
) -> list[str]:
    """Writes a model as ``.npz`` (released names), timm or Hugging Face safetensors.

    Args:
      path: file, or for "hf" folder.
      cfg: of the model.
      params: its parameters.
      about: class names and preprocessing, which travel along.
      layout: "npz", "timm" or "hf"; "": by the suffix of ``path``.

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
    convert: Any = lambda x: x,
) -> Checkpoint:
    size = _pair(
        image_size if image_size is not None else overrides.pop("image_size", 0)
    )
    overrides = _checked(overrides)
    stated = {k: v for k, v in overrides.items() if k in _STATED and not new_head}
    stated |= {k: v for k, v in overrides.items() if k in ("heads", "gelu")}
    with sources.open_source(catalogue.resolve(str(source)), stated) as (
        contents,
        tree,
    ):
        report = Report(contents.where)
        arrays = _canonical(contents, tree, report)
        known = {**contents.metadata.model, **stated}
        stored = infer.infer(arrays, known, size, report)
        wanted = dataclasses.replace(
            stored, **overrides, **({"image_size": size} if size != (0, 0) else {})
        )
        report.check()
        wanted = models.resolve(wanted)
        params = fit.fit(
            arrays,
            stored,
            wanted,
            report,
            new_head=new_head,
            convert=convert,
        )
    about = contents.metadata
    resized = preprocessing.rescaled(
        about.transforms, stored.image_size, wanted.image_size
    )
    about = dataclasses.replace(about, transforms=resized)
    if new_head:
        about = dataclasses.replace(about, class_names=())
    elif about.class_names and len(about.class_names) != wanted.num_classes:
        report.warn(
            f"ignored: {len(about.class_names)} class names for {wanted.num_classes} classes"
        )
        about = dataclasses.replace(about, class_names=())
    return Checkpoint(wanted, params, about, report)


def _canonical(contents: Contents, tree: str, report: Report) -> dict[str, Array]:
    for note in contents.notes:
        report.change(note)
    return layout.canonical(contents.arrays, tree, report)


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
