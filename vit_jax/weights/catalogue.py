# SPDX-License-Identifier: Apache-2.0
"""The published checkpoints as data: which file holds what, and what to expect of it.

Ids are unique, file names are not: four different models are called ``ViT-B_16.npz``.
Accuracies are top-1 on the ImageNet validation set: "timm" as timm's maintainers
measured the file (bicubic resize, central crop 0.9 at 224, exact GELU), "readme" as the
official README states; none of them was measured with this code.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vit_jax.config import nearest
from vit_jax.errors import UserError
from vit_jax.weights import fetch, hub

_BUCKET = "gs://vit_models"
# Why some sources are listed first: the bucket refused anonymous readers in 2026.
BUCKET_NOTE = (
    "The official bucket (gs://vit_models) has refused anonymous readers since February "
    "2026; the hf:// sources hold the same weights in the layouts of timm and Hugging Face."
)


@dataclass(frozen=True)
class Published:
    """One published checkpoint."""

    id: str
    model: str  # a name of create_model
    data: str  # trained on; "a -> b": pre-trained on a, fine-tuned on b
    image_size: int
    classes: int  # outputs of the head in the npz file
    head: Literal["valid", "zeroed"]
    file: str  # the original npz
    alternatives: tuple[str, ...] = ()  # the same weights elsewhere
    pre_logits: bool = False  # the npz has the tanh layer
    accuracy: float = 0.0  # top-1 in per cent; 0: not known, or no ImageNet head
    measured_by: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        return (*self.alternatives, self.file)


class AugReg(NamedTuple):
    """The settings in a file name of "How to train your ViT?" (arXiv 2106.10270)."""

    model: str
    data: str  # i1k, i21k
    epochs: int
    learning_rate: float
    augmentation: str  # none, light0, light1, medium1, medium2, strong1, strong2
    weight_decay: float
    dropout: float
    stochastic_depth: float
    adapt_data: str = ""  # fine-tuned on this; "": only pre-trained
    adapt_steps: int = 0  # in whole thousands, as printed: 500 steps read 0
    adapt_learning_rate: float = 0.0
    image_size: int = 224


def resolve(source: str) -> str:
    """The first source of a catalogue id, or a cached one; anything else unchanged."""
    if source not in CATALOGUE or Path(source).exists():
        return source
    sources = CATALOGUE[source].sources
    for candidate in sources:
        if _in_cache(candidate):
            return candidate
    return sources[0]


def find(name: str) -> Published:
    """Raises: UserError: no such id."""
    if name not in CATALOGUE:
        raise UserError(
            f"no published checkpoint {name!r}: {nearest(name, CATALOGUE)}"
            "`python -m vit_jax.weights list` shows all ids"
        )
    return CATALOGUE[name]


def parse_name(name: str) -> AugReg:
    """Decodes an AugReg file name, with or without folder and suffix.

    Raises:
      UserError: it does not follow that scheme.
    """
    stem = name.rsplit("/", 1)[-1].removesuffix(".npz")
    match = _AUGREG.fullmatch(stem)
    if not match:
        raise UserError(
            f"{name!r} is no AugReg file name, which reads MODEL-DATA-EPOCHSep-lr_X-aug_X-"
            "wd_X-do_X-sd_X, and for fine-tuned ones --DATASET-steps_Nk-lr_X-res_N"
        )
    x: dict[str, Any] = match.groupdict()
    *stems, size, patch = x["name"].split("_")
    model = f"{stems[0]}+ViT-{size}/{patch}" if stems else f"ViT-{size}/{patch}"
    pre = AugReg(
        model,
        x["ds"],
        int(x["epochs"]),
        float(x["lr"]),
        x["aug"],
        float(x["wd"]),
        float(x["do"]),
        float(x["sd"]),
    )
    if not x["adapt"]:
        return pre
    return pre._replace(
        adapt_data=x["adapt"],
        adapt_steps=1000 * int(x["steps"]),
        adapt_learning_rate=float(x["adapt_lr"]),
        image_size=int(x["res"]),
    )


_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
_AUGREG = re.compile(
    rf"(?P<name>(?:R\d*_)?[A-Z][a-z]?_\d+)-(?P<ds>i1k|i21k)-(?P<epochs>\d+)ep"
    rf"-lr_(?P<lr>{_NUMBER})-aug_(?P<aug>\w+)-wd_(?P<wd>{_NUMBER})-do_(?P<do>{_NUMBER})"
    rf"-sd_(?P<sd>{_NUMBER})"
    rf"(?:--(?P<adapt>[\w.]+)-steps_(?P<steps>\d+)k-lr_(?P<adapt_lr>{_NUMBER})"
    rf"-res_(?P<res>\d+))?"
)


def _in_cache(source: str) -> bool:
    if source.startswith("hf://"):
        return hub.in_cache(source)
    return fetch.cached(source).exists()


def _slug(model: str) -> str:
    return model.lower().replace("+", "_").replace("vit-", "vit_", 1).replace("/", "")


def _original() -> list[Published]:
    """The paper's models: imagenet21k (head zeroed) and its fine-tuned files."""
    # (model, repositories with the same weights)
    pretrained = {
        "ViT-B/8": (),
        "ViT-B/16": ("hf://google/vit-base-patch16-224-in21k",),
        "ViT-B/32": ("hf://google/vit-base-patch32-224-in21k",),
        "ViT-L/16": ("hf://google/vit-large-patch16-224-in21k",),
        "ViT-L/32": ("hf://google/vit-large-patch32-224-in21k",),
        "ViT-H/14": ("hf://google/vit-huge-patch14-224-in21k",),
        "R50+ViT-B/16": ("hf://timm/vit_base_r50_s16_224.orig_in21k",),
        "R26+ViT-B/32": (),
        "R50+ViT-L/32": (),
    }
    rows = []
    for model, elsewhere in pretrained.items():
        file = f"{_BUCKET}/imagenet21k/{model.replace('/', '_')}.npz"
        rows.append(
            Published(
                f"{_slug(model)}_i21k",
                model,
                "i21k",
                224,
                21843,
                "zeroed",
                file,
                elsewhere,
                pre_logits=True,
            )
        )
    google, timm = "hf://google/vit-", "hf://timm/vit_"
    finetuned = [
        ("ViT-B/8", 384, (), 0.0, ""),
        ("ViT-B/16", 384, (f"{google}base-patch16-384",), 84.21, "timm"),
        ("ViT-B/16", 224, (f"{google}base-patch16-224",), 81.78, "timm"),
        ("ViT-B/32", 384, (f"{google}base-patch32-384",), 0.0, ""),
        ("ViT-L/16", 384, (f"{google}large-patch16-384",), 0.0, ""),
        ("ViT-L/16", 224, (f"{google}large-patch16-224",), 82.7, "readme"),
        ("ViT-L/32", 384, (f"{google}large-patch32-384",), 81.51, "timm"),
        (
            "R50+ViT-B/16",
            384,
            (f"{timm}base_r50_s16_384.orig_in21k_ft_in1k",),
            84.99,
            "timm",
        ),
    ]
    for model, size, elsewhere, accuracy, by in finetuned:
        suffix = "-224" if size == 224 else ""
        name = model.replace("/", "_") + suffix
        rows.append(
            Published(
                f"{_slug(model)}_i21k_ft_i1k_{size}",
                model,
                "i21k -> i1k",
                size,
                1000,
                "valid",
                f"{_BUCKET}/imagenet21k+imagenet2012/{name}.npz",
                elsewhere,
                accuracy=accuracy,
                measured_by=by,
            )
        )
    for folder, names in (("sam", ("B/16", "B/32")), ("gsam", ("B/16",))):
        for size in names:
            patch = size.split("/")[1]
            elsewhere = (f"{timm}base_patch{patch}_224.sam_in1k",)
            rows.append(
                Published(
                    f"vit_{size.replace('/', '').lower()}_{folder}_i1k",
                    f"ViT-{size}",
                    f"i1k ({folder.upper()})",
                    224,
                    1000,
                    "valid",
                    f"{_BUCKET}/{folder}/ViT-{size.replace('/', '_')}.npz",
                    elsewhere if folder == "sam" else (),
                )
            )
    return rows


