# SPDX-License-Identifier: Apache-2.0
"""The families of published ViTs: one row each, in ``FAMILIES``.

A row says what the file calls each role (``roles.py``), which roles betray the family,
what no array shows, and how its tables of positions are resized. To add a family, add a
row; its ``config.json`` is read and written by ``documents.py`` from the same row.

Spelling: alternatives are divided by "|", the first is written; a name that begins with
"/" stands outside the tower, as the classifier of ``vit.*`` does.
"""

import dataclasses
from typing import Any

from vit_jax.weights import roles

IMAGENET = {
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
EXACT = {"gelu": "exact", "layer_norm_eps": 1e-6}


@dataclasses.dataclass(frozen=True)
class Hub:
    """What ``transformers`` calls a family in ``config.json``."""

    kinds: tuple[str, ...]  # model_type; the first is written
    plain: str  # architecture without a head
    classifier: str = ""  # and with one
    processor: str = "ViTImageProcessor"
    # Entries that every model of the family has, besides sizes; see documents.py.
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """One row: how a family writes its weights, and what its files do not say."""

    name: str
    names: roles.Names  # role -> name in the file
    has: tuple[str, ...] = ()  # roles that betray the family ...
    lacks: tuple[str, ...] = ()  # ... and roles that it does not have
    kinds: dict[str, str] = dataclasses.field(default_factory=dict)  # see roles.read
    tower: str = ""  # written before all names but "/...", where there is a head
    inside: str = ""  # what a part of the path to the tower is called
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # no array shows it
    head_width: int = 64  # of the attention heads, whose number no array shows
    heads: dict[int, int] = dataclasses.field(
        default_factory=dict
    )  # or it is, by width
    resize: str = "bicubic"  # of tables of positions, see positions.py
    crop: float = 0.875  # share of the resized short side that is cropped
    hub: Hub | None = None  # how transformers writes it, if it does
    timm: bool = False  # a layout of timm, whose config.json names an architecture


_TIMM: roles.Names = {
    "cls": "cls_token",
    "dist": "dist_token",
    "mask": "mask_token",
    "registers": "reg_token|register_tokens|storage_tokens",
    "positions": "pos_embed",
    "patch": "patch_embed.proj",
    "patch_norm": "patch_embed.norm",
    "norm_pre": "norm_pre",
    "norm1": "blocks.{i}.norm1",
    "qkv": "blocks.{i}.attn.qkv",
    "q": "blocks.{i}.attn.q_proj",
    "k": "blocks.{i}.attn.k_proj",
    "v": "blocks.{i}.attn.v_proj",
    "q_bias": "blocks.{i}.attn.q_bias",
    "k_bias": "blocks.{i}.attn.k_bias",
    "v_bias": "blocks.{i}.attn.v_bias",
    "bias_mask": "blocks.{i}.attn.qkv.bias_mask",
    "q_norm": "blocks.{i}.attn.q_norm",
    "k_norm": "blocks.{i}.attn.k_norm",
    "relative": "blocks.{i}.attn.relative_position_bias_table",
    "attention_norm": "blocks.{i}.attn.norm|blocks.{i}.attn.inner_attn_ln",
    "out": "blocks.{i}.attn.proj",
    "scale1": "blocks.{i}.ls1.gamma|blocks.{i}.gamma_1",
    "norm2": "blocks.{i}.norm2",
    "gate": "blocks.{i}.mlp.fc1_g|blocks.{i}.mlp.w1",
    "up": "blocks.{i}.mlp.fc1|blocks.{i}.mlp.fc1_x|blocks.{i}.mlp.w12|blocks.{i}.mlp.w2",
    "mlp_norm": "blocks.{i}.mlp.norm|blocks.{i}.mlp.ffn_ln",
    "down": "blocks.{i}.mlp.fc2|blocks.{i}.mlp.w3",
    "scale2": "blocks.{i}.ls2.gamma|blocks.{i}.gamma_2",
    "norm": "norm",
    "fc_norm": "fc_norm",
    "probe": "attn_pool.latent",
    "pool_q": "attn_pool.q",
    "pool_kv": "attn_pool.kv",
    "pool_out": "attn_pool.proj",
    "pool_norm": "attn_pool.norm",
    "pool_up": "attn_pool.mlp.fc1",
    "pool_down": "attn_pool.mlp.fc2",
    "pre_logits": "pre_logits.fc",
    "head": "head|/head.proj",
    "head_dist": "head_dist",
}
_TIMM_PARALLEL = {
    **{role: _TIMM[role] for role in ("cls", "positions", "patch", "norm_pre", "norm")},
    "norm1": "blocks.{i}.in_norm",
    "up_qkv": "blocks.{i}.in_proj",
    "up_bias": "blocks.{i}.mlp_bias",
    "q_norm": "blocks.{i}.q_norm",
    "k_norm": "blocks.{i}.k_norm",
    "out": "blocks.{i}.attn_out_proj",
    "scale1": "blocks.{i}.ls1.gamma",
    "down": "blocks.{i}.mlp_out_proj",
    "scale2": "blocks.{i}.ls2.gamma",
    "fc_norm": "fc_norm",
    "head": "head",
}
_CLIP_ORIGINAL = {
    "cls": "class_embedding",
    "positions": "positional_embedding",
    "patch": "conv1",
    "norm_pre": "ln_pre",
    "norm1": "transformer.resblocks.{i}.ln_1",
    "qkv": "transformer.resblocks.{i}.attn.in_proj_",
    "out": "transformer.resblocks.{i}.attn.out_proj",
    "scale1": "transformer.resblocks.{i}.ls_1.gamma",
    "norm2": "transformer.resblocks.{i}.ln_2",
    "up": "transformer.resblocks.{i}.mlp.c_fc",
    "down": "transformer.resblocks.{i}.mlp.c_proj",
    "scale2": "transformer.resblocks.{i}.ls_2.gamma",
    "norm": "ln_post",
    "probe": "attn_pool.probe",
    "pool_qkv": "attn_pool.attn.in_proj_",
    "pool_out": "attn_pool.attn.out_proj",
    "pool_norm": "attn_pool.layernorm",
    "pool_up": "attn_pool.mlp.c_fc",
    "pool_down": "attn_pool.mlp.c_proj",
    "projection": "proj",
}
_AIMV2_ORIGINAL = {
    "positions": "preprocessor.pos_embed",
    "patch": "preprocessor.patchifier.proj",
    "patch_norm": "preprocessor.patchifier.norm",
    "norm1": "trunk.blocks.{i}.norm_1",
    "qkv": "trunk.blocks.{i}.attn.qkv",
    "out": "trunk.blocks.{i}.attn.proj",
    "norm2": "trunk.blocks.{i}.norm_2",
    "gate": "trunk.blocks.{i}.mlp.fc1",
    "up": "trunk.blocks.{i}.mlp.fc3",
    "down": "trunk.blocks.{i}.mlp.fc2",
    "norm": "trunk.post_trunk_norm",
}


def _old_and_new(old: str, new: str) -> str:
    """A name in a block before transformers 5, and from then on."""
    return f"encoder.layer.{{i}}.{old}|layers.{{i}}.{new}|encoder.layer.{{i}}.{new}"


_HF_VIT: roles.Names = {
    "cls": "embeddings.cls_token",
    "mask": "embeddings.mask_token",
    "positions": "embeddings.position_embeddings",
    "patch": "embeddings.patch_embeddings.projection",
    "norm1": _old_and_new("layernorm_before", "layernorm_before"),
    "q": _old_and_new("attention.attention.query", "attention.q_proj"),
    "k": _old_and_new("attention.attention.key", "attention.k_proj"),
    "v": _old_and_new("attention.attention.value", "attention.v_proj"),
    "out": _old_and_new("attention.output.dense", "attention.o_proj"),
    "norm2": _old_and_new("layernorm_after", "layernorm_after"),
    "up": _old_and_new("intermediate.dense", "mlp.fc1"),
    "down": _old_and_new("output.dense", "mlp.fc2"),
    "norm": "layernorm",
    # A dense layer and tanh on the class token, which is what pre_logits is.
    "pre_logits": "pooler.dense",
    "head": "/classifier",
}
_RELATIVE = "relative_position_bias.relative_position_bias_table"
_HF_BEIT = {
    **_HF_VIT,
    "relative": _old_and_new(f"attention.attention.{_RELATIVE}", _RELATIVE),
    "scale1": _old_and_new("lambda_1", "lambda_1"),
    "scale2": _old_and_new("lambda_2", "lambda_2"),
    "fc_norm": "pooler.layernorm",
}
_HF_DINOV2 = {
    **{k: v for k, v in _HF_VIT.items() if k != "pre_logits"},
    "registers": "embeddings.register_tokens",
    "norm1": "encoder.layer.{i}.norm1",
    "scale1": "encoder.layer.{i}.layer_scale1.lambda1",
    "norm2": "encoder.layer.{i}.norm2",
    "gate": "encoder.layer.{i}.mlp.gate_proj",
    "up": "encoder.layer.{i}.mlp.fc1|encoder.layer.{i}.mlp.weights_in"
    "|encoder.layer.{i}.mlp.up_proj",
    "down": "encoder.layer.{i}.mlp.fc2|encoder.layer.{i}.mlp.weights_out"
    "|encoder.layer.{i}.mlp.down_proj",
    "scale2": "encoder.layer.{i}.layer_scale2.lambda1",
}
_HF_DINOV3 = {
    "cls": "embeddings.cls_token",
    "mask": "embeddings.mask_token",
    "registers": "embeddings.register_tokens",
    "patch": "embeddings.patch_embeddings",
    "norm1": "layer.{i}.norm1",
    "q": "layer.{i}.attention.q_proj",
    "k": "layer.{i}.attention.k_proj",
    "v": "layer.{i}.attention.v_proj",
    "out": "layer.{i}.attention.o_proj",
    "scale1": "layer.{i}.layer_scale1.lambda1",
    "norm2": "layer.{i}.norm2",
    "gate": "layer.{i}.mlp.gate_proj",
    "up": "layer.{i}.mlp.up_proj",
    "down": "layer.{i}.mlp.down_proj",
    "scale2": "layer.{i}.layer_scale2.lambda1",
    "norm": "norm",
    "head": "/classifier",
}
_HF_SIGLIP = {
    "positions": "embeddings.position_embedding.weight",
    "patch": "embeddings.patch_embedding",
    "norm1": "encoder.layers.{i}.layer_norm1",
    "q": "encoder.layers.{i}.self_attn.q_proj",
    "k": "encoder.layers.{i}.self_attn.k_proj",
    "v": "encoder.layers.{i}.self_attn.v_proj",
    "out": "encoder.layers.{i}.self_attn.out_proj",
    "norm2": "encoder.layers.{i}.layer_norm2",
    "up": "encoder.layers.{i}.mlp.fc1",
    "down": "encoder.layers.{i}.mlp.fc2",
    "norm": "post_layernorm",
    "probe": "head.probe",
    "pool_qkv": "head.attention.in_proj_",
    "pool_out": "head.attention.out_proj",
    "pool_norm": "head.layernorm",
    "pool_up": "head.mlp.fc1",
    "pool_down": "head.mlp.fc2",
    "head": "/classifier",
}
_HF_CLIP = {
    **{k: v for k, v in _HF_SIGLIP.items() if not k.startswith(("pool", "probe"))},
    "cls": "embeddings.class_embedding",
    "norm_pre": "pre_layrnorm",  # sic
    "head": "/visual_projection|/classifier",
}
_HF_AIMV2 = {
    "positions": "embeddings.position_embedding.weight",
    "patch": "embeddings.patch_embed",
    "patch_norm": "embeddings.rms_norm",
    "norm1": "encoder.layers.{i}.rms_norm1",
    "q": "encoder.layers.{i}.attention.q_proj",
    "k": "encoder.layers.{i}.attention.k_proj",
    "v": "encoder.layers.{i}.attention.v_proj",
    "out": "encoder.layers.{i}.attention.out_proj",
    "norm2": "encoder.layers.{i}.rms_norm2",
    "gate": "encoder.layers.{i}.ffn.gate_proj",
    "up": "encoder.layers.{i}.ffn.up_proj",
    "down": "encoder.layers.{i}.ffn.down_proj",
    "norm": "rms_norm",
}
_AIM = {**CLIP, "layer_norm_eps": 1e-5}

# The first row that fits a file is its family.
FAMILIES = (
    # --- Hugging Face: a folder with config.json -----------------------------------------
    Family(
        "dinov2 with registers (Hugging Face)",
        _HF_DINOV2,
        kinds={"mask": "matrix"},
        has=("scale1", "registers"),
        tower="dinov2_with_registers.",
        model={**IMAGENET, **EXACT},
        heads={1536: 24},
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
        _HF_DINOV2,
        kinds={"mask": "matrix"},
        has=("scale1",),
        tower="dinov2.",
        model={**IMAGENET, **EXACT},
        heads={1536: 24},
        hub=Hub(
            ("dinov2",),
            "Dinov2Model",
            "Dinov2ForImageClassification",
            "BitImageProcessor",
        ),
    ),
    Family(
        "dinov3 (Hugging Face)",
        _HF_DINOV3,
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
        _HF_BEIT,
        has=("scale1", "q"),
        tower="beit.",
        model={"gelu": "exact", "layer_norm_eps": 1e-12},
        resize="bilinear",
        hub=Hub(
            ("beit",),
            "BeitModel",
            "BeitForImageClassification",
            "BeitImageProcessor",
        ),
    ),
    Family(
        "deit (Hugging Face)",
        {
            **_HF_VIT,
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
        _HF_VIT,
        has=("q",),
        lacks=("cls",),
        tower="ijepa.",
        model={**IMAGENET, "gelu": "exact", "layer_norm_eps": 1e-6},
        hub=Hub(("ijepa", "vit"), "IJepaModel", "IJepaForImageClassification"),
    ),
    Family(
        "vit or mae (Hugging Face)",
        _HF_VIT,
        has=("q", "norm1"),
        tower="vit.",
        model={"gelu": "exact", "layer_norm_eps": 1e-12},
        hub=Hub(("vit", "vit_mae", "vit_msn"), "ViTModel", "ViTForImageClassification"),
    ),
    Family(
        "clip (Hugging Face)",
        _HF_CLIP,
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
        _HF_SIGLIP,
        has=("positions", "q"),
        kinds={"patch": "flat_conv", "positions": "rows"},
        tower="vision_model.",
        model={"gelu": "tanh", "layer_norm_eps": 1e-6},
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
        _HF_SIGLIP,
        has=("positions", "q"),
        kinds={"positions": "rows"},
        tower="vision_model.",
        model={"gelu": "tanh", "layer_norm_eps": 1e-6},
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
        _HF_AIMV2,
        has=("patch_norm", "gate"),
        kinds={"positions": "rows"},
        tower="vision_model.",
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
        "clip",
        _CLIP_ORIGINAL,
        has=("norm_pre", "norm1"),
        kinds={"cls": "vector", "positions": "rows"},
        model={**CLIP, "gelu": "exact", "layer_norm_eps": 1e-5},
        crop=1.0,
    ),
    Family(
        "aimv2",
        _AIMV2_ORIGINAL,
        has=("patch_norm", "gate"),
        model=_AIM,
        head_width=128,
        crop=1.0,
    ),
    Family(
        "mocov3",
        _TIMM,
        has=("norm1", "cls"),
        tower="module.base_encoder.",
        inside="base_encoder",
        model={**IMAGENET, **EXACT},
        heads={384: 12},
    ),
    Family(
        "dinov3",
        {**_TIMM, "registers": "storage_tokens"},
        has=("registers",),
        model={**IMAGENET, "gelu": "exact", "layer_norm_eps": 1e-5, "rope": "dinov3"},
        heads={1280: 20, 4096: 32},
        crop=1.0,
    ),
    Family(
        "dinov2 with registers",
        {**_TIMM, "registers": "register_tokens"},
        kinds={"mask": "matrix"},
        has=("registers", "scale1", "positions"),
        model={**IMAGENET, **EXACT},
        heads={1536: 24},
        resize="bicubic_antialias",
    ),
    Family(
        "dinov2",
        {**_TIMM, "scale1": "blocks.{i}.ls1.gamma"},
        kinds={"mask": "matrix"},
        has=("mask", "scale1", "positions", "cls"),
        lacks=("relative",),
        model={**IMAGENET, **EXACT},
        heads={1536: 24},
        resize="bicubic_offset",
    ),
    Family(
        "eva02",
        _TIMM,
        has=("q_bias", "gate"),
        lacks=("relative",),
        model={**CLIP, **EXACT, "rope": "eva02", "rope_grid": (16, 16)},
        resize="bicubic_antialias",
        crop=1.0,
    ),
    Family(
        "beit",
        _TIMM,
        has=("relative",),
        model={**EXACT},
        resize="bicubic",
    ),
    Family(
        "deit3",
        {**_TIMM, "scale1": "blocks.{i}.gamma_1"},
        has=("scale1", "positions", "cls"),
        lacks=("registers", "gate"),
        model={**IMAGENET, **EXACT},
        crop=1.0,
    ),
    Family(
        "deit, distilled",
        _TIMM,
        has=("dist",),
        model={**IMAGENET, **EXACT},
    ),
    Family(
        "mae or dino",
        _TIMM,
        has=("norm1", "cls", "qkv", "positions"),
        lacks=("head", "scale1", "registers", "norm_pre", "probe"),
        model={**IMAGENET, **EXACT},
    ),
    Family(
        "timm, parallel blocks",
        _TIMM_PARALLEL,
        has=("up_qkv",),
        model={**EXACT},
        resize="bicubic_antialias",
        timm=True,
    ),
    Family(
        "timm",
        _TIMM,
        has=("norm1",),
        model={**EXACT},
        resize="bicubic_antialias",
        timm=True,
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
