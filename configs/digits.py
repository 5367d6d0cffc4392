"""The demo: a small ViT on the 1,797 scanned digits that ship with scikit-learn."""

from vit_jax.config import (
    CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, config_dict,
)


def get_config():
    return config_dict(
        Config(
            model=ModelConfig(name="", width=96, depth=6, mlp_dim=192, heads=4, patch=4),
            data=DataConfig(source="digits", image_size=24),
            optim=OptimConfig(learning_rate=1e-3, warmup=100, weight_decay=0.1, clip=1.0),
            eval=EvalConfig(every=200),
            checkpoint=CheckpointConfig(every=200),
            steps=1000, batch=64, log_every=20,
        )
    )
