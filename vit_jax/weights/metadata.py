# SPDX-License-Identifier: Apache-2.0
"""Class names and preprocessing that travel with the weights.

``transforms`` uses the words of ``data.eval_transforms`` (``resize``, ``central_crop``,
``resize_small``), plus ``normalize`` with the mean and standard deviation, per channel
and for pixels in [0, 1], that torch checkpoints state. Without it pixels go to [-1, 1].
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from vit_jax import config
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.weights.contents import Metadata, atomic

# The official evaluation: the whole image, bilinear without anti-aliasing, [-1, 1].
DEFAULT_TRANSFORMS: tuple[dict[str, Any], ...] = ({"op": "resize"},)

_GELU = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # of Pillow
_TRAINING_ONLY = (
    "name",
    "dropout",
    "attention_dropout",
    "stochastic_depth",
    "dtype",
    "layers",
    "remat",
)


def read_json(path: Any) -> dict[str, Any]:
    """Raises: UserError: not a JSON object."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not readable as JSON: {e}") from e
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def sidecar(path: Path) -> Path:
    """``x.json``, which belongs to ``x.npz``."""
    return path.with_suffix(".json")


def of_npz(path: Path) -> Metadata:
    """From the sidecar that ``convert`` writes, if there is one."""
    other = sidecar(path)
    if other == path or not other.exists():
        return Metadata()
    values = read_json(other)
    if values.get("format") != "vit_jax":
        return Metadata()
    return from_dict(values, str(other))


def of_safetensors(header: dict[str, str]) -> Metadata:
    """From the header that ``convert`` writes into safetensors files."""
    if "vit_jax" not in header:
        return Metadata()
    return from_dict(json.loads(header["vit_jax"]), "the header")


