# SPDX-License-Identifier: Apache-2.0
"""The paper's studies as data: which runs each one compares.

A study is a dict of rows; ``python -m vit_jax.study`` runs them, and ``STUDIES`` at the
end lists them all. Section, table and figure numbers are those of arXiv 2010.11929,
where no other paper is named.
"""

from collections.abc import Callable

from vit_jax import recipes
from vit_jax.config import Config, DataConfig, ModelConfig, replace
from vit_jax.scales import (
    COMPUTE,
    FIGURE12,
    RESOLUTIONS,
    SHAPES,
    SUBSETS,
    Claim,
    Row,
    Scale,
    Study,
)  # fmt: skip
from vit_jax.vtab_tasks import TASKS

# 1. Data size: Figure 4 ----------------------------------------------------------------


def data_size(scale: Scale) -> Study:
    """Equal hyper-parameters and steps for every size, as in Figure 4."""
    models = {
        "tiny": ("ViT-B/32", "R50x1"),
        "small": ("ViT-b/32", "ViT-B/32", "R50+ViT-B/32", "R50x1"),
        "paper": ("ViT-b/32", "ViT-B/32", "ViT-L/16", "R50+ViT-B/32", "R50x1", "R152x2"),
    }[scale.name]  # fmt: skip
    sizes = [int(scale.subset(size)) for size in SUBSETS[scale.name]]
    rows = {}
    for model in models:
        for size in sizes:
            if model == "ViT-b/32" and scale.paper:
                cfg = scale.pretrain("ViT-B/32", **HALF_B)
            else:
                cfg = scale.pretrain(model)
            every = size == sizes[-1] and scale.name != "tiny"
            cfg = replace(
                cfg,
                data__subset=0.0 if every else float(size),
                # The labels of records are not known before they are read.
                data__subset_balanced=not scale.paper,
            )
            rows[f"{model}, {size:,}"] = Row(cfg, line=model, x=size)
    least, most = f"{sizes[0]:,}", f"{sizes[-1]:,}"
    claims = [
        Claim("with few images the ResNet leads", (f"R50x1, {least}",), (f"ViT-B/32, {least}",)),
        Claim("with many images the ViT leads", (f"ViT-B/32, {most}",), (f"R50x1, {most}",)),
    ]  # fmt: skip
    if "ViT-b/32" in models:
        large, small = f"ViT-B/32, {most}", f"ViT-b/32, {most}"
        text = "with many images the larger ViT leads"
        claims.append(Claim(text, (large,), (small,)))
    return Study(
        "Data size (Figure 4)", scale.metric, "lines", rows, tuple(claims),
        "training images",
    )  # fmt: skip


HALF_B = {
    "model__name": "", "model__width": 384, "model__depth": 12, "model__mlp_dim": 1536,
    "model__heads": 6, "model__patch": 32,
}  # fmt: skip


# 2. Scaling: Figure 5 and Table 6 ------------------------------------------------------

# Model and epochs -> ImageNet accuracy.
TABLE6 = {
    ("ViT-B/32", 7): "80.73", ("ViT-B/16", 7): "84.15", ("ViT-L/32", 7): "84.37",
    ("ViT-L/16", 7): "86.30", ("ViT-L/16", 14): "87.12", ("ViT-H/14", 14): "88.08",
    ("R50x1", 7): "77.54", ("R50x2", 7): "82.12", ("R101x1", 7): "80.67",
    ("R152x1", 7): "81.88", ("R152x2", 7): "84.97", ("R152x2", 14): "85.56",
    ("R50+ViT-B/32", 7): "84.90", ("R50+ViT-B/16", 7): "85.58",
    ("R50+ViT-L/32", 7): "85.68", ("R50+ViT-L/16", 7): "86.60",
    ("R50+ViT-L/16", 14): "87.12",
}  # fmt: skip
SMALL6 = (
    ("ViT-b/32", 7), ("ViT-B/32", 7), ("ViT-L/32", 7), ("R50x1", 7), ("R152x2", 7),
    ("R50+ViT-B/32", 7),
)  # fmt: skip


