# SPDX-License-Identifier: Apache-2.0
"""``config.json`` of timm: an architecture by name, and what differs from it."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vit_jax import config
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models import published
from vit_jax.weights import entries
from vit_jax.weights.contents import Metadata


def is_timm(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of timm's."""
    return "pretrained_cfg" in values or "architecture" in values


# What the images of timm's models are pooled with, as heads of ours.
POOLS = {"": "none", "token": "token", "avg": "gap", "map": "map"}

# What timm's architectures are known by alone: every row that fits a name counts.
_ARCHITECTURES: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"", {"gelu": "exact", "layer_norm_eps": 1e-6}),
    (
        r"(base_patch32|so400m_patch16|giantopt_patch16)_siglip|large_patch16_siglip_(gap_)?512",
        {"gelu": "tanh"},
    ),
    (r"quickgelu", {"gelu": "quick"}),
    (r"^vit_.*_clip_|dinov3|lingbot|^vit_pe_|^aimv2|^beit3", {"layer_norm_eps": 1e-5}),
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
# Parts that no array shows and no model here has.
_UNKNOWN = ((r"^eva02_enormous|_rpn_", "norms of what attention and MLP return"),)
_NORMS = {"layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32"}
# Heads that do not follow from the width, where config.json does not give them.
_HEADS = (
    (r"vit_base_patch16_gap_224|^vit_pe_\w+_gigantic|giantopt|so400m", 16),
    (r"^vit_(huge|giant|gigantic)_patch1\d_(?!dinov2|reg)", 16),
    (r"^vit_giant_.*(dinov2|tipsv2)", 24),
    (r"^vit_7b", 32),
)


def known_by(architecture: str, where: str, width: int = 0) -> dict[str, Any]:
    """What the name of an architecture of timm says about its model of this width, which
    may be another than the published one.

    Raises:
      UserError: it has a part that no model here has.
    """
    for pattern, part in _UNKNOWN:
        if re.search(pattern, architecture):
            raise UserError(f"{where}: {architecture} has {part}, which is not covered")
    model: dict[str, Any] = {}
    for pattern, known in _ARCHITECTURES:
        if re.search(pattern, architecture):
            model |= known
    row = published.fields_of(architecture)
    if width and row.get("width") == width:
        model["heads"] = row["heads"]
    for pattern, heads in _HEADS:
        if re.search(pattern, architecture):
            model["heads"] = heads
    return model


# Arguments of timm's models, and the fields of ``ModelConfig`` that they are.
_ARGUMENTS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("num_heads", "heads", entries.count),
    ("embed_dim", "width", entries.count),
    ("depth", "depth", entries.count),
    ("patch_size", "patch", entries.square),
    ("in_chans", "channels", entries.count),
    ("attn_pool_num_heads", "map_heads", entries.count),
    ("rope_temperature", "rope_theta", entries.positive),
    ("rope_grid_offset", "rope_offset", entries.positive),
    ("ref_feat_shape", "rope_grid", entries.pair),
)


def read(
    values: dict[str, Any], where: str, roles: Collection[str] = (), width: int = 0
) -> Metadata:
    """Fields of ``ModelConfig``, class names and preprocessing.

    ``roles``: which of ``roles.ROLES`` the weights have; ``width``: of their tokens.

    Raises:
      UserError: an entry that cannot be, or that no model here has.
    """
    about = entries.field(values, "pretrained_cfg", values, dict, where)
    arguments = entries.field(values, "model_args", {}, dict, where)
    architecture = str(values.get("architecture", ""))
    get = lambda key, default, convert: entries.field(
        about, key, default, convert, where
    )
    given = lambda key, default, convert: entries.field(
        arguments, key, default, convert, where
    )
    model = known_by(architecture, where, width)
    if "embed_dim" in arguments:
        model.pop("heads", 0)  # of the published width
    for key, ours, convert in _ARGUMENTS:
        if value := given(key, None, convert):
            model[ours] = value
    size = given("img_size", None, entries.pair) or get(
        "input_size", None, lambda s: entries.pair(s[1:])
    )
    if size:
        model["image_size"] = size
    if act := arguments.get("act_layer"):
        model["gelu"] = config.choose(
            "act_layer in config.json", str(act), entries.GELU
        )
    pool = arguments.get("global_pool", values.get("global_pool"))
    if pool is not None:
        model["head"] = config.choose("global_pool in config.json", str(pool), POOLS)
    usual = pool == "map" and re.match("vit_pe_|test_vit3", architecture) is not None
    takes_all = arguments.get("pool_include_prefix", usual)
    misfit = pool == "avg" if takes_all else "probe" in roles
    if misfit and not {"cls", "registers"}.isdisjoint(roles):
        raise UserError(
            f"{where}: global_pool={pool!r} with pool_include_prefix={bool(takes_all)} is "
            "not covered: here 'map' pools all tokens, and 'avg' those of patches"
        )
    if (norm := arguments.get("norm_layer")) and norm not in _NORMS:
        raise UserError(
            f"{where}: norm_layer is {norm!r:.60}, not one of {sorted(_NORMS)}"
        )
    if arguments.get("pos_embed") == "none":
        model["positions"] = "none"
    labels = get("label_names", (), entries.names) or entries.field(
        values, "label_names", (), entries.names, where
    )
    model |= entries.normalization(get, "mean", "std")
    crop = get("crop_pct", 1.0, entries.positive)
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