def of_workdir(folder: Any) -> Metadata:
    """From ``config.json`` and ``dataset.json`` of a training run."""
    cfg = config.from_dict(read_json(folder / "config.json"))
    data: dict[str, Any] = {}
    if (folder / "dataset.json").exists():
        data = read_json(folder / "dataset.json")
    model = dataclasses.asdict(cfg.model)
    if cfg.model.image_size == (0, 0):
        size = data.get("image_size") or cfg.data.image_size
        model["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    # Zeros are filled in from the variant, and read off the arrays.
    model = {k: v for k, v in model.items() if v or k not in _FILLED}
    model.pop("num_classes")  # of the data, or what masked patch prediction predicts
    transforms = data.get("eval_transforms") or cfg.data.eval_transforms
    return Metadata(
        class_names=tuple(data.get("class_names", ())),
        transforms=tuple(dict(t) for t in transforms) or DEFAULT_TRANSFORMS,
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


def of_torch_folder(config_file: Path, where: str) -> Metadata:
    """From the ``config.json`` of a Hugging Face or timm folder.

    Raises:
      UserError: a model type or activation that the models here do not have.
    """
    values = read_json(config_file)
    if "pretrained_cfg" in values or "architecture" in values:
        return _of_timm(values)
    kind = values.get("model_type", "vit")
    if kind != "vit":
        raise UserError(
            f"{where}: config.json says model_type {kind!r}; only 'vit' (and timm's ViTs) "
            "can be loaded"
        )
    act = str(values.get("hidden_act", "gelu"))
    model: dict[str, Any] = {
        "gelu": config.choose(f"hidden_act in {config_file}", act, _GELU),
        "layer_norm_eps": float(values.get("layer_norm_eps", 1e-12)),
    }
    if "num_attention_heads" in values:
        model["heads"] = int(values["num_attention_heads"])
    if size := values.get("image_size"):
        model["image_size"] = _pair(size)
    labels = {int(k): str(v) for k, v in values.get("id2label", {}).items()}
    names = tuple(labels[i] for i in sorted(labels))
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        names = ()  # what Hugging Face writes where nobody gave names
    other = config_file.with_name("preprocessor_config.json")
    processor = read_json(other) if other.exists() else {}
    multilabel = values.get("problem_type") == "multi_label_classification"
    return Metadata(names, _of_processor(processor), model, multilabel, "hf")


def from_dict(values: dict[str, Any], where: str) -> Metadata:
    """The inverse of :func:`to_dict`. Raises: UserError: naming a wrong field."""
    model = values.get("model", {})
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    if strange := sorted(set(model) - known):
        raise UserError(f"{where} states unknown model fields {strange}")
    full = config.from_dict({"model": model}).model  # checks types and choices
    return Metadata(
        class_names=tuple(str(n) for n in values.get("class_names", ())),
        transforms=tuple(dict(t) for t in values.get("transforms", ())),
        model={k: getattr(full, k) for k in model},
        multilabel=bool(values.get("multilabel", False)),
    )


def to_dict(cfg: ModelConfig, about: Metadata) -> dict[str, Any]:
    """What is stored: architecture, class names, preprocessing."""
    model = dataclasses.asdict(cfg)
    return {
        "format": "vit_jax",
        "model": {k: v for k, v in model.items() if k not in _TRAINING_ONLY},
        "class_names": list(about.class_names),
        "transforms": list(about.transforms or DEFAULT_TRANSFORMS),
        "multilabel": about.multilabel,
    }


def to_hf(cfg: ModelConfig, about: Metadata) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` of a Hugging Face folder."""
    classifier = cfg.num_classes > 0
    names = about.class_names or tuple(f"LABEL_{i}" for i in range(cfg.num_classes))
    height, width = cfg.image_size
    values: dict[str, Any] = {
        "architectures": ["ViTForImageClassification" if classifier else "ViTModel"],
        "model_type": "vit",
        "attention_probs_dropout_prob": cfg.attention_dropout,
        "dtype": "float32",
        "encoder_stride": cfg.patch,
        "hidden_act": "gelu" if cfg.gelu == "exact" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": cfg.dropout,
        "hidden_size": cfg.width,
        "image_size": height if height == width else [height, width],
        "initializer_range": 0.02,
        "intermediate_size": cfg.mlp_dim,
        "layer_norm_eps": cfg.layer_norm_eps,
        "num_attention_heads": cfg.heads,
        "num_channels": cfg.channels,
        "num_hidden_layers": cfg.depth,
        "patch_size": cfg.patch,
        "pooler_act": "tanh",
        "pooler_output_size": cfg.width,
        "qkv_bias": True,
    }
    if classifier:
        values["id2label"] = {str(i): name for i, name in enumerate(names)}
        values["label2id"] = {name: i for i, name in enumerate(names)}
    if about.multilabel:
        values["problem_type"] = "multi_label_classification"
    transforms = about.transforms or DEFAULT_TRANSFORMS
    norm = next((t for t in transforms if t["op"] == "normalize"), {})
    method = next(
        (t.get("method", "bilinear") for t in transforms if "resize" in t["op"]), ""
    )
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": {v: k for k, v in _RESAMPLE.items()}.get(method, 2),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(norm.get("mean", [0.5] * cfg.channels)),
        "image_std": list(norm.get("std", [0.5] * cfg.channels)),
        # Exactly ours; the fields above can only approximate it (no anti-aliasing
        # flag).
        "vit_jax_transforms": list(transforms),
    }
    return values, processor


def write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic(path) as partial:
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _of_processor(values: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    if "vit_jax_transforms" in values:
        return tuple(dict(t) for t in values["vit_jax_transforms"])
    if not values:
        return DEFAULT_TRANSFORMS
    resize: dict[str, Any] = {"op": "resize", "antialias": True}
    resize["method"] = _RESAMPLE.get(values.get("resample", 2), "bilinear")
    return (resize, _normalize(values.get("image_mean"), values.get("image_std")))


def _of_timm(values: dict[str, Any]) -> Metadata:
    about = values.get("pretrained_cfg", values)
    _, height, width = about.get("input_size", (3, 0, 0))
    model: dict[str, Any] = {}
    if height:
        model["image_size"] = (height, width)
    arguments = values.get("model_args", {})
    if "num_heads" in arguments:
        model["heads"] = int(arguments["num_heads"])
    act = arguments.get("act_layer")
    if act:
        model["gelu"] = config.choose("act_layer in config.json", str(act), _GELU)
    names = about.get("label_names") or values.get("label_names") or ()
    method = about.get("interpolation", "bicubic")
    crop = float(about.get("crop_pct") or 1.0)
    resize = {"method": method, "antialias": True}
    if about.get("crop_mode") == "squash" or crop == 1.0 or not height:
        steps = [{"op": "resize", **resize}]
    else:
        larger = int(height / crop)
        steps = [
            {"op": "resize_small", "size": larger, **resize},
            {"op": "central_crop"},
        ]
    steps.append(_normalize(about.get("mean"), about.get("std")))
    return Metadata(tuple(names), tuple(steps), model, layout="timm")


def _normalize(mean: Any, std: Any) -> dict[str, Any]:
    return {
        "op": "normalize",
        "mean": [float(x) for x in mean or (0.5, 0.5, 0.5)],
        "std": [float(x) for x in std or (0.5, 0.5, 0.5)],
    }


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return (size, size)
    height, width = size
    return (int(height), int(width))
