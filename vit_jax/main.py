# SPDX-License-Identifier: Apache-2.0
"""Trains a model.

    python -m vit_jax.main --config=FILE --workdir=DIR [--config.key=value ...]

Run the same command again to continue. This file has no logic: flags -> Config ->
train.train.
"""

from absl import flags

from vit_jax import cli
from vit_jax.errors import UserError

flags.DEFINE_string(
    "workdir", "", "Folder of the run, local or gs://; an existing run is continued."
)
cli.define_config_flag()
cli.define_process_flags()


def main(argv: list[str]) -> int:
    if argv:
        raise UserError(
            f"unexpected argument {argv[0]!r}: flags look like --workdir=DIR"
        )
    cfg = cli.read_config()
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing: give the folder that the run writes to")
    cli.connect()
    from vit_jax import train

    result = train.train(cfg, flags.FLAGS.workdir)
    return cli.PREEMPTED if result.preempted else 0


if __name__ == "__main__":
    cli.run(main)
