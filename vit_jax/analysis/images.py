# SPDX-License-Identifier: Apache-2.0
"""Which photos to look at."""

from collections.abc import Iterable
from pathlib import Path

from vit_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")


def find(places: Iterable[str], count: int) -> list[Path]:
    """Image files among files and folders; of more than ``count``, evenly spaced ones.

    Raises:
      UserError: a place that does not exist, or no image at all.
    """
    found: list[Path] = []
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            found += sorted(
                p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS
            )
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--images names {place!r}, which does not exist")
    if not found:
        raise UserError(
            f"--images={','.join(places)} holds no images: it may name files and folders "
            f"with {', '.join(EXTENSIONS)}"
        )
    if len(found) > count:
        found = [found[i * len(found) // count] for i in range(count)]
    return found
