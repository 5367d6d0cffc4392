# SPDX-License-Identifier: Apache-2.0
"""What ``config.json`` and its neighbours state, of transformers, timm and OpenCLIP.

Only what is stated is returned: fields of ``ModelConfig``, class names, preprocessing.
What follows from the arrays or has to be assumed is not decided here.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from vit_jax import config
from vit_jax.errors import UserError
from vit_jax.weights import entries, timm_config
from vit_jax.weights.contents import Metadata
from vit_jax.weights.families import FAMILIES, Family

_FILES = (".safetensors", ".bin", ".pth", ".pt")  # else a folder was asked for
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # of Pillow


def describe(
    files: Mapping[str, dict[str, Any]],
    family: Family | None,
    where: str,
    roles: Collection[str] = (),
    width: int = 0,
) -> Metadata:
    """What the JSON files beside torch weights state.

    Args:
      files: JSON objects by file name, such as "config.json".
      family: of the weights; None: nobody has looked, so the one that is named.
      where: the folder, for messages.
      roles: which of ``roles.ROLES`` the weights have.
      width: of their tokens.

    Raises:
      UserError: an entry that cannot be, or that no model here has.
    """
    values = files.get("config.json", {})
    if timm_config.is_timm(values):
        return timm_config.read(values, f"{where}/config.json", roles, width)
    if values and family is None:
        kind = values.get("model_type", "vit")
        known = (f for f in FAMILIES if f.hub and kind in f.hub.kinds)
        family = next(known, FAMILIES[0])
    if values and family and family.hub is None:
        if "model_type" in values and not where.endswith(_FILES):
            raise UserError(
                f"{where}: config.json says model_type {values['model_type']!r}, but the "
                f"arrays are those of {family.name}: two models in one folder? Give the "
                f"file, as in {where}/FILE"
            )
        return Metadata()  # of another model: a file among strangers
    if values and family:
        processor = files.get("preprocessor_config.json", {})
        return _of_transformers(values, processor, family, where)
    if values := files.get("open_clip_config.json", {}):
        return _of_open_clip(values, f"{where}/open_clip_config.json", width)
    return Metadata()


# --- transformers -------------------------------------------------------------------------

# config.json -> ModelConfig, and how the value is read.
_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "hidden_size": ("width", entries.count),
    "num_hidden_layers": ("depth", entries.count),
    "num_attention_heads": ("heads", entries.count),
    "num_channels": ("channels", entries.count),
    "num_register_tokens": ("registers", entries.whole),
    "patch_size": ("patch", entries.square),
    "image_size": ("image_size", entries.pair),
    "layer_norm_eps": ("layer_norm_eps", entries.epsilon),
    "rms_norm_eps": ("layer_norm_eps", entries.epsilon),
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
    get = lambda key, default, convert: entries.field(
        inner, key, default, convert, where_config
    )
    model = {ours: get(key, None, convert) for key, (ours, convert) in _FIELDS.items()
             if inner.get(key) is not None}  # fmt: skip
    gated = _gated(inner, family)
    if mlp_dim := _mlp_dim(inner, gated, get):
        model["mlp_dim"] = mlp_dim
    act = str(inner.get("hidden_act", "gelu" if "hidden_act" in inner else ""))
    if act and not (gated and (act in ("silu", "swish") or "use_swiglu_ffn" in inner)):
        model["gelu"] = config.choose(
            f"hidden_act in {where_config}", act, entries.GELU
        )
        model |= {"mlp": "geglu"} if gated else {}
    architectures = values.get("architectures") or [""]
    plain = all(str(x).endswith("Model") for x in architectures)
    if plain and inner.get("pooler_act", "tanh") != "tanh":
        raise UserError(
            f"{where_config}: pooler_act is {inner['pooler_act']!r}, not 'tanh'"
        )
    if "rope" in family.model:
        model["rope_theta"] = get("rope_theta", 100.0, entries.positive)
    if kind in ("ijepa",):
        model["head"] = "gap"
    if kind.startswith(("clip", "metaclip")) and "ForImage" in str(architectures):
        model |= {"head": "gap", "final_norm": "none"}
    transforms: tuple[dict[str, Any], ...] = ()
    if processor:
        transforms, norm = _of_processor(processor, f"{where}/preprocessor_config.json")
        model |= norm
    return Metadata(
        entries.field(values, "id2label", (), entries.labels, where_config),
        transforms,
        model,
        values.get("problem_type") == "multi_label_classification",
    )


def _gated(values: Mapping[str, Any], family: Family) -> bool:
    keys = ("use_swiglu_ffn", "use_gated_mlp")
    return "gate" in family.has or any(values.get(key) is True for key in keys)


def _mlp_dim(values: Mapping[str, Any], gated: bool, get: entries.Get) -> int:
    if size := get("intermediate_size", 0, entries.count):
        return size
    ratio, width = (
        get("mlp_ratio", 0.0, entries.positive),
        get("hidden_size", 0, entries.count),
    )
    if not ratio or not width:
        return 0
    # A gated MLP of DINOv2 is two thirds as wide, rounded up to a multiple of 8.
    size = int(width * ratio)
    return (int(size * 2 / 3) + 7) // 8 * 8 if gated else size


def _of_processor(
    values: dict[str, Any], where: str
) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """What the image processor of ``transformers`` does: entries.operations, mean and deviation."""
    get = lambda key, default, convert: entries.field(
        values, key, default, convert, where
    )
    norm = entries.normalization(get, "image_mean", "image_std")
    if not get("do_normalize", True, bool):
        norm = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    if stored := get("vit_jax_transforms", (), entries.operations):
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
        size = dict(zip(_SIDES, entries.pair(size), strict=True))
    return {str(k): int(v) for k, v in size.items() if v is not None}


def to_transformers(
    cfg: config.ModelConfig, about: Metadata, family: Family, names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` of a folder with arrays of these
    names."""
    hub = family.hub
    assert hub is not None
    architecture = hub.classifier if cfg.num_classes else hub.plain
    if cfg.distillation == "head":
        architecture += "WithTeacher"
    height, width = cfg.image_size
    size = height if height == width else [height, width]
    rms = "rms_norm_eps" if cfg.norm == "rms" else "layer_norm_eps"
    values: dict[str, Any] = {
        "architectures": [architecture],
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
    values |= _extra(cfg, family, names)
    if cfg.num_classes and hub.kinds[0].startswith("siglip"):  # has no flat config
        outer = {"architectures": values.pop("architectures"), "dtype": "float32"}
        values = {**outer, "model_type": hub.kinds[1], "vision_config": values}
    if hub.classifier.startswith("CLIP"):
        values["projection_dim"] = cfg.num_classes or 512
    elif cfg.num_classes:
        labels = about.class_names or [f"LABEL_{i}" for i in range(cfg.num_classes)]
        values["id2label"] = {str(i): name for i, name in enumerate(labels)}
        values["label2id"] = {name: i for i, name in enumerate(labels)}
    if about.multilabel:
        values["problem_type"] = "multi_label_classification"
    return values, _to_processor(cfg, about, hub.processor)


def _extra(
    cfg: config.ModelConfig, family: Family, names: Collection[str]
) -> dict[str, Any]:
    """What only some families have in their config.json."""
    has = lambda *ends: any(name.endswith(ends) for name in names)
    qkv_bias = has("query.bias", "q_proj.bias")
    gated, kind = cfg.mlp != "gelu", family.hub.kinds[0] if family.hub else ""
    if kind.startswith("dinov2"):
        ratio = (cfg.mlp_dim * 1.5 if gated else cfg.mlp_dim) / cfg.width
        extra: dict[str, Any] = {
            "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
            "use_swiglu_ffn": gated,
            "qkv_bias": qkv_bias,
            "layerscale_value": 1.0,
        }
        if cfg.registers:
            extra["num_register_tokens"] = cfg.registers
        return extra
    if kind == "dinov3_vit":
        return {
            "num_register_tokens": cfg.registers,
            "rope_theta": cfg.rope_theta or 100.0,
            "use_gated_mlp": gated,
            "query_bias": qkv_bias,
            "key_bias": has("k_proj.bias"),
            "value_bias": has("v_proj.bias"),
            "proj_bias": has("o_proj.bias"),
            "mlp_bias": has("up_proj.bias"),
            "pos_embed_rescale": 2.0,
            **({"hidden_act": "silu"} if cfg.mlp == "swiglu" else {}),
        }
    if kind == "beit":
        return {
            "use_relative_position_bias": cfg.relative_bias,
            "use_absolute_position_embeddings": cfg.positions == "learned",
            "use_mask_token": has("mask_token"),
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
            **({"hidden_act": "silu"} if cfg.mlp == "swiglu" else {}),
            "use_head": cfg.head == "map",
            "is_native": not has("position_embedding.weight"),
            "qkv_bias": qkv_bias,
            "mlp_bias": has("up_proj.bias"),
        }
    if kind in ("vit", "deit"):
        return {
            "attention_probs_dropout_prob": cfg.attention_dropout,
            "hidden_dropout_prob": cfg.dropout,
            "encoder_stride": cfg.patch,
            "pooler_act": "tanh",
            "pooler_output_size": cfg.width,
            "qkv_bias": qkv_bias,
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


# --- OpenCLIP -----------------------------------------------------------------------------


def _of_open_clip(values: dict[str, Any], where: str, width: int) -> Metadata:
    outer = entries.field(values, "model_cfg", {}, dict, where)
    vision = entries.field(outer, "vision_cfg", {}, dict, where)
    about = entries.field(values, "preprocess_cfg", {}, dict, where)
    get = lambda key, default, convert: entries.field(
        vision, key, default, convert, where
    )
    prepared = lambda key, default, convert: entries.field(
        about, key, default, convert, where
    )
    model: dict[str, Any] = {"gelu": "quick" if outer.get("quick_gelu") else "exact"}
    if tower := vision.get("timm_model_name"):
        model = timm_config.known_by(str(tower), where, width)
        if pool := vision.get("timm_pool"):
            model["head"] = config.choose(
                f"timm_pool in {where}", str(pool), timm_config.POOLS
            )
    for key, ours, convert in (
        ("width", "width", entries.count),
        ("layers", "depth", entries.count),
        ("patch_size", "patch", entries.square),
        ("image_size", "image_size", entries.pair),
    ):
        if value := get(key, None, convert):
            model[ours] = value
    if "width" in model:
        model["heads"] = model["width"] // get("head_width", 64, entries.count)
    if about:
        model |= entries.normalization(prepared, "mean", "std")
    mode = {"shortest": "center", "squash": "squash"}
    how = mode.get(str(about.get("resize_mode", "shortest")), "center")
    method = str(about.get("interpolation", "bicubic"))
    return Metadata(
        (), timm_config.crops(model.get("image_size"), 1.0, how, method), model
    )
