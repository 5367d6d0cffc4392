# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning what small_pretrain.py trained. Argument: mnist (default; 1,000 images,
200 steps) or cifar10 (all images, 400 steps at 48 pixels instead of 32).

    python -m vit_jax.main --config=configs/small_finetune.py --workdir=DIR2 \
        --config.data.path=mnist/ --config.pretrained=DIR

Without --config.pretrained: from scratch, at equal steps. Measured: mnist 0.447 from
scratch, 0.633 from supervised and 0.690 from masked pre-training, 2 CPU minutes
each; cifar10 0.571 (8 CPU minutes), 0.528 with --config.data.image_size=32.
"""

from vit_jax import demos
from vit_jax.config import choose, config_dict

CROP = ({"op": "inception_crop", "area": (0.5, 1.0)},)  # digits are not flipped
TASKS = {
    "mnist": {"steps": 200, "data__subset": 1_000.0, "data__train_transforms": CROP},
    "cifar10": {"steps": 400, "data__image_size": 48, "optim__learning_rate": 3e-4},
}


def get_config(task="mnist"):
    changes = choose("task", task, TASKS)
    return config_dict(demos.small(**changes, batch=64, optim__warmup=20))
