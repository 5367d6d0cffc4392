# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning a ViT-B/16, Table 4. Argument: cifar10 (default), cifar100, pets, flowers
or imagenet.

    python -m vit_jax.main --config=configs/finetune.py:pets --workdir=DIR \
        --config.pretrained=FILE
    python -m vit_jax.sweep ... the same: the grid of learning rates, then three seeds

Another model: --config.model.name=ViT-L/16 --config.model.dropout=0.1.
Expected from the released imagenet21k B/16: 99.02 CIFAR-10 and 92.06 CIFAR-100 (2.2 h
each on A100), 84.53 ImageNet (6.5 h; README of the official code); 99.38 Flowers and
94.43 Pets (Table 5). Not run by us.
"""

from vit_jax import recipes
from vit_jax.config import config_dict


def get_config(dataset="cifar10"):
    return config_dict(recipes.finetune(dataset))
