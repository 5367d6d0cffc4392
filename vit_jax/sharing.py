# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a repository of the Hugging Face Hub, with a card that says what it is."""

import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from vit_jax import config, weights, workdir
from vit_jax.config import Config
from vit_jax.errors import UserError, writing
from vit_jax.weights import hub

_FIGURES = (".png", ".jpg", ".jpeg", ".svg")


def share(
    source: str,
    dest: str,
    layout: str = "",
    image_size: int = 0,
    *,
    licence: str,
    figure: str = "",
    dry_run: str = "",
    private: bool = False,
    update: bool = False,
) -> tuple[str, list[str]]:
    """Uploads ``source`` to ``dest``.

    Args:
      source: whatever ``vit_jax.load`` takes; of a workdir the card tells the data, the
        recipe and the last evaluation.
      dest: ``hf://owner/name``.
      layout: of the weights: "hf", which "" means too, or "timm".
      image_size: to resize the position embeddings to; 0: as they are.
      licence: of the weights, as the Hub calls it.
      figure: an image file for the card; "": none.
      dry_run: a folder to write to instead; "": upload.
      private: whether a new repository is private.
      update: whether the repository may exist already.

    Returns:
      Where it is now, and what happened on the way, line by line.

    Raises:
      UserError: something of the above is wrong, or the Hub refuses.
    """
    repo = hub.new_repository(dest)
    layout = layout or "hf"
    _check(layout, licence, figure, dry_run)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        found = weights.read(source, image_size or None)
        file = folder if layout == "hf" else folder / "model.safetensors"
        notes = weights.save(file, found.cfg, found.params, found.metadata, layout)
        if figure:
            shutil.copyfile(figure, folder / f"figure{Path(figure).suffix.lower()}")
        (folder / "README.md").write_text(card(folder, repo, source, licence))
        where = dry_run or hub.upload(dest, folder, private, update)
        if dry_run:
            with writing(f"--dry_run={dry_run}"):  # shutil.Error is an OSError
                shutil.copytree(folder, dry_run)
    return where, [*found.report.changes, *found.report.warnings, *notes]


def _check(layout: str, licence: str, figure: str, dry_run: str) -> None:
    if layout not in ("hf", "timm"):
        raise UserError(f"--format={layout}: the Hub's layouts are hf and timm")
    check_licence(licence)
    if figure and not (_is_figure(figure) and Path(figure).is_file()):
        raise UserError(f"--figure={figure} must be a file {' '.join(_FIGURES)}")
    if dry_run and Path(dry_run).exists():
        raise UserError(f"--dry_run={dry_run} exists: give a folder that does not")


def check_licence(licence: str) -> None:
    """Raises: UserError: the Hub knows no licence of such a name."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise UserError(
            f"--licence={licence!r}: say under which licence others may use the weights, "
            "as the Hub calls it, for example apache-2.0, mit, cc-by-nc-4.0 or other"
        )


def card(folder: Path, repo: str, source: str, licence: str) -> str:
    """The model card, in Markdown.

    Args:
      folder: of the files that the repository will hold.
      repo: its owner/name.
      source: of the weights.
      licence: of the weights.
    """
    tags = ["tags: [vit_jax, vision-transformer]", "pipeline_tag: image-classification"]
    lines = ["---", f"license: {licence}", "library_name: vit_jax", *tags, "---", ""]
    lines += [f"# {repo.split('/')[1]}", ""]
    lines += [
        f"![]({p.name})\n" for p in sorted(folder.iterdir()) if _is_figure(p.name)
    ]
    lines += _use(folder, repo)
    run = workdir.stored_config(source)
    if run:
        lines += _data(source, run) + _recipe(run) + _metrics(source)
    else:
        shown = source if "://" in source else Path(source).name
        lines += ["## Origin", "", f"Converted by vit_jax from `{shown}`.", ""]
    return "\n".join([*lines, "## Licence", "", licence, ""])


def _use(folder: Path, repo: str) -> list[str]:
    lines = ["import vit_jax", "", f'model, params = vit_jax.load("hf://{repo}")']
    lines += ["logits = model.apply({'params': params}, images)  # of [-1, 1]"]
    text = folder / "config.json"
    names = json.loads(text.read_text()).get("architectures") if text.exists() else []
    if names:
        lines += ["", f"from transformers import {names[0]}", ""]
        lines += [f'model = {names[0]}.from_pretrained("{repo}")']
    return ["## Use", "", "```python", *lines, "```", ""]


def _data(source: str, run: Config) -> list[str]:
    try:
        about = json.loads((epath.Path(source) / "dataset.json").read_text())
        name = about["name"] or about["source"]
        counts = [about[k] for k in ("num_classes", "num_train", "num_test")]
        classes, train, test = (f"{n:,}" for n in counts)
        text = f"`{name}`: {classes} classes, {train} training and {test} test images."
    except (OSError, ValueError, LookupError, TypeError):
        text = f"`{run.data.name or run.data.source}`."
    return ["## Data", "", text, ""]


def _recipe(run: Config) -> list[str]:
    """What differs from the defaults."""
    changes = config.difference(Config(), run)
    values = _without_paths({k: new for k, (_, new) in changes.items()})
    if run.pretrained and "://" not in run.pretrained:
        values["pretrained"] = Path(run.pretrained).name
    lines = [f"{k} = {json.dumps(v)}" for k, v in values.items()]
    text = "Fields of `vit_jax.config.Config` that differ from their defaults:"
    return ["## Recipe", "", text, "", "```", *lines, "```", ""]


def _without_paths(value: Any) -> Any:
    """Where data lies on the machine that trained is nobody's business."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k.split(".")[-1] != "path"}
        return {k: _without_paths(v) for k, v in kept.items()}
    many = isinstance(value, (list, tuple))
    return [_without_paths(v) for v in value] if many else value


def _metrics(source: str) -> list[str]:
    rows = [m for m in workdir.read_metrics(source) if workdir.is_evaluation(m)]
    if not rows:
        return ["## Metrics", "", "Not evaluated.", ""]
    last = rows[-1]
    table = [
        f"| {name} | {value:.7g} |"
        for name, value in last.items()
        if name != "step" and math.isfinite(value)
    ]
    text = (
        f"After {last['step']:,} steps, by `python -m vit_jax.evaluate RUN` of the run:"
    )
    return ["## Metrics", "", text, "", "| metric | value |", "|---|---|", *table, ""]


def _is_figure(name: str) -> bool:
    return Path(name).suffix.lower() in _FIGURES
