# SPDX-License-Identifier: Apache-2.0
"""A small ViT from scratch on CIFAR-10 as a folder of class folders, sized for two CPU cores.

    python -m vit_jax.main --config=configs/cifar10.py --config.data.path=DIR --workdir=RUN

DIR holds train/CLASS/*.jpg and test/CLASS/*.jpg. Scales up by overrides alone, such as
--config.model.name=ViT-S/4 --config.model.patch=4 --config.steps=50000.
"""

from vit_jax.config import CheckpointConfig as Checkpoint
from vit_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig
from vit_jax.config import config_dict


def get_config():
    sizes = ModelConfig(name="", width=96, depth=4, mlp_dim=192, heads=3, patch=4, head="gap")
    crop = ({"op": "inception_crop", "area": (0.5, 1.0)}, {"op": "flip"})
    images = DataConfig("folder", image_size=32, train_transforms=crop)
    adam = OptimConfig("adam", learning_rate=1e-3, warmup=150, weight_decay=0.1, clip=1.0)
    evals = EvalConfig(every=500, batch=500)
    return config_dict(
        Config(sizes, images, adam, evals, Checkpoint(every=500), steps=2000, batch=128)
    )
