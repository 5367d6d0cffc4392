# SPDX-License-Identifier: Apache-2.0
"""What each code base calls the roles of ``roles.py``: one table per way of naming.

Alternatives are divided by "|", the first is written; a name that begins with "/" stands
outside the tower, as the classifier of ``vit.*`` does.
"""

from vit_jax.weights.roles import Names

TIMM: Names = {
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
    "relative": "blocks.{i}.attn.relative_position_bias_table"
    "|rel_pos_bias.relative_position_bias_table",
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
TIMM_PARALLEL = {
    **{role: TIMM[role] for role in ("cls", "registers", "positions")},
    **{role: TIMM[role] for role in ("patch", "norm_pre", "norm")},
    "norm1": "blocks.{i}.in_norm",
    "up_qkv": "blocks.{i}.in_proj",
    "up_bias": "blocks.{i}.mlp_bias",
    "q_norm": "blocks.{i}.q_norm",
    "k_norm": "blocks.{i}.k_norm",
    "out": "blocks.{i}.attn_out_proj",
    "down": "blocks.{i}.mlp_out_proj",
    "scale": "blocks.{i}.ls.gamma",
    "fc_norm": "fc_norm",
    "head": "head",
}
CLIP_ORIGINAL = {
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
AIMV2_ORIGINAL = {
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
    "probe": "head.cls_token",
    "pool_k": "head.k",
    "pool_v": "head.v",
    "pool_out": "head.linear",
}


def _old_and_new(old: str, new: str) -> str:
    """A name in a block before transformers 5, and from then on; MSN's classifier has
    its blocks outside the tower."""
    first = f"encoder.layer.{{i}}.{old}"
    return f"{first}|layers.{{i}}.{new}|encoder.layer.{{i}}.{new}|/{first}"


HF_VIT: Names = {
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
HF_BEIT = {
    **HF_VIT,
    "relative": _old_and_new(f"attention.attention.{_RELATIVE}", _RELATIVE)
    + f"|encoder.{_RELATIVE}|{_RELATIVE}",
    "scale1": _old_and_new("lambda_1", "lambda_1"),
    "scale2": _old_and_new("lambda_2", "lambda_2"),
    "norm": "layernorm|/layernorm",
    "fc_norm": "pooler.layernorm",
}
HF_DINOV2 = {
    **{k: v for k, v in HF_VIT.items() if k != "pre_logits"},
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
HF_DINOV3 = {
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
HF_SIGLIP = {
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
HF_CLIP = {
    **{k: v for k, v in HF_SIGLIP.items() if not k.startswith(("pool", "probe"))},
    "cls": "embeddings.class_embedding",
    "norm_pre": "pre_layrnorm",  # sic
    "head": "/visual_projection|/classifier",
}
HF_AIMV2 = {
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
    "probe": "head.cls_token",
    "pool_k": "head.k_proj",
    "pool_v": "head.v_proj",
    "pool_out": "head.output_proj",
    "head": "/visual_projection",
}
