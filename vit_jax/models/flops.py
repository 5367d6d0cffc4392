# SPDX-License-Identifier: Apache-2.0
"""Multiplications of a forward pass, counted as the paper counts them (section D.5)."""

from vit_jax.config import ModelConfig
from vit_jax.models.variants import (
    has_stem,
    is_resnet,
    prefix_tokens,
    resolve,
    token_grid,
)


def macs(cfg: ModelConfig) -> int:
    """Multiply-accumulate operations per image of ``cfg.image_size``.

    N P^2 C D + L (4 S D^2 + 2 S^2 D + 2 S D M) for the Transformer, 3 S D M with a gate,
    the convolutions of a ResNet stem or baseline, and the head. Norms, rotations and
    activations are left out, as is usual. A training step costs 6 FLOPs per MAC and
    image, inference 2.
    """
    cfg = resolve(cfg)
    rows, columns = token_grid(cfg, cfg.image_size)
    n = rows * columns
    stem, channels = _resnet(cfg) if has_stem(cfg) else (0, cfg.channels)
    if is_resnet(cfg):
        return stem + cfg.width * cfg.num_classes
    d, m = cfg.width, cfg.mlp_dim
    s = n + prefix_tokens(cfg)
    embedding = n * cfg.patch**2 * channels * d
    dense = 2 if cfg.mlp == "gelu" else 3
    blocks = cfg.depth * (4 * s * d * d + 2 * s * s * d + dense * s * d * m)
    return stem + embedding + blocks + _head(cfg, n, s)


def _head(cfg: ModelConfig, n: int, s: int) -> int:
    """MACs of what reads the s tokens, of which n are patches."""
    d, m = cfg.width, cfg.map_mlp_dim or cfg.mlp_dim
    outputs = {"none": s, "masked_patch": n}.get(cfg.head, 1)
    features = 2 * d if cfg.head == "token_gap" else d
    classes = cfg.num_classes * (2 if cfg.distillation == "head" else 1)
    total = outputs * (features * classes + (d * d if cfg.pre_logits else 0))
    if cfg.head == "map":
        total += 2 * s * d * d + 2 * d * d + 2 * s * d + 2 * d * m
    return total


def _resnet(cfg: ModelConfig) -> tuple[int, int]:
    """MACs of the convolutions of ``resnet.features``, and the channels it returns."""
    height, width = (-(-side // 2) for side in cfg.image_size)
    channels = 64 * cfg.resnet_width
    total = height * width * 7 * 7 * cfg.channels * channels
    height, width = -(-height // 2), -(-width // 2)
    for i, units in enumerate(cfg.resnet):
        mid = 64 * cfg.resnet_width * 2**i
        before = height * width  # the first unit strides in its 3 x 3 convolution
        if i:
            height, width = -(-height // 2), -(-width // 2)
        after = height * width
        for j in range(units):
            total += (after if j else before) * channels * mid
            total += after * (9 * mid * mid + 4 * mid * mid)
            total += after * channels * 4 * mid if j == 0 else 0
            channels = 4 * mid
    return total, channels
