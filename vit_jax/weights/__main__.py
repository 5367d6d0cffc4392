# SPDX-License-Identifier: Apache-2.0
"""``python -m vit_jax.weights``: the published checkpoints, and what a file holds.

list [WORDS...]      table of the catalogue, filtered by words such as "B/16 384" or
                     patterns such as "ViT-S/*"
show ID_OR_FILE      everything known about a published checkpoint, or about a file
parse FILENAME       the hyper-parameters in an AugReg file name
"""

import dataclasses
import textwrap
from pathlib import Path

from vit_jax import cli
from vit_jax.errors import UserError
from vit_jax.weights import augreg, catalogue


def main(arguments: list[str]) -> int:
    command, *rest = arguments or ["list"]
    if command == "list":
        _list(" ".join(rest))
    elif command == "show" and len(rest) == 1:
        _show(rest[0])
    elif command == "parse" and len(rest) == 1:
        for key, value in augreg.parse_name(rest[0])._asdict().items():
            print(f"{key:<20} {value}")
    else:
        raise UserError(
            f"unknown command {' '.join(arguments)!r}: use `list [WORDS]`, `show ID_OR_FILE` "
            "or `parse FILENAME`"
        )
    return 0


def _list(pattern: str) -> None:
    """A table for a terminal of 80 columns."""
    rows = [("id", "pixels", "outputs", "top-1")]
    for p in catalogue.matching(pattern):
        outputs = {"none": "features", "zeroed": f"{p.classes} (zeroed)"}
        accuracy = f"{p.accuracy:.2f}" if p.accuracy else ""
        shown = outputs.get(p.head, str(p.classes))
        rows.append((p.id, str(p.image_size), shown, accuracy))
    if len(rows) == 1:
        raise UserError(
            f"no published checkpoint matches {pattern!r}: give words of an id or model, "
            'or a pattern such as "ViT-S/*"'
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
        print(line.rstrip())
    print(f"\n{textwrap.fill(catalogue.BUCKET_NOTE, 80)}")


def _show(name: str) -> None:
    if name in catalogue.CATALOGUE:
        for key, value in dataclasses.asdict(catalogue.find(name)).items():
            text = ", ".join(value) if isinstance(value, tuple) else value
            if text or key == "classes":  # what is not known is left out
                print(f"{key:<14} {text}")
        return
    if "/" not in name and "." not in name and not Path(name).exists():
        catalogue.find(name)
    from vit_jax import weights

    found = weights.read(name)
    for key, value in dataclasses.asdict(found.cfg).items():
        print(f"{key:<18} {value}")
    print(f"{'class names':<18} {len(found.metadata.class_names) or 'not in the file'}")
    for line in found.report.lines:
        print(line)


if __name__ == "__main__":
    cli.run(main)
