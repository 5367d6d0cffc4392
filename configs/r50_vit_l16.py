# SPDX-License-Identifier: Apache-2.0
"""R50+ViT-L/16 pre-training, Table 3. Argument: imagenet21k (default), imagenet or jft.

    python -m vit_jax.main --config=configs/r50_vit_l16.py:imagenet --workdir=DIR

Give --config.data.path=SHARDS for imagenet21k and jft (neither is public in one form).
The paper trains it on jft only (Table 6), which is not public: expect what the images
give. On imagenet21k and imagenet it trains like ViT-L/16 (Appendix B.1).
Cost: 834 exaFLOPs for 7 epochs of jft (half of Table 6's 14). Not run by us.
"""

from vit_jax import recipes

get_config = recipes.table3("R50+ViT-L/16")
