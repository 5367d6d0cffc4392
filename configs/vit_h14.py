# SPDX-License-Identifier: Apache-2.0
"""ViT-H/14 pre-training. Argument: jft (default, Table 3), imagenet21k or imagenet.

    python -m vit_jax.main --config=configs/vit_h14.py --workdir=DIR

Give --config.data.path=SHARDS. JFT is not public: on other images expect other numbers.
imagenet21k (trained like L: Table 3 has no row) 49.06 % on its own validation set
(issue 62 of the official code), then 85.13 ImageNet at 384 (Table 5).
Cost: 4,258 exaFLOPs on jft (14 epochs; 2.5k TPU v3 core-days, Table 2), 428 on
imagenet21k (30 epochs). Not run by us. Parameters and Adam take 7.6 GB: sharded.
"""

from vit_jax import recipes
from vit_jax.config import config_dict, replace


def get_config(dataset="jft"):
    cfg = recipes.pretrain("ViT-H/14", dataset)
    return config_dict(replace(cfg, sharding="fsdp", model__remat="full"))