# timm's choice of AugReg files: (pre-trained stem, fine-tuned at, its learning rate,
# name of timm's model, accuracy as timm measured it).
_AUGREG_FILES = [
    ("Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", "tiny_patch16",
     {224: ("0.03", 0.0), 384: ("0.03", 78.44)}),
    ("S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", "small_patch32",
     {224: ("0.03", 0.0), 384: ("0.03", 80.48)}),
    ("S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", "small_patch16",
     {224: ("0.03", 0.0), 384: ("0.03", 83.81)}),
    ("B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0", "base_patch32",
     {224: ("0.03", 0.0)}),
    ("B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", "base_patch32",
     {384: ("0.03", 83.36)}),
    ("B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", "base_patch16",
     {224: ("0.01", 84.53), 384: ("0.01", 86.01)}),
    ("B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", "base_patch8",
     {224: ("0.01", 85.84)}),
    ("L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", "large_patch16",
     {224: ("0.01", 85.86), 384: ("0.01", 87.10)}),
    ("R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", "tiny_r_s16_p8",
     {224: ("0.03", 0.0), 384: ("0.03", 75.96)}),
    ("R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1", "small_r26_s32",
     {224: ("0.03", 0.0)}),
    ("R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0", "small_r26_s32",
     {384: ("0.03", 84.07)}),
    ("R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", "large_r50_s32",
     {224: ("0.01", 0.0)}),
    ("R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0", "large_r50_s32",
     {384: ("0.01", 86.19)}),
    ("S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0", "small_patch16",
     {224: ("0.01", 0.0), 384: ("0.01", 0.0)}),
    ("B_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.1-sd_0.1", "base_patch32",
     {224: ("0.01", 0.0), 384: ("0.01", 0.0)}),
    ("B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1", "base_patch16",
     {224: ("0.01", 0.0), 384: ("0.01", 0.0)}),
]  # fmt: skip
# timm publishes the pre-trained weights of these (of two of a model, the first is not).
_AUGREG_NOT_PRETRAINED = (
    "aug_light1-wd_0.1",
    "aug_light0-wd_0.03",
    "L_32-i21k-300ep-lr_0.001-aug_medium1",
)


