# SPDX-License-Identifier: Apache-2.0
"""The models of the paper: Vision Transformers, hybrids and ResNet baselines.

Parameters have the names and shapes of the released ``.npz`` files. A switch of
``ModelConfig`` adds its own and leaves the others as they are; a norm is ``scale`` and
``bias``, only ``scale`` where ``norm`` is "rms". R registers, D width, k heads of size
D_h, M hidden size of the MLP, h x w patches, K classes:

==================  ====================================================================
switch              parameters
==================  ====================================================================
class token         ``cls`` (1, 1, D)
distillation        ``dist`` (1, 1, D); "head" also ``head_dist`` like ``head``
registers           ``registers`` (1, R, D)
patch_norm          ``embedding_norm``
norm_pre            ``Transformer/norm_pre``
final_norm          "tokens" ``Transformer/encoder_norm``, "pooled" ``fc_norm``
positions           rows of ``Transformer/posembed_input/pos_embedding`` (1, S', D): class
                    token, distillation token, patches; registers have none
relative_bias       in every ``MultiHeadDotProductAttention_1``:
                    ``posembed_bias/pos_embedding`` ((2h-1)(2w-1) + 3, k), BEiT's order
qk_norm             there: ``query_norm`` and ``key_norm`` (D_h)
attention_norm      there: ``norm`` (k, D_h)
parallel            no ``LayerNorm_2``
axial               every block twice: within it, ``rows`` and ``columns``
mlp "swiglu"        in every ``MlpBlock_3``: ``gate`` (D, M) beside ``Dense_0`` (D, M),
                    the value, and ``Dense_1`` (M, D); "geglu" the same
mlp_norm            there: ``norm`` (M)
head "token_gap"    ``head`` has the kernel (2D, K)
map_heads, ...      shapes within ``MAPHead_0``, whose MLP is always a plain one
==================  ====================================================================

Rotary positions, GELUs, ``image_mean`` and ``image_std`` have no parameters. What a file
may lack is folded when it is loaded: biases are zeros, LayerScale goes into the kernels,
CLIP's projection is a ``head`` with a bias of zeros.
"""

from collections.abc import Callable
from typing import Any

from vit_jax.config import ModelConfig
from vit_jax.models import published
from vit_jax.models.attention import Attend, beyond_attend
from vit_jax.models.flops import largest_activation, macs, traced_flops
from vit_jax.models.resnet import ResNet
from vit_jax.models.variants import (
    has_class_token,
    has_stem,
    is_resnet,
    names,
    prefix_tokens,
    resolve,
    token_grid,
    token_stride,
)
from vit_jax.models.vit import ViT

__all__ = [
    "Attend",
    "ResNet",
    "ViT",
    "beyond_attend",
    "create",
    "has_class_token",
    "has_stem",
    "is_resnet",
    "largest_activation",
    "macs",
    "names",
    "prefix_tokens",
    "published",
    "resolve",
    "token_grid",
    "token_stride",
    "traced_flops",
]


def create(
    cfg: ModelConfig,
    on_block_params: Callable[[Any], Any] | None = None,
    attend: Attend | None = None,
) -> ViT | ResNet:
    """The module that ``cfg`` describes; its ``.cfg`` has every size filled in.

    ``on_block_params`` is applied to the parameters of each encoder block where it
    runs, which is how sharding.py gathers them layer by layer; ``attend`` computes
    attention there, see kernels.py. Initialize without them.

    Raises:
      UserError: unknown name, or sizes that contradict each other.
    """
    cfg = resolve(cfg)
    return ResNet(cfg) if is_resnet(cfg) else ViT(cfg, on_block_params, attend)
