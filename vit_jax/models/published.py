# SPDX-License-Identifier: Apache-2.0
"""Published architectures by the names that timm, Hugging Face or their authors gave them.

A name selects what the arrays have to be and what is computed with them, but neither
the weights nor the colours and classes they were trained with: those come with a file.
Sizes and switches are those of timm 1.0.31 (vision_transformer.py, deit.py, eva.py,
beit.py); where Hugging Face's class differs, ``_HUGGING_FACE`` says in what.
"""

import re
from typing import Any

from vit_jax.models.sizes import SIZES

Fields = dict[str, Any]

_WORDS = {
    "tiny": "Ti",
    "small": "S",
    "medium": "M",
    "base": "B",
    "so400m": "So400m",
    "large": "L",
    "huge": "H",
    "giant": "g",
    "giantopt": "g-opt",
    "gigantic": "G",
}
_CLIP = {"norm_pre": True, "layer_norm_eps": 1e-5}
_MEAN = {"class_token": True, "head": "gap", "final_norm": "pooled"}
_DINOV3 = {
    **{"registers": 4, "positions": "none", "rope": "dinov3", "layer_norm_eps": 1e-5},
}
_BEIT = {**_MEAN, "positions": "none", "relative_bias": True}
_EVA02 = {**_MEAN, "rope": "eva02", "rope_grid": (16, 16), "mlp": "swiglu"}
_AIMV2 = {
    **{"norm": "rms", "layer_norm_eps": 1e-5, "patch_norm": True, "mlp": "swiglu"},
    "head": "gap",
}
_PE = {
    **{"norm_pre": True, "rope": "pe", "rope_offset": 1.0, "layer_norm_eps": 1e-5},
    **{"class_token": True, "head": "map", "map_heads": 8},
}
_TANH = {"gelu": "tanh"}
_EPSILON = {"layer_norm_eps": 1e-12}  # the default of transformers


