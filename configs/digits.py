"""The demo: a small ViT learns the 1,797 scanned digits that ship with scikit-learn."""

from vit_jax.config import CheckpointConfig as Checkpoint
from vit_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig
from vit_jax.config import config_dict


def get_config():
    sizes = ModelConfig(name="", width=64, depth=4, mlp_dim=128, heads=4, patch=4, dropout=0.1)
    shift = ({"op": "resize", "size": 18}, {"op": "random_crop", "size": 16})
    centre = ({"op": "resize", "size": 18}, {"op": "central_crop", "size": 16})
    images = DataConfig("digits", image_size=16, train_transforms=shift, eval_transforms=centre)
    adam = OptimConfig("adam", learning_rate=2e-3, warmup=100, weight_decay=0.1, clip=1.0)
    return config_dict(
        Config(
            sizes, images, adam, EvalConfig(every=500), Checkpoint(every=500),
            steps=1500, batch=64, label_smoothing=0.1, log_every=50,
        )
    )  # fmt: skip
