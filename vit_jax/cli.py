# SPDX-License-Identifier: Apache-2.0
"""The door of every command: flags to a Config, and user errors to one line.

TensorFlow, JAX and Abseil talk a lot at start-up; :func:`run` keeps what a user can act
on.
"""

import contextlib
import ctypes
import dataclasses
import glob
import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from vit_jax import config, distributed
from vit_jax.errors import UserError

USER_ERROR = 2  # exit status: something in the command, its config or its files
PREEMPTED = (
    distributed.PREEMPTED
)  # a checkpoint was saved, or a peer was lost: start the same command again


def define_config_flag() -> None:
    """Adds ``--config=configs/X.py`` and ``--config.key=value``."""
    config_flags.DEFINE_config_file(
        "config", None, "Config file; --config.key=value overrides one of its fields."
    )
    flags.FLAGS["config"].parser = _ConfigFile()


def define_process_flags() -> None:
    """Adds the flags that connect several processes; none are needed on TPU pods or
    under SLURM."""
    flags.DEFINE_string(
        "coordinator", "", "HOST:PORT of process 0, if there are several processes."
    )
    flags.DEFINE_integer("num_processes", 0, "How many processes train together.")
    flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0.")
    flags.DEFINE_integer(
        "process_timeout", 300, "Seconds to wait for the other processes at the start."
    )


def connect() -> None:
    """Connects the processes that the flags of :func:`define_process_flags` describe;
    compiled programs and freed memory are kept."""
    keep_compiled()
    keep_memory()
    f = flags.FLAGS
    distributed.initialize(
        f.coordinator, f.num_processes, f.process_id, f.process_timeout
    )


def keep_compiled() -> None:
    """Compiled programs are kept on disk, so that a run that starts again, or another
    like it, need not compile.

    In ``~/.cache/vit_jax/xla``, or where ``JAX_COMPILATION_CACHE_DIR`` says (gs://
    works); none with ``JAX_ENABLE_COMPILATION_CACHE=false``.
    """
    if not jax.config.jax_compilation_cache_dir:
        folder = os.path.expanduser("~/.cache/vit_jax/xla")
        jax.config.update("jax_compilation_cache_dir", folder)


def keep_memory() -> None:
    """On a machine without accelerators, memory that a step frees is kept for the next
    one. Call it before JAX starts.

    XLA for CPUs takes its buffers from malloc, and glibc returns large ones to the
    system, which clears every page anew at the next step: a third of the time of a step
    of configs/cifar10.py. One arena, because only the main one can grow without limit.
    """
    accelerators = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")
    if sys.platform != "linux" or any(map(glob.glob, accelerators)):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's only
    if mallopt:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
        mallopt(arena_max, 1)


def read_config() -> config.Config:
    """The Config that the flags describe.

    Raises:
      UserError: no ``--config``, an unknown key, or a value that a field does not
        allow.
    """
    values = flags.FLAGS.config
    if values is None:
        raise UserError(
            "--config is missing: give --config=configs/digits.py or your own"
        )
    return config.from_dict(dict(values.items()))


def only_json(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Whatever is printed meanwhile goes to standard error, where standard output is
    for :func:`print_json`."""
    return (
        contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()
    )


def print_json(value: Any) -> None:
    """One JSON document, the only thing on standard output; NaN and infinity are null."""
    print(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _log_only_our_own() -> None:
    """Orbax and Flax warn about what is normal here, and log as pages what they raise
    as well."""
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)-12s %(message)s"))
    ours = logging.getLogger("vit_jax")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False

    def unraisable(report: Any) -> None:
        # After a read or write that failed, TensorStore's threads call Orbax's loop.
        if str(report.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(report)

    sys.unraisablehook = unraisable


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs ``main(positional arguments)`` as a command and exits.

    Exit status: 0, or what ``main`` returned; 2 after a ``UserError`` or a bad flag,
    reported in one line.
    """
    _log_only_our_own()

    def guarded(argv: list[str]) -> int:
        try:
            status = main(argv[1:]) or 0
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            status = USER_ERROR
        except Exception:
            if not distributed.connected():
                raise
            time.sleep(1)  # a lost peer explains it better, and ends the process
            traceback.print_exc()
            status = 1
        distributed.leave(status)
        return status

    app.run(guarded, flags_parser=_parse_flags)


class _ConfigFile(flags.ArgumentParser):
    """Says what is wrong with a config file in one line, where that of ml_collections
    shows a traceback."""

    def parse(self, argument: str) -> ConfigDict:
        """What ``get_config`` of a FILE returns, or ``get_config(X)`` of FILE:X."""
        path, *options = os.path.expanduser(argument).split(":", 1)
        names: dict[str, Any] = {"__name__": "config", "__file__": path}
        try:
            source = Path(path).read_bytes()
        except OSError as e:
            raise UserError(f"cannot be read: {e.strerror}") from e
        try:
            exec(compile(source, path, "exec"), names)
            if "get_config" not in names:
                raise UserError("it defines no function get_config()")
            values = names["get_config"](*options)
        except UserError:
            raise
        except Exception as e:  # whatever someone's program raises
            frames = traceback.extract_tb(e.__traceback__)
            lines = [f"line {f.lineno}: " for f in frames if f.filename == path]
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


def _check_overrides(argv: list[str]) -> None:
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


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; whatever is wrong with them, or with the config file, becomes one
    line."""
    try:
        _check_overrides(argv)
        return flags.FLAGS(argv)
    except (flags.Error, UserError) as e:
        message = str(e)
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        # str() of a KeyError is the repr of its message
        text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
        message = f"{_config_argument(argv)}: {text}".replace("\n", " ")
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USER_ERROR)


def _config_argument(argv: list[str]) -> str:
    return next((a for a in argv if a.startswith(("--config", "-config"))), "--config")
