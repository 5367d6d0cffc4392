# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of the paper for a checkpoint, and those of its run.

    python -m vit_jax.analysis SOURCE --out=DIR [--images=photo.jpg,folder] [--html]

SOURCE is whatever ``vit_jax.load`` takes. Each figure is a PNG with an ``.npz`` of the
arrays behind it. Images come from ``--images``, else from the test split of
``--config`` or of the config in the workdir; what cannot be drawn is left out with a
line that says why.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vit_jax import cli, config, photos
from vit_jax.analysis import attention, figures, report
from vit_jax.analysis.subject import Subject
from vit_jax.config import DataConfig
from vit_jax.errors import UserError
from vit_jax.workdir import read_metrics


def analyse(
    source: str,
    out: str,
    *,
    places: Sequence[str] = (),
    data: DataConfig | None = None,
    count: int = 128,
    seed: int = 0,
    only: Sequence[str] = (),
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
    for name in only:
        config.choose("figure in --only", name, figures.FIGURES)
    subject = Subject(source, places, data, count, seed)
    # A photo that does not decode is an error and not a figure left out.
    if wrong := photos.check(subject.photos() if places else ()):
        raise UserError("; ".join(wrong.values()))
    pictures, omitted = [], {}
    for name in only or figures.FIGURES:
        try:
            arrays = figures.FIGURES[name].arrays(subject)
        except UserError as e:
            omitted[name] = str(e)
            print(f"left out {name}: {e}")
            continue
        pictures.append(report.write(out, name, arrays))
        print(f"wrote {pictures[-1]}")
    if html:
        title = f"Analysis of {Path(source).name}"
        stored = (
            json.dumps(config.to_dict(subject.run), indent=2) if subject.run else ""
        )
        page = report.write_html(
            Path(out) / "report.html", title, facts(subject),
            {p: figures.caption(p.stem) for p in pictures}, omitted, {"config": stored},
        )  # fmt: skip
        print(f"wrote {page}")
    return omitted


def facts(subject: Subject) -> dict[str, Any]:
    """What the report says first."""
    c = subject.model.cfg
    found: dict[str, Any] = {}
    if subject.run:
        for row in read_metrics(subject.source):
            tested = [k for k in row if k.endswith("/accuracy") and k[:6] != "train/"]
            found |= {k: f"{row[k]:.2%} at step {row['step']:,}" for k in tested}
    found |= {
        "drawn": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "source": subject.source,
        "model": subject.name,
        "parameters": f"{subject.parameters():,}",
        "images": f"{subject.size[0]} x {subject.size[1]}",
    }
    if c.depth:
        grid, patch = attention.geometry(subject.model, subject.size)
        found["patches"] = f"{grid[0]} x {grid[1]} of {patch} pixels"
        found["layers, heads, width"] = f"{c.depth}, {c.heads}, {c.width}"
    return found


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
