# SPDX-License-Identifier: Apache-2.0
"""A small hybrid from scratch on CIFAR-10 as class folders, sized for a CPU. Argument:
short (default) or long.

    python -m vit_jax.main --config=configs/cifar10.py --config.data.path=cifar10/ \
        --workdir=RUN

cifar10/ holds train/CLASS/*.jpg and test/CLASS/*.jpg. Cost: 1,600 steps of 128 images
(4.1 epochs), 62 TFLOPs, 14 CPU minutes; long: 9,600 steps, 74. Measured: test accuracy
0.758 (three seeds), long 0.849 (one seed). The plain ViT of small_pretrain.py has 0.551
after 23. Scales up by overrides alone:
--config.model.width=384 --config.model.depth=12 --config.model.mlp_dim=1536
--config.model.heads=6 --config.steps=50000.
"""

from vit_jax import demos
from vit_jax.config import config_dict


def get_config(length="short"):
    return config_dict(demos.cifar10(length))
