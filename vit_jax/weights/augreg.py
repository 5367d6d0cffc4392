# SPDX-License-Identifier: Apache-2.0
"""What the file names of "How to train your ViT?" (arXiv 2106.10270) say."""

import re
from typing import Any, NamedTuple

from vit_jax.errors import UserError


class AugReg(NamedTuple):
    """The settings in a file name."""

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
