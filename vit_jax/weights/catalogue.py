# SPDX-License-Identifier: Apache-2.0
"""The published checkpoints as data: which file holds what, and what to expect of it.

Ids are unique, file names are not: four different models are called ``ViT-B_16.npz``.
Accuracies are top-1 on the ImageNet validation set: "timm" as timm's maintainers
measured the file (bicubic resize, central crop 0.9 at 224, exact GELU), "readme" as the
official README states; of features "linear probe", as the README of their authors states.
None of them was measured with this code.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vit_jax.config import nearest
from vit_jax.errors import UserError
from vit_jax.models import published
from vit_jax.weights import augreg, fetch, hub

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
    classes: int  # outputs of the head; 0: none, the model returns features
    head: Literal["valid", "zeroed", "none"]
    file: str = ""  # the original npz
    alternatives: tuple[str, ...] = ()  # the same weights elsewhere
    pre_logits: bool = False  # the npz has the tanh layer
    accuracy: float = 0.0  # top-1 in per cent; 0: not known
    measured_by: str = ""
    licence: str = "apache-2.0"  # "": see the page of the source

    @property
    def sources(self) -> tuple[str, ...]:
        return (*self.alternatives, *((self.file,) if self.file else ()))


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


def matching(pattern: str) -> list[Published]:
    """The rows in which every word of ``pattern`` is found; capitals do not count.

    A word with ``*`` or ``?`` is a pattern of the id or the model, such as "ViT-S/*";
    another one may be anywhere in the id, model, data, image size or source.
    """
    found = []
    for p in CATALOGUE.values():
        names = p.id.lower(), p.model.lower()
        text = " ".join((*names, p.data, str(p.image_size), p.sources[0])).lower()
        if all(
            any(fnmatch.fnmatchcase(name, word) for name in names)
            if set(word) & set("*?[")
            else word in text
            for word in pattern.lower().split()
        ):
            found.append(p)
    return found


def _in_cache(source: str) -> bool:
    if source.startswith("hf://"):
        return hub.in_cache(source)
    return fetch.cached(source).exists()


def _slug(model: str) -> str:
    return model.lower().replace("+", "_").replace("vit-", "vit_", 1).replace("/", "")


# Files of the paper: (folder, model, pixels, the same weights
# elsewhere, top-1, measured by). The head of those pre-trained on i21k is zeroed.
_21K, _BOTH = "imagenet21k", "imagenet21k+imagenet2012"
_GOOGLE = "hf://google/vit-"
_PAPER: tuple[tuple[str, str, int, str, float, str], ...] = (
    (_21K, "ViT-B/8", 224, "", 0, ""),
    (_21K, "ViT-B/16", 224, f"{_GOOGLE}base-patch16-224-in21k", 0, ""),
    (_21K, "ViT-B/32", 224, f"{_GOOGLE}base-patch32-224-in21k", 0, ""),
    (_21K, "ViT-L/16", 224, f"{_GOOGLE}large-patch16-224-in21k", 0, ""),
    (_21K, "ViT-L/32", 224, f"{_GOOGLE}large-patch32-224-in21k", 0, ""),
    (_21K, "ViT-H/14", 224, f"{_GOOGLE}huge-patch14-224-in21k", 0, ""),
    (_21K, "R50+ViT-B/16", 224, "hf://timm/vit_base_r50_s16_224.orig_in21k", 0, ""),
    (_21K, "R26+ViT-B/32", 224, "", 0, ""),
    (_21K, "R50+ViT-L/32", 224, "", 0, ""),
    (_BOTH, "ViT-B/8", 384, "", 0, ""),
    (_BOTH, "ViT-B/16", 384, f"{_GOOGLE}base-patch16-384", 84.21, "timm"),
    (_BOTH, "ViT-B/16", 224, f"{_GOOGLE}base-patch16-224", 81.78, "timm"),
    (_BOTH, "ViT-B/32", 384, f"{_GOOGLE}base-patch32-384", 0, ""),
    (_BOTH, "ViT-L/16", 384, f"{_GOOGLE}large-patch16-384", 0, ""),
    (_BOTH, "ViT-L/16", 224, f"{_GOOGLE}large-patch16-224", 82.7, "readme"),
    (_BOTH, "ViT-L/32", 384, f"{_GOOGLE}large-patch32-384", 81.51, "timm"),
    (
        *(_BOTH, "R50+ViT-B/16", 384),
        *("hf://timm/vit_base_r50_s16_384.orig_in21k_ft_in1k", 84.99, "timm"),
    ),
    ("sam", "ViT-B/16", 224, "hf://timm/vit_base_patch16_224.sam_in1k", 0, ""),
    ("sam", "ViT-B/32", 224, "hf://timm/vit_base_patch32_224.sam_in1k", 0, ""),
    ("gsam", "ViT-B/16", 224, "", 0, ""),
)


def _original() -> Iterator[Published]:
    """The paper's models: pre-trained (head zeroed), fine-tuned, and with SAM."""
    for folder, model, size, elsewhere, accuracy, by in _PAPER:
        pretrained = folder == _21K
        data = {_21K: "i21k", _BOTH: "i21k -> i1k"}.get(
            folder, f"i1k ({folder.upper()})"
        )
        tags = {_21K: "i21k", _BOTH: f"i21k_ft_i1k_{size}"}
        suffix = "-224" if folder == _BOTH and size == 224 else ""
        yield Published(
            f"{_slug(model)}_{tags.get(folder, f'{folder}_i1k')}",
            model,
            data,
            size,
            21843 if pretrained else 1000,
            "zeroed" if pretrained else "valid",
            f"{_BUCKET}/{folder}/{model.replace('/', '_')}{suffix}.npz",
            (elsewhere,) if elsewhere else (),
            pre_logits=pretrained,
            accuracy=accuracy,
            measured_by=by,
        )


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
        about = augreg.parse_name(stem)
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


