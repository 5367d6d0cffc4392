# SPDX-License-Identifier: Apache-2.0
"""From an opened file to arrays under our names, and all that is known of its model."""

import dataclasses
import re
from typing import Any

from vit_jax.weights import (
    documents,
    layout,
    metadata,
    positions,
    recognise,
    roles,
    sources,
    timm_config,
)
from vit_jax.weights.contents import (
    Array,
    Contents,
    Metadata,
    count_up,
    in_memory,
)
from vit_jax.weights.families import BY_NAME
from vit_jax.weights.infer import Facts, guess_heads
from vit_jax.weights.layout import POSITIONS
from vit_jax.weights.report import Report

# Stands among the names of a file's arrays where its position table has no row for the
# class token.
PATCHES_ONLY = "positions of patches only"
# And where it has rows for the registers, which are folded into them.
OF_REGISTERS = "positions of registers too"


def understand(
    contents: Contents,
    tree: str,
    asked: dict[str, Any],
    report: Report,
    size: tuple[int, int] = (0, 0),
) -> tuple[dict[str, Array], Facts, Metadata]:
    """Arrays under the released names, what is known of the model, and what travels along.

    Args:
      contents: of the file.
      tree: which subtree to read, as in ``file.npz:img``; "": found.
      asked: fields of ModelConfig that the caller states.
      report: told what was renamed, folded, ignored and assumed.
      size: (height, width) of the caller's images; (0, 0): not said.

    Raises:
      UserError: it is not a Vision Transformer, or of a family that is not known here.
    """
    for note in contents.notes:
        report.change(note)
    if not contents.torch:
        arrays = layout.canonical(contents.arrays, tree, report)
        about = contents.metadata
        about = dataclasses.replace(about, resize=about.resize or "corners")
        return arrays, Facts(about.model, asked, {}, report, size), about
    about, found = describe(contents)
    family = found.family
    facts = Facts(about.model, asked, family.model, report, size)
    numbers = {name.rpartition(".")[2] for name in contents.arrays}
    if "input_resolution" in numbers and not contents.files:
        facts.stated["gelu"] = "quick"  # only OpenAI's own files have these numbers
    sizes = _sizes(found, contents, facts, report)
    arrays, names = recognise.convert(found, contents.arrays, sizes, report)
    if family.waves and "positions" not in found.names:
        arrays[POSITIONS] = _native(found, arrays, facts)
    if facts.stated.get("final_norm") == "none":  # though the file may have one
        last = [name for name in arrays if "encoder_norm" in name]
        for name in last:
            report.change(
                f"ignored: {arrays.pop(name).name} (the head does not read it)"
            )
    about = dataclasses.replace(
        about,
        transforms=about.transforms or timm_config.crops(None, family.crop),
        family=about.family or family.name,
        arrays=about.arrays or names,
        resize=about.resize or family.resize,
    )
    return arrays, facts, about


def metadata_of(source: str) -> Metadata:
    """Class names and preprocessing.

    Where they lie beside the weights (a workdir, the ``.json`` beside an ``.npz``, the
    ``config.json`` of a Hugging Face folder), no weights are read or downloaded. Else
    they are in the weights' own file, which is downloaded, and of which the table of
    arrays is read.

    Raises:
      UserError: as for ``sources.open_source``.
    """
    name, _ = sources.split(source)
    if not sources.in_bucket(name):
        path = sources.local(name, weights=False)
        folder = path if path.is_dir() else path.parent
        if (path / "checkpoints").is_dir() and (path / "config.json").is_file():
            return metadata.of_workdir(path)
        if path.suffix == ".npz" and metadata.sidecar(path).is_file():
            return metadata.of_npz(path)
        if name.startswith("hf://") and (folder / "config.json").is_file():
            return documents.describe(sources.beside(folder, True), None, name)
    with sources.open_source(source) as (contents, _):
        return describe(contents)[0] if contents.torch else contents.metadata


def describe(contents: Contents) -> tuple[Metadata, recognise.Found]:
    """What a torch file and its neighbours state, and the encoder that it holds."""
    timm = timm_config.is_timm(contents.files.get("config.json", {}))
    found = recognise.recognise(contents.arrays, timm, contents.where)
    if contents.metadata.model:  # of this code: nothing is left to find out
        about = contents.metadata
        if about.family in BY_NAME:
            found = found._replace(family=BY_NAME[about.family])
        return dataclasses.replace(
            about, transforms=about.transforms or metadata.DEFAULT_TRANSFORMS
        ), found
    about = documents.describe(
        contents.files, found.family, contents.where, found.names, found.width
    )
    return about, found


def _sizes(
    found: recognise.Found, contents: Contents, facts: Facts, report: Report
) -> roles.Sizes:
    """What the names and shapes depend on; above all the heads, which few arrays show."""
    family, arrays = found.family, contents.arrays
    shown = None
    shape = lambda role: recognise.shape_of(arrays, found.names, role)
    if len(relative := shape("relative")) == 2:
        shown = relative[1]
    elif len(norm := shape("q_norm")) == 1 and found.width % norm[0] == 0:
        shown = found.width // norm[0]
    said = shown or facts.stated.get("heads") or facts.asked.get("heads")
    guess = None if said else guess_heads(
        found.width, found.mlp_dim, family.heads, family.head_width, report.where
    )  # fmt: skip
    heads = facts.settle("heads", shown, guess)
    pool_heads = facts.settle("map_heads") or heads
    return roles.Sizes(
        found.depth, found.width, heads, pool_heads, _stages(found, arrays, report)
    )


def _native(found: recognise.Found, arrays: dict[str, Array], facts: Facts) -> Array:
    """Positions of an AIMv2 for images of any size: fixed waves, here for one size."""
    if facts.wanted != (0, 0):
        facts.stated["image_size"] = facts.wanted
    size = facts.stated.setdefault("image_size", (224, 224))
    rows, columns = (n // arrays["embedding/kernel"].shape[0] for n in size)
    facts.report.change(f"computed: positions of {rows} x {columns} patches")
    return in_memory("positions", positions.waves((rows, columns), found.width))


def _stages(
    found: recognise.Found, arrays: dict[str, Array], report: Report
) -> tuple[int, ...] | None:
    """Units per stage of timm's ResNet stem; None: there is no stem."""
    if not found.family.timm:
        return None
    backbone = re.escape(found.names["patch"].replace("proj", "backbone"))
    units: dict[int, set[int]] = {}
    pattern = re.compile(backbone + r"\.stages\.(\d{1,9})\.blocks\.(\d{1,9})\.")
    for name in arrays:
        if match := pattern.match(name):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    if not any(re.match(backbone + r"\.", name) for name in arrays):
        return None
    # 1e-5 / deviation of a kernel: 6e-4 of the logits of R50+ViT-L/32, by measurement.
    report.change(
        "standardised kernels: as the official code, 1e-5 is added to their deviation, by "
        "timm 1e-8 to their variance; outputs differ from timm's by less than 1e-3"
    )
    where = f"{report.where}: stage "
    stages = range(count_up(units, 0, where))
    return tuple(count_up(units[i], 0, f"{where}{i}, unit ") for i in stages)
