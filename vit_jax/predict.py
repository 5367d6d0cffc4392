# SPDX-License-Identifier: Apache-2.0
"""``python -m vit_jax.predict SOURCE IMAGE... [--top=5] [--json]``: what is in the images.

SOURCE is anything that ``vit_jax.load`` takes. Class names and preprocessing come from
the checkpoint; where it states none, the official evaluation applies: the whole image
resized to the model's size, pixels in [-1, 1].
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from vit_jax import cli, models, weights
from vit_jax.errors import UserError
from vit_jax.weights import preprocessing
from vit_jax.weights.metadata import DEFAULT_TRANSFORMS

_BATCH = 16


def define_flags() -> None:
    flags.DEFINE_integer("top", 5, "How many classes to name per image.", lower_bound=1)
    flags.DEFINE_boolean("json", False, "One JSON object per image.")
    flags.DEFINE_integer(
        "image_size", 0, "Resize the position embeddings; 0: keep them."
    )
    flags.FLAGS.set_gnu_getopt()  # flags may follow the paths


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        raise UserError(
            "give a checkpoint and at least one image: python -m vit_jax.predict SOURCE "
            "IMAGE... [--top=5] [--json]"
        )
    source, *images = arguments
    options = flags.FLAGS
    for result in predict(source, images, options.top, options.image_size):
        if options.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
            continue
        print(result["image"])
        for entry in result["top"]:
            print(f"  {entry['probability']:8.2%}  {entry['class']}", flush=True)
    return 0


def predict(
    source: str, images: Sequence[str], top: int = 5, image_size: int = 0
) -> Iterator[dict[str, Any]]:
    """``{"image": path, "top": [{"class", "probability"}, ...]}`` for each image.

    Raises:
      UserError: an unreadable image (before the weights are read), or checkpoint.
    """
    _check_images(images)
    found = weights.read(source, image_size or None)
    for line in [*found.report.changes, *found.report.warnings]:
        print(f"{found.report.where}: {line}", file=sys.stderr)
    cfg = found.cfg
    if not cfg.num_classes or cfg.head not in ("token", "gap", "map"):
        raise UserError(
            f"{source} classifies nothing: it has "
            + ("no head" if not cfg.num_classes else f"the head {cfg.head!r}")
            + "; fine-tune it first (vit_jax.load_for_finetune)"
        )
    names = found.metadata.class_names or tuple(map(str, range(cfg.num_classes)))
    transforms = found.metadata.transforms or DEFAULT_TRANSFORMS
    model, params = models.create(cfg), jax.device_put(found.params)
    activation = jax.nn.sigmoid if found.metadata.multilabel else jax.nn.softmax

    @jax.jit
    def probabilities(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch)
        return activation(logits)

    for start in range(0, len(images), _BATCH):
        paths = images[start : start + _BATCH]
        batch = np.stack(
            [
                preprocessing.prepare(
                    preprocessing.read_image(Path(p), cfg.channels),
                    transforms,
                    cfg.image_size,
                )
                for p in paths
            ]
        )
        size = _BATCH if len(images) > _BATCH else len(images)  # one shape: one compile
        padding = [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)]
        values = np.asarray(probabilities(params, np.pad(batch, padding)))[: len(batch)]
        for path, p in zip(paths, values, strict=True):
            best = np.argsort(-p, kind="stable")[:top]
            yield {
                "image": path,
                "top": [{"class": names[i], "probability": float(p[i])} for i in best],
            }


def _check_images(images: Sequence[str]) -> None:
    """Every file that is no image at once, before minutes are spent on the weights."""
    bad = []
    for path in images:
        try:
            preprocessing.check_image(Path(path))
        except UserError as e:
            bad.append(str(e))
    if bad:
        raise UserError("; ".join(bad))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
