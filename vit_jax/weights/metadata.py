# SPDX-License-Identifier: Apache-2.0
"""Class names and preprocessing that travel with the weights.

``transforms`` uses the words of ``data.eval_transforms`` (``resize``, ``central_crop``,
``resize_small``), plus ``normalize`` with the mean and standard deviation, per channel
and for pixels in [0, 1], that torch checkpoints state. Without it pixels go to [-1, 1].
What torch's processors do and no operation here does is an operation too, which is
refused by its name when an image is prepared: the weights are of use without it.
"""

import dataclasses
import json
from collections.abc import Callable
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


def _field(
    values: dict[str, Any],
    key: str,
    default: Any,
    convert: Callable[[Any], Any],
    where: str,
) -> Any:
    """``convert(values[key])``; null and no entry are both the default.

    Raises:
      UserError: naming an entry that cannot be converted.
    """
    value = values.get(key)
    if value is None:
        return default
    try:
        return convert(value)
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as e:
        raise UserError(f"{where}: {key} is {value!r:.60}: {e}") from e


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
        size = _pair(cfg.data.image_size)
        model["image_size"] = _field(data, "image_size", size, _pair, where)
    # Zeros are filled in from the variant, and read off the arrays.
    model = {k: v for k, v in model.items() if v or k not in _FILLED}
    # Of the data, or what masked patch prediction predicts.
    model.pop("num_classes", None)
    transforms = tuple(dict(t) for t in cfg.data.eval_transforms)
    return Metadata(
        class_names=_field(data, "class_names", (), _names, where),
        transforms=_field(data, "eval_transforms", transforms, _dicts, where)
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


def of_torch_folder(config_file: Path, where: str) -> Metadata:
    """From the ``config.json`` of a Hugging Face or timm folder.

    Raises:
      UserError: a model type or activation that the models here do not have.
    """
    values = read_json(config_file)
    if "pretrained_cfg" in values or "architecture" in values:
        return _of_timm(values, str(config_file))
    kind = values.get("model_type", "vit")
    if kind != "vit":
        raise UserError(
            f"{where}: config.json says model_type {kind!r}; only 'vit' (and timm's ViTs) "
            "can be loaded"
        )
    act = str(values.get("hidden_act", "gelu"))
    model: dict[str, Any] = {
        "gelu": config.choose(f"hidden_act in {config_file}", act, _GELU),
        "layer_norm_eps": _field(
            values, "layer_norm_eps", 1e-12, float, str(config_file)
        ),
    }
    if heads := _field(values, "num_attention_heads", 0, int, str(config_file)):
        model["heads"] = heads
    if size := _field(values, "image_size", (), _pair, str(config_file)):
        model["image_size"] = size
    names = _field(values, "id2label", (), _labels, str(config_file))
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        names = ()  # what Hugging Face writes where nobody gave names
    other = config_file.with_name("preprocessor_config.json")
    transforms = DEFAULT_TRANSFORMS
    if other.exists() and (processor := read_json(other)):
        transforms = _of_processor(processor, str(other))
    multilabel = values.get("problem_type") == "multi_label_classification"
    return Metadata(names, transforms, model, multilabel, "hf")


def from_dict(values: dict[str, Any], where: str) -> Metadata:
    """The inverse of :func:`to_dict`. Raises: UserError: naming a wrong field."""
    model = _field(values, "model", {}, dict, where)
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    if strange := sorted(set(model) - known):
        raise UserError(f"{where} states unknown model fields {strange}")
    full = config.from_dict({"model": model}).model  # checks types and choices
    return Metadata(
        class_names=_field(values, "class_names", (), _names, where),
        transforms=_field(values, "transforms", (), _dicts, where),
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


def _of_processor(values: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """What ``ViTImageProcessor`` of ``transformers`` does."""
    get = lambda key, default, convert: _field(values, key, default, convert, where)
    if stored := get("vit_jax_transforms", (), _dicts):
        return stored
    size, crop = get("size", {}, _edges), get("do_center_crop", False, bool)
    resample = get("resample", 2, int)
    resize = {"method": _RESAMPLE.get(resample, ""), "antialias": True}
    steps: list[dict[str, Any]] = []
    if not get("do_resize", True, bool):
        pass
    elif not resize["method"]:
        steps.append({"op": f"resample={resample} of {where}"})
    elif set(size) == {"shortest_edge"}:
        steps.append({"op": "resize_small", "size": size["shortest_edge"], **resize})
    elif size and set(size) != {"height", "width"}:
        steps.append({"op": f"size={size} of {where}"})
    elif size and crop:
        pixels = [size["height"], size["width"]]
        steps.append({"op": "resize", "size": pixels, **resize})
    else:  # to what the model takes
        steps.append({"op": "resize", **resize})
    if crop:
        steps.append({"op": "central_crop"})
        if pixels := get("crop_size", [], lambda s: [_edges(s)[k] for k in _SIDES]):
            steps[-1]["size"] = pixels
    factor = get("rescale_factor", 1 / 255, float)
    if not get("do_rescale", True, bool):
        steps.append({"op": f"do_rescale=False of {where}"})
    elif abs(255 * factor - 1) > 1e-3:
        steps.append({"op": f"rescale_factor={factor} of {where}"})
    if get("do_normalize", True, bool):
        steps.append(_normalize(get, "image_mean", "image_std"))
    else:
        steps.append({"op": "normalize", "mean": [0.0] * 3, "std": [1.0] * 3})
    return tuple(steps)


# What the images of timm's models are pooled with, as heads of ours.
_POOLS = {"": "", "token": "token", "avg": "gap", "map": "map"}


def _of_timm(values: dict[str, Any], where: str) -> Metadata:
    about = _field(values, "pretrained_cfg", values, dict, where)
    arguments = _field(values, "model_args", {}, dict, where)
    get = lambda key, default, convert: _field(about, key, default, convert, where)
    height, width = get("input_size", (0, 0), lambda size: _pair(size[1:]))
    model: dict[str, Any] = {}
    if height:
        model["image_size"] = (height, width)
    if heads := _field(arguments, "num_heads", 0, int, where):
        model["heads"] = heads
    if act := arguments.get("act_layer"):
        model["gelu"] = config.choose("act_layer in config.json", str(act), _GELU)
    pool = str(arguments.get("global_pool", values.get("global_pool", "")))
    if head := config.choose("global_pool in config.json", pool, _POOLS):
        model["head"] = head
    names = get("label_names", (), _names) or _field(
        values, "label_names", (), _names, where
    )
    resize = {"method": about.get("interpolation") or "bicubic", "antialias": True}
    crop = get("crop_pct", 1.0, float) or 1.0
    larger = [int(height / crop), int(width / crop)]
    mode = about.get("crop_mode") or "center"
    # Without a size, all of them are made for what the model takes.
    if mode == "squash":
        steps = [{"op": "resize", **({"size": larger} if height else {}), **resize}]
    elif mode == "center":
        larger = {"size": max(larger)} if height else {}
        steps = [{"op": "resize_small", **larger, **resize}]
    else:
        steps = [{"op": f"crop_mode={mode} of {where}"}]
    steps.append({"op": "central_crop"})
    steps.append(_normalize(get, "mean", "std"))
    return Metadata(names, tuple(steps), model, layout="timm")


# --- entries, as _field converts them ---------------------------------------------------

_SIDES = ("height", "width")


def _pair(size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair):
        raise ValueError("it must be a side in pixels, or [height, width]")
    return pair


def _edges(size: Any) -> dict[str, int]:
    """``size`` and ``crop_size`` of ``transformers``, which older files give as a side."""
    if not isinstance(size, dict):
        size = dict(zip(_SIDES, _pair(size), strict=True))
    return {str(k): int(v) for k, v in size.items() if v is not None}


def _names(values: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in values)


def _labels(values: Any) -> tuple[str, ...]:
    labels = {int(k): str(v) for k, v in values.items()}
    return tuple(labels[i] for i in sorted(labels))


def _dicts(values: Any) -> tuple[dict[str, Any], ...]:
    if not all(isinstance(t, dict) and isinstance(t.get("op"), str) for t in values):
        raise ValueError('it must be a list of operations such as {"op": "resize"}')
    return tuple(dict(t) for t in values)


def _normalize(get: Callable[..., Any], mean: str, std: str) -> dict[str, Any]:
    """The operation whose numbers are the entries ``mean`` and ``std``."""

    def channels(value: Any) -> list[float]:
        many = isinstance(value, (list, tuple))
        return [float(x) for x in value] if many else [float(value)] * 3

    half = [0.5] * 3
    numbers = {"mean": get(mean, half, channels), "std": get(std, half, channels)}
    return {"op": "normalize", **numbers}
