# SPDX-License-Identifier: Apache-2.0
"""Config files: found by path or by name, run, and overridden from the command line."""

import dataclasses
import inspect
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from vit_jax import config
from vit_jax.errors import UserError

# Beside the package in a clone, inside it where it was installed.
_HERE = Path(__file__).parent
SHIPPED = next(p for p in (_HERE / "configs", _HERE.parent / "configs") if p.is_dir())


class Parser(flags.ArgumentParser):
    """Parser of ``--config``: says what is wrong with a config file in one line, where
    that of ml_collections shows a traceback."""

    def parse(self, argument: str) -> ConfigDict:
        """What ``get_config`` of a FILE returns, or ``get_config(X)`` of FILE:X."""
        name, *options = os.path.expanduser(argument).split(":", 1)
        path = find(name)
        names: dict[str, Any] = {"__name__": "config", "__file__": str(path)}
        try:
            source = path.read_bytes()
        except OSError as e:
            raise UserError(f"cannot be read: {e.strerror}") from e
        try:
            exec(compile(source, str(path), "exec"), names)
            if "get_config" not in names:
                raise UserError("it defines no function get_config()")
            if options and not inspect.signature(names["get_config"]).parameters:
                raise UserError(f"it takes no argument: leave out ':{options[0]}'")
            values = names["get_config"](*options)
        except UserError:
            raise
        except Exception as e:  # whatever someone's program raises
            frames = traceback.extract_tb(e.__traceback__)
            lines = [f"line {f.lineno}: " for f in frames if f.filename == str(path)]
            reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
            raise UserError("".join(lines[-1:]) + reason) from e
        if isinstance(values, config.Config):
            values = config.config_dict(values)
        if not isinstance(values, ConfigDict):
            raise UserError(
                f"get_config() returned {values!r:.80}: it must return a "
                "vit_jax.config.Config"
            )
        return values.lock()


def find(name: str) -> Path:
    """The file that ``--config=name`` means: a path, or the name of a config that ships
    with the package, with or without ``configs/`` and ``.py``.

    Raises:
      UserError: there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(SHIPPED.glob("*.py"))}
    ours = path.parent in (Path(), Path("configs")) and path.suffix in ("", ".py")
    if ours and path.stem in shipped:
        return shipped[path.stem]
    without_suffix = path.parent / f"{path.name}.py"
    if without_suffix.is_file():
        return without_suffix
    reason = "is a folder" if path.is_dir() else "does not exist"
    raise UserError(
        f"{name!r} {reason}: {config.nearest(path.stem, shipped)}give a file, or one of "
        f"the configs that come with vit_jax: {' '.join(shipped)}"
    )


def check_overrides(argv: Sequence[str]) -> None:
    """Refuses ``--config.key`` where a Config has no such key."""
    for argument in argv:
        found = re.match(r"--?config\.(\w+(\.\w+)*)", argument)
        value: Any = config.Config()
        path = "config"
        for name in found[1].split(".") if found else ():
            keys = config.to_dict(value) if dataclasses.is_dataclass(value) else {}
            if name not in keys:
                raise UserError(
                    f"{argument}: unknown key {path}.{name}: "
                    f"{config.nearest(name, keys)}{path} has {sorted(keys) or 'no keys'}"
                )
            value, path = getattr(value, name), f"{path}.{name}"
