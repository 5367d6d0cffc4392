# SPDX-License-Identifier: Apache-2.0
"""The one exception that a user may cause, and how it is reported."""

import contextlib
from collections.abc import Iterator

# Exit status (EX_TEMPFAIL): a checkpoint was saved, or a peer was lost. Start the same
# command again.
PREEMPTED = 75


class UserError(ValueError):
    """Bad input from outside: a file, a path, a config value, a flag.

    The message names the value, what is allowed and the knob to turn. Commands print it
    as one line without a traceback and exit with status 2; library callers may catch it
    as a ``ValueError``.
    """


def one_line(error: BaseException) -> str:
    """What a foreign library says, as part of a message: its first line, printable."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:300]


def check_local(what: str) -> None:
    """Refuses an address as a place to write to: a folder "gs:" would be made of it.
    ``what`` is the knob and its value."""
    if "://" in what:
        raise UserError(f"{what} cannot be written: it must be a local path")


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """An OSError meanwhile as one line; ``what`` is the knob and its value,
    ``--out=DIR``."""
    check_local(what)
    try:
        yield
    except OSError as e:
        raise UserError(f"{what} cannot be written: {e.strerror or one_line(e)}") from e


class Diverged(UserError):
    """A run whose loss stayed non-finite."""
