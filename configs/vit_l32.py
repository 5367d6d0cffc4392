# SPDX-License-Identifier: Apache-2.0
"""ViT-L/32 pre-training, Table 3. Argument: imagenet21k (default), imagenet or jft.

    python -m vit_jax.main --config=configs/vit_l32.py:imagenet --workdir=DIR

Give --config.data.path=SHARDS for imagenet21k and jft (neither is public in one form).
Expected: imagenet21k 45.42 % on its own validation set after 90 epochs (issue 62 of the
official code), then 80.99 ImageNet at 384 (Table 5); imagenet 66.90, then 71.16 at 384.
Cost: 39 exaFLOPs on imagenet21k (30 epochs), 36 on imagenet (300). Not run by us.
"""

from vit_jax import recipes

get_config = recipes.table3("ViT-L/32")
