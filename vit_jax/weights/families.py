# SPDX-License-Identifier: Apache-2.0
"""The families of published ViTs: one row each, in ``FAMILIES``.

A row says what the file calls each role (``spellings.py``), which roles betray the family,
what no array shows, and how its tables of positions are resized. To add a family, add a
row, and a table in ``spellings.py`` if its names are new; its ``config.json`` is read and
written by ``documents.py`` from the same row.
"""

import dataclasses
from typing import Any

from vit_jax.weights import roles, spellings

IMAGENET = {
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
HALF = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
EXACT = {"gelu": "exact", "layer_norm_eps": 1e-6}


@dataclasses.dataclass(frozen=True)
class Hub:
    """What ``transformers`` calls a family in ``config.json``."""

    kinds: tuple[str, ...]  # model_type; the first is written
    plain: str  # architecture without a head
    classifier: str = ""  # and with one
    processor: str = "ViTImageProcessor"


@dataclasses.dataclass(frozen=True)
class Family:
    """One row: how a family writes its weights, and what its files do not say."""

    name: str
    names: roles.Names  # role -> name in the file
    has: tuple[str, ...] = ()  # roles that betray the family ...
    lacks: tuple[str, ...] = ()  # ... and roles that it does not have
    called: str = ""  # pattern of file names, where no array betrays it
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)  # see roles.read
    tower: str = ""  # written before all names but "/...", where there is a head
    inside: str = ""  # what a part of the path to the tower is called
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # no array shows it
    head_width: int = 64  # of the attention heads, whose number no array shows
    heads: dict[int, int] = dataclasses.field(
        default_factory=dict
    )  # or it is, by width
    resize: str = "bicubic"  # of tables of positions, see positions.py
    waves: bool = False  # where it has no such table, positions are computed
    crop: float = 0.875  # share of the resized short side that is cropped
    hub: Hub | None = None  # how transformers writes it, if it does
    timm: bool = False  # a layout of timm, whose config.json names an architecture


_AIM = {**CLIP, "layer_norm_eps": 1e-5}
_PE = {
    **{**HALF, "gelu": "exact", "layer_norm_eps": 1e-5, "map_heads": 8},
    **{"rope": "pe", "rope_offset": 1.0},
}
# What a plain ViT with the names of timm has not.
_SPECIAL = ("scale1", "registers", "norm_pre", "probe", "relative", "gate", "q_bias")

# Of DINOv2's g, and of Web-SSL from 2 to 7 billion parameters.
_DINOV2_HEADS = {1536: 24, 2688: 21, 3072: 24, 3584: 28, 4096: 32}

