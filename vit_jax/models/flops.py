# SPDX-License-Identifier: Apache-2.0
"""Multiplications of a forward pass, counted as the paper counts them (section D.5)."""

from vit_jax.config import ModelConfig
from vit_jax.models.variants import has_class_token, is_resnet, resolve, token_grid


def macs(cfg: ModelConfig) -> int:
    """Multiply-accumulate operations per image of ``cfg.image_size``.

    N P^2 C D + L (4 S D^2 + 2 S^2 D + 2 S D M) for the Transformer, the convolutions of
    a ResNet stem or baseline, and the head. Norms and activations are left out, as is
    usual. A training step costs 6 FLOPs per MAC and image, inference 2.
    """
    cfg = resolve(cfg)
    rows, columns = token_grid(cfg, cfg.image_size)
    n = rows * columns
    stem, channels = _resnet(cfg) if cfg.resnet_width else (0, cfg.channels)
    if is_resnet(cfg):
        return stem + cfg.width * cfg.num_classes
    d, m = cfg.width, cfg.mlp_dim
    s = n + has_class_token(cfg)
    embedding = n * cfg.patch**2 * channels * d
    blocks = cfg.depth * (4 * s * d * d + 2 * s * s * d + 2 * s * d * m)
    outputs = s if cfg.head in ("none", "masked_patch") else 1
    head = outputs * d * (cfg.num_classes + (d if cfg.pre_logits else 0))
    probe = (
        2 * s * d * d + 2 * d * d + 2 * s * d + 2 * d * m if cfg.head == "map" else 0
    )
    return stem + embedding + blocks + probe + head


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
