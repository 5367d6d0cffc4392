# SPDX-License-Identifier: Apache-2.0
"""Which Parquet or tar files hold which split: in a folder, or in a data set of the Hub,
where only those of the splits in use are downloaded.

What the README.md of a data set says of its configurations counts; without it, the names
of files and folders do.
"""

import contextlib
import dataclasses
import fnmatch
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vit_jax import hub
from vit_jax.config import DataConfig, choose
from vit_jax.data import split_files, splits
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

# Where the Hub keeps its own copies of sets that are stored otherwise.
_CONVERTED = "refs/convert/parquet"


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of a data set, by split; ``fetch`` gives those that can be opened."""

    root: str
    splits: Mapping[str, Sequence[str]]
    fetch: Callable[[Sequence[str]], Sequence[str]] = lambda files: files

    def files(self, split: str) -> Sequence[str]:
        return self.fetch(self.splits[split])


def find(cfg: DataConfig, *suffixes: str) -> Found:
    """The files of ``cfg.path`` with one of the suffixes, of the configuration
    ``cfg.name``.

    Raises:
      UserError: there are none, or the configuration is left open.
    """
    if cfg.path.startswith("hf://"):
        return _on_the_hub(cfg, suffixes)
    root, files = split_files.find(cfg, *suffixes)
    if files == [root]:
        return Found(root, split_files.by_split(root, files))
    readme, text = os.path.join(root, "README.md"), ""
    if tf.io.gfile.exists(readme):
        with tf.io.gfile.GFile(readme, "rb") as stream:
            text = stream.read().decode(errors="replace")
    names = [os.path.relpath(file, root) for file in files]
    found = _by_split(cfg, root, names, text)
    there = {s: [os.path.join(root, n) for n in names] for s, names in found.items()}
    return Found(root, there)


def _on_the_hub(cfg: DataConfig, suffixes: tuple[str, ...]) -> Found:
    url, converted = cfg.path, _CONVERTED if ".parquet" in suffixes else ""
    repo, revision, inside = hub.parsed(url.replace("hf://datasets/", "hf://", 1))
    with hub.explained(url):
        api, get = hub.repository(repo, "dataset")
        root, names = _listed(api, get, repo, revision, inside, suffixes)
    if not names and not revision and converted:
        with contextlib.suppress(UserError), hub.explained(url):
            root, names = _listed(api, get, repo, converted, inside, suffixes)
    if not names:
        nor = ", nor has the Hub converted it" if converted else ""
        raise UserError(
            f"{url} has no {suffixes[0]} files{nor}: download it and "
            "use config.data.source=folder"
        )
    readme = root / "README.md"
    text = readme.read_text(errors="replace") if readme.is_file() else ""

    def fetch(files: Sequence[str]) -> list[str]:
        with hub.explained(url):
            # By the commit: between two requests the branch may move.
            get(revision=root.name, allow_patterns=hub.exactly([*files]))
        return [str(root / file) for file in files]

    if names == [inside]:
        return Found(url, split_files.by_split(inside, names), fetch)
    return Found(url, _by_split(cfg, url, names, text), fetch)


def _listed(
    api: Any,
    get: Callable[..., str],
    repo: str,
    revision: str,
    inside: str,
    suffixes: tuple[str, ...],
) -> tuple[Path, list[str]]:
    """(where a commit is cached, its files in the folder ``inside``)"""
    root = Path(get(revision=revision or None, allow_patterns=["README.md"]))
    names = [n for n in hub.names(api, repo, root, "dataset") if n.endswith(suffixes)]
    return root, [n for n in names if not inside or f"{n}/".startswith(f"{inside}/")]


def _by_split(
    cfg: DataConfig, root: str, names: Sequence[str], readme: str
) -> dict[str, list[str]]:
    """Split -> those of the names that belong to it."""
    configs = _described(readme, names) or _folders(names)
    if cfg.name:
        return choose("config.data.name", cfg.name, configs)
    if len(configs) > 1 and "default" not in configs:
        raise UserError(
            f"{root} has the configurations {splits.some(sorted(configs))}: choose one "
            "with config.data.name"
        )
    return configs.get("default") or next(iter(configs.values()))


def _described(readme: str, names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Configuration -> split -> files, as the front matter of a README.md says; {}: it
    says nothing of these files."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    try:
        about = yaml.safe_load(match[1]) if match else {}
        listed = about.get("configs") or ()
        configs = {str(c["config_name"]): _patterns(c) for c in listed}
        default = next((c for c in listed if c.get("default")), None)
        configs |= {"default": _patterns(default)} if default else {}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as e:
        log.warning("the README.md cannot be understood: %s", type(e).__name__)
        return {}
    found = {
        config: {
            split: [n for n in names if any(_matches(n, p) for p in patterns)]
            for split, patterns in of_splits.items()
        }
        for config, of_splits in configs.items()
    }
    whole = {c: {s: f for s, f in found[c].items() if f} for c in found}
    return {c: of_splits for c, of_splits in whole.items() if of_splits}


def _matches(name: str, pattern: str) -> bool:
    """As on the Hub, where "**/" also stands for no folder."""
    pattern = pattern.removeprefix("./")
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(
        name, pattern.replace("**/", "")
    )


def _patterns(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Split -> patterns of its files."""
    files = config.get("data_files") or ()
    if isinstance(files, str) or (files and isinstance(files[0], str)):
        files = [{"split": splits.TRAIN[0], "path": files}]
    listed = lambda path: [path] if isinstance(path, str) else [*map(str, path)]
    return {str(f["split"]): listed(f["path"]) for f in files}


def _folders(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """The same by names alone: folders that hold the same splits are configurations."""
    tops: dict[str, list[str]] = {}
    for name in names:
        tops.setdefault(name.split("/")[0] if "/" in name else "", []).append(name)
    found = {top: split_files.by_split("", files) for top, files in tops.items()}
    every = [split for of_splits in found.values() for split in of_splits]
    if len({*every}) < len(every):
        return found
    return {"default": split_files.by_split("", names)}
