# SPDX-License-Identifier: Apache-2.0
"""The smallest run that exercises everything: a config file, and the same as an object
for tests."""

from vit_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    config_dict,
)  # fmt: skip

TINY = Config(
    model=ModelConfig(name="", width=16, depth=1, mlp_dim=32, heads=2, patch=4),
    data=DataConfig(source="synthetic", image_size=16, num_classes=5),
    optim=OptimConfig(
        learning_rate=1e-3, schedule="constant", warmup=2, weight_decay=0.1, clip=1.0
    ),
    eval=EvalConfig(every=10),
    checkpoint=CheckpointConfig(every=10),
    steps=20,
    batch=16,
    log_every=5,
)


def get_config():
    return config_dict(TINY)
