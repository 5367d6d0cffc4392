# SPDX-License-Identifier: Apache-2.0
"""ViT-B/32 pre-training, Table 3. Argument: imagenet21k (default), imagenet or jft.

    python -m vit_jax.main --config=configs/vit_b32.py:imagenet --workdir=DIR

Give --config.data.path=SHARDS for imagenet21k and jft (neither is public in one form).
Expected: imagenet21k 44.04 % on its own validation set (issue 62 of the official code),
then 81.28 ImageNet at 384 (Table 5); imagenet 69.19 at 224, then 73.38 at 384.
Cost: 34 exaFLOPs on imagenet21k (90 epochs), 10 on imagenet (300). Not run by us.
"""

from vit_jax import recipes

get_config = recipes.table3("ViT-B/32")
