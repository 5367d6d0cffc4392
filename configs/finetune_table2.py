# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on ImageNet as for Table 2: more pixels, averaged weights. Argument:
ViT-L/16 (default, 512 pixels) or ViT-H/14 (518).

    python -m vit_jax.main --config=configs/finetune_table2.py --workdir=DIR \
        --config.pretrained=FILE

Expected from L/16 of imagenet21k: 85.30 +- 0.02 (Table 2). Not run by us.
"""

from vit_jax import recipes
from vit_jax.config import choose, config_dict

SIZES = {"ViT-L/16": 512, "ViT-H/14": 518}


def get_config(model="ViT-L/16"):
    size = choose("model of Table 2", model, SIZES)
    return config_dict(recipes.finetune("imagenet", model, 0.0, size, polyak=0.9999))
