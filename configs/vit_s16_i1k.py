# SPDX-License-Identifier: Apache-2.0
"""ViT-S/16 on ImageNet alone, 90 epochs: the better plain ViT baseline.

    python -m vit_jax.main --config=configs/vit_s16_i1k.py --workdir=DIR

Longer: --config.steps=185794 (150 epochs) or 371588 (300).
Expected: 76.5 % (90 epochs; 6 to 7 h on a TPU v3-8), 78.5 (150), 80.0 (300); 74.7 with
batch 4096, 73.6 without RandAugment and mixup (arXiv 2205.01580). Not run by us.
"""

from vit_jax import recipes
from vit_jax.config import config_dict


def get_config():
    return config_dict(recipes.baseline())
