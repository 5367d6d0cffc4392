# SPDX-License-Identifier: Apache-2.0
"""A small ViT from scratch on CIFAR-10 as class folders, sized for two CPU cores.

    python -m vit_jax.main --config=configs/cifar10.py --config.data.path=cifar10/ \
        --workdir=RUN

cifar10/ holds train/CLASS/*.jpg and test/CLASS/*.jpg. Measured: test accuracy 0.488 at
step 1,000, 0.539 at 1,500 (18 CPU minutes), 0.551 at 2,000 (5 epochs, 23 minutes). Scales
up by overrides alone: --config.model.width=384 --config.model.depth=12
--config.model.mlp_dim=1536 --config.model.heads=6 --config.steps=50000.
"""

from vit_jax import demos
from vit_jax.config import config_dict


def get_config():
    return config_dict(demos.small())
