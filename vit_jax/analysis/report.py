# SPDX-License-Identifier: Apache-2.0
"""Writes figures, the arrays behind them, and one HTML page that opens without a
network."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.analysis import figures
from vit_jax.errors import UserError

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }}
figure {{ margin: 2.5rem 0; }}
figure img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #555; }}
table {{ border-collapse: collapse; }}
td {{ padding: .15rem .8rem .15rem 0; vertical-align: top; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>{facts}</table>
{figures}
{omitted}
</body>
</html>
"""


def write(out: str | Path, name: str, arrays: Mapping[str, Any]) -> Path:
    """``name.png`` at print quality and ``name.npz`` in the folder ``out``; returns the
    picture's path.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = Path(out)
    path = folder / f"{name}.png"
    figure = figures.draw(name, arrays)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / f"{name}.npz", **arrays)
        figure.savefig(path, dpi=figures.DPI)
    except OSError as e:
        raise UserError(
            f"cannot write {path}: {e.strerror}; choose another --out"
        ) from e
    return path


def write_html(
    path: str | Path,
    title: str,
    facts: Mapping[str, Any],
    pictures: Sequence[Path],
    omitted: Mapping[str, str],
) -> Path:
    """One page with everything inside it.

    Args:
      path: of the page.
      title: its heading.
      facts: shown as a table.
      pictures: files called after their figure.
      omitted: why a figure is not there.
    """
    rows = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in facts.items()
    )
    blocks = []
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        text = html.escape(figures.caption(picture.stem))
        blocks.append(
            f'<figure id="{picture.stem}"><img alt="{text}" '
            f'src="data:image/png;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    notes = "".join(
        f"<p>Left out: {html.escape(k)} ({html.escape(v)})</p>"
        for k, v in omitted.items()
    )
    page = _PAGE.format(
        title=html.escape(title), facts=rows, figures="\n".join(blocks), omitted=notes
    )
    path = Path(path)
    try:
        path.write_text(page)
    except OSError as e:
        raise UserError(
            f"cannot write {path}: {e.strerror}; choose another --out"
        ) from e
    return path


def png(figure: Any) -> bytes:
    """The picture as bytes, for a notebook."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
