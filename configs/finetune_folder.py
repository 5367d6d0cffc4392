# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on your own photos: a folder with one sub-folder per class.

    python -m vit_jax.main --config=configs/finetune_folder.py --workdir=DIR \
        --config.data.path=photos/ --config.pretrained=FILE
    python -m vit_jax.predict DIR some_photo.jpg

The architecture and the size of the images are those of FILE; more pixels:
--config.data.image_size=384. A fifth of the photos is held out for testing unless
photos/ has train/ and test/. Cost (ViT-B/16): 500 steps of 64 images at 224 pixels, minutes on one accelerator.
"""

from vit_jax import recipes
from vit_jax.config import DataConfig, config_dict, replace


def get_config():
    cfg = recipes.finetune("pets", learning_rate=0.01)
    data = DataConfig(source="folder", image_size=0)
    cfg = replace(cfg, data=data, batch=64, optim__warmup=0.2, model__dtype="float32")
    return config_dict(replace(cfg, eval__every=100, checkpoint__every=100))
