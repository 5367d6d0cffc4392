# SPDX-License-Identifier: Apache-2.0
"""The door of every command: flags to a Config, and user errors to one line.

TensorFlow, JAX and Abseil talk a lot at start-up; :func:`run` keeps what a user can act
on.
"""

import contextlib
import importlib.util
import inspect
import json
import logging
import math
import os
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vit_jax import config, config_file, distributed, runtime
from vit_jax.errors import UserError

USER_ERROR = 2  # exit status: something in the command, its config or its files

# Which extra of the package brings a module that is not part of the core.
EXTRAS = {
    "clu": "train",
    "cv2": "train",
    "google_crc32c": "train",
    "tensorboard": "train",
    "tensorflow": "train",
    "tensorflow_datasets": "train",
    "matplotlib": "analysis",
    "sklearn": "train",
    "libtpu": "plan",
    "jax2onnx": "onnx",
    "mlflow": "mlflow",
    "pyarrow": "parquet",
    "wandb": "wandb",
}

# It warns where the home folder cannot be written, and works all the same.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

# The arguments of a command that was asked what it does.
HELP = ["--help"]

# Flags belong to the command that asks for them, whose --help shows them.
flags.disclaim_key_flags()


def define_config_flag() -> None:
    """Adds ``--config=configs/X.py`` and ``--config.key=value``."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config: a file, or the name of one that comes with vit_jax, such as digits; "
        "--config.key=value overrides a field, and vit_jax/config.py explains each.",
    )
    flags.FLAGS["config"].parser = config_file.Parser()


def define_image_size_flag() -> None:
    """Adds ``--image_size``, for commands that read weights; flags may follow the
    paths."""
    flags.DEFINE_integer(
        "image_size", 0, "Resize the position embeddings; 0: keep them."
    )
    flags.FLAGS.set_gnu_getopt()


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
    """Connects the processes that the flags of :func:`define_process_flags` describe."""
    f = flags.FLAGS
    distributed.initialize(
        f.coordinator, f.num_processes, f.process_id, f.process_timeout
    )


def only_flags(argv: list[str], example: str) -> None:
    """Refuses positional arguments; ``example`` shows a flag."""
    if argv:
        raise UserError(f"unexpected argument {argv[0]!r}: flags look like {example}")


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


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Whatever is printed meanwhile goes to standard error, where standard output is
    for :func:`print_json`."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    # Libraries such as Gloo print from C++.
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)


def print_json(value: Any) -> None:
    """One JSON document, the only thing on standard output; NaN and infinity are null."""
    print(json.dumps(finite(value), allow_nan=False))


def finite(value: Any) -> Any:
    """A tree of dicts and lists as JSON can have it: NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs ``main(positional arguments)`` as a command and exits.

    Exit status: 0, or what ``main`` returned; 2 after a ``UserError``, a bad flag or a
    package that is not installed, reported in one line.
    """
    quiet()
    runtime.prepare()

    def guarded(argv: list[str]) -> int:
        try:
            if argv is HELP:
                print(help_text(inspect.getmodule(main).__doc__ or ""))
                status = 0
            else:
                status = main(argv[1:]) or 0
            sys.stdout.flush()
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            status = USER_ERROR
        except BrokenPipeError:
            # Whoever read the output, such as `head`, has seen enough. The interpreter
            # flushes once more at its end, which must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + 13
        except ModuleNotFoundError as e:
            if (e.name or "").split(".")[0] not in EXTRAS:
                raise
            status = _missing(e.name or "")
        except Exception:
            if not distributed.connected():
                raise
            time.sleep(1)  # a lost peer explains it better, and ends the process
            traceback.print_exc()
            status = 1
        distributed.leave(status)
        return status

    app.run(guarded, flags_parser=_parse_flags)


def need(*modules: str) -> None:
    """Ends a command whose own imports would fail, in one line. Call it before them."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            sys.exit(_missing(module))


def _missing(module: str) -> int:
    print(
        f"error: {module} is not installed, and this needs it: pip install "
        f"'vit_jax[{EXTRAS[module.split('.')[0]]}]'",
        file=sys.stderr,
    )
    return USER_ERROR


def quiet() -> None:
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


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags and gives the positional arguments, or HELP where that is asked for;
    whatever is wrong with flags, or with the config file, becomes one line."""
    if any(a in ("-h", "--h", "-help", "--help", "--helpfull") for a in argv[1:]):
        flags.FLAGS.mark_as_parsed()
        return HELP
    try:
        config_file.check_overrides(argv)
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as e:
        name = e.flagname
        known = [f.name for f in _flags()]
        all_flags = f"the flags are {', '.join(f'--{k}' for k in known)}"
        message = (
            f"unknown flag --{name}: {config.nearest(name, known)}"
            f"{all_flags if known else 'there are none'}"
        )
    except (flags.Error, UserError) as e:
        message = str(e)
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        # str() of a KeyError is the repr of its message
        text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
        message = f"{_config_argument(argv)}: {text}"
    print("error:", message.replace("\n", " "), file=sys.stderr)
    sys.exit(USER_ERROR)


def help_text(about: str) -> str:
    """What ``--help`` prints: what the command is for, and all of its flags.

    Args:
      about: the docstring of the command's module, with an example.
    """
    columns = min(max(shutil.get_terminal_size().columns, 40), 88)
    lines = [about.strip(), "", "Flags:"]
    for flag in _flags():
        default = "" if flag.default in (None, "", False, 0) else f" ({flag.default})"
        lines.append(f"  --{flag.name}{'' if flag.boolean else '=...'}{default}")
        text = " ".join((flag.help or "").split())
        lines += textwrap.wrap(
            text, columns, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def _flags() -> list[flags.Flag]:
    """The flags of this command, without those that Abseil brings."""
    own = flags.FLAGS.get_flags_for_module(sys.argv[0])
    return sorted(own, key=lambda flag: flag.name)


def _config_argument(argv: list[str]) -> str:
    return next((a for a in argv if a.startswith(("--config", "-config"))), "--config")
