# SPDX-License-Identifier: Apache-2.0
"""ViT-B/16 pre-training, Table 3. Argument: imagenet21k (default), imagenet or jft.

    python -m vit_jax.main --config=configs/vit_b16.py:imagenet --workdir=DIR

Give --config.data.path=SHARDS for imagenet21k and jft (neither is public in one form).
Expected: imagenet21k 47.88 % on its own validation set after 90 epochs (issue 62 of the
official code), then 83.97 ImageNet at 384 (Table 5); imagenet 74.79, then 77.91 at 384.
Cost: 135 exaFLOPs on imagenet21k, 41 on imagenet (300 epochs). Not run by us.
"""

from vit_jax import recipes

get_config = recipes.table3("ViT-B/16")
