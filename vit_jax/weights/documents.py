# SPDX-License-Identifier: Apache-2.0
"""What ``config.json`` and its neighbours state, of transformers, timm and OpenCLIP.

Only what is stated is returned: fields of ``ModelConfig``, class names, preprocessing.
What follows from the arrays or has to be assumed is not decided here.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax import config
from vit_jax.errors import UserError
from vit_jax.weights.contents import Metadata
from vit_jax.weights.families import FAMILIES, Family

_GELU = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "quick_gelu": "quick",
    "quickgelu": "quick",
}
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # of Pillow

Get = Callable[..., Any]


def describe(
    files: Mapping[str, dict[str, Any]], family: Family | None, where: str
) -> Metadata:
    """What the JSON files beside torch weights state.

    Args:
      files: JSON objects by file name, such as "config.json".
      family: of the weights; None: nobody has looked, so the one that is named.
      where: the folder, for messages.

    Raises:
      UserError: an entry that cannot be, or that no model here has.
    """
    values = files.get("config.json", {})
    if is_timm(values):
        return _of_timm(values, f"{where}/config.json")
    if values and family is None:
        kind = values.get("model_type", "vit")
        known = (f for f in FAMILIES if f.hub and kind in f.hub.kinds)
        family = next(known, FAMILIES[0])
    if values and family and family.hub is None:
        return Metadata()  # of another model: a file among strangers
    if values and family:
        processor = files.get("preprocessor_config.json", {})
        return _of_transformers(values, processor, family, where)
    if values := files.get("open_clip_config.json", {}):
        return _of_open_clip(values, f"{where}/open_clip_config.json")
    return Metadata()


def is_timm(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of timm's."""
    return "pretrained_cfg" in values or "architecture" in values


# --- entries ------------------------------------------------------------------------------


