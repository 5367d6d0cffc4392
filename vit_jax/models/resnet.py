# SPDX-License-Identifier: Apache-2.0
"""ResNets with weight standardisation and GroupNorm: stems of hybrids, and baselines.

The version 1 network of the official code (activation after the addition, stride on
the 3 x 3 convolution), which is not the pre-activation network that BiT released. All
padding is SAME as XLA means it: 3 x 3 with stride 2 pads an even size by 0 before and 1
after it.
"""

from functools import partial

import flax.linen as nn
import jax

from vit_jax.config import ModelConfig
from vit_jax.models import heads
from vit_jax.models.images import standardize


class ResNet(nn.Module):
    """Baseline: images (B, H, W, C) in [-1, 1] -> logits (B, K) in float32."""

    cfg: ModelConfig

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        return self.forward(images, train=train)[0]

    @nn.compact
    def forward(
        self, images: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits, and {"tokens": (B, S, D) last feature map, "pre_logits": (B, D)}."""
        del train  # nothing differs
        x = features(self.cfg, standardize(self.cfg, images))
        tokens = jax.lax.collapse(x, 1, 3)
        logits, y = heads.classify(self.cfg, tokens.mean(axis=1))
        return logits, {"tokens": tokens, "pre_logits": y}


def features(cfg: ModelConfig, images: jax.Array) -> jax.Array:
    """Feature map (B, H/s, W/s, D); s is 4, 4, 8, 16 or 32 after 0 to 4 stages.

    Called in the scope of the model, as the parameter names of the released files want.
    """
    width = 64 * cfg.resnet_width
    x = StdConv(width, 7, stride=2, dtype=cfg.dtype, name="conv_root")(images)
    x = nn.relu(nn.GroupNorm(32, dtype=cfg.dtype, name="gn_root")(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for i, units in enumerate(cfg.resnet):
        stride = 2 if i else 1
        x = Stage(cfg, units, width * 2**i, stride, name=f"block{i + 1}")(x)
    return x


class Stage(nn.Module):
    """``units`` residual units; the first has the stride."""

    cfg: ModelConfig
    units: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        Unit = nn.remat(ResidualUnit) if self.cfg.remat != "none" else ResidualUnit
        for j in range(self.units):
            stride = self.stride if j == 0 else 1
            x = Unit(self.features, stride, self.cfg.dtype, name=f"unit{j + 1}")(x)
        return x


class ResidualUnit(nn.Module):
    """Bottleneck: 1 x 1, 3 x 3 (with the stride), 1 x 1 to four times the features."""

    features: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(StdConv, dtype=self.dtype)
        norm = partial(nn.GroupNorm, 32, dtype=self.dtype)
        features = 4 * self.features
        y = nn.relu(norm(name="gn1")(conv(self.features, 1, name="conv1")(x)))
        y = conv(self.features, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(name="gn2")(y))
        y = conv(features, 1, name="conv3")(y)
        # Scale 0: a new unit starts as the identity.
        y = norm(name="gn3", scale_init=nn.initializers.zeros)(y)
        if x.shape[-1] != features or self.stride != 1:
            x = conv(features, 1, self.stride, name="conv_proj")(x)
            x = norm(name="gn_proj")(x)
        return nn.relu(x + y)


class StdConv(nn.Module):
    """Weight-standardised convolution: per output channel mean 0, deviation 1.

    The stored kernel is the raw one.
    """

    features: int
    size: int
    stride: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        w = self.param("kernel", nn.initializers.lecun_normal(), shape)
        w = w - w.mean(axis=(0, 1, 2), keepdims=True)
        w = w / (w.std(axis=(0, 1, 2), keepdims=True) + 1e-5)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            w.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
