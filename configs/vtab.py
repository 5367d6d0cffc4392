# SPDX-License-Identifier: Apache-2.0
"""One task of VTAB-1k. Argument: its name (default dtd; recipes.VTAB lists the 19).

    for task in caltech101 cifar100 dtd ...; do
        python -m vit_jax.main --config=configs/vtab.py:$task --workdir=DIR/$task \
            --config.pretrained=FILE --config.model.name=ViT-L/16
    done

The score is the mean test accuracy. Expected from L/16 of imagenet21k: 72.72 +- 0.21
(Table 2; per task in Table 9). Not run by us.
"""

from vit_jax import recipes
from vit_jax.config import config_dict


def get_config(task="dtd"):
    return config_dict(recipes.vtab(task))