# The first row that fits a file is its family.
FAMILIES = (
    # --- Hugging Face: a folder with config.json -----------------------------------------
    Family(
        "dinov2 with registers (Hugging Face)",
        spellings.HF_DINOV2,
        kinds={"mask": "matrix"},
        has=("scale1", "registers"),
        tower="dinov2_with_registers.",
        model={**IMAGENET, **EXACT},
        heads=_DINOV2_HEADS,
        resize="bicubic_antialias",
        hub=Hub(
            ("dinov2_with_registers",),
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersForImageClassification",
            "BitImageProcessor",
        ),
    ),
    Family(
        "dinov2 (Hugging Face)",
        spellings.HF_DINOV2,
        kinds={"mask": "matrix"},
        has=("scale1",),
        tower="dinov2.",
        model={**IMAGENET, **EXACT},
        heads=_DINOV2_HEADS,
        hub=Hub(
            ("dinov2",),
            "Dinov2Model",
            "Dinov2ForImageClassification",
            "BitImageProcessor",
        ),
    ),
    Family(
        "dinov3 (Hugging Face)",
        spellings.HF_DINOV3,
        has=("scale1", "q"),
        tower="model.",
        model={**IMAGENET, "gelu": "exact", "layer_norm_eps": 1e-5, "rope": "dinov3"},
        heads={1280: 20, 4096: 32},
        crop=1.0,
        hub=Hub(
            ("dinov3_vit",),
            "DINOv3ViTModel",
            "DINOv3ViTForImageClassification",
            "DINOv3ViTImageProcessor",
        ),
    ),
    Family(
        "beit (Hugging Face)",
        spellings.HF_BEIT,
        has=("scale1", "q"),
        tower="beit.",
        model={**HALF, "gelu": "exact", "layer_norm_eps": 1e-12},
        resize="bilinear",
        hub=Hub(
            ("beit", "data2vec-vision"),
            "BeitModel",
            "BeitForImageClassification",
            "BeitImageProcessor",
        ),
    ),
    Family(
        "deit (Hugging Face)",
        {
            **spellings.HF_VIT,
            "dist": "embeddings.distillation_token",
            "head": "/classifier|/cls_classifier",
            "head_dist": "/distillation_classifier",
        },
        has=("dist", "q"),
        tower="deit.",
        model={**IMAGENET, "gelu": "exact", "layer_norm_eps": 1e-12},
        hub=Hub(
            ("deit",),
            "DeiTModel",
            "DeiTForImageClassification",
            "DeiTImageProcessor",
        ),
    ),
    Family(
        "ijepa (Hugging Face)",
        spellings.HF_VIT,
        has=("q",),
        lacks=("cls",),
        tower="ijepa.",
        model={**IMAGENET, "gelu": "exact", "layer_norm_eps": 1e-6},
        hub=Hub(("ijepa", "vit"), "IJepaModel", "IJepaForImageClassification"),
    ),
    Family(
        "vit or mae (Hugging Face)",
        spellings.HF_VIT,
        has=("q", "norm1"),
        tower="vit.",
        model={**HALF, "gelu": "exact", "layer_norm_eps": 1e-12},
        hub=Hub(("vit", "vit_mae", "vit_msn"), "ViTModel", "ViTForImageClassification"),
    ),
    Family(
        "clip (Hugging Face)",
        spellings.HF_CLIP,
        has=("cls", "norm_pre", "q"),
        kinds={"cls": "vector", "positions": "rows"},
        tower="vision_model.",
        model={**CLIP, "gelu": "quick", "layer_norm_eps": 1e-5},
        crop=1.0,
        hub=Hub(
            ("clip_vision_model", "clip", "metaclip_2_vision_model", "metaclip_2"),
            "CLIPVisionModel",
            "CLIPVisionModelWithProjection",
            "CLIPImageProcessor",
        ),
    ),
    Family(
        "siglip 2 (Hugging Face)",
        spellings.HF_SIGLIP,
        has=("positions", "q"),
        kinds={"patch": "flat_conv", "positions": "rows"},
        tower="vision_model.",
        model={**HALF, "gelu": "tanh", "layer_norm_eps": 1e-6},
        resize="bilinear_antialias",
        crop=1.0,
        hub=Hub(
            ("siglip2_vision_model", "siglip2"),
            "Siglip2VisionModel",
            "Siglip2ForImageClassification",
            "Siglip2ImageProcessor",
        ),
    ),
    Family(
        "siglip (Hugging Face)",
        spellings.HF_SIGLIP,
        has=("positions", "q"),
        kinds={"positions": "rows"},
        tower="vision_model.",
        model={**HALF, "gelu": "tanh", "layer_norm_eps": 1e-6},
        crop=1.0,
        hub=Hub(
            ("siglip_vision_model", "siglip", "siglip2"),
            "SiglipVisionModel",
            "SiglipForImageClassification",
            "SiglipImageProcessor",
        ),
    ),
    Family(
        "aimv2 (Hugging Face)",
        spellings.HF_AIMV2,
        has=("patch_norm", "gate"),
        kinds={"positions": "rows"},
        tower="vision_model.",
        waves=True,
        model=_AIM,
        head_width=128,
        crop=1.0,
        hub=Hub(
            ("aimv2_vision_model", "aimv2"),
            "Aimv2VisionModel",
            processor="CLIPImageProcessor",
        ),
    ),
    # --- the authors' own files, mostly with the names that timm took over ---------------
    Family(
        "perception encoder",
        spellings.CLIP_ORIGINAL,
        has=("norm_pre", "probe"),
        kinds={"cls": "vector", "positions": "rows"},
        model=_PE,
        crop=1.0,
    ),
    Family(
        "perception encoder, spatial or language",
        spellings.CLIP_ORIGINAL,
        has=("norm_pre", "norm1"),
        lacks=("norm",),
        kinds={"cls": "vector", "positions": "rows"},
        model=_PE,
        crop=1.0,
    ),
    Family(
        "clip",
        spellings.CLIP_ORIGINAL,
        has=("norm_pre", "norm1"),
        kinds={"cls": "vector", "positions": "rows"},
        model={**CLIP, "gelu": "exact", "layer_norm_eps": 1e-5},
        crop=1.0,
    ),
    Family(
        "aimv2",
        spellings.AIMV2_ORIGINAL,
        has=("patch_norm", "gate"),
        waves=True,
        model=_AIM,
        head_width=128,
        crop=1.0,
    ),
    Family(
        "mocov3",
        spellings.TIMM,
        has=("norm1", "cls"),
        tower="module.base_encoder.",
        inside="base_encoder",
        model={**IMAGENET, **EXACT},
        heads={384: 12},
    ),
    Family(
        "dinov3",
        {**spellings.TIMM, "registers": "storage_tokens"},
        has=("registers",),
        model={**IMAGENET, "gelu": "exact", "layer_norm_eps": 1e-5, "rope": "dinov3"},
        heads={1280: 20, 4096: 32},
        crop=1.0,
    ),
    Family(
        "dinov2 with registers",
        {**spellings.TIMM, "registers": "register_tokens"},
        kinds={"mask": "matrix"},
        has=("registers", "scale1", "positions"),
        model={**IMAGENET, **EXACT},
        heads=_DINOV2_HEADS,
        resize="bicubic_antialias",
    ),
    Family(
        "dinov2",
        {**spellings.TIMM, "scale1": "blocks.{i}.ls1.gamma"},
        kinds={"mask": "matrix"},
        has=("mask", "scale1", "positions", "cls"),
        lacks=("relative",),
        model={**IMAGENET, **EXACT},
        heads=_DINOV2_HEADS,
        resize="bicubic_offset",
    ),
    Family(
        "eva02",
        spellings.TIMM,
        has=("q_bias", "gate"),
        lacks=("relative",),
        model={**CLIP, **EXACT, "rope": "eva02", "rope_grid": (16, 16)},
        resize="bicubic_antialias",
        crop=1.0,
    ),
    Family(
        "beitv2",
        spellings.TIMM,
        has=("relative",),
        called="beit_?v2",
        model={**IMAGENET, **EXACT},
    ),
    Family(
        "beit",
        spellings.TIMM,
        has=("relative",),
        model={**HALF, **EXACT},
    ),
    Family(
        "deit3",
        {**spellings.TIMM, "scale1": "blocks.{i}.gamma_1"},
        has=("scale1", "positions", "cls"),
        lacks=("registers", "gate"),
        model={**IMAGENET, **EXACT},
        crop=1.0,
    ),
    Family(
        "deit, distilled",
        spellings.TIMM,
        has=("dist",),
        model={**IMAGENET, **EXACT},
    ),
    Family(
        "dino",
        spellings.TIMM,
        has=("norm1", "cls", "qkv", "positions"),
        lacks=("head", *_SPECIAL),
        called="dino",
        model={**IMAGENET, **EXACT},
        resize="bicubic_offset",
    ),
    Family(
        "mae",
        spellings.TIMM,
        has=("norm1", "cls", "qkv", "positions"),
        lacks=("head", *_SPECIAL),
        model={**IMAGENET, **EXACT},
    ),
    Family(
        "mae, fine-tuned",
        spellings.TIMM,
        has=("fc_norm", "cls", "head", "positions"),
        lacks=("norm", *_SPECIAL),
        model={**IMAGENET, **EXACT},
    ),
    Family(
        "deit",
        spellings.TIMM,
        has=("norm1", "cls", "head", "positions"),
        lacks=_SPECIAL,
        called="deit",
        model={**IMAGENET, **EXACT},
    ),
    Family(
        "ijepa",
        spellings.TIMM,
        has=("norm1", "qkv", "positions", "norm"),
        lacks=("cls", "head", *_SPECIAL),
        model={**IMAGENET, **EXACT},
    ),
    Family(
        "timm, parallel blocks",
        spellings.TIMM_PARALLEL,
        has=("up_qkv",),
        model={**HALF, **EXACT},
        resize="bicubic_antialias",
        timm=True,
    ),
    Family(
        "timm",
        spellings.TIMM,
        has=("norm1",),
        model={**HALF, **EXACT},
        resize="bicubic_antialias",
        timm=True,
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
