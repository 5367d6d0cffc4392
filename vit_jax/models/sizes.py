# SPDX-License-Identifier: Apache-2.0
"""The sizes behind the names: Transformers, ResNets, and how a hybrid joins them."""

from typing import NamedTuple


class Size(NamedTuple):
    """One row of Table 1."""

    depth: int
    width: int
    mlp_dim: int
    heads: int


# B, L, H: Table 1. Ti, S: the official code. The rest: big_vision ("Scaling Vision
# Transformers", arXiv 2106.04560, and later). Case only matters between g and G.
SIZES = {
    "mu": Size(1, 32, 128, 2),
    "Ti": Size(12, 192, 768, 3),
    "S": Size(12, 384, 1536, 6),
    "M": Size(12, 512, 2048, 8),
    "B": Size(12, 768, 3072, 12),
    "L": Size(24, 1024, 4096, 16),
    "So400m": Size(27, 1152, 4304, 16),
    "H": Size(32, 1280, 5120, 16),
    "g": Size(40, 1408, 6144, 16),
    "g-opt": Size(40, 1536, 6144, 16),
    "G": Size(48, 1664, 8192, 16),
    "G-opt": Size(48, 1536, 8192, 16),
    "e": Size(56, 1792, 15360, 16),
}

# Residual units per stage of the ResNet baselines, R50x1 and so on.
RESNETS = {
    "R26": (2, 2, 2, 2),
    "R50": (3, 4, 6, 3),
    "R101": (3, 4, 23, 3),
    "R152": (3, 8, 36, 3),
    "R200": (3, 24, 36, 3),
}

# Stems of the hybrids: (residual units per stage, patch on the feature map). The number
# in the name is the total stride (Section 4.1): for 16 the units of stage 4 move into
# stage 3. Except R+X/16, which is of stride 4 * 8 = 32 in spite of its name.
STEMS = {
    ("R", 16): ((), 8),
    ("R26", 32): ((2, 2, 2, 2), 1),
    ("R50", 16): ((3, 4, 9), 1),
    ("R50", 32): ((3, 4, 6, 3), 1),
}
