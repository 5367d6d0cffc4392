# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of the paper for a checkpoint, and those of its run.

    python -m vit_jax.analysis SOURCE --out=DIR [--images=photo.jpg,folder] [--html]

SOURCE is whatever ``vit_jax.load`` takes. Each figure is a PNG with an ``.npz`` of the
arrays behind it. Images come from ``--images``, else from the test split of
``--config`` or of the config in the workdir; what cannot be drawn is left out with a
line that says why.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from vit_jax import cli, config, models, weights
from vit_jax.analysis import attention, embeddings, figures, images, report, runs
from vit_jax.config import DataConfig
from vit_jax.errors import UserError
from vit_jax.weights import preprocessing
from vit_jax.weights.metadata import DEFAULT_TRANSFORMS

CHOSEN = 6  # images of the rollout figure, as in Figure 6
GRID = 64  # random images of the rollout grid, as in Figure 14
BATCH = 16  # images per step: one layer of B/16 attention is then 30 MB


@dataclasses.dataclass
class Analysis:
    """One checkpoint and the images to show it."""

    source: str
    out: str
    places: tuple[str, ...] = ()  # --images
    data: DataConfig | None = None
    count: int = 128
    seed: int = 0
    only: tuple[str, ...] = ()

    def __post_init__(self):
        for name in self.only:
            config.choose("figure in --only", name, figures.FIGURES)
        if self.count < 1:
            raise UserError(f"--count={self.count}: give 1 or more images")
        found = weights.read(self.source)
        found.report.log()
        self.model, self.params = models.create(found.cfg), found.params
        self.about = found.metadata
        self.workdir = Path(self.source) if _is_workdir(self.source) else None
        if self.data is None and self.workdir:
            self.data = config.read(self.workdir / "config.json").data
        size = self.model.cfg.image_size
        if size == (0, 0):
            side = self.data.image_size if self.data else 224
            size = (side, side)
        self.size = size

    def arrays(self, name: str) -> dict[str, Any]:
        """The arrays of one figure. Raises: UserError: why there is none."""
        return _ARRAYS[name](self)

    def batches(self) -> Iterator[np.ndarray]:
        """``count`` uint8 images, in arrays: ``--images`` in order, or random ones of
        the data set."""
        if self.places:
            paths = images.find(self.places, self.count)
            for start in range(0, len(paths), BATCH):
                yield np.stack([self._read(p) for p in paths[start : start + BATCH]])
            return
        if self.data is None:
            raise UserError(
                "needs images: name photos with --images, or a data set with --config"
            )
        batches = self.labelled()
        passed, chosen = 0, self._random_positions()
        for batch in batches:
            real = to_uint8(batch["image"][batch["mask"] > 0])
            here = chosen[(passed <= chosen) & (chosen < passed + len(real))] - passed
            if len(here):
                yield real[here]
            passed += len(real)
            if passed > chosen[-1]:
                return

    def _random_positions(self) -> np.ndarray:
        """Which test images are looked at, in order: the first ones of a folder are all
        of one class."""
        from vit_jax import data

        assert self.data is not None
        total = data.describe(self.data).num_test
        count = min(self.count, total)
        return np.sort(np.random.default_rng(self.seed).permutation(total)[:count])

    def _read(self, path: Path) -> np.ndarray:
        """uint8 pixels as the checkpoint's preprocessing cuts them. Raises: UserError:
        no image."""
        image = preprocessing.read_image(path, self.model.cfg.channels)
        ops = [t for t in self.about.transforms if t["op"] != "normalize"]
        cut = preprocessing.prepare(image, ops or DEFAULT_TRANSFORMS, self.size)
        return to_uint8(cut)

    def check_images(self) -> None:
        """Raises: UserError: a photo does not decode, which is an error and not a
        figure left out."""
        for path in images.find(self.places, self.count):
            preprocessing.check_image(path)

    def labelled(self) -> Iterator[dict[str, np.ndarray]]:
        """Test images with labels, of the data set that belongs to the checkpoint."""
        if self.data is None:
            raise UserError("needs images with labels: name a data set with --config")
        if self.size != (self.data.image_size,) * 2:
            raise UserError(
                f"the images of the data set are {self.data.image_size} pixels wide, but the "
                f"model takes {self.size[0]}x{self.size[1]}: set --config.data.image_size"
            )
        from vit_jax import data

        return data.eval_batches(self.data, batch=BATCH)

    def summary(self) -> tuple[attention.Summary, np.ndarray]:
        """Attention of ``count`` images, and the images; computed once."""
        if not hasattr(self, "_summary"):
            kept: list[np.ndarray] = []
            prepared = (self._keep(b, kept) for b in self.batches())
            model, params = attention.unrolled(self.model, self.params)
            summary = attention.summarize(model, params, prepared, batch=BATCH)
            self._summary = summary, np.concatenate(kept)
        return self._summary

    def _keep(self, batch: np.ndarray, kept: list[np.ndarray]) -> np.ndarray:
        kept.append(batch)
        return images.to_input(batch, self.about.transforms)

    def probabilities(self) -> Callable[[np.ndarray], np.ndarray]:
        """uint8 images -> probabilities (b, K)."""
        multilabel = self.about.multilabel

        @jax.jit
        def forward(params: Any, x: jax.Array) -> jax.Array:
            x = attention.normalized(x)
            logits: Any = self.model.apply({"params": params}, x)
            return jax.nn.sigmoid(logits) if multilabel else jax.nn.softmax(logits)

        return lambda x: np.asarray(
            forward(self.params, images.to_input(x, self.about.transforms))
        )

    def errors(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Confusion matrix and errors over the test split; computed once."""
        if not hasattr(self, "_errors"):
            cfg = self.model.cfg
            if not cfg.num_classes or cfg.head == "masked_patch":
                raise UserError("the checkpoint has no classes")
            batches = self.labelled()
            names = self.about.class_names or self._class_names()
            self._errors = runs.find_errors(self.probabilities(), batches, names)
        return self._errors

    def _class_names(self) -> tuple[str, ...]:
        from vit_jax import data

        assert self.data is not None
        names = data.describe(self.data).class_names
        if len(names) != self.model.cfg.num_classes:
            raise UserError(
                f"the data set has {len(names)} classes, the checkpoint "
                f"{self.model.cfg.num_classes}"
            )
        return names


def _filters(a: Analysis) -> dict[str, Any]:
    kernel, _ = embeddings.first_filters(a.params)
    components, share = embeddings.filter_components(kernel)
    return {"components": components, "share": share}


def _positions(a: Analysis) -> dict[str, Any]:
    table = embeddings.position_table(a.model, a.params, a.size)
    return {"similarity": embeddings.position_similarity(table)}


def _distance(a: Analysis) -> dict[str, Any]:
    summary, shown = a.summary()
    uniform = attention.patch_distances(*attention.geometry(a.model, a.size)).mean()
    return {"distance": summary.distance, "uniform": uniform, "images": len(shown)}


def _rollout(a: Analysis) -> dict[str, Any]:
    """The first images of ``--images``; of a data set, those whose attention is most
    concentrated."""
    summary, shown = a.summary()
    if a.places:
        chosen = np.arange(min(CHOSEN, len(shown)))
    else:
        flat = summary.maps.reshape(len(shown), -1)
        p = flat / flat.sum(1, keepdims=True)
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(1)
        chosen = np.sort(entropy.argsort()[:CHOSEN])
    return {"images": shown[chosen], "maps": summary.maps[chosen]}


def _rollout_grid(a: Analysis) -> dict[str, Any]:
    summary, shown = a.summary()
    count = min(GRID, len(shown))
    chosen = random.Random(a.seed).sample(range(len(shown)), count)
    return {"images": shown[chosen], "maps": summary.maps[chosen]}


def _heads(a: Analysis) -> dict[str, Any]:
    image = a.summary()[1][:1]
    model, params = attention.unrolled(a.model, a.params)
    w = attention.capture(model, params, images.to_input(image, a.about.transforms))
    grid, _ = attention.geometry(model, a.size)
    return {"image": image[0], "maps": np.asarray(attention.token_map(w[:, 0], grid))}


def _curves(a: Analysis) -> dict[str, Any]:
    if a.workdir is None:
        raise UserError("the source is not a workdir, so there is no log of a run")
    return runs.read_curves(a.workdir)


def _confusion(a: Analysis) -> dict[str, Any]:
    matrix = a.errors()[0]
    if len(matrix["class_names"]) > 1000:
        raise UserError(f"{len(matrix['class_names'])} classes are too many to show")
    return matrix


def _wrong(a: Analysis) -> dict[str, Any]:
    shown = a.errors()[1]
    if not len(shown["images"]):
        raise UserError("there are no errors: every test image is right")
    return shown


_ARRAYS: dict[str, Callable[[Analysis], dict[str, Any]]] = {
    "filters": _filters,
    "positions": _positions,
    "distance": _distance,
    "rollout": _rollout,
    "rollout_grid": _rollout_grid,
    "heads": _heads,
    "curves": _curves,
    "confusion": _confusion,
    "errors": _wrong,
}


def analyse(
    source: str,
    out: str,
    *,
    places: tuple[str, ...] = (),
    data: DataConfig | None = None,
    count: int = 128,
    seed: int = 0,
    only: tuple[str, ...] = (),
    html: bool = False,
) -> dict[str, str]:
    """Writes every figure that the checkpoint allows; returns why the others are left
    out.

    Args:
      source: of the weights.
      out: folder.
      places: image files and folders.
      data: the data set, where ``source`` is not a workdir that knows it.
      count: images for the attention figures.
      seed: of the random choice of images.
      only: names of figures; (): all.
      html: write ``report.html`` as well.
    """
    analysis = Analysis(source, out, places, data, count, seed, only)
    if places:
        analysis.check_images()
    pictures, omitted = [], {}
    for name in only or figures.FIGURES:
        try:
            arrays = analysis.arrays(name)
        except UserError as e:
            omitted[name] = str(e)
            print(f"left out {name}: {e}")
            continue
        pictures.append(report.write(out, name, arrays))
        print(f"wrote {pictures[-1]}")
    if html:
        page = Path(out) / "report.html"
        title = f"Analysis of {Path(source).name}"
        report.write_html(page, title, analysis_facts(analysis), pictures, omitted)
        print(f"wrote {page}")
    return omitted


def analysis_facts(a: Analysis) -> dict[str, Any]:
    """What the report says about the model."""
    c = a.model.cfg
    size = sum(math.prod(np.shape(x)) for x in jax.tree.leaves(a.params))
    facts = {"source": a.source, "model": c.name or "ViT", "parameters": f"{size:,}"}
    facts["images"] = f"{a.size[0]} x {a.size[1]}"
    if c.depth:
        grid, patch = attention.geometry(a.model, a.size)
        facts["patches"] = f"{grid[0]} x {grid[1]} of {patch} pixels"
        facts["layers, heads, width"] = f"{c.depth}, {c.heads}, {c.width}"
    return facts


def _is_workdir(source: str) -> bool:
    return "://" not in source and (Path(source) / "checkpoints").is_dir()


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] as pixels."""
    if x.dtype == np.uint8:
        return x
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        raise UserError(
            f"expected one SOURCE, got {argv}: python -m vit_jax.analysis SOURCE --out=DIR"
        )
    f = flags.FLAGS
    if not f.out:
        raise UserError("--out is missing: give the folder for the figures")
    data = None if f.config is None else cli.read_config().data
    analyse(
        argv[0], f.out, places=tuple(f.images), data=data, count=f.count, seed=f.seed,
        only=tuple(f.only), html=f.html,
    )  # fmt: skip
    return 0


def define_flags() -> None:
    flags.DEFINE_string("out", "", "Folder for the figures.")
    flags.DEFINE_list("images", [], "Image files and folders, separated by commas.")
    flags.DEFINE_integer("count", 128, "How many images the attention figures use.")
    flags.DEFINE_integer("seed", 0, "Of the random choice of images.")
    flags.DEFINE_list("only", [], "Names of figures to draw; all of them if not given.")
    flags.DEFINE_bool(
        "html", False, "Write report.html, one page with everything in it."
    )
    cli.define_config_flag()


if __name__ == "__main__":
    define_flags()
    cli.run(main)
