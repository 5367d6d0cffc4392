# SPDX-License-Identifier: Apache-2.0
"""What the figures are about: one checkpoint, and the images to show it."""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from vit_jax import data, inference, models, photos, weights, workdir
from vit_jax.analysis import attention
from vit_jax.config import DataConfig
from vit_jax.errors import UserError
from vit_jax.inference import Batch

# Images per step: one layer of B/16 attention is then 30 MB.
BATCH = 16


class Subject:
    """One checkpoint and the images to show it.

    Args:
      source: whatever ``vit_jax.load`` takes.
      places: image files and folders; (): images of the data set.
      data_cfg: the data set; None: that of the workdir ``source``, if it is one.
      count: how many images the attention figures use.
      seed: of the random choice of images.
    """

    def __init__(
        self,
        source: str,
        places: Sequence[str] = (),
        data_cfg: DataConfig | None = None,
        count: int = 128,
        seed: int = 0,
    ):
        if count < 1:
            raise UserError(f"--count={count}: give 1 or more images")
        self.source, self.places, self.count, self.seed = source, places, count, seed
        found = weights.read(source)
        found.report.log()
        self.model, self.params = models.create(found.cfg), found.params
        self.about = found.metadata
        self.name = found.cfg.name or "ViT"
        self.class_token = models.has_class_token(found.cfg)
        self.run = workdir.stored_config(source)
        self.data_cfg = data_cfg or (self.run.data if self.run else None)
        size = found.cfg.image_size
        side = self.data_cfg.image_size if self.data_cfg else 224
        self.size = size if any(size) else (side, side)

    def parameters(self) -> int:
        return sum(math.prod(np.shape(x)) for x in jax.tree.leaves(self.params))

    @functools.cached_property
    def predictor(self) -> inference.Predictor:
        return inference.create(self.model.cfg, self.params, devices=jax.devices()[:1])

    @functools.cached_property
    def images(self) -> np.ndarray:
        """At most ``count`` uint8 images (n, H, W, C): ``--images`` in order, or random
        ones of the test images.

        Raises:
          UserError: there are neither photos nor a data set.
        """
        if self.places:
            return np.stack([self._photo(p) for p in self.photos()])
        if self.data_cfg is None:
            raise UserError(
                "needs images: name photos with --images, or a data set with --config"
            )
        # The first ones of a folder are all of one class.
        total = data.describe(self.data_cfg).num_test
        order = np.random.default_rng(self.seed).permutation(total)
        chosen = np.sort(order[: self.count])
        found, passed = [], 0
        for batch in self.labelled():
            real = to_uint8(np.asarray(batch["image"])[np.asarray(batch["mask"]) > 0])
            here = chosen[(passed <= chosen) & (chosen < passed + len(real))] - passed
            found.append(real[here])
            passed += len(real)
            if passed > chosen[-1]:
                break
        return np.concatenate(found)

    def photos(self) -> list[str]:
        """Of more than ``count`` photos, evenly spaced ones."""
        found = photos.find(self.places, "--images: ")
        count = min(self.count, len(found))
        return [found[i * len(found) // count] for i in range(count)]

    def _photo(self, place: str) -> np.ndarray:
        """uint8 pixels as the checkpoint's preprocessing cuts them."""
        image = photos.read(place, self.model.cfg.channels)
        return to_uint8(photos.prepare(image, self.about, self.size))

    def sees_grey(self) -> bool:
        """Whether the images, where there are any, are grey pictures in colour."""
        try:
            shown = self.images
        except UserError:
            return False
        return shown.shape[-1] == 3 and bool((shown == shown[..., :1]).all())

    def labelled(self) -> Iterator[Batch]:
        """The test images with their labels.

        Raises:
          UserError: no data set belongs to the checkpoint, or images of another size.
        """
        if self.data_cfg is None:
            raise UserError("needs images with labels: name a data set with --config")
        if self.size != (self.data_cfg.image_size,) * 2:
            raise UserError(
                f"the images of the data set are {self.data_cfg.image_size} pixels wide, "
                f"but the model takes {self.size[0]}x{self.size[1]}: set "
                "--config.data.image_size"
            )
        return self.predictor.batches(self.data_cfg, "test", BATCH)

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Of the model's outputs; numbers where nothing names them.

        Raises:
          UserError: the model has no classes, or another number than the data set.
        """
        cfg = self.model.cfg
        if not cfg.num_classes or cfg.head in ("none", "masked_patch"):
            raise UserError("the checkpoint has no classes")
        if self.about.class_names or self.data_cfg is None:
            return self.about.class_names or tuple(map(str, range(cfg.num_classes)))
        names = data.describe(self.data_cfg).class_names
        if len(names) != cfg.num_classes:
            raise UserError(
                f"the data set has {len(names)} classes, the checkpoint {cfg.num_classes}"
            )
        return names

    def probabilities(self, logits: jax.Array | np.ndarray) -> np.ndarray:
        activation = jax.nn.sigmoid if self.about.multilabel else jax.nn.softmax
        return np.asarray(activation(logits.astype(np.float32)))

    def predicted(self, shown: np.ndarray) -> list[str]:
        """``cat 93%`` for each of some images; [] if the model has no classes."""
        try:
            names = self.class_names
        except UserError:
            return []
        found = []
        for start in range(0, len(shown), BATCH):
            part = shown[start : start + BATCH]
            p = self.probabilities(self.predictor(part)["logits"])
            found += [
                f"{names[i]} {q:.0%}"
                for i, q in zip(p.argmax(1), p.max(1), strict=True)
            ]
        return found

    @functools.cached_property
    def summary(self) -> attention.Summary:
        """Attention of the images."""
        model, params = attention.unrolled(self.model, self.params)
        shown = self.images
        parts = (shown[i : i + BATCH] for i in range(0, len(shown), BATCH))
        return attention.summarize(model, params, parts, batch=BATCH)

    def patch_tokens(self, shown: np.ndarray) -> np.ndarray:
        """Tokens (n, h, w, D) float32 of the patches, after the last norm."""
        function = functools.partial(inference.vectors, pooling="none")
        devices = jax.devices()[:1]
        tokens = inference.create(self.model.cfg, self.params, devices, function)
        return np.concatenate([tokens(x[None]) for x in shown])


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as pixels."""
    if x.dtype == np.uint8:
        return x
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)
