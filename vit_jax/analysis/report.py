# SPDX-License-Identifier: Apache-2.0
"""Writes figures, the arrays behind them, and one HTML page that opens without a
network."""

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.analysis import figures
from vit_jax.analysis.drawing import DPI
from vit_jax.errors import writing

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
figure img {{ width: 100%; height: auto; }}
figcaption {{ color: #555; }}
table {{ border-collapse: collapse; }}
td {{ padding: .15rem .8rem .15rem 0; vertical-align: top; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: .8rem; font-size: .8rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>{facts}</table>
<nav>
<h2>Contents</h2>
<ul>{contents}</ul>
</nav>
{figures}
{omitted}
{texts}
</body>
</html>
"""


def write(out: str | Path, name: str, arrays: Mapping[str, Any]) -> Path:
    """``name.png`` at print quality and ``name.npz`` in the folder ``out``; returns the
    picture's path.

    Raises:
      UserError: the folder cannot be written.
    """
    path = Path(out) / f"{name}.png"
    figure = figures.draw(name, arrays)
    with writing(f"--out={out}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path.with_suffix(".npz"), **arrays)
        figure.savefig(path, dpi=DPI)
    return path


def write_html(
    path: Any,
    title: str,
    facts: Mapping[str, Any],
    pictures: Mapping[Path, str],
    omitted: Mapping[str, str],
    texts: Mapping[str, str],
) -> Path:
    """One page with everything inside it.

    Args:
      path: of the page.
      title: its heading.
      facts: shown as a table.
      pictures: captions of files called after their figure.
      omitted: why a figure is not there.
      texts: shown as they are, below their names.
    """
    escape = lambda value: html.escape(str(value))
    rows = [
        f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts.items()
    ]
    links = {p.stem: p.stem.replace("_", " ") for p in pictures}
    blocks = []
    for picture, caption in pictures.items():
        text = escape(caption)
        content = base64.b64encode(picture.read_bytes()).decode()
        blocks.append(
            f'<figure id="{picture.stem}"><h2>{links[picture.stem]}</h2>'
            f'<img alt="{text}" src="data:image/png;base64,{content}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    texts = {k: v for k, v in texts.items() if v}
    links |= {k: k for k in texts}
    page = _PAGE.format(
        title=escape(title),
        facts="".join(rows),
        contents="".join(f'<li><a href="#{k}">{v}</a></li>' for k, v in links.items()),
        figures="\n".join(blocks),
        omitted="".join(
            f"<p>Left out: {escape(k)} ({escape(v)})</p>" for k, v in omitted.items()
        ),
        texts="\n".join(
            f'<h2 id="{k}">{k}</h2><pre>{escape(v)}</pre>' for k, v in texts.items()
        ),
    )
    path = Path(path)
    with writing(f"--out={path.parent}"):
        path.write_text(page)
    return path