# Repositories of other families: (source, trained on, licence, outputs, top-1: as timm
# measured it in results/results-imagenet.csv or, of features, of a linear probe by
# README.md of dinov2 and dino, FINETUNE.md of mae). "": the licence was not looked up.
_MIT, _APACHE, _NC, _DINOV3 = "mit", "apache-2.0", "cc-by-nc-4.0", "dinov3-license"
_FAMILIES: tuple[tuple[str, str, str, int, float], ...] = (
    ("timm/deit_tiny_patch16_224.fb_in1k", "i1k", _APACHE, 1000, 0),
    ("timm/deit_small_patch16_224.fb_in1k", "i1k", _APACHE, 1000, 0),
    ("timm/deit_base_patch16_224.fb_in1k", "i1k", _APACHE, 1000, 81.99),
    ("timm/deit_base_patch16_384.fb_in1k", "i1k", _APACHE, 1000, 83.11),
    ("timm/deit_small_distilled_patch16_224.fb_in1k", "i1k", _APACHE, 1000, 81.22),
    ("timm/deit_base_distilled_patch16_224.fb_in1k", "i1k", _APACHE, 1000, 83.39),
    ("timm/deit_base_distilled_patch16_384.fb_in1k", "i1k", _APACHE, 1000, 85.43),
    ("facebook/deit-base-distilled-patch16-224", "i1k", _APACHE, 1000, 0),
    ("timm/deit3_small_patch16_224.fb_in1k", "i1k", "", 1000, 81.37),
    ("timm/deit3_small_patch16_384.fb_in1k", "i1k", "", 1000, 83.43),
    ("timm/deit3_medium_patch16_224.fb_in1k", "i1k", "", 1000, 83.09),
    ("timm/deit3_base_patch16_224.fb_in1k", "i1k", "", 1000, 83.79),
    ("timm/deit3_base_patch16_384.fb_in1k", "i1k", "", 1000, 85.07),
    ("timm/deit3_large_patch16_224.fb_in1k", "i1k", "", 1000, 84.78),
    ("timm/deit3_large_patch16_384.fb_in1k", "i1k", "", 1000, 85.81),
    ("timm/deit3_huge_patch14_224.fb_in1k", "i1k", "", 1000, 85.22),
    ("timm/deit3_small_patch16_224.fb_in22k_ft_in1k", "i22k -> i1k", "", 1000, 83.07),
    ("timm/deit3_medium_patch16_224.fb_in22k_ft_in1k", "i22k -> i1k", "", 1000, 84.55),
    ("timm/deit3_base_patch16_224.fb_in22k_ft_in1k", "i22k -> i1k", "", 1000, 85.70),
    ("timm/deit3_large_patch16_384.fb_in22k_ft_in1k", "i22k -> i1k", "", 1000, 87.72),
    ("timm/deit3_huge_patch14_224.fb_in22k_ft_in1k", "i22k -> i1k", "", 1000, 87.19),
    ("timm/vit_base_patch16_224.mae", "i1k", _NC, 0, 67.8),
    ("timm/vit_large_patch16_224.mae", "i1k", _NC, 0, 76.0),
    ("timm/vit_huge_patch14_224.mae", "i1k", _NC, 0, 77.2),
    ("facebook/vit-mae-base", "i1k", _NC, 0, 67.8),
    ("timm/vit_small_patch16_224.dino", "i1k", "", 0, 77.0),
    ("timm/vit_base_patch16_224.dino", "i1k", "", 0, 78.2),
    ("facebook/dino-vits8", "i1k", "", 0, 79.7),
    ("facebook/dinov2-base", "lvd142m", _APACHE, 0, 84.5),
    ("facebook/dinov2-with-registers-base", "lvd142m", _APACHE, 0, 84.6),
    ("timm/vit_small_patch14_dinov2.lvd142m", "lvd142m", _APACHE, 0, 81.1),
    ("timm/vit_base_patch14_dinov2.lvd142m", "lvd142m", _APACHE, 0, 84.5),
    ("timm/vit_large_patch14_dinov2.lvd142m", "lvd142m", _APACHE, 0, 86.3),
    ("timm/vit_base_patch14_reg4_dinov2.lvd142m", "lvd142m", _APACHE, 0, 84.6),
    ("timm/vit_giant_patch14_reg4_dinov2.lvd142m", "lvd142m", _APACHE, 0, 87.1),
    ("facebook/dinov3-vits16-pretrain-lvd1689m", "lvd1689m", _DINOV3, 0, 0),
    ("timm/vit_small_patch16_dinov3.lvd1689m", "lvd1689m", _DINOV3, 0, 0),
    ("timm/vit_base_patch16_dinov3.lvd1689m", "lvd1689m", _DINOV3, 0, 0),
    ("timm/vit_large_patch16_dinov3.lvd1689m", "lvd1689m", _DINOV3, 0, 0),
    ("openai/clip-vit-base-patch32", "image-text pairs", "", 512, 0),
    ("openai/clip-vit-base-patch16", "image-text pairs", "", 512, 0),
    ("openai/clip-vit-large-patch14", "image-text pairs", "", 768, 0),
    ("timm/vit_base_patch16_clip_224.openai", "image-text pairs", _APACHE, 512, 0),
    ("timm/vit_base_patch16_clip_224.laion2b", "laion2b", "", 512, 0),
    (
        "timm/vit_base_patch16_clip_224.laion2b_ft_in12k_in1k",
        *("laion2b -> i12k -> i1k", "", 1000, 86.17),
    ),
    (
        "timm/vit_large_patch14_clip_336.openai_ft_in12k_in1k",
        *("image-text pairs -> i12k -> i1k", "", 1000, 88.27),
    ),
    (
        "timm/vit_huge_patch14_clip_336.laion2b_ft_in12k_in1k",
        *("laion2b -> i12k -> i1k", "", 1000, 88.59),
    ),
    ("google/siglip-base-patch16-224", "webli", "", 0, 0),
    ("google/siglip-so400m-patch14-384", "webli", "", 0, 0),
    ("timm/vit_base_patch16_siglip_224.webli", "webli", "", 0, 0),
    ("timm/vit_base_patch16_siglip_224.v2_webli", "webli", "", 0, 0),
    ("timm/vit_large_patch16_siglip_256.v2_webli", "webli", "", 0, 0),
    ("timm/vit_so400m_patch14_siglip_224.v2_webli", "webli", "", 0, 0),
    ("microsoft/beit-base-patch16-224", "i22k -> i1k", "", 1000, 0),
    ("timm/beit_base_patch16_224.in22k_ft_in22k_in1k", "i22k -> i1k", "", 1000, 85.21),
    ("timm/beit_base_patch16_384.in22k_ft_in22k_in1k", "i22k -> i1k", "", 1000, 86.80),
    ("timm/beit_large_patch16_224.in22k_ft_in22k_in1k", "i22k -> i1k", "", 1000, 87.48),
    ("timm/beit_large_patch16_512.in22k_ft_in22k_in1k", "i22k -> i1k", "", 1000, 88.60),
    ("timm/beitv2_base_patch16_224.in1k_ft_in1k", "i1k", "", 1000, 85.59),
    ("timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k", "i22k -> i1k", "", 1000, 86.47),
    ("timm/beitv2_large_patch16_224.in1k_ft_in1k", "i1k", "", 1000, 87.41),
    (
        "timm/beitv2_large_patch16_224.in1k_ft_in22k_in1k",
        "i22k -> i1k",
        "",
        1000,
        88.39,
    ),
    (
        "timm/eva02_small_patch14_336.mim_in22k_ft_in1k",
        "i22k -> i1k",
        _MIT,
        1000,
        85.72,
    ),
    ("timm/eva02_base_patch14_448.mim_in22k_ft_in1k", "i22k -> i1k", _MIT, 1000, 88.25),
    (
        "timm/eva02_base_patch14_448.mim_in22k_ft_in22k_in1k",
        *("i22k -> i1k", _MIT, 1000, 88.69),
    ),
    (
        "timm/eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",
        *("m38m -> i22k -> i1k", _MIT, 1000, 90.05),
    ),
    ("apple/aimv2-large-patch14-224", "image-text pairs", "apple-ascl", 0, 0),
    ("timm/vit_pe_core_tiny_patch16_384.fb", "image-text pairs", _APACHE, 512, 0),
    ("timm/vit_pe_core_small_patch16_384.fb", "image-text pairs", _APACHE, 512, 0),
    ("timm/vit_pe_core_base_patch16_224.fb", "image-text pairs", _APACHE, 1024, 0),
    ("timm/vit_pe_core_large_patch14_336.fb", "image-text pairs", _APACHE, 1024, 0),
    ("timm/vit_pe_core_gigantic_patch14_448.fb", "image-text pairs", _APACHE, 1280, 0),
    ("facebook/ijepa_vith14_1k", "i1k", _NC, 0, 0),
    ("facebook/webssl-dino1b-full2b-224", "mc2b", "", 0, 0),
    ("facebook/webssl-dino2b-full2b-224", "mc2b", "", 0, 0),
    ("facebook/webssl-dino3b-full2b-224", "mc2b", "", 0, 0),
    ("facebook/webssl-dino5b-full2b-224", "mc2b", "", 0, 0),
    ("facebook/webssl-dino7b-full8b-224", "mc2b", "", 0, 0),
    ("facebook/webssl-dino7b-full8b-518", "mc2b", "", 0, 0),
    ("timm/flexivit_small.1200ep_in1k", "i1k", "", 1000, 82.52),
    ("timm/flexivit_base.1200ep_in1k", "i1k", "", 1000, 84.68),
    ("timm/flexivit_large.1200ep_in1k", "i1k", "", 1000, 85.65),
)


