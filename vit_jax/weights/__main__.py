# SPDX-License-Identifier: Apache-2.0
"""``python -m vit_jax.weights``: the published checkpoints, and what a file holds.

list [WORDS...]      table of the catalogue, filtered by words such as "B/16 384"
show ID_OR_FILE      everything known about a published checkpoint, or about a file
parse FILENAME       the hyper-parameters in an AugReg file name
"""

import dataclasses
from pathlib import Path

from vit_jax import cli
from vit_jax.errors import UserError
from vit_jax.weights import catalogue


def main(arguments: list[str]) -> int:
    command, *rest = arguments or ["list"]
    if command == "list":
        _list(" ".join(rest).lower().split())
    elif command == "show" and len(rest) == 1:
        _show(rest[0])
    elif command == "parse" and len(rest) == 1:
        for key, value in catalogue.parse_name(rest[0])._asdict().items():
            print(f"{key:<20} {value}")
    else:
        raise UserError(
            f"unknown command {' '.join(arguments)!r}: use `list [WORDS]`, `show ID_OR_FILE` "
            "or `parse FILENAME`"
        )
    return 0


def _list(words: list[str]) -> None:
    head = ("id", "model", "data", "pixels", "classes", "head", "top-1", "source")
    rows: list[tuple[str, ...]] = [head]
    for p in catalogue.CATALOGUE.values():
        row = (
            p.id,
            p.model,
            p.data,
            str(p.image_size),
            str(p.classes),
            p.head,
            f"{p.accuracy:.2f} ({p.measured_by})" if p.accuracy else "",
            p.sources[0],
        )
        if all(word in " ".join(row).lower() for word in words):
            rows.append(row)
    if len(rows) == 1:
        raise UserError(f"no published checkpoint matches {words}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        line = "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
        print(line.rstrip())
    print(f"\n{catalogue.BUCKET_NOTE}")


def _show(name: str) -> None:
    if name in catalogue.CATALOGUE:
        for key, value in dataclasses.asdict(catalogue.find(name)).items():
            text = ", ".join(value) if isinstance(value, tuple) else value
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