def _augreg() -> list[Published]:
    rows = []
    for stem, timm, finetuned in _AUGREG_FILES:
        about = parse_name(stem)
        slug = f"{_slug(about.model)}_augreg_{about.data}"
        tag = f"augreg_in{about.data[1:]}"
        listed = not any(part in stem for part in _AUGREG_NOT_PRETRAINED)
        if about.data == "i21k" and listed:
            rows.append(
                Published(
                    slug,
                    about.model,
                    "i21k",
                    224,
                    21843,
                    "valid",
                    f"{_BUCKET}/augreg/{stem}.npz",
                    (f"hf://timm/vit_{timm}_224.{tag}",),
                )
            )
        for size, (lr, accuracy) in finetuned.items():
            name = f"{stem}--imagenet2012-steps_20k-lr_{lr}-res_{size}"
            ft = f"{tag}_ft_in1k" if about.data == "i21k" else tag
            rows.append(
                Published(
                    f"{slug}_ft_i1k_{size}",
                    about.model,
                    f"{about.data} -> i1k",
                    size,
                    1000,
                    "valid",
                    f"{_BUCKET}/augreg/{name}.npz",
                    (f"hf://timm/vit_{timm}_{size}.{ft}",),
                    accuracy=accuracy,
                    measured_by="timm" if accuracy else "",
                )
            )
    return rows


def _big_vision() -> list[Published]:
    """S/16 of "Better plain ViT baselines" (arXiv 2205.01580): accuracy of the paper."""
    return [
        Published(
            f"vit_s16_plain_i1k_{epochs}ep",
            "ViT-S/16",
            "i1k",
            224,
            1000,
            "valid",
            f"gs://big_vision/vit_s16_i1k_{epochs}ep.npz",
            pre_logits=True,
            accuracy=accuracy,
            measured_by="paper",
        )
        for epochs, accuracy in ((90, 76.5), (150, 78.5), (300, 80.0))
    ]


CATALOGUE = {p.id: p for p in (*_original(), *_augreg(), *_big_vision())}
