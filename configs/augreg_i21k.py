# SPDX-License-Identifier: Apache-2.0
"""AugReg pre-training on ImageNet-21k, 300 epochs. Argument: model, default ViT-B/16.

    python -m vit_jax.main --config=configs/augreg_i21k.py:ViT-S/16 --workdir=DIR

Give --config.data.path=SHARDS. RandAugment and mixup are big_vision's default for the
model; the study's other settings: recipes.AUGREG.
Expected from the best settings, fine-tuned on ImageNet at 384: B/16 85.49, L/16 85.59,
S/16 83.73, Ti/16 78.22 (README of the official code).
Cost: 449 exaFLOPs (B/16). Not run by us.
"""

from vit_jax import recipes
from vit_jax.config import config_dict


def get_config(model="ViT-B/16"):
    return config_dict(recipes.augreg(model, "imagenet21k"))
