# SPDX-License-Identifier: Apache-2.0
"""ViT-g/14 on JFT-3B ("Scaling Vision Transformers"). Argument: or ViT-G/14.

    python -m vit_jax.main --config=configs/vit_g14.py:ViT-G/14 --workdir=DIR

Give --config.data.path=SHARDS of multi-label images. JFT-3B is not public: no published
number can be expected from other images. The head decays 100 times as much as the body.
Cost: 1M steps of 16,384 images; compile it for a pod with vit_jax.plan. Not run by us.
"""

from vit_jax import recipes
from vit_jax.config import config_dict


def get_config(model="ViT-g/14"):
    return config_dict(recipes.scaling(model))