def scaling(scale: Scale) -> Study:
    """Accuracy against the compute of pre-training. R200x3 is left out: Table 3 has no
    recipe for it."""
    rows = {}
    for model, epochs in TABLE6 if scale.paper else SMALL6:
        cfg = scale.pretrain(model)
        line = "hybrid" if "+" in model else "ViT" if "ViT" in model else "ResNet"
        if not scale.paper:
            rows[model] = Row(cfg, line=line)
            continue
        name = f"{model}, {epochs} epochs"
        cfg = replace(cfg, steps=epochs * recipes.IMAGES["jft"].images // cfg.batch)
        rows[f"pre-train {name}"] = Row(cfg, shown=False)
        rows[name] = Row(
            scale.finetune("imagenet", model), f"pre-train {name}", line,
            paper=TABLE6[model, epochs],
        )  # fmt: skip
    end = ", 7 epochs" if scale.paper else ""
    b, resnet, hybrid = f"ViT-B/32{end}", f"R50x1{end}", f"R50+ViT-B/32{end}"
    return Study(
        "Scaling (Figure 5, Table 6)", "test/accuracy", "lines", rows,
        (
            Claim("ViT-B/32 is better than R50x1 for about the same compute", (b,), (resnet,)),
            Claim("the small hybrid is better than its ViT", (hybrid,), (b,)),
        ),
        COMPUTE,
    )  # fmt: skip


# 3. Position embeddings: Table 8 -------------------------------------------------------

TABLE8 = {
    ("none", "stem"): "0.614", ("learned", "stem"): "0.642",
    ("learned", "every"): "0.640", ("learned", "shared"): "0.643",
    ("learned2d", "stem"): "0.640", ("learned2d", "every"): "0.640",
    ("learned2d", "shared"): "0.640", ("relative", "stem"): "0.640",
}  # fmt: skip


def positions(scale: Scale) -> Study:
    rows = {}
    names = {
        "none": "none",
        "learned": "1-D",
        "learned2d": "2-D",
        "relative": "relative",
    }
    for (kind, place), paper in TABLE8.items():
        cfg = scale.pretrain(model__positions=kind, model__position_at=place)
        name = names[kind] + (f", {place}" if kind[:7] == "learned" else "")
        rows[name] = Row(cfg, paper=paper)
    kinds = {"1-D": "1-D, stem", "2-D": "2-D, stem", "relative": "relative"}
    return Study(
        "Position embeddings (Table 8)", scale.metric, "bars", rows,
        (
            *(Claim(f"{name} positions are better than none", (row,), ("none",)) for name, row in kinds.items()),
            Claim("in every layer is about as good as at the stem", ("1-D, every", "2-D, every"), ("1-D, stem", "2-D, stem"), equal=True),
            Claim("2-D is about as good as 1-D", ("2-D, stem",), ("1-D, stem",), equal=True),
        ),
    )  # fmt: skip


# 4. Head and pooling: Figure 9 ---------------------------------------------------------


def head(scale: Scale) -> Study:
    """The paper's learning rates, or those of the scale in the same ratio."""
    high = 8e-4 if scale.paper else 2e-3
    low = high * 3 / 8
    rows = {}
    for name, pool, rate in (
        ("class token", "token", high), ("class token, lower rate", "token", low),
        ("mean", "gap", high), ("mean, lower rate", "gap", low),
    ):  # fmt: skip
        cfg = scale.pretrain(
            model__head=pool,
            model__pre_logits=scale.paper and pool == "token",
            optim__learning_rate=rate,
        )
        rows[name] = Row(replace(cfg, eval__every=max(cfg.steps // 6, 1)))
    return Study(
        "Head and pooling (Figure 9)", scale.metric, "curves", rows,
        (
            Claim("the mean of the patches wants a lower rate than the class token", ("mean, lower rate",), ("mean",)),
            Claim("at the rate of the class token, the mean is worse", ("class token",), ("mean",)),
        ),
    )  # fmt: skip


# 5. Optimizer: Table 7 -----------------------------------------------------------------

# BiT's for the batch of Table 3: 0.03 * 4096 / 256. Its steps of 10 are a cosine here.
BIT = {
    "optim__name": "sgd", "optim__learning_rate": 0.48, "optim__weight_decay": 1e-4,
    "optim__schedule": "cosine", "optim__warmup": 5_000.0,
}  # fmt: skip
SGD = {"optim__name": "sgd", "optim__learning_rate": 0.1, "optim__weight_decay": 1e-3}
TABLE7 = {
    ("R50x1", "adam"): ("77.54", "97.67"), ("R50x1", "sgd"): ("78.24", "97.46"),
    ("R152x2", "adam"): ("84.97", "99.06"), ("R152x2", "sgd"): ("84.37", "99.07"),
}  # fmt: skip


def optimizer(scale: Scale) -> Study:
    """Pre-training with each optimizer, then the same fine-tuning."""
    models = ("R50x1", "R152x2") if scale.paper else ("R50x1", "ViT-B/32")
    kinds = {"adam": {}, "sgd": BIT if scale.paper else SGD}
    rows, ends = {}, {"adam": [], "sgd": [], "muon": []}
    for model in models:
        muon = {} if model[0] == "R" else {"muon": {"optim__name": "muon"}}
        for name, changes in (kinds | muon).items():
            before = f"pre-train {model}, {name}"
            images = "jft" if scale.paper else "imagenet"  # the latter has colours
            rows[before] = Row(scale.pretrain(model, images, **changes), shown=False)
            # At tiny: one, to spare time.
            for i, target in enumerate(
                ("cifar10", "imagenet")[: 1 + (scale.name != "tiny")]
            ):
                row = f"{model}, {name}, to {_target(scale, target)}"
                cfg = scale.finetune(target, model)
                paper = TABLE7.get((model, name), ("", ""))[1 - i]
                rows[row] = Row(cfg, before, paper=paper)
                ends[name].append(row)
    resnet = {k: tuple(r for r in v if r[:2] == "R5") for k, v in ends.items()}
    return Study(
        "Optimizer of pre-training (Table 7)", "test/accuracy", "bars", rows,
        (
            Claim("Adam pre-trains ResNets better than SGD", resnet["adam"], resnet["sgd"]),
            Claim("on average over all rows as well", tuple(ends["adam"]), tuple(ends["sgd"])),
        ),
    )  # fmt: skip


def _target(scale: Scale, target: str) -> str:
    """What a data set of the paper is at this scale."""
    if scale.paper:
        return target
    here = {"imagenet": "CIFAR-10", "cifar10": "MNIST"}[target]
    return here if scale.root or scale.name != "tiny" else "digits"


# 6. Model shape: Figure 8 --------------------------------------------------------------


def shape(scale: Scale) -> Study:
    """One dimension at a time around a base, and all together once."""
    base, grid = SHAPES[scale.name]
    if scale.paper:
        start = replace(
            scale.pretrain("ViT-B/32"), model=recipes.shape().model, sharding="zero"
        )
    else:
        start = scale.pretrain("ViT-B/32")
    of = lambda **m: replace(start, **{f"model__{k}": v for k, v in (base | m).items()})
    rows = {"base": Row(of(), line="base")}
    for field, values in grid.items():
        for value in values:
            rows[f"{field} {value}"] = Row(of(**{field: value}), line=field)
    largest = {k: v[-2 if scale.paper else -1] for k, v in grid.items()}
    rows["all"] = Row(of(**largest), line="all")
    best = {k: f"{k} {v[-1]}" for k, v in grid.items()}
    return Study(
        "Model shape (Figure 8)", scale.metric, "lines", rows,
        (
            Claim("more depth helps", (best["depth"],), ("base",)),
            Claim("depth helps more than width", (best["depth"],), (best["width"],)),
            Claim("smaller patches help, without more parameters", (best["patch"],), ("base",)),
        ),
        COMPUTE,
    )  # fmt: skip


# 7. Self-supervision: Section 4.6 and B.1.2 --------------------------------------------


def self_supervision(scale: Scale) -> Study:
    """From scratch, from masked patch prediction, from labels; then the same
    fine-tuning. At tiny and small it sees 1,000 labels."""
    rows = {"scratch": Row(scale.finetune(), paper="77.9")}
    if scale.paper:  # Table 3 trains it from scratch
        rows["scratch"] = Row(scale.pretrain("ViT-B/16", "imagenet", eval__evaluators=({"type": "accuracy"},)), paper="77.9")  # fmt: skip
    for target in ("mean", "downsampled", "pixels"):
        rows[f"pre-train {target}"] = Row(scale.masked(target), shown=False)
        paper = "79.9" if target == "mean" else ""
        rows[f"masked, {target}"] = Row(scale.finetune(), f"pre-train {target}", paper=paper)  # fmt: skip
    rows["pre-train labels"] = Row(
        scale.pretrain("ViT-B/16", "imagenet21k"), shown=False
    )
    rows["supervised"] = Row(scale.finetune(), "pre-train labels", paper="84.0")
    masked = tuple(name for name in rows if name.startswith("masked"))
    return Study(
        "Self-supervision (Section 4.6, B.1.2)", "test/accuracy", "bars", rows,
        (
            Claim("masked patch prediction is better than from scratch", masked, ("scratch",)),
            Claim("supervised pre-training is better still", ("supervised",), masked),
            Claim("the mean colour is better than all pixels", ("masked, mean",), ("masked, pixels",)),
        ),
    )  # fmt: skip


# 8. Resolution: Section 3.2 ------------------------------------------------------------


def resolution(scale: Scale) -> Study:
    """Equal steps at every resolution: at that of pre-training it is the control."""
    sizes = RESOLUTIONS[scale.name]
    before = scale.pretrain("ViT-B/16", "imagenet21k")
    rows = {"pre-train": Row(before, shown=scale.name != "paper")}
    for size in sizes:
        cfg = scale.finetune("imagenet", data__image_size=size)
        if not scale.paper:  # the same images as in pre-training, all that there are
            cfg = replace(cfg, data__subset=before.data.subset)
        paper = "84.0" if size == 384 else ""
        rows[f"{size} pixels"] = Row(cfg, "pre-train", paper=paper)
    low, *high = (f"{size} pixels" for size in sizes)
    return Study(
        "Resolution of fine-tuning (Section 3.2)", "test/accuracy", "bars", rows,
        (Claim("more pixels help at equal steps", tuple(high), (low,)),),
    )  # fmt: skip


# 9. AugReg: 2106.10270 -----------------------------------------------------------------

# RandAugment's operations and magnitude, and mixup. It moves images by up to 10 pixels
# per unit of magnitude, and is applied to images of 96 pixels here.
PRESETS = {"none": (0, 0, 0.0), "medium": (2, 3, 0.2)}


def augreg(scale: Scale) -> Study:
    """Augmentation (mixup included) by regularisation (dropout and stochastic depth)."""
    rows = {}
    if scale.paper:
        for preset in recipes.AUGREG:
            for regular in (0.0, 0.1):
                for decay in (0.03, 0.1):
                    cfg = recipes.augreg("ViT-S/16", "imagenet", preset, regular, decay)
                    cfg = replace(cfg, data__path=scale.root)
                    rows[f"{preset}, {regular}, decay {decay}"] = Row(cfg)
        plain, best = "none, 0.0, decay 0.1", "medium2, 0.0, decay 0.1"
    else:
        crop, *others = scale.images("cifar10")["train_transforms"]
        for preset, (n, m, mixup) in PRESETS.items():
            augment = ({"op": "randaugment", "n": n, "m": m},) if n else ()
            ops = ({**crop, "size": 96}, *others, *augment, {"op": "resize"})
            for regular in (0.0, 0.1):
                cfg = scale.pretrain(
                    data__train_transforms=ops,
                    data__subset=1_000.0,
                    model__dropout=regular,
                    model__stochastic_depth=regular,
                    mixup=mixup,
                )
                rows[f"{preset}, {regular}"] = Row(cfg)
        plain, best = "none, 0.0", "medium, 0.0"
    return Study(
        "AugReg on a small data set (2106.10270)", "test/accuracy", "bars", rows,
        (
            Claim("augmentation helps where images are few", (best,), (plain,)),
            Claim("augmentation helps more than regularisation", (best,), (plain.replace("0.0", "0.1", 1),)),
        ),
    )  # fmt: skip


# 10. Compute: Figure 12 ----------------------------------------------------------------


def compute(scale: Scale) -> Study:
    """Inference on this machine: images/s, and the largest batch that its memory, or
    16 GiB where it has none of its own, would hold."""
    models, sizes = FIGURE12[scale.name]
    rows = {}
    for model in models:
        for size in sizes:
            patch = int(model.split("/")[1]) if "/" in model else 1
            side = size - size % patch if scale.paper else size
            fields = {"name": model} if scale.paper else {"name": "", **scale.model(model)}  # fmt: skip
            cfg = Config(
                model=ModelConfig(**fields, dtype="bfloat16" if scale.paper else "float32"),
                data=DataConfig(source="synthetic", image_size=side, num_classes=1000),
                batch=64,
            )  # fmt: skip
            rows[f"{model}, {size} px"] = Row(cfg, line=model, x=side, measure="speed")
    at = lambda model: tuple(f"{model}, {size} px" for size in sizes)
    return Study(
        "Compute of inference (Figure 12)", "speed/images_per_second", "lines", rows,
        (Claim("a ViT is about as fast as a ResNet", at("ViT-B/32"), at("R50x1"), equal=True),),
        "image size (pixels)",
    )  # fmt: skip


# 11. Attention distance: Figure 7 right, Figure 11 -------------------------------------


def distance(scale: Scale) -> Study:
    """A ViT and a hybrid of the same grid and size, after the same training."""
    models = ("ViT-L/16", "R50+ViT-L/16") if scale.paper else ("ViT-B/32", "R50+ViT-B/32")  # fmt: skip
    rows = {}
    for model, name in zip(models, ("ViT", "hybrid"), strict=True):
        rows[name] = Row(scale.pretrain(model), measure="distance")
    return Study(
        "Attention distance (Figure 7 right, Figure 11)", "distance/nearest", "distance",
        rows,
        (
            Claim("the hybrid has fewer local heads: its nearest head looks further", ("hybrid",), ("ViT",)),
            Claim("in the ViT, the distance grows with depth", ("ViT",), (), "distance/growth"),
        ),
    )  # fmt: skip


# 12. Axial attention: Section D.6, Figure 13 -------------------------------------------


def axial(scale: Scale) -> Study:
    """Of 2-D positions and the mean of the patches, with and without."""
    rows = {}
    for model in ("ViT-B/32", "ViT-B/16") if scale.paper else ("ViT-B/32",):
        for name, wanted in ((model, False), (f"Axial{model}", True)):
            cfg = scale.pretrain(
                model,
                model__head="gap",
                model__pre_logits=False,
                model__positions="learned2d",
                model__axial=wanted,
            )
            rows[name] = Row(cfg, line="AxialViT" if wanted else "ViT")
    axials = tuple(name for name in rows if name.startswith("Axial"))
    plain = tuple(name.removeprefix("Axial") for name in axials)
    return Study(
        "Axial attention (Figure 13)", scale.metric, "lines", rows,
        (Claim("axial attention is better than its ViT, for more compute", axials, plain),),
        COMPUTE,
    )  # fmt: skip


# 13. Transfer to small data sets: Table 2, VTAB ----------------------------------------

CHECKPOINT_SIZE = 56  # pixels at which its features are taken


def transfer(scale: Scale) -> Study:
    """VTAB-1k; at tiny and small 1,000 images of each of three sets: from scratch, from
    pre-training (our own has seen no labels), and from a published checkpoint."""
    before = scale.pretrain("ViT-B/16", "imagenet21k") if scale.paper else scale.masked("mean")  # fmt: skip
    rows = {"pre-train": Row(before, shown=False)}
    for name, cfg in _targets(scale).items():
        rows[f"{name}, scratch"] = Row(cfg)
        rows[f"{name}, pre-trained"] = Row(cfg, "pre-train")
        if scale.checkpoint:
            rows[f"{name}, published"] = Row(_frozen(scale, cfg), measure="features")
    end = lambda word: tuple(name for name in rows if name.endswith(word))
    claims = [Claim("pre-training helps", end("pre-trained"), end("scratch"))]
    if scale.checkpoint:
        text = "a large model, pre-trained on many images, is better still"
        claims.append(Claim(text, end("published"), end("pre-trained")))
    return Study(
        "Transfer to 1,000 images", "test/accuracy", "bars", rows, tuple(claims)
    )


def _targets(scale: Scale) -> dict[str, Config]:
    """Fine-tuning on every set."""
    if scale.paper:
        return {
            task: replace(recipes.vtab(task), data__path=scale.root, model__num_classes=about.classes)
            for task, about in TASKS.items()
        }  # fmt: skip
    bare = scale.name == "tiny" and not scale.root
    sets = {} if bare else {"CIFAR-10": "cifar10", "MNIST": "mnist"}
    return {
        name: scale.finetune(**{f"data__{k}": v for k, v in scale.images(images).items()})
        for name, images in (sets | {"digits": "digits"}).items()
    }  # fmt: skip


def _frozen(scale: Scale, cfg: Config) -> Config:
    """A closed-form classifier on features of 100 images of each class."""
    return replace(
        cfg,
        model=ModelConfig(),
        pretrained=scale.checkpoint,
        data__image_size=CHECKPOINT_SIZE,
        data__eval_transforms=({"op": "resize"},),
        data__subset=1_400.0,  # from which every seed draws its examples
        eval__evaluators=({"type": "fewshot", "shots": (100,)},),
        eval__batch=50,
    )


STUDIES: dict[str, Callable[[Scale], Study]] = {
    "data_size": data_size,
    "scaling": scaling,
    "positions": positions,
    "head": head,
    "optimizer": optimizer,
    "shape": shape,
    "self_supervision": self_supervision,
    "resolution": resolution,
    "augreg": augreg,
    "compute": compute,
    "distance": distance,
    "axial": axial,
    "transfer": transfer,
}
