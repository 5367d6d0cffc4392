# SPDX-License-Identifier: Apache-2.0
"""Masked patch prediction (Section 4.6), B/16. Argument: imagenet (default) or jft.

    python -m vit_jax.main --config=configs/masked_patch.py --workdir=DIR
    python -m vit_jax.main --config=configs/finetune.py:imagenet --workdir=DIR2 \
        --config.pretrained=DIR

imagenet: 100k steps, after which gains flatten. jft: the paper's 1M steps. The paper
reports about 2 % above from scratch and 4 % below supervised pre-training on ImageNet,
and similar gains from both sets. Other targets: --config.masked_target=downsampled or
pixels. Cost: 43 exaFLOPs for 100k steps. Not run by us at this size.
"""

from vit_jax import recipes
from vit_jax.config import config_dict


def get_config(dataset="imagenet"):
    return config_dict(recipes.masked_patch(dataset))
