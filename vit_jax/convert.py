# SPDX-License-Identifier: Apache-2.0
"""``python -m vit_jax.convert SOURCE DEST``: any checkpoint to a layout others read.

DEST says which: ``x.npz`` has the released names (readable by the official code), with
class names and preprocessing in ``x.json``; ``x.safetensors`` is for timm; a folder for
Hugging Face. ``--format`` says otherwise: ``timm`` with a folder adds the ``config.json``
from which timm builds the model, and ``own`` keeps the names of the family that SOURCE is
of, whoever uses them. The weights are the same bits in each.

    python -m vit_jax.convert RUN hf://OWNER/NAME --licence=apache-2.0

uploads such a folder with a model card; ``--dry_run=DIR`` writes it there instead.

    python -m vit_jax.convert SOURCE --space=DIR

writes the page of ``vit-jax app`` as the files of a Hugging Face Space.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vit_jax import cli, sharing, space, weights
from vit_jax.errors import UserError
from vit_jax.weights import export


def define_flags() -> None:
    flags.DEFINE_string(
        "format",
        "",
        "own (the names that SOURCE has), npz, timm or hf; otherwise by the name of DEST.",
    )
    flags.DEFINE_string(
        "licence",
        "",
        "hf://, --space: of the weights, as the Hub calls it: apache-2.0, other.",
    )
    flags.DEFINE_string("figure", "", "hf://: an image for the model card.")
    flags.DEFINE_string("dry_run", "", "hf://: write to this folder; upload nothing.")
    flags.DEFINE_bool("private", False, "hf://: create a private repository.")
    flags.DEFINE_string("space", "", "Folder to write a Space to, instead of DEST.")
    flags.DEFINE_bool("update", False, "hf://: the repository may exist already.")
    cli.define_image_size_flag()


def main(arguments: list[str]) -> int:
    f = flags.FLAGS
    if len(arguments) != (1 if f.space else 2):
        raise UserError(
            f"give SOURCE and DEST, or SOURCE and --space, not {len(arguments)} arguments: "
            "python -m vit_jax.convert SOURCE DEST [--format=own|npz|timm|hf] "
            "[--image_size=N]"
        )
    source, dest = arguments[0], f.space or arguments[1]
    upload = ("figure", "dry_run", "private", "update")
    where = dest
    if f.space:
        _refuse(("format", *upload), "is of no use with --space")
        lines = space.write(source, dest, f.image_size, f.licence)
    elif dest.startswith("hf://"):
        chosen: dict[str, Any] = {name: f[name].value for name in ("licence", *upload)}
        where, lines = sharing.share(source, dest, f.format, f.image_size, **chosen)
    else:
        _refuse(("licence", *upload), f"is for DEST=hf://OWNER/NAME, not {dest}")
        lines = convert(source, dest, f.format, f.image_size)
    for line in lines:
        print(line, file=sys.stderr)
    print(f"wrote {where}")
    return 0


def _refuse(names: Sequence[str], why: str) -> None:
    if given := [f"--{name}" for name in names if flags.FLAGS[name].value]:
        raise UserError(f"{' '.join(given)} {why}")


def convert(source: str, dest: str, layout: str = "", image_size: int = 0) -> list[str]:
    """Writes ``source`` as ``dest``; returns what happened on the way, line by line.

    Raises:
      UserError: ``dest`` exists, what ``source`` holds does not fit, or the layout of
        ``dest`` has no such model.
    """
    if "://" in dest:
        raise UserError(f"{dest}: DEST is a local path, or hf://OWNER/NAME to upload")
    to = Path(dest)
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        raise UserError(f"{dest} exists: remove it, or choose another DEST")
    layout = layout or export.layout_of(to)  # before anything is read
    found = weights.read(source, image_size or None)
    notes = weights.save(dest, found.cfg, found.params, found.metadata, layout)
    return [*found.report.changes, *found.report.warnings, *notes]


if __name__ == "__main__":
    define_flags()
    cli.run(main)
