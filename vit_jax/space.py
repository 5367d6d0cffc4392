# SPDX-License-Identifier: Apache-2.0
"""The page of ``vit_jax.app`` as the files of a Hugging Face Space."""

import importlib.metadata
import json
import platform
import re
import shutil
from pathlib import Path

import vit_jax
from vit_jax import config_file, sharing, weights
from vit_jax.errors import UserError, check_local

APP = '''"""Serves the page: python app.py, then http://127.0.0.1:7860."""

import os

from vit_jax import app

app.serve("model.npz", host="0.0.0.0", port=int(os.environ.get("PORT", 7860)))
'''

# A Space runs as the user 1000, who may write to nothing but its home.
DOCKERFILE = """FROM python:{python}-slim
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt
COPY --chown=user . .
CMD ["python", "app.py"]
"""

README = """---
title: {quoted}
sdk: docker
app_port: 7860
{licence}---

# {title}

A photo goes in; its classes and what the model attends to come out. `python app.py` serves the
same page on your own machine, after `pip install -r requirements.txt`. Upload the folder
with `hf upload OWNER/NAME . --repo-type=space`.
"""


def write(
    source: str, folder: str, image_size: int = 0, licence: str = ""
) -> list[str]:
    """Writes a Space that shows ``source``: the page, this package, what it needs and the
    model. Returns what happened on the way, line by line.

    Args:
      source: anything that ``vit_jax.load`` takes.
      folder: to create.
      image_size: to resize the position embeddings to; 0: as they are.
      licence: of the weights, as the Hub calls it; "": the front matter has none.

    Raises:
      UserError: the folder exists or cannot be written, or wrong weights.
    """
    check_local(f"--space={folder}")
    to = Path(folder)
    if to.exists():
        raise UserError(f"--space={folder} exists: give a folder that does not")
    if licence:
        sharing.check_licence(licence)
    found = weights.read(source, image_size or None)
    texts = _texts(found, to.resolve().name, licence)
    try:
        to.mkdir(parents=True)
        notes = weights.save(to / "model.npz", found.cfg, found.params, found.metadata)
        _copy(Path(vit_jax.__file__).parent, to / "vit_jax")
        # Beside the package in a checkout.
        _copy(config_file.SHIPPED, to / "vit_jax" / "configs")
        for name, text in texts.items():
            (to / name).write_text(text, encoding="utf-8")
    except (OSError, UserError) as e:
        shutil.rmtree(to, ignore_errors=True)
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"--space={folder} cannot be written: {reason}") from e
    return [*found.report.changes, *found.report.warnings, *notes]


def _copy(source: Path, to: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, to, ignore=ignore, dirs_exist_ok=True)


def _texts(found: weights.Checkpoint, name: str, licence: str) -> dict[str, str]:
    title = f"{found.cfg.name or 'ViT'}: {name}"
    return {
        "app.py": APP,
        "requirements.txt": "\n".join([*_requirements(), ""]),
        "Dockerfile": DOCKERFILE.format(
            python=".".join(platform.python_version_tuple()[:2])
        ),
        "README.md": README.format(
            title=title,
            quoted=json.dumps(title, ensure_ascii=False),
            licence=f"license: {licence}\n" if licence else "",
        ),
    }


def _requirements() -> list[str]:
    """What this package needs at least, in the versions that it was seen working with:
    those that are installed."""
    try:
        lines = importlib.metadata.requires("vit_jax") or []
    except importlib.metadata.PackageNotFoundError as e:
        raise UserError(
            "--space: vit_jax is not installed, so that what it needs is not known: pip "
            "install it first"
        ) from e
    # What has a condition belongs to an extra.
    core = [re.match(r"([\w.-]+)(\[.*?\])?", line) for line in lines if ";" not in line]
    return [f"{m[0]}=={importlib.metadata.version(m[1])}" for m in core if m]
