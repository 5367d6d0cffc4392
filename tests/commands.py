# SPDX-License-Identifier: Apache-2.0
"""Commands as a user calls them, in this process: for mistakes, which need no process of
their own to be seen."""

import runpy
import sys
import warnings
from typing import NamedTuple

import pytest
from absl import flags

from vit_jax import cli, runtime


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line on standard error that a mistake is answered with."""
        lines = self.stderr.splitlines()
        assert self.returncode == 2, self
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        return lines[0]


class Command:
    """Calls a module as ``python -m`` does. Its flags are forgotten afterwards."""

    def __init__(self, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *args: object, module: str = "vit_jax.main") -> Ended:
        before = set(flags.FLAGS)
        self._capsys.readouterr()
        with self._monkeypatch.context() as patch, warnings.catch_warnings():
            # The module may have been imported by another test.
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")
            patch.setattr(sys, "argv", [module, *map(str, args)])
            patch.setattr(cli, "quiet", lambda: None)
            patch.setattr(runtime, "prepare", lambda: None)
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as e:
                status = e.code or 0
            finally:
                for name in set(flags.FLAGS) - before:
                    delattr(flags.FLAGS, name)
                flags.FLAGS.unparse_flags()
        return Ended(status, *self._capsys.readouterr())