def field(
    values: Mapping[str, Any],
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


def count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("it must be a whole number above 0")
    return value


def positive(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError("it must be a number above 0")
    return float(value)


def epsilon(value: Any) -> float:
    if positive(value) >= 1:
        raise ValueError("it must be below 1")
    return float(value)


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a side or two, in pixels."""
    both = (size, size) if isinstance(size, int) else tuple(size)
    if len(both) != 2 or any(type(n) is not int or n < 1 for n in both):
        raise ValueError("it must be a side in pixels, or [height, width]")
    return both


def square(size: Any) -> int:
    height, width = pair(size)
    if height != width:
        raise ValueError("patches must be square")
    return height


def names(values: Any) -> tuple[str, ...]:
    if isinstance(values, str):
        raise ValueError("it must be a list")
    return tuple(str(name) for name in values)


def operations(values: Any) -> tuple[dict[str, Any], ...]:
    if not all(isinstance(t, dict) and isinstance(t.get("op"), str) for t in values):
        raise ValueError('it must be a list of operations such as {"op": "resize"}')
    return tuple(dict(t) for t in values)


def _channels(value: Any) -> tuple[float, ...]:
    many = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if not all(math.isfinite(x) for x in many):
        raise ValueError("it must be finite")
    return tuple(float(x) for x in many)


def _scales(value: Any) -> tuple[float, ...]:
    return tuple(
        map(positive, value if isinstance(value, (list, tuple)) else [value] * 3)
    )


def _labels(values: Any) -> tuple[str, ...]:
    labels = {int(k): str(v) for k, v in values.items()}
    found = tuple(labels[i] for i in sorted(labels))
    # What transformers writes where nobody gave names.
    return () if all(x == f"LABEL_{i}" for i, x in enumerate(found)) else found


def _normalization(get: Get, mean: str, std: str) -> dict[str, Any]:
    half = (0.5,) * 3
    return {
        "image_mean": get(mean, half, _channels),
        "image_std": get(std, half, _scales),
    }


# --- transformers -------------------------------------------------------------------------

# config.json -> ModelConfig, and how the value is read.
_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hidden_size": ("width", count),
    "num_hidden_layers": ("depth", count),
    "num_attention_heads": ("heads", count),
    "num_channels": ("channels", count),
    "patch_size": ("patch", square),
    "image_size": ("image_size", pair),
    "layer_norm_eps": ("layer_norm_eps", epsilon),
    "rms_norm_eps": ("layer_norm_eps", epsilon),
}


def _of_transformers(
    values: dict[str, Any], processor: dict[str, Any], family: Family, where: str
) -> Metadata:
    assert family.hub is not None
    where_config = f"{where}/config.json"
    kind = values.get("model_type", family.hub.kinds[0])
    if kind not in family.hub.kinds:
        raise UserError(
            f"{where}: config.json says model_type {kind!r}, but the arrays are those of "
            f"{family.name}, whose model_type is {' or '.join(family.hub.kinds)}"
        )
    inner = values.get("vision_config")
    inner = {**inner} if isinstance(inner, dict) else values
    get = lambda key, default, convert: field(
        inner, key, default, convert, where_config
    )
    model = {ours: get(key, None, convert) for key, (ours, convert) in _FIELDS.items()
             if inner.get(key) is not None}  # fmt: skip
    gated = _gated(inner, family)
    if mlp_dim := _mlp_dim(inner, gated, get):
        model["mlp_dim"] = mlp_dim
    act = str(inner.get("hidden_act", "gelu" if "hidden_act" in inner else ""))
    if gated:
        if act not in ("silu", "swish", "") and "use_swiglu_ffn" not in inner:
            raise UserError(
                f"{where_config}: hidden_act is {act!r}: a gated MLP here has 'silu'"
            )
    elif act:
        model["gelu"] = config.choose(f"hidden_act in {where_config}", act, _GELU)
    plain = all(str(x).endswith("Model") for x in values.get("architectures") or [""])
    if plain and inner.get("pooler_act", "tanh") != "tanh":
        raise UserError(
            f"{where_config}: pooler_act is {inner['pooler_act']!r}, not 'tanh'"
        )
    if "rope" in family.model:
        model["rope_theta"] = get("rope_theta", 100.0, positive)
    if kind in ("ijepa",):
        model["head"] = "gap"
    transforms: tuple[dict[str, Any], ...] = ()
    if processor:
        transforms, norm = _of_processor(processor, f"{where}/preprocessor_config.json")
        model |= norm
    return Metadata(
        field(values, "id2label", (), _labels, where_config),
        transforms,
        model,
        values.get("problem_type") == "multi_label_classification",
    )


def _gated(values: Mapping[str, Any], family: Family) -> bool:
    keys = ("use_swiglu_ffn", "use_gated_mlp")
    return any(values.get(key) is True for key in keys) or family.name.startswith(
        "aimv2"
    )


def _mlp_dim(values: Mapping[str, Any], gated: bool, get: Get) -> int:
    if size := get("intermediate_size", 0, count):
        return size
    ratio, width = get("mlp_ratio", 0.0, positive), get("hidden_size", 0, count)
    if not ratio or not width:
        return 0
    # A gated MLP of DINOv2 is two thirds as wide, rounded up to a multiple of 8.
    size = int(width * ratio)
    return (int(size * 2 / 3) + 7) // 8 * 8 if gated else size


def _of_processor(
    values: dict[str, Any], where: str
) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """What the image processor of ``transformers`` does: operations, mean and deviation."""
    get = lambda key, default, convert: field(values, key, default, convert, where)
    norm = _normalization(get, "image_mean", "image_std")
    if not get("do_normalize", True, bool):
        norm = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    if stored := get("vit_jax_transforms", (), operations):
        return stored, norm
    size, crop = get("size", {}, _edges), get("do_center_crop", False, bool)
    steps = [_resize(size, crop, get("resample", 2, int), where)]
    if not get("do_resize", True, bool):
        steps = []
    if crop:
        steps.append({"op": "central_crop"})
        if pixels := get("crop_size", [], lambda s: [_edges(s)[k] for k in _SIDES]):
            steps[-1]["size"] = pixels
    factor = get("rescale_factor", 1 / 255, float)
    if not get("do_rescale", True, bool):
        steps.append({"op": f"do_rescale=False of {where}"})
    elif abs(255 * factor - 1) > 1e-3:
        steps.append({"op": f"rescale_factor={factor} of {where}"})
    return tuple(steps), norm


def _resize(
    size: dict[str, int], crop: bool, resample: int, where: str
) -> dict[str, Any]:
    """The operation; one that is not known here is named, and refused when it is used."""
    if resample not in _RESAMPLE:
        return {"op": f"resample={resample} of {where}"}
    how = {"method": _RESAMPLE[resample], "antialias": True}
    if set(size) == {"shortest_edge"}:
        return {"op": "resize_small", "size": size["shortest_edge"], **how}
    if size and set(size) != {"height", "width"}:
        return {"op": f"size={size} of {where}"}
    if size and crop:
        return {"op": "resize", "size": [size["height"], size["width"]], **how}
    return {"op": "resize", **how}  # to what the model takes


_SIDES = ("height", "width")


def _edges(size: Any) -> dict[str, int]:
    """``size`` and ``crop_size`` of ``transformers``, which older files give as a side."""
    if not isinstance(size, dict):
        size = dict(zip(_SIDES, pair(size), strict=True))
    return {str(k): int(v) for k, v in size.items() if v is not None}


def to_transformers(
    cfg: config.ModelConfig, about: Metadata, family: Family
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` of a folder."""
    hub = family.hub
    assert hub is not None
    height, width = cfg.image_size
    size = height if height == width else [height, width]
    rms = "rms_norm_eps" if cfg.norm == "rms" else "layer_norm_eps"
    values: dict[str, Any] = {
        "architectures": [hub.classifier if cfg.num_classes else hub.plain],
        "model_type": hub.kinds[0],
        "dtype": "float32",
        "hidden_act": {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}.get(
            cfg.gelu, "quick_gelu"
        ),
        "hidden_size": cfg.width,
        "image_size": size,
        "intermediate_size": cfg.mlp_dim,
        rms: cfg.layer_norm_eps,
        "num_attention_heads": cfg.heads,
        "num_channels": cfg.channels,
        "num_hidden_layers": cfg.depth,
        "patch_size": cfg.patch,
    }
    values |= _extra(cfg, family)
    if hub.classifier.startswith("CLIP") or hub.classifier == "":
        values["projection_dim"] = cfg.num_classes or 512
    elif cfg.num_classes:
        labels = about.class_names or [f"LABEL_{i}" for i in range(cfg.num_classes)]
        values["id2label"] = {str(i): name for i, name in enumerate(labels)}
        values["label2id"] = {name: i for i, name in enumerate(labels)}
    if about.multilabel:
        values["problem_type"] = "multi_label_classification"
    return values, _to_processor(cfg, about, hub.processor)


def _extra(cfg: config.ModelConfig, family: Family) -> dict[str, Any]:
    """What only some families have in their config.json."""
    gated, kind = cfg.mlp == "swiglu", family.hub.kinds[0] if family.hub else ""
    if kind.startswith("dinov2"):
        ratio = (cfg.mlp_dim * 1.5 if gated else cfg.mlp_dim) / cfg.width
        extra: dict[str, Any] = {
            "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
            "use_swiglu_ffn": gated,
            "qkv_bias": True,
            "layerscale_value": 1.0,
        }
        if cfg.registers:
            extra["num_register_tokens"] = cfg.registers
        return extra
    if kind == "dinov3_vit":
        extra = {
            "num_register_tokens": cfg.registers,
            "rope_theta": cfg.rope_theta or 100.0,
            "use_gated_mlp": gated,
            "key_bias": False,
            "pos_embed_rescale": 2.0,
        }
        return extra | ({"hidden_act": "silu"} if gated else {})
    if kind == "beit":
        return {
            "use_relative_position_bias": cfg.relative_bias,
            "use_absolute_position_embeddings": cfg.positions == "learned",
            "use_mean_pooling": cfg.final_norm == "pooled",
            "layer_scale_init_value": 0.1,
        }
    if kind == "siglip2_vision_model":
        rows, columns = (n // cfg.patch for n in cfg.image_size)
        return {"num_patches": rows * columns, "vision_use_head": cfg.head == "map"}
    if kind == "siglip_vision_model":
        return {"vision_use_head": cfg.head == "map"}
    if kind == "aimv2_vision_model":
        return {
            "hidden_act": "silu",
            "use_head": False,
            "qkv_bias": False,
            "mlp_bias": False,
        }
    if kind in ("vit", "deit"):
        return {
            "attention_probs_dropout_prob": cfg.attention_dropout,
            "hidden_dropout_prob": cfg.dropout,
            "encoder_stride": cfg.patch,
            "pooler_act": "tanh",
            "pooler_output_size": cfg.width,
            "qkv_bias": True,
        }
    return {}


def _to_processor(
    cfg: config.ModelConfig, about: Metadata, processor: str
) -> dict[str, Any]:
    height, width = cfg.image_size
    transforms = about.transforms or ({"op": "resize"},)
    methods = (t.get("method", "bilinear") for t in transforms if "resize" in t["op"])
    numbers = {name: key for key, name in _RESAMPLE.items()}
    return {
        "image_processor_type": processor,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": numbers.get(next(methods, ""), 2),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg.image_mean or (0.5,) * cfg.channels),
        "image_std": list(cfg.image_std or (0.5,) * cfg.channels),
        # Exactly ours; the fields above can only approximate it.
        "vit_jax_transforms": list(transforms),
    }


# --- timm ---------------------------------------------------------------------------------

# What the images of timm's models are pooled with, as heads of ours.
_POOLS = {"": "none", "token": "token", "avg": "gap", "map": "map"}

# What timm's architectures are known by alone: every row that fits a name counts.
_ARCHITECTURES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"", {"gelu": "exact", "layer_norm_eps": 1e-6}),
    (
        r"(base_patch32|so400m_patch16|giantopt_patch16)_siglip|large_patch16_siglip_(gap_)?512",
        {"gelu": "tanh"},
    ),
    (r"quickgelu", {"gelu": "quick"}),
    (r"^vit_.*_clip_|dinov3|lingbot|^vit_pe_|^aimv2", {"layer_norm_eps": 1e-5}),
    (r"dinov3|lingbot", {"rope": "dinov3"}),
    (r"dinov3_|_dinov3$|lingbot", {"rope_theta": 100.0}),
    (r"^eva02_|_rope_reg\d_gap", {"rope": "eva02", "rope_grid": (16, 16)}),
    (r"_rope_(ape_)?\d+$", {"rope": "pe", "rope_theta": 100.0}),
    (r"^vit_pe_", {"rope": "pe", "rope_offset": 1.0, "rope_grid": (32, 32)}),
    (r"^vit_pe_core_(tiny|small|large)", {"rope_grid": (24, 24)}),
    (r"^vit_pe_core_base", {"rope_grid": (14, 14)}),
    (r"^vit_pe_\w+_gigantic", {"rope_offset": 0.0}),
    (r"^vit_pe_core", {"map_heads": 8}),
)
# Heads that do not follow from the width, where config.json does not give them.
_HEADS = (
    (r"vit_base_patch16_gap_224|^vit_pe_\w+_gigantic|giantopt|so400m", 16),
    (r"^vit_(huge|giant|gigantic)_patch1\d_(?!dinov2|reg)", 16),
    (r"^vit_giant_.*(dinov2|tipsv2)", 24),
    (r"^vit_7b", 32),
)


def _of_timm(values: dict[str, Any], where: str) -> Metadata:
    about = field(values, "pretrained_cfg", values, dict, where)
    arguments = field(values, "model_args", {}, dict, where)
    architecture = str(values.get("architecture", ""))
    get = lambda key, default, convert: field(about, key, default, convert, where)
    given = lambda key, default, convert: field(arguments, key, default, convert, where)
    model: dict[str, Any] = {}
    for pattern, known in _ARCHITECTURES:
        if re.search(pattern, architecture):
            model |= known
    for pattern, heads in _HEADS:
        if re.search(pattern, architecture) and "embed_dim" not in arguments:
            model["heads"] = heads
    for key, ours, convert in (
        ("num_heads", "heads", count),
        ("embed_dim", "width", count),
        ("depth", "depth", count),
        ("patch_size", "patch", square),
        ("in_chans", "channels", count),
        ("attn_pool_num_heads", "map_heads", count),
    ):
        if value := given(key, None, convert):
            model[ours] = value
    size = given("img_size", None, pair) or get(
        "input_size", None, lambda s: pair(s[1:])
    )
    if size:
        model["image_size"] = size
    if act := arguments.get("act_layer"):
        model["gelu"] = config.choose("act_layer in config.json", str(act), _GELU)
    pool = arguments.get("global_pool", values.get("global_pool"))
    if pool is not None:
        model["head"] = config.choose("global_pool in config.json", str(pool), _POOLS)
    if arguments.get("pos_embed") == "none":
        model["positions"] = "none"
    labels = get("label_names", (), names) or field(
        values, "label_names", (), names, where
    )
    model |= _normalization(get, "mean", "std")
    crop = get("crop_pct", 1.0, positive)
    mode = about.get("crop_mode") or "center"
    method = about.get("interpolation") or "bicubic"
    return Metadata(labels, crops(size, crop, mode, method, where), model)


def crops(
    size: tuple[int, int] | None,
    share: float,
    mode: str = "center",
    method: str = "bicubic",
    where: str = "",
) -> tuple[dict[str, Any], ...]:
    """Resize, then the central ``share`` of the short side ("center") or of both
    ("squash"). Without a size, both are made for what the model takes."""
    how = {"method": method, "antialias": True}
    larger = [int(n / share) for n in size] if size else []
    if mode == "squash":
        first = {"op": "resize", **({"size": larger} if larger else {}), **how}
    elif mode == "center":
        first = {
            "op": "resize_small",
            **({"size": max(larger)} if larger else {}),
            **how,
        }
    else:
        first = {"op": f"crop_mode={mode} of {where}"}
    return first, {"op": "central_crop"}


# --- OpenCLIP -----------------------------------------------------------------------------


def _of_open_clip(values: dict[str, Any], where: str) -> Metadata:
    outer = field(values, "model_cfg", {}, dict, where)
    vision = field(outer, "vision_cfg", {}, dict, where)
    about = field(values, "preprocess_cfg", {}, dict, where)
    get = lambda key, default, convert: field(vision, key, default, convert, where)
    prepared = lambda key, default, convert: field(about, key, default, convert, where)
    model: dict[str, Any] = {"gelu": "quick" if outer.get("quick_gelu") else "exact"}
    for key, ours, convert in (
        ("width", "width", count),
        ("layers", "depth", count),
        ("patch_size", "patch", square),
        ("image_size", "image_size", pair),
    ):
        if value := get(key, None, convert):
            model[ours] = value
    if "width" in model:
        model["heads"] = model["width"] // get("head_width", 64, count)
    if about:
        model |= _normalization(prepared, "mean", "std")
    mode = {"shortest": "center", "squash": "squash"}
    how = mode.get(str(about.get("resize_mode", "shortest")), "center")
    method = str(about.get("interpolation", "bicubic"))
    return Metadata((), crops(model.get("image_size"), 1.0, how, method), model)
