# SPDX-License-Identifier: Apache-2.0
"""The models of the paper: Vision Transformers, hybrids and ResNet baselines."""

from collections.abc import Callable
from typing import Any

from vit_jax.config import ModelConfig
from vit_jax.models.flops import macs
from vit_jax.models.resnet import ResNet
from vit_jax.models.variants import (
    has_class_token,
    is_resnet,
    resolve,
    token_grid,
    token_stride,
)
from vit_jax.models.vit import ViT

__all__ = [
    "ResNet",
    "ViT",
    "create",
    "has_class_token",
    "is_resnet",
    "macs",
    "resolve",
    "token_grid",
    "token_stride",
]


def create(
    cfg: ModelConfig, on_block_params: Callable[[Any], Any] | None = None
) -> ViT | ResNet:
    """The module that ``cfg`` describes; its ``.cfg`` has every size filled in.

    ``on_block_params`` is applied to the parameters of each encoder block where it
    runs, which is how sharding.py gathers them layer by layer. Initialize without it.

    Raises:
      UserError: unknown name, or sizes that contradict each other.
    """
    cfg = resolve(cfg)
    return ResNet(cfg) if is_resnet(cfg) else ViT(cfg, on_block_params)