# Switches that timm's class VisionTransformer has not: another class has them, which is
# found by an architecture's name.
_ELSEWHERE = (
    *(
        "rope",
        "relative_bias",
        "norm",
        "mlp",
        "mlp_norm",
        "attention_norm",
        "patch_norm",
    ),
    *("parallel", "resnet", "resnet_width"),
)


def write(
    cfg: ModelConfig, about: Metadata, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """``config.json``, from which timm builds the model that these arrays fit.

    Args:
      cfg: of the model.
      about: class names and preprocessing.
      shapes: of the arrays, by their names in the file.

    Raises:
      UserError: no architecture of timm is such a model.
    """
    pools = {head: pool for pool, head in POOLS.items()}
    if cfg.head not in pools or cfg.pre_logits:
        what = "pre_logits" if cfg.pre_logits else f"head {cfg.head!r}"
        raise UserError(f"model.head: timm builds no model with {what}")
    usual = ModelConfig()
    if any(getattr(cfg, f) != getattr(usual, f) for f in _ELSEWHERE):
        architecture, arguments = _architecture(cfg), {}
        if cfg.map_mlp_dim:
            arguments["attn_pool_mlp_ratio"] = cfg.map_mlp_dim / cfg.width
    else:
        architecture, arguments = _plain(cfg, shapes)
    # timm counts gate and value together in DINOv2's class, and one of them elsewhere.
    both = 2 if cfg.mlp != "gelu" and architecture.endswith("_dinov2") else 1
    biases = ("qkv.bias", "q_bias", "q_proj.bias", "in_proj.bias")
    arguments |= {
        "patch_size": cfg.patch,
        "in_chans": cfg.channels,
        "embed_dim": cfg.width,
        "depth": cfg.depth,
        "num_heads": cfg.heads,
        "mlp_ratio": both * cfg.mlp_dim / cfg.width,
        "qkv_bias": any(name.endswith(biases) for name in shapes),
    }
    size = [cfg.channels, *cfg.image_size]
    prepared: dict[str, Any] = {
        "input_size": size,
        "fixed_input_size": True,
        "num_classes": cfg.num_classes,
        "mean": list(cfg.image_mean or (0.5,) * cfg.channels),
        "std": list(cfg.image_std or (0.5,) * cfg.channels),
        **_prepared(cfg, about),
    }
    if about.class_names:
        prepared["label_names"] = list(about.class_names)
    return {
        "architecture": architecture,
        "num_classes": cfg.num_classes,
        "num_features": cfg.width,
        "global_pool": pools[cfg.head],
        "model_args": {
            "img_size": list(cfg.image_size),
            "global_pool": pools[cfg.head],
            **arguments,
        },
        "pretrained_cfg": prepared,
    }


def _plain(
    cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, dict[str, Any]]:
    """An architecture with that epsilon, and every argument of its class."""
    architecture = "vit_base_patch16_224"
    if cfg.layer_norm_eps == 1e-5:
        architecture = "vit_base_patch16_clip_224"
    if cfg.distillation != "none":
        architecture = "deit_base_distilled_patch16_224"
    rows, columns = (n // cfg.patch for n in cfg.image_size)
    arguments = {
        "act_layer": {"exact": "gelu", "tanh": "gelu_tanh"}.get(cfg.gelu, "quick_gelu"),
        "class_token": "cls_token" in shapes,
        "reg_tokens": cfg.registers,
        "no_embed_class": shapes.get("pos_embed", (0, 0))[1] == rows * columns,
        "pre_norm": cfg.norm_pre,
        "final_norm": cfg.final_norm != "none",
        "fc_norm": cfg.final_norm == "pooled",
        "qk_norm": cfg.qk_norm,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in shapes else None,
    }
    if cfg.head == "map":
        if cfg.map_heads not in (0, cfg.heads):
            raise UserError(
                f"model.map_heads={cfg.map_heads}: timm pools with model.heads={cfg.heads}"
            )
        arguments["pool_include_prefix"] = True
    return architecture, arguments


# Which timm's classes take as arguments.
_SIZES = ("width", "depth", "heads", "mlp_dim", "map_mlp_dim", "patch", "image_size")


def _architecture(cfg: ModelConfig) -> str:
    """The published architecture that is this model, but for sizes if need be."""
    found = []
    for name, row in published.TIMM.items():
        fields = {*_ELSEWHERE, "registers", *row} - {"image_size", "gelu"}
        other = {
            f for f in fields if getattr(cfg, f) != row.get(f, getattr(ModelConfig, f))
        }
        if other.issubset(_SIZES):
            found.append((len(other), "_7b_" in name, name))  # 7b rounds mlp_dim up
    if not found:
        raise UserError(
            "no architecture of timm has these switches: write a file NAME.safetensors"
        )
    return min(found)[2]


def _prepared(cfg: ModelConfig, about: Metadata) -> dict[str, Any]:
    """How timm has to prepare an image."""
    for step in about.transforms:
        if step["op"] in ("resize", "resize_small"):
            small = step["op"] == "resize_small"
            side = step.get("size", max(cfg.image_size))
            larger = side if isinstance(side, int) else max(side)
            return {
                "crop_pct": max(cfg.image_size) / larger,
                "crop_mode": "center" if small else "squash",
                "interpolation": step.get("method", "bilinear"),
            }
    return {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
