# SPDX-License-Identifier: Apache-2.0
"""The one exception that a user may cause, and how a command reports it."""

# Exit status (EX_TEMPFAIL): a checkpoint was saved, or a peer was lost. Start the same
# command again.
PREEMPTED = 75


class UserError(ValueError):
    """Bad input from outside: a file, a path, a config value, a flag.

    The message names the value, what is allowed and the knob to turn. Commands print it
    as one line without a traceback and exit with status 2; library callers may catch it
    as a ``ValueError``.
    """


class Diverged(UserError):
    """A run whose loss stayed non-finite."""
