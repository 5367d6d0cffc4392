# SPDX-License-Identifier: Apache-2.0
"""R50+ViT-B/16 pre-training, Table 3. Argument: imagenet21k (default), imagenet or jft.

    python -m vit_jax.main --config=configs/r50_vit_b16.py:imagenet --workdir=DIR

Give --config.data.path=SHARDS for imagenet21k and jft (neither is public in one form).
Expected: imagenet21k, then 85.08 ImageNet and 98.94 CIFAR-10 at 384 with dropout 0.1
(README of the official code). The paper's own numbers are all from jft.
Cost: 165 exaFLOPs on imagenet21k (90 epochs, 21.5 GMAC per image). Not run by us.
"""

from vit_jax import recipes

get_config = recipes.table3("R50+ViT-B/16")
