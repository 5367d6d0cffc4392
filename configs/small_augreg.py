# SPDX-License-Identifier: Apache-2.0
"""The effect of AugReg on 2,500 images of CIFAR-10, 80 epochs. Argument: augreg
(default; RandAugment and mixup) or none.

    python -m vit_jax.main --config=configs/small_augreg.py:none --workdir=DIR \
        --config.data.path=cifar10/

Cost: 1,600 steps of 128 images, 20 CPU minutes. Measured: 0.456 without, @aug@ with.
"""

from vit_jax import recipes
from vit_jax.config import config_dict


def get_config(preset="augreg"):
    return config_dict(recipes.small_augreg(preset))
