# SPDX-License-Identifier: Apache-2.0
"""What loading did to the arrays, in lines that a person reads; and all errors at once."""

import dataclasses
import logging
from typing import Any

from vit_jax.errors import UserError

# A level of its own: the commands silence other libraries at the root.
_LOG = logging.getLogger("vit_jax.weights")
_LOG.setLevel(logging.WARNING)

_SHOWN = 12  # problems that one message lists


@dataclasses.dataclass
class Report:
    """Collects what happened to each array while a checkpoint is fitted to a model."""

    where: str  # the checkpoint, for messages
    renamed: list[str] = dataclasses.field(default_factory=list)
    assumed: dict[str, Any] = dataclasses.field(default_factory=dict)
    changes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def rename(self, old: str, new: str) -> None:
        if old != new:
            self.renamed.append(f"renamed: {old} -> {new}")

    def assume(self, field: str, value: Any) -> None:
        """A field of ModelConfig that nobody states and no array shows."""
        self.assumed[field] = value

    def change(self, line: str) -> None:
        """Resized, re-initialised, ignored or folded: what was asked for, or has to be."""
        self.changes.append(line)

    def warn(self, line: str) -> None:
        """Something that a user almost surely has to act on."""
        self.warnings.append(line)

    def problem(self, line: str) -> None:
        """Makes :meth:`check` fail, together with every other problem."""
        if line not in self.problems:
            self.problems.append(line)

    def check(self) -> None:
        """Raises: UserError: names every problem found so far."""
        if not self.problems:
            return
        count = len(self.problems)
        shown = "; ".join(self.problems[:_SHOWN])
        more = f"; and {count - _SHOWN} more" if count > _SHOWN else ""
        what = f"{count} problems" if count > 1 else "1 problem"
        raise UserError(f"{self.where} cannot be loaded, {what}: {shown}{more}")

    @property
    def lines(self) -> list[str]:
        """One line per array that was renamed, resized, re-initialised or ignored."""
        return [*self.renamed, *self.changes, *self.assumptions, *self.warnings]

    @property
    def assumptions(self) -> list[str]:
        """One line with everything that was assumed, or none."""
        if not self.assumed:
            return []
        text = ", ".join(f"{k}={_plain(v)}" for k, v in self.assumed.items())
        return [f"assumed: {text}"]

    def log(self) -> None:
        """What was done as it must be is INFO; what the user has to judge, WARNING."""
        for line in [*self.renamed, *self.changes]:
            _LOG.info("%s: %s", self.where, line)
        for line in [*self.assumptions, *self.warnings]:
            _LOG.warning("%s: %s", self.where, line)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
