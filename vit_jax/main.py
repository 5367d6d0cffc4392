# SPDX-License-Identifier: Apache-2.0
"""Trains a model.

    python -m vit_jax.main --config=FILE --workdir=DIR [--config.key=value ...]

For example --config=configs/digits.py --workdir=/tmp/digits. Run the same command again
to continue.
"""

from absl import flags

from vit_jax import cli
from vit_jax.config import DataConfig
from vit_jax.errors import PREEMPTED, UserError

flags.DEFINE_string(
    "workdir", "", "Folder of the run, local or gs://; an existing run is continued."
)
cli.define_config_flag()
cli.define_process_flags()


def main(argv: list[str]) -> int:
    cli.only_flags(argv, "--workdir=DIR")
    cfg = cli.read_config()
    if not flags.FLAGS.workdir:
        raise UserError(
            "--workdir is missing: give the folder that the run writes to, local or "
            f"gs://{_ways_on(cfg.data)}"
        )
    cli.connect()
    from vit_jax import train

    result = train.train(cfg, flags.FLAGS.workdir)
    return PREEMPTED if result.preempted else 0


def _ways_on(data: DataConfig) -> str:
    """What else a first run of a config needs, and how to do without."""
    place = data.path or "FOLDER"
    reads = {
        "folder": f"images from --config.data.path={place}",
        "records": f"shards from --config.data.path={place} (or, of many configs, public "
        "images: --config=NAME:imagenet)",
        "tfds": f"the tfds set {data.name!r} in --config.data.path={place}",
    }.get(data.source)
    if reads is None:
        return ""
    return (
        f"; this config reads {reads}; to try the machine without data, add "
        "--config.data.source=synthetic --config.data.num_classes=1000"
    )


if __name__ == "__main__":
    cli.run(main)
