# SPDX-License-Identifier: Apache-2.0
"""What a name stands for, what sizes are possible, and what follows from them."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from vit_jax.config import Config, ModelConfig, checked, nearest
from vit_jax.errors import UserError
from vit_jax.models import published
from vit_jax.models.sizes import RESNETS, SIZES, STEMS

_NAME = re.compile(
    r"(?:(?P<stem>R\d*)(?:x(?P<factor>[1-9]\d*))?[+_])?"
    r"(?:ViT[-_])?(?P<size>[a-z][a-z0-9-]*)[/_](?P<patch>[1-9]\d*)",
    re.IGNORECASE,
)
_DEFAULT = ModelConfig()
_RESNET = re.compile(r"(?P<stem>R\d+)x(?P<factor>[1-9]\d*)", re.IGNORECASE)


def resolve(cfg: ModelConfig) -> ModelConfig:
    """Fills in from its name what ``cfg`` leaves at the default, and checks the sizes.

    ``num_classes`` and ``image_size`` may stay 0: then the model returns what the head
    would read, and takes images of the size it first sees.
    ``resnet_width`` tells whether there is a ResNet: 0 afterwards means none.

    Raises:
      UserError: naming the field.
    """
    cfg = checked(Config(model=cfg)).model
    row = _fields_of(cfg.name) if cfg.name else {}
    unset = lambda field: getattr(cfg, field) == getattr(_DEFAULT, field)
    cfg = dataclasses.replace(cfg, **{k: v for k, v in row.items() if unset(k)})
    if cfg.resnet and not cfg.resnet_width:
        cfg = dataclasses.replace(cfg, resnet_width=1)
    if is_resnet(cfg):
        features = 256 * cfg.resnet_width * 2 ** (len(cfg.resnet) - 1)
        head = "gap" if cfg.head == "token" else cfg.head  # "token" is the default
        cfg = dataclasses.replace(cfg, width=features, head=head, patch=1)
    _check(cfg)
    return cfg


def names() -> list[str]:
    """Every name that is written out somewhere; any size goes with any patch."""
    found = [f"ViT-{size}/{patch}" for size in SIZES for patch in (14, 16, 32)]
    found += [f"{stem}+ViT-{size}/{patch}" for stem, patch in STEMS for size in SIZES]
    found += [f"{resnet}x{factor}" for resnet in RESNETS for factor in (1, 2, 3, 4)]
    return found + list(published.ARCHITECTURES)


def is_resnet(cfg: ModelConfig) -> bool:
    """Whether this is a ResNet baseline, without a Transformer."""
    return bool(cfg.resnet) and not cfg.depth


def has_stem(cfg: ModelConfig) -> bool:
    """Whether a ResNet comes before the patches, for a resolved ``cfg``."""
    return cfg.resnet_width > 0


def has_class_token(cfg: ModelConfig) -> bool:
    """Whether token 0 is the class token."""
    return cfg.class_token or cfg.head in ("token", "token_gap", "masked_patch")


def prefix_tokens(cfg: ModelConfig) -> int:
    """How many tokens come before those of the patches.

    They are, in this order, the class token, the distillation token and the registers;
    all but the registers have a position.
    """
    distillation = cfg.distillation != "none"
    return has_class_token(cfg) + distillation + cfg.registers


def token_grid(cfg: ModelConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches of a (height, width) image, for a resolved ``cfg``.

    The ResNet pads, so it rounds up; cutting patches drops an incomplete one.
    """
    rows, columns = (-(-n // _stem_stride(cfg)) // cfg.patch for n in image_size)
    return rows, columns


def token_stride(cfg: ModelConfig) -> int:
    """Pixels from one patch to the next, for a resolved ``cfg``."""
    return _stem_stride(cfg) * cfg.patch


def _stem_stride(cfg: ModelConfig) -> int:
    return 4 * 2 ** max(len(cfg.resnet) - 1, 0) if has_stem(cfg) else 1


def _fields_of(name: str) -> dict[str, Any]:
    """The fields that a name gives."""
    if match := _RESNET.fullmatch(name):
        stem = match["stem"].upper()
        if stem in RESNETS:
            return {"resnet": RESNETS[stem], "resnet_width": int(match["factor"])}
    elif match := _NAME.fullmatch(name):
        same = [s for s in SIZES if s.lower() == match["size"].lower()]
        if len(same) > 1:  # g and G, g-opt and G-opt: the case of the letter decides
            same = [s for s in same if s[0] == match["size"][0]]
        stem, patch = (match["stem"] or "").upper(), int(match["patch"])
        if same and not stem:
            return SIZES[same[0]]._asdict() | {"patch": patch}
        if same and (stem, patch) in STEMS:
            resnet, patch = STEMS[stem, patch]
            width = int(match["factor"] or 1)
            found = {"resnet": resnet, "resnet_width": width, "patch": patch}
            return SIZES[same[0]]._asdict() | found
    elif found := published.fields_of(name):
        return {k: v for k, v in found.items() if k != "image_size"}
    raise UserError(
        f"unknown model name {name!r}: {nearest(name, names())}a name is "
        f"'ViT-SIZE/PATCH' with SIZE one of {list(SIZES)}, a hybrid such as "
        f"{[f'{s}+ViT-B/{p}' for s, p in STEMS]}, a ResNet, one of {list(RESNETS)} "
        "with a width factor, such as 'R50x1', or what timm or Hugging Face call a "
        "plain ViT, such as 'vit_small_patch14_dinov2'"
    )


def _check(cfg: ModelConfig) -> None:
    """UserError for sizes that no model can have, naming the field."""

    def refuse(field: str, reason: str) -> None:
        value = getattr(cfg, field)
        raise UserError(f"config.model.{field} is {value!r}: {reason}")

    transformer = () if is_resnet(cfg) else ("depth", "mlp_dim", "heads")
    for field in ("width", *transformer, "patch"):
        if getattr(cfg, field) < 1:
            row = f"the name {cfg.name!r} does not give it" if cfg.name else "no name"
            refuse(field, f"it must be at least 1 ({row})")
    for field in ("dropout", "attention_dropout", "stochastic_depth"):
        if not 0 <= getattr(cfg, field) < 1:
            refuse(field, "it must be at least 0 and below 1")
    for field in ("image_mean", "image_std"):
        if len(getattr(cfg, field)) not in (0, cfg.channels):
            refuse(field, f"it must have config.model.channels={cfg.channels} entries")
    if is_resnet(cfg):
        for field in ("pre_logits", "dropout", "attention_dropout", "stochastic_depth"):
            if getattr(cfg, field):
                refuse(field, f"a ResNet baseline ({cfg.name!r}) has nothing like it")
        if cfg.axial:
            refuse("axial", f"a ResNet baseline ({cfg.name!r}) has no attention")
        if cfg.head != "gap":
            refuse("head", "a ResNet baseline only has 'gap'")
        return
    if cfg.width % cfg.heads:
        refuse("heads", f"it does not divide config.model.width {cfg.width}")
    if cfg.head == "map" and cfg.map_heads and cfg.width % cfg.map_heads:
        refuse("map_heads", f"it does not divide config.model.width {cfg.width}")
    if cfg.pre_logits and cfg.head in ("masked_patch", "token_gap"):
        refuse("pre_logits", f"the head {cfg.head!r} is one linear layer")
    if cfg.distillation != "none" and not has_class_token(cfg):
        refuse("distillation", "it comes after a class token, and there is none")
    if cfg.distillation == "head":
        plain = cfg.final_norm != "pooled" and not cfg.pre_logits
        if cfg.head != "token" or not plain:
            refuse("distillation", "its head is beside a plain config.model.head=token")
    _check_positions(cfg, refuse)


def _check_positions(cfg: ModelConfig, refuse: Callable[[str, str], None]) -> None:
    parts = {"learned2d": 2, "sincos2d": 4}.get(cfg.positions, 1)
    if cfg.width % parts:
        refuse("positions", f"{parts} does not divide config.model.width {cfg.width}")
    if cfg.positions in ("relative", "none") and cfg.position_at != "stem":
        refuse(
            "position_at", f"config.model.positions={cfg.positions} adds nothing there"
        )
    if cfg.relative_bias and prefix_tokens(cfg) != 1:
        refuse("relative_bias", "it is for patches after one class token")
    if cfg.axial and prefix_tokens(cfg):
        refuse("axial", "rows and columns are of patches alone, as with head='gap'")
    if cfg.axial and cfg.rope != "none":
        refuse("axial", f"config.model.rope={cfg.rope!r} is for all patches at once")
    if cfg.rope != "none" and cfg.width // cfg.heads % 4:
        size = f"{cfg.width} / {cfg.heads}"
        refuse("rope", f"4 does not divide the size of a head, {size}")
    if cfg.image_size != (0, 0) and min(token_grid(cfg, cfg.image_size)) < 1:
        size = token_stride(cfg)
        refuse("image_size", f"smaller than one patch, which is {size}x{size} pixels")