def _sizes(width: int, depth: int, heads: int, mlp_dim: int, **others: Any) -> Fields:
    sizes = {"width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
    return sizes | others


_DINOV2_GIANT = {"giant": _sizes(1536, 40, 24, 4096, mlp="swiglu")}

# (name, sizes and patches, side of the images, what all have, what some sizes have)
_Row = tuple[str, str, int, Fields, dict[str, Fields]]
_TIMM: tuple[_Row, ...] = (
    (
        "vit_{size}_patch{patch}_{image}",
        "tiny/16 small/8 small/16 small/32 base/8 base/16 base/32 large/14 large/16 "
        "large/32 huge/14 giant/14 gigantic/14",
        224,
        {},
        {},
    ),
    ("deit_{size}_patch{patch}_{image}", "tiny/16 small/16 base/16", 224, {}, {}),
    (
        "deit_{size}_distilled_patch{patch}_{image}",
        "tiny/16 small/16 base/16",
        224,
        {"distillation": "head"},
        {},
    ),
    (
        "deit3_{size}_patch{patch}_{image}",
        "small/16 medium/16 base/16 large/16 huge/14",
        224,
        {},
        {},
    ),
    (
        "vit_{size}_patch{patch}_dinov2",
        "small/14 base/14 large/14 giant/14",
        518,
        {},
        _DINOV2_GIANT,
    ),
    (
        "vit_{size}_patch{patch}_reg4_dinov2",
        "small/14 base/14 large/14 giant/14",
        518,
        {"registers": 4},
        _DINOV2_GIANT,
    ),
    (
        "vit_{size}_patch{patch}_dinov3",
        "small/16 small_plus/16 base/16 large/16 huge_plus/16 7b/16",
        256,
        _DINOV3,
        {
            "small_plus": _sizes(384, 12, 6, 1536, mlp="swiglu"),
            "huge_plus": _sizes(1280, 32, 20, 5120, mlp="swiglu"),
            "7b": _sizes(4096, 40, 32, 8192, mlp="swiglu"),
        },
    ),
    (
        "vit_{size}_patch{patch}_clip_{image}",
        "base/32 base/16 large/14 huge/14 giant/14 gigantic/14",
        224,
        _CLIP,
        {},
    ),
    (
        "vit_{size}_patch{patch}_clip_quickgelu_{image}",
        "base/32 base/16 large/14 huge/14 gigantic/14",
        224,
        {**_CLIP, "gelu": "quick"},
        {},
    ),
    (
        "vit_{size}_patch{patch}_siglip_{image}",
        "base/16 large/16 so400m/14",
        224,
        {"head": "map"},
        {},
    ),
    (
        "vit_{size}_patch{patch}_siglip_{image}",
        "base/32 so400m/16 giantopt/16",
        256,
        {"head": "map", **_TANH},
        {},
    ),
    (
        "vit_{size}_patch{patch}_siglip_{image}",
        "large/16",
        512,
        {"head": "map", **_TANH},
        {},
    ),
    ("flexivit_{size}", "small/16 base/16 large/16", 240, {}, {}),
    ("beit_{size}_patch{patch}_{image}", "base/16 large/16", 224, _BEIT, {}),
    ("beitv2_{size}_patch{patch}_{image}", "base/16 large/16", 224, _BEIT, {}),
    (
        "eva02_{size}_patch{patch}_{image}",
        "tiny/14 small/14 base/14 large/14",
        336,
        _EVA02,
        {
            "tiny": {"mlp_dim": 512},
            "small": {"mlp_dim": 1024},
            "base": {"mlp_dim": 2048, "mlp_norm": True, "image_size": (448, 448)},
            "large": {"mlp_dim": 2730, "mlp_norm": True, "image_size": (448, 448)},
        },
    ),
    (
        "aimv2_{size}_patch{patch}_{image}",
        "large/14 huge/14 1b/14 3b/14",
        224,
        _AIMV2,
        {
            "large": _sizes(1024, 24, 8, 2816),
            "huge": _sizes(1536, 24, 12, 4096),
            "1b": _sizes(2048, 24, 16, 5632),
            "3b": _sizes(3072, 24, 24, 8192),
        },
    ),
    (
        "vit_pe_core_{size}_patch{patch}_{image}",
        "tiny/16 small/16 base/16 large/14 gigantic/14",
        384,
        {**_PE, "rope_grid": (24, 24)},
        {
            "base": {"image_size": (224, 224), "rope_grid": (14, 14)},
            "large": {"image_size": (336, 336)},
            "gigantic": _sizes(
                *(1536, 50, 16, 8960),
                **{"image_size": (448, 448), "rope_grid": (32, 32)},
                **{"rope_offset": 0.0, "class_token": False, "map_mlp_dim": 6144},
            ),
        },
    ),
    (
        "vit_{size}_patch{patch}_gap_{image}",
        "base/16 huge/14 huge/16 giant/16",
        224,
        {"head": "gap"},
        {"base": {"heads": 16}},
    ),
)

# Not in timm: vits.py of moco-v3; backbones.py of Franca; vision_transformer.py of webssl.
_OTHERS: tuple[_Row, ...] = (
    (
        "mocov3_{size}_patch{patch}_{image}",
        "small/16 base/16",
        224,
        {},
        {"small": {"heads": 12}},
    ),
    (
        "franca_{size}_patch{patch}_{image}",
        "base/14 large/14 giant/14",
        224,
        {"mlp": "swiglu"},
        {
            "base": {"mlp_dim": 2048},
            "large": {"mlp_dim": 2736},
            **_DINOV2_GIANT,
        },
    ),
    (
        "webssl_dino_{size}_patch{patch}_{image}",
        "1b/14 2b/14 3b/14 5b/14 7b/14",
        224,
        {"mlp": "swiglu"},
        {
            "1b": _sizes(1536, 40, 24, 4096),
            "2b": _sizes(2688, 24, 21, 7168),
            "3b": _sizes(3072, 26, 24, 8192),
            "5b": _sizes(3584, 32, 28, 9560),
            "7b": _sizes(4096, 32, 32, 10928),
        },
    ),
)


def _architectures(rows: tuple[_Row, ...]) -> dict[str, Fields]:
    found = {}
    for name, sizes, image, shared, special in rows:
        for size, patch in (entry.split("/") for entry in sizes.split()):
            row = SIZES[_WORDS[size]]._asdict() if size in _WORDS else {}
            row |= {"gelu": "exact", "patch": int(patch), "image_size": (image, image)}
            row |= shared | special.get(size, {})
            side = row["image_size"][0]
            found[name.format(size=size, patch=patch, image=side)] = row
    return found


# Each at one size of images.
TIMM = _architectures(_TIMM)
ARCHITECTURES = TIMM | _architectures(_OTHERS)

# Ids of Hugging Face: their pattern, the name above, and what their classes do differently.
_HUGGING_FACE: tuple[tuple[str, str, Fields], ...] = (
    (
        r"google/vit-(base|large|huge)-patch(\d+)-(\d+)(-in21k)?",
        r"vit_\1_patch\2_\3",
        _EPSILON,
    ),
    (
        r"facebook/vit-mae-(base|large)",
        r"vit_\1_patch16_224",
        _EPSILON,
    ),
    (r"facebook/vit-mae-huge", "vit_huge_patch14_224", _EPSILON),
    (
        r"facebook/deit-(tiny|small|base)-patch16-(\d+)",
        r"deit_\1_patch16_\2",
        _EPSILON,
    ),
    (
        r"facebook/deit-(tiny|small|base)-distilled-patch16-(\d+)",
        r"deit_\1_distilled_patch16_\2",
        _EPSILON,
    ),
    (
        r"facebook/dino-vits(8|16)",
        r"vit_small_patch\1_224",
        _EPSILON,
    ),
    (
        r"facebook/dino-vitb(8|16)",
        r"vit_base_patch\1_224",
        _EPSILON,
    ),
    (r"facebook/dinov2-(small|base|large|giant)", r"vit_\1_patch14_dinov2", {}),
    (
        r"facebook/dinov2-with-registers-(small|base|large|giant)",
        r"vit_\1_patch14_reg4_dinov2",
        {},
    ),
    (r"facebook/dinov3-vits16-.*", "vit_small_patch16_dinov3", {}),
    (r"facebook/dinov3-vits16plus-.*", "vit_small_plus_patch16_dinov3", {}),
    (r"facebook/dinov3-vitb16-.*", "vit_base_patch16_dinov3", {}),
    (r"facebook/dinov3-vitl16-.*", "vit_large_patch16_dinov3", {}),
    (r"facebook/dinov3-vith16plus-.*", "vit_huge_plus_patch16_dinov3", {}),
    (r"facebook/dinov3-vit7b16-.*", "vit_7b_patch16_dinov3", {}),
    (r"facebook/ijepa_vith(14|16)_.*", r"vit_huge_patch\1_gap_224", {}),
    (r"facebook/ijepa_vitg16_.*", "vit_giant_patch16_gap_224", {}),
    (
        r"openai/clip-vit-(base|large)-patch(\d+)(?:-(336))?",
        r"vit_\1_patch\2_clip_quickgelu_\3",
        {},
    ),
    (
        r"google/siglip2?-(base|large|so400m)-patch(\d+)-(\d+)",
        r"vit_\1_patch\2_siglip_\3",
        _TANH,
    ),
    (
        r"google/siglip2-giant-opt-patch16-(\d+)",
        r"vit_giantopt_patch16_siglip_\1",
        _TANH,
    ),
    (
        r"microsoft/beit-(base|large)-patch16-(\d+).*",
        r"beit_\1_patch16_\2",
        _EPSILON,
    ),
    (
        r"facebook/webssl-dino(1b|2b|3b|5b|7b)-.*-(\d+)",
        r"webssl_dino_\1_patch14_\2",
        {},
    ),
    (r"apple/aimv2-(large|huge|1b|3b)-patch14-(\d+).*", r"aimv2_\1_patch14_\2", {}),
)


def fields_of(name: str) -> Fields:
    """The fields of ``ModelConfig`` that a name of timm or Hugging Face stands for.

    Names of timm may bring the tag of the weights ("...224.augreg_in21k") and the
    owner ("timm/..."), and be for another size of images than the row. {}: unknown.
    """
    differs: Fields = {}
    name = name.removeprefix("timm/").split(".")[0].lower()
    for pattern, known, fields in _HUGGING_FACE:
        if match := re.fullmatch(pattern, name):
            name, differs = match.expand(known).strip("_"), fields
    if name in ARCHITECTURES:
        return ARCHITECTURES[name] | differs
    of_any_size: dict[str, Fields] = {}
    for known, row in ARCHITECTURES.items():
        if known.rpartition("_")[2].isdecimal():
            of_any_size.setdefault(known.rpartition("_")[0], row)
    if name in of_any_size:
        return of_any_size[name] | differs
    family, _, side = name.rpartition("_")
    if family in of_any_size and side.isdecimal():
        size = {"image_size": (int(side), int(side))}
        return of_any_size[family] | size | differs
    return {}