# Files that no repository of Hugging Face holds: (address, model, trained on, licence,
# top-1 of a linear probe by CONFIG.md of moco-v3 and README.md of Franca).
_MOCO = "https://dl.fbaipublicfiles.com/moco-v3"
_FRANCA = "https://github.com/valeoai/Franca/releases/download"
_RAIL = "research-only-rail"
_ADDRESSES: tuple[tuple[str, str, str, str, float], ...] = (
    (
        f"{_MOCO}/vit-s-300ep/vit-s-300ep.pth.tar",
        *("mocov3_small_patch16_224", "i1k", _NC, 73.2),
    ),
    (
        f"{_MOCO}/vit-b-300ep/vit-b-300ep.pth.tar",
        *("mocov3_base_patch16_224", "i1k", _NC, 76.7),
    ),
    (
        f"{_FRANCA}/v1.1.0/franca_vitb14_In21K_224.pth",
        *("franca_base_patch14_224", "i21k", _RAIL, 82.0),
    ),
    (
        f"{_FRANCA}/v1.0.0/franca_vitb14_In21K.pth",
        *("franca_base_patch14_518", "i21k", _RAIL, 82.6),
    ),
    (
        f"{_FRANCA}/v1.1.0/franca_vitl14_Laion600M_224.pth",
        *("franca_large_patch14_224", "laion600m", _RAIL, 84.5),
    ),
    (
        f"{_FRANCA}/v1.1.0/franca_vitl14_Laion_518.pth",
        *("franca_large_patch14_518", "laion600m", _RAIL, 85.2),
    ),
)


def _families() -> Iterator[Published]:
    """By the name of the repository; the model, too, is what its owner calls it."""
    for source, data, licence, classes, accuracy in _FAMILIES:
        owner, name = source.split("/")
        yield Published(
            name,
            name.split(".")[0] if owner == "timm" else source,
            data,
            published.fields_of(source)["image_size"][0],
            classes,
            "valid" if classes else "none",
            alternatives=(f"hf://{source}",),
            accuracy=accuracy,
            measured_by=("timm" if classes else "linear probe") if accuracy else "",
            licence=licence,
        )
    for address, model, data, licence, probe in _ADDRESSES:
        yield Published(
            f"{model}.{data}",
            model,
            data,
            published.fields_of(model)["image_size"][0],
            0,
            "none",
            alternatives=(address,),
            accuracy=probe,
            measured_by="linear probe",
            licence=licence,
        )


CATALOGUE = {p.id: p for p in (*_original(), *_augreg(), *_big_vision(), *_families())}
