# SPDX-License-Identifier: Apache-2.0
"""ViT-L/16 pre-training, Table 3. Argument: imagenet21k (default), imagenet or jft.

    python -m vit_jax.main --config=configs/vit_l16.py:imagenet --workdir=DIR

Give --config.data.path=SHARDS for imagenet21k and jft (neither is public in one form).
Expected: imagenet21k 49.90 % on its own validation set after 90 epochs (issue 62 of the
official code), then 85.15 ImageNet at 384 (Table 5); imagenet 72.59, then 76.53 at 384.
Cost: 157 exaFLOPs on imagenet21k (30 epochs; Section 4.2: about 30 days on 8 cores of
TPU v3), 142 on imagenet (300). Not run by us.
"""

from vit_jax import recipes

get_config = recipes.table3("ViT-L/16")
