# SPDX-License-Identifier: Apache-2.0
"""Pre-training a small ViT on CIFAR-10 as class folders, for two CPU cores. Argument:
supervised (default) or masked (masked patch prediction, no labels).

    python -m vit_jax.main --config=configs/small_pretrain.py:masked --workdir=DIR \
        --config.data.path=cifar10/

Cost: 2,000 steps of 128 images (5 epochs), 51 TFLOPs: 26 CPU minutes. Measured: masked
loss from ln 512 = 6.24 to 1.83 (the entropy of the patches' colours is 4.23); fine-tuned
on MNIST it reaches 0.690 (small_finetune.py). Supervised: test accuracy 0.488 at step
1,000, 0.539 at 1,500, 0.551 at the end (23 minutes).
"""

from vit_jax import demos
from vit_jax.config import choose, config_dict

MASKED = {"loss": "masked_patch", "model__head": "masked_patch", "eval__evaluators": ()}


def get_config(objective="supervised"):
    changes = {"supervised": {}, "masked": MASKED}
    return config_dict(demos.small(**choose("objective", objective, changes)))
