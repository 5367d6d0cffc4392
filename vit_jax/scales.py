# SPDX-License-Identifier: Apache-2.0
"""What a study is made of, and what it costs: its configs at three scales.

At ``paper`` they are those of ``recipes``. ``small`` (one GPU) and ``tiny`` (one CPU
core) keep the comparison and replace what is large: CIFAR-10 stands for ImageNet and,
at small, for JFT, in whose place MNIST is at tiny, because it is learned in seconds;
MNIST also stands for the data sets of transfer, and ``STAND_INS`` for the models.
"""

import dataclasses
import os
from typing import Any, Literal, NamedTuple

from vit_jax import demos, recipes
from vit_jax.config import Config, replace


class Row(NamedTuple):
    """One line of a table: a run for each seed."""

    cfg: Config
    # The row whose checkpoint of the same seed this one starts from; "": none.
    after: str = ""
    # Its line and its place on the horizontal axis, where the figure has lines.
    line: str = ""
    x: float = 0.0
    paper: str = ""  # the paper's number, as it is printed there
    shown: bool = True  # False: only trained for the rows after it
    # What is done: train; train and look at the attention; measure the features of a
    # checkpoint; time inference without training.
    measure: Literal["train", "distance", "features", "speed"] = "train"


# The horizontal axis on which a row's own config gives its place.
COMPUTE = "training compute (FLOPs)"


class Claim(NamedTuple):
    """What the paper says of two groups of rows: the mean of the first is higher, or
    (``equal``) they are about the same."""

    text: str
    higher: tuple[str, ...]
    lower: tuple[str, ...]  # (): 0
    metric: str = ""  # "": that of the study
    equal: bool = False


class Study(NamedTuple):
    """Rows, the number that they are compared by, and how it is drawn."""

    title: str
    metric: str
    figure: Literal["bars", "lines", "curves", "distance"]
    rows: dict[str, Row]
    claims: tuple[Claim, ...] = ()
    x: str = ""  # what the horizontal axis of "lines" shows


# Sizes that stand for the paper's models: width, depth, MLP, heads, patch, and the units
# of the ResNet. Images have 16 pixels at tiny and 32 at small.
STAND_INS: dict[str, dict[str, tuple[int, int, int, int, int, tuple[int, ...]]]] = {
    "tiny": {
        "ViT-b/32": (32, 4, 64, 2, 4, ()),
        "ViT-B/32": (64, 4, 128, 4, 4, ()),
        "ViT-B/16": (64, 4, 128, 4, 4, ()),
        "ViT-L/32": (96, 6, 192, 4, 4, ()),
        "ViT-L/16": (96, 6, 192, 4, 4, ()),
        "R50+ViT-B/32": (64, 4, 128, 4, 1, (1,)),
        "R50+ViT-L/16": (96, 6, 192, 4, 1, (1,)),
        "R50x1": (0, 0, 0, 0, 1, (1,)),
        "R152x2": (0, 0, 0, 0, 1, (1, 1)),
    },
    "small": {
        "ViT-b/32": (64, 6, 128, 2, 4, ()),
        "ViT-B/32": (128, 6, 256, 4, 4, ()),
        "ViT-B/16": (128, 6, 256, 4, 4, ()),
        "ViT-L/32": (256, 8, 512, 8, 4, ()),
        "ViT-L/16": (256, 8, 512, 8, 4, ()),
        "R50+ViT-B/32": (128, 6, 256, 4, 1, (1,)),
        "R50+ViT-L/16": (256, 8, 512, 8, 1, (1,)),
        "R50x1": (0, 0, 0, 0, 1, (1, 1)),
        "R152x2": (0, 0, 0, 0, 1, (2, 2, 2)),
    },
}  # fmt: skip
IMAGE_SIZE = {"tiny": 16, "small": 32}
# Of a run of pre-training: steps, images per step, and images to choose from.
BUDGET = {"tiny": (600, 32, 4_000), "small": (4_000, 128, 0)}
# Of one of fine-tuning.
FINETUNING = {"tiny": (120, 32, 1_000), "small": (500, 128, 1_000)}
FEWSHOT = {"type": "fewshot", "datasets": ("imagenet",), "shots": (5,)}
CLASSES = {"imagenet": 1000, "cifar10": 10, "cifar100": 100}


