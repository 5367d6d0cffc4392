# SPDX-License-Identifier: Apache-2.0
"""Small runs: the same recipes for two CPU cores and class folders.

Like ``recipes``, only ``configs/`` uses it; the files there say what each run showed.
"""

from typing import Any

from vit_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    choose,
    replace,
)


def digits() -> Config:
    """The demo: scikit-learn's scanned digits, in about a minute.

    Digits are not flipped; they are moved by up to two of 18 pixels.
    """
    shift = ({"op": "resize", "size": 18}, {"op": "random_crop", "size": 16})
    centre = ({"op": "resize", "size": 18}, {"op": "central_crop", "size": 16})
    return Config(
        model=ModelConfig(
            name="", width=64, depth=4, mlp_dim=128, heads=4, patch=4, dropout=0.1
        ),
        data=DataConfig(
            source="digits",
            image_size=16,
            train_transforms=shift,
            eval_transforms=centre,
        ),
        optim=OptimConfig(learning_rate=2e-3, warmup=0.07, weight_decay=0.1, clip=1.0),
        eval=EvalConfig(every=500),
        checkpoint=CheckpointConfig(every=500),
        steps=1_500,
        batch=64,
        label_smoothing=0.1,
    )


def small(**changes: Any) -> Config:
    """A ViT of 0.3M parameters on 32-pixel images in class folders, minutes per run.

    What the ``configs/small_*.py`` have in common; they say what each run showed.
    """
    cfg = Config(
        model=ModelConfig(name="", width=96, depth=4, mlp_dim=192, heads=4, patch=4),
        data=DataConfig(
            source="folder",
            image_size=32,
            train_transforms=(
                {"op": "inception_crop", "area": (0.5, 1.0)},
                {"op": "flip"},
            ),
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup=0.05, weight_decay=0.1, clip=1.0),
        eval=EvalConfig(every=500, batch=500),
        checkpoint=CheckpointConfig(every=500),
        steps=2_000,
        batch=128,
    )
    return replace(cfg, **changes)


def cifar10(length: str) -> Config:
    """A hybrid: one residual stage, then two blocks that are wide enough for a CPU to
    multiply fast, trained with Muon; the rate is constant until it cools down."""
    lengths = {"short": (1_600, 500), "long": (9_600, 2_400)}
    steps, cooldown = choose("length of the CIFAR-10 recipe", length, lengths)
    return small(
        model=ModelConfig(
            name="",
            width=192,
            depth=2,
            mlp_dim=384,
            heads=3,
            patch=1,
            resnet=(1,),
            resnet_width=1,
            head="gap",
            positions="sincos2d",
        ),
        optim=OptimConfig(
            name="muon",
            learning_rate=3e-3,
            schedule="constant",
            warmup=75,
            cooldown=cooldown,
            weight_decay=0.1,
            clip=1.0,
        ),
        steps=steps,
    )


def small_augreg(preset: str) -> Config:
    """``small`` on 2,500 images for 80 epochs, with or without RandAugment and mixup.

    RandAugment moves images by up to 10 pixels per unit of magnitude: it is applied at
    96 pixels, at magnitude 3, so that what is seen at 32 pixels stays recognisable.
    """
    augment = {"op": "randaugment", "n": 2, "m": 3}
    crop = {"op": "inception_crop", "area": (0.3, 1.0), "size": 96}
    ops = {
        "none": (crop, {"op": "flip"}, {"op": "resize"}),
        "augreg": (crop, {"op": "flip"}, augment, {"op": "resize"}),
    }
    return small(
        data__train_transforms=choose("small AugReg preset", preset, ops),
        data__subset=2_500.0,
        mixup=0.2 if preset == "augreg" else 0.0,
        steps=1_600,
    )
