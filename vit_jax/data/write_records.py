# SPDX-License-Identifier: Apache-2.0
"""Turns a folder, a manifest, or any other source of data into sharded records.

    python -m vit_jax.data.write_records photos/ records/
    python -m vit_jax.data.write_records labels.csv records/ --format=array_record
    python -m vit_jax.data.write_records tfds:cifar10 records/ --split=train
    python -m vit_jax.data.write_records imagenet/ records/ --shorter_side=256

Images are copied as they are, or made smaller (shrink.py), in one fixed random order, so
that shards can also be read in sequence; those that cannot be decoded are listed and left
out. Shards are written side by side; one that is finished is not written again when the
command is repeated after an interruption. Several processes, on one host or many, share
the shards out: the index, SPLIT.json, is deleted first and written by the one that ends
last. Shards of two runs are never read together.
"""

import os
from typing import Any

from absl import flags

from vit_jax import cli
from vit_jax.config import DataConfig, choose

if __name__ == "__main__":
    cli.need("tensorflow")

from vit_jax.data import shard_writer, sources
from vit_jax.data.shards import FORMATS, TFRECORD
from vit_jax.data.shrink import Shrink
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

_LISTED = 20  # images that were left out are named one by one, up to this number


def write(
    source: str,
    dest: str,
    *,
    split: str = "",
    format: str = TFRECORD,
    shards: int = 0,
    workers: int = 0,
    shorter_side: int = 0,
    quality: int = 90,
    process_id: int = 0,
    num_processes: int = 1,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Writes the splits of ``source`` into the folder ``dest``.

    Args:
      source: a folder, a .csv or .jsonl manifest, or another source of
        ``config.data.source`` with its path or name: ``tar:shards/``, ``tfds:cifar10``.
      split: "train", "test" or, if "", both.
      shards: files per split; 0: as many as make them about 128 MiB.
      workers: shards written at a time; 0: one per CPU.
      shorter_side: larger images are made that small, as JPEG files of this ``quality``
        (see shrink.py); 0: all stay as they are.
      process_id: which of the ``num_processes`` that write the same thing this is.

    Returns:
      The index of each split, which is also in ``dest/SPLIT.json``; its ``left_out``
      lists what could not be decoded. Splits that others have to finish are missing.

    Raises:
      UserError: the source is not a data set or holds no image that can be decoded,
        ``dest`` is not a folder or holds shards of another ``shorter_side`` or
        ``quality``, or the disk is full.
    """
    choose("--format", format, dict.fromkeys(FORMATS))
    cfg = sources.named(source) or DataConfig(source="folder", path=source)
    if workers < 0:
        raise UserError(f"--workers is {workers}: it must be at least 0 (one per CPU)")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id} of --num_processes={num_processes}: it must "
            f"lie in [0, {num_processes})"
        )
    shrink = Shrink(shorter_side, quality) if shorter_side else Shrink()
    dataset = sources.load(cfg)
    try:
        tf.io.gfile.makedirs(dest)
    except tf.errors.OpError as e:
        raise UserError(f"cannot make the folder {dest}: {e.message}") from e
    result = {}
    for name in (split,) if split else ("train", "test"):
        part = sources.evaluation_split(cfg, dataset, name)
        writing = shard_writer.Writing(dataset, part, dest, name, format, shrink)
        jobs = shard_writer.make_jobs(writing, shards)
        own = jobs[process_id::num_processes]
        index = shard_writer.write_split(writing, jobs, own, workers, progress)
        if index is not None:
            result[name] = index
    return result


_FLAGS = (
    "split", "format", "shards", "workers", "shorter_side", "quality", "num_processes",
    "process_id",
)  # fmt: skip


def define_flags() -> None:
    """The options of the command."""
    flags.DEFINE_enum("format", TFRECORD, FORMATS, "Of the files.")
    flags.DEFINE_string("split", "", "train or test; both if empty.")
    flags.DEFINE_integer("shards", 0, "Files per split; 0: of about 128 MiB each.")
    flags.DEFINE_integer("workers", 0, "Shards written at a time; 0: one per CPU.")
    flags.DEFINE_integer(
        "shorter_side", 0, "Larger images are made that small; 0: all stay as they are."
    )
    flags.DEFINE_integer("quality", 90, "Of those that --shorter_side made smaller.")
    flags.DEFINE_integer("num_processes", 1, "How many share the shards out.")
    flags.DEFINE_integer("process_id", 0, "Which of them this is, from 0.")


def main(arguments: list[str]) -> None:
    """Entry point: ``SOURCE DEST`` and the flags."""
    if len(arguments) != 2:
        raise UserError(
            f"got the arguments {arguments}: it must be SOURCE (a folder, a .csv or "
            ".jsonl manifest, tar:FOLDER, tfds:NAME, ...) and DEST (a folder for the "
            "shards)"
        )
    source, dest = arguments
    if flags.FLAGS["quality"].present and not flags.FLAGS.shorter_side:
        raise UserError("--quality changes nothing without --shorter_side: give both")
    options: dict[str, Any] = {k: flags.FLAGS[k].value for k in _FLAGS}
    for name, index in write(source, dest, **options, progress=True).items():
        print(
            f"{name}: {index['examples']} examples of {len(index['class_names'])} "
            f"classes in {len(index['shards'])} {index['format']} shards"
        )
        if index["shorter_side"]:
            print(
                f"  {index['reencoded']} of {index['examples']} images are smaller now, "
                "or in sRGB; the others are as they were"
            )
        left_out = index["left_out"]
        for bad in left_out[:_LISTED]:
            print(f"  left out: {bad['image']}: {bad['reason']}")
        if len(left_out) > _LISTED:
            more = len(left_out) - _LISTED
            print(f"  and {more} more, which {os.path.join(dest, name)}.json lists")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
