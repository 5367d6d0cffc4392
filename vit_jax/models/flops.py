# SPDX-License-Identifier: Apache-2.0
"""Multiplications of a forward pass, counted as the paper counts them (section D.5), and
those of any traced function."""

import math
from typing import Any

from jax.extend import core

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
    everything twice but S times its row and column only for axial attention; the convolutions of a ResNet stem or baseline, and the head. Norms, rotations and
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
    halves, keys = (2, rows + columns) if cfg.axial else (1, s)
    layer = halves * (4 * s * d * d + dense * s * d * m) + 2 * s * keys * d
    blocks = cfg.depth * layer
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


def largest_activation(cfg: ModelConfig, image_size: tuple[int, int]) -> int:
    """How many numbers the largest array between two layers holds, per image: the hidden
    layer of the MLP, the attention weights, or the first stage of a ResNet."""
    cfg = resolve(cfg)
    stage = 16 * cfg.resnet_width * math.prod(image_size) if has_stem(cfg) else 0
    if is_resnet(cfg):
        return stage
    tokens = math.prod(token_grid(cfg, image_size)) + prefix_tokens(cfg)
    return max(stage, tokens * max(cfg.mlp_dim, cfg.heads * tokens))


def traced_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products and convolutions of a traced function; where it
    chooses between branches, of the largest.

    Unlike XLA's own count it knows how often ``scan`` and the grid of a kernel repeat.
    """
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            shape = e.invars[0].aval.shape
            terms = math.prod(shape[i] for i in contracted)
            total += 2 * math.prod(e.outvars[0].aval.shape) * terms
        elif e.primitive.name == "conv_general_dilated":
            kernel = e.invars[1].aval.shape
            outputs = kernel[e.params["dimension_numbers"].rhs_spec[0]]
            terms = math.prod(kernel) // outputs
            total += 2 * math.prod(e.outvars[0].aval.shape) * terms
        else:
            inner = [traced_flops(j) for j in core.jaxprs_in_params(e.params)]
            repeats = e.params.get("length", 1)
            if "grid_mapping" in e.params:  # a kernel
                repeats = math.prod(e.params["grid_mapping"].grid)
            if "manual_axes" in e.params:  # what one device of a mesh does
                sizes = e.params["mesh"].shape
                repeats = math.prod(sizes[axis] for axis in e.params["manual_axes"])
            one = max(inner, default=0) if "branches" in e.params else sum(inner)
            total += repeats * one
    return total
