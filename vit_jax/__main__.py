# SPDX-License-Identifier: Apache-2.0
"""``vit-jax COMMAND ...``, or ``python -m vit_jax COMMAND ...``: all commands.

Each is also ``python -m vit_jax.COMMAND``, and explains itself with ``--help``.
"""

import contextlib
import runpy
import sys

from vit_jax import config

COMMANDS = {
    "main": "train a model, or continue a run",
    "predict": "name what is in images",
    "embed": "write one vector per image",
    "app": "look at a model in the browser: photo, classes, attention, nearest images",
    "evaluate": "measure a checkpoint with every evaluator of a config",
    "convert": "write a checkpoint in another layout, or share it",
    "export": "write a checkpoint as a program: StableHLO, SavedModel, TFLite, ONNX",
    "analysis": "draw the paper's figures of a checkpoint",
    "weights": "list the published checkpoints",
    "sweep": "select a learning rate as the paper does",
    "study": "run one of the paper's studies: table, figure, logs",
    "plan": "compile a run for a TPU slice that is not there: memory, time, traffic",
    "benchmark": "time training, inference and data on this machine",
    "data.write_records": "write images as shards for training",
}


def main() -> None:
    """Runs the command that the arguments name."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"vit_jax.{name}", run_name="__main__", alter_sys=True)
    elif name in ("-h", "-help", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = (
            f"  {command:<{width}}  {about}" for command, about in COMMANDS.items()
        )
        # Nobody may be there to read it, as after `| head`.
        with contextlib.suppress(BrokenPipeError):
            print("vit-jax COMMAND [--help]\n", *lines, sep="\n", flush=True)
    else:
        hint = (
            "did you mean 'main'? "
            if name == "train"
            else config.nearest(name, COMMANDS)
        )
        print(
            f"error: unknown command {name!r}: {hint}the commands are "
            f"{', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