# What the studies vary: training images, shapes around a base, pixels at fine-tuning, and
# models and pixels of inference.
SUBSETS = {
    "tiny": (500, 2_000, 8_000),
    "small": (1_000, 5_000, 50_000),
    "paper": (9_000_000, 30_000_000, 90_000_000, 303_000_000),
}
SHAPES = {
    "tiny": (
        {"depth": 4, "width": 32, "mlp_dim": 64, "heads": 4, "patch": 4},
        {"depth": (2, 8), "width": (16, 64), "mlp_dim": (32, 128), "patch": (8, 2)},
    ),
    "small": (
        {"depth": 4, "width": 128, "mlp_dim": 256, "heads": 4, "patch": 8},
        {"depth": (2, 8, 16), "width": (64, 256), "mlp_dim": (128, 512), "patch": (16, 4)},
    ),
    "paper": (
        {"depth": 8, "width": 1024, "mlp_dim": 2048, "heads": 16, "patch": 32},
        {
            "depth": (2, 4, 16, 32, 64), "width": (256, 512, 2048),
            "mlp_dim": (512, 1024, 4096, 8192), "patch": (64, 16, 8),
        },
    ),
}  # fmt: skip
RESOLUTIONS = {"tiny": (16, 24, 32), "small": (32, 48, 64), "paper": (224, 384, 512)}
FIGURE12 = {
    "tiny": (("R50x1", "ViT-b/32", "ViT-B/32", "ViT-L/32"), (16, 32, 64)),
    "small": (("R50x1", "R152x2", "ViT-B/32", "ViT-L/32"), (32, 64, 128)),
    "paper": (
        ("R50x1", "R50x2", "R152x4", "ViT-B/32", "ViT-L/32", "ViT-B/16", "ViT-L/16", "ViT-H/14"),
        (64, 128, 224, 384, 512),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """Builds the configs of one scale.

    Args:
      name: "tiny", "small" or "paper".
      root: folder of the data; "": what needs none.
      checkpoint: pre-trained model of the study "transfer"; "": without its rows.
    """

    name: str
    root: str = ""
    checkpoint: str = ""

    @property
    def paper(self) -> bool:
        return self.name == "paper"

    @property
    def metric(self) -> str:
        """Of pre-trained models: the paper's is 5-shot ImageNet."""
        return "fewshot/imagenet/5shot" if self.paper else "test/accuracy"

    def subset(self, count: int) -> float:
        """As many images as there are, at most."""
        digits = self.name == "tiny" and not self.root
        return float(min(count, 1_400) if digits else count)

    def images(self, name: str) -> dict[str, Any]:
        """Fields of DataConfig of a set, "cifar10", "mnist" or "digits", and how its
        images are augmented."""
        place: dict[str, Any]
        flip = ({"op": "flip"},) if name == "cifar10" else ()
        crop = {"op": "inception_crop", "area": (0.5, 1.0)}
        if name == "digits" or (not self.root and self.name == "tiny"):
            place = {"source": "digits", "path": "", "holdout": 0.0}
            flip = ()
        elif self.root:
            place = {"source": "folder", "path": os.path.join(self.root, name)}
            if self.name == "tiny":  # 2,000 images of the training set, not 10,000
                place |= {"holdout": 0.04}
        else:
            place = {"source": "tfds", "name": name}
        return {**place, "train_transforms": (crop, *flip)}

    def model(self, name: str) -> dict[str, Any]:
        width, depth, mlp, heads, patch, resnet = STAND_INS[self.name][name]
        return {
            "width": width, "depth": depth, "mlp_dim": mlp, "heads": heads,
            "patch": patch, "resnet": resnet, "layers": "scan" if depth else "loop",
        }  # fmt: skip

    def pretrain(
        self, model: str = "ViT-B/16", images: str = "jft", **changes: Any
    ) -> Config:
        """Pre-training, evaluated a few times."""
        if self.paper:
            cfg = recipes.pretrain(model, images)
            large = "L/" in model or "H/" in model or "R152x2" in model
            shards = self.root and cfg.data.source == "records"
            cfg = replace(
                cfg,
                data__path=os.path.join(self.root, images) if shards else self.root,
                eval__evaluators=(FEWSHOT,),
                eval__every=cfg.steps // 7,
                **({"sharding": "zero", "model__remat": "full"} if large else {}),
            )
            return replace(cfg, **changes)
        steps, batch, subset = BUDGET[self.name]
        place = "mnist" if (self.name, images) == ("tiny", "jft") else "cifar10"
        cfg = demos.small(
            **{f"model__{k}": v for k, v in self.model(model).items()},
            **{f"data__{k}": v for k, v in self.images(place).items()},
            data__image_size=IMAGE_SIZE[self.name],
            data__subset=self.subset(subset),
            optim__learning_rate=2e-3,
            steps=steps,
            batch=batch,
            eval__every=0,
            checkpoint__every=0,
        )
        return replace(cfg, **changes)

    def masked(self, target: str) -> Config:
        """Pre-training by masked patch prediction (B.1.2), without labels."""
        if self.paper:
            cfg = recipes.masked_patch("imagenet")
            return replace(cfg, masked_target=target, data__path=self.root)
        return self.pretrain(
            images="imagenet",
            loss="masked_patch",
            model__head="masked_patch",
            masked_target=target,
            eval__evaluators=(),
        )

    def finetune(
        self, target: str = "imagenet", model: str = "ViT-B/16", **changes: Any
    ) -> Config:
        """Fine-tuning on ``target``: ImageNet itself, of which CIFAR-10 takes the place
        here as well, or another set, in whose place MNIST is; 1,000 of their images."""
        if self.paper:
            cfg = recipes.finetune(target, model)
            changes = {
                "model__num_classes": CLASSES[target], "data__path": self.root, **changes,
            }  # fmt: skip
            return replace(cfg, **changes)
        steps, batch, subset = FINETUNING[self.name]
        images = self.images("cifar10" if target == "imagenet" else "mnist")
        cfg = self.pretrain(
            model,
            **{f"data__{k}": v for k, v in images.items()},
            data__subset=self.subset(subset),
            optim__learning_rate=1e-3,
            optim__warmup=0.1,
            optim__weight_decay=0.0,
            steps=steps,
            batch=batch,
        )
        return replace(cfg, **changes)
