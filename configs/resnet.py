# SPDX-License-Identifier: Apache-2.0
"""ResNet (BiT) baselines on JFT, Table 3. Argument: R50x1 (default), R50x2, R101x1,
R152x1 or R152x2.

    python -m vit_jax.main --config=configs/resnet.py:R152x2 --workdir=DIR

Give --config.data.path=SHARDS of multi-label images. JFT is not public, so the numbers
of Table 6 cannot be expected from other images.
Cost: 50 (R50x1) to 563 (R152x2) exaFLOPs for 7 epochs (Table 6). Not run by us.
"""

from vit_jax import recipes
from vit_jax.config import config_dict


def get_config(model="R50x1"):
    return config_dict(recipes.pretrain(model, "jft"))
