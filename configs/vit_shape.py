# SPDX-License-Identifier: Apache-2.0
"""Base of the shape study (Appendix D.2, Figure 8): 8 layers, D 1024, M 2048, patch 32.

    python -m vit_jax.main --config=configs/vit_shape.py --workdir=DIR \
        --config.model.depth=16

Vary model.depth, width, mlp_dim or patch, or all; the metric is 5-shot ImageNet. Give
--config.data.path=SHARDS: the paper's images (JFT) are not public. Not run by us.
"""

from vit_jax import recipes
from vit_jax.config import config_dict


def get_config():
    return config_dict(recipes.shape())
