# SPDX-License-Identifier: Apache-2.0
"""Turns a folder, a manifest or a tfds set into sharded records.

    python -m vit_jax.data.write_records photos/ records/
    python -m vit_jax.data.write_records labels.csv records/ --format=array_record
    python -m vit_jax.data.write_records tfds:cifar10 records/ --split=train

Images are copied as they are, in one fixed random order, so that shards can also be
read in sequence. Shards are written side by side; one that is finished is not written
again when the command is repeated after an interruption. The index, SPLIT.json, goes
first and comes last: shards of two runs are never read together.
"""

import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
from absl import flags

from vit_jax import cli
from vit_jax.config import DataConfig
from vit_jax.data import order, sources
from vit_jax.data.examples import Dataset, Split
from vit_jax.data.records import (
    ARRAY_RECORD,
    FORMATS,
    IMAGE_KEY,
    LABEL_KEY,
    NAME_KEY,
    TFRECORD,
    read_sidecar,
)
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

SHARD_BYTES = 128 * 2**20  # aimed at: large reads, and enough shards to share out
_SHUFFLE = 0x77726974  # names the permutation of the examples


def write(
    source: str,
    dest: str,
    *,
    split: str = "",
    format: str = TFRECORD,
    shards: int = 0,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Writes the splits of ``source`` into the folder ``dest``.

    Args:
      source: a folder, a .csv or .jsonl manifest, or ``tfds:NAME``.
      split: "train", "test" or, if "", both.
      shards: files per split; 0: as many as make them about 128 MiB.
      workers: shards written at a time; 0: one per CPU.

    Returns:
      The index of each split, which is also in ``dest/SPLIT.json``.

    Raises:
      UserError: the source is no data set or has a file that cannot be read, ``dest``
        is no folder, or the disk is full.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}: choose one of {list(FORMATS)}")
    if source.startswith("tfds:"):
        cfg = DataConfig(source="tfds", name=source.removeprefix("tfds:"))
    else:
        cfg = DataConfig(source="folder", path=source)
    if workers < 0:
        raise UserError(f"--workers is {workers}: it must be at least 0 (one per CPU)")
    dataset = sources.load(cfg)
    try:
        tf.io.gfile.makedirs(dest)
    except tf.errors.OpError as e:
        raise UserError(f"cannot make the folder {dest}: {e.message}") from e
    result = {}
    for name in (split,) if split else ("train", "test"):
        part = sources.evaluation_split(cfg, dataset, name)
        if part.parse is not None:
            record = tf.TensorSpec((), tf.string)
            parse = tf.function(part.parse, input_signature=[record], autograph=False)
            part = dataclasses.replace(part, parse=parse)
        result[name] = _write_split(
            dataset, part, dest, name, format, shards, workers, progress
        )
    return result


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard: which examples, where to, and what identifies a finished one."""

    file: str
    positions: np.ndarray
    fingerprint: str


def _write_split(
    dataset: Dataset,
    part: Split,
    dest: str,
    name: str,
    format: str,
    shards: int,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    size = len(part)
    if not shards:
        sample = np.linspace(0, size - 1, min(size, 64)).astype(np.int64)
        mean = np.mean([len(_example(part, int(p))[0]) for p in sample])
        shards = min(max(1, math.ceil(mean * size / SHARD_BYTES)), size)
    if not 0 < shards <= size:
        raise UserError(f"--shards is {shards}: it must lie in [1, {size}]")
    shuffled = order.permutation(np.arange(size), size, _SHUFFLE)
    jobs = []
    for i in range(shards):
        positions = shuffled[i * size // shards : (i + 1) * size // shards]
        file = os.path.join(dest, f"{name}-{i:05d}-of-{shards:05d}.{format}")
        jobs.append(_Job(file, positions, _fingerprint(dataset, part, positions)))
    done, lock = 0, threading.Lock()
    infos: dict[str, dict[str, Any]] = {}
    counts = np.zeros(dataset.num_classes, np.int64)
    index_file = os.path.join(dest, name + ".json")
    if tf.io.gfile.exists(index_file):
        tf.io.gfile.remove(index_file)
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    futures = {pool.submit(_write_shard, j, part, format): j for j in jobs}
    try:
        for future in as_completed(futures):
            info, labels = future.result()
            with lock:
                infos[info["file"]] = info
                counts += np.bincount(labels[labels >= 0], minlength=len(counts))
                done += 1
            if progress:
                print(f"\r{name}: {done} of {shards} shards", end="", flush=True)
    except (OSError, RuntimeError, tf.errors.OpError) as e:
        pool.shutdown(cancel_futures=True)
        raise _failure(e, dest, len(infos), shards) from e
    finally:
        pool.shutdown(cancel_futures=True)
    if progress:
        print()
    index = {
        "format": format,
        "examples": size,
        "multilabel": dataset.multilabel,
        "class_names": list(dataset.class_names),
        "class_counts": counts.tolist(),
        "image_key": IMAGE_KEY,
        "label_key": LABEL_KEY,
        "shards": [infos[os.path.basename(j.file)] for j in jobs],
    }
    _replace(index_file, json.dumps(index, indent=1).encode())
    _remove_others(dest, name, set(infos))
    return index


def _remove_others(dest: str, name: str, files: set[str]) -> None:
    """Removes shards of this split that are not in its index, and pieces of them."""
    ours = re.compile(
        rf"{re.escape(name)}(\.json|-\d+-of-\d+\.({'|'.join(FORMATS)})(\.npz)?)(\.tmp)?"
    )
    keep = {name + ".json"} | files | {file + ".npz" for file in files}
    for file in tf.io.gfile.listdir(dest):
        if ours.fullmatch(file) and file not in keep:
            tf.io.gfile.remove(os.path.join(dest, file))


def _write_shard(
    job: _Job, part: Split, format: str
) -> tuple[dict[str, Any], np.ndarray]:
    """Writes one shard unless it is there already; returns its index entry and labels.

    The sidecar is written last: it vouches for the shard.
    """
    sidecar = job.file + ".npz"
    if tf.io.gfile.exists(sidecar):
        labels = _finished(job)
        if labels is not None:
            return _info(job, tf.io.gfile.stat(job.file).length), labels
        tf.io.gfile.remove(sidecar)
    temporary = job.file + ".tmp"
    offsets, label_lists = [0], []
    try:
        writer = _writer(temporary, format)
        try:
            for position in job.positions:
                record, labels = _record(part, int(position))
                writer.write(record)
                offsets.append(offsets[-1] + len(record) + 16)
                label_lists.append(labels)
        finally:
            writer.close()
        size = tf.io.gfile.stat(temporary).length
        if format == TFRECORD and size != offsets[-1]:
            raise OSError(errno.ENOSPC, "the shard is shorter than what was written")
        flat = np.array([v for x in label_lists for v in x], np.int32)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            offsets=np.array(offsets if format == TFRECORD else [], np.int64),
            labels=flat,
            label_counts=np.array([len(x) for x in label_lists], np.int32),
            bytes=size,
            fingerprint=job.fingerprint,
        )
        tf.io.gfile.rename(temporary, job.file, overwrite=True)
        _replace(sidecar, buffer.getvalue())
    except BaseException:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)
        raise
    return _info(job, size), flat


def _finished(job: _Job) -> np.ndarray | None:
    """The labels of a shard that an earlier run wrote; None where it is another one."""
    try:
        found = read_sidecar(job.file, "fingerprint", "bytes", "labels")
    except UserError:  # cut short
        return None
    if found is None or str(found[0]) != job.fingerprint:
        return None
    if not tf.io.gfile.exists(job.file):
        return None
    return found[2] if tf.io.gfile.stat(job.file).length == found[1] else None


def _record(part: Split, position: int) -> tuple[bytes, list[int]]:
    image, labels = _example(part, position)
    name = os.path.basename(part.name(int(part.index(np.array([position]))[0])))
    feature = {
        IMAGE_KEY: _bytes(image),
        LABEL_KEY: tf.train.Feature(int64_list=tf.train.Int64List(value=labels)),
        NAME_KEY: _bytes(name.encode()),
    }
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    return example.SerializeToString(deterministic=True), labels


def _example(part: Split, position: int) -> tuple[bytes, list[int]]:
    """The encoded image as it is (a decoded one becomes a PNG file, which loses
    nothing) and its labels."""
    index = part.index(np.array([position]))
    data = part.fetch(index)
    if part.kind == "record":
        assert part.parse is not None
        image, labels = part.parse(data[0])
        return image.numpy(), labels.numpy().tolist()
    if part.kind == "pixels":
        pixels = np.frombuffer(data[0][0], np.uint8).reshape(data[1][0])
        image = tf.io.encode_png(pixels).numpy()
    else:
        image = _read(data[0]) if part.kind == "path" else data[0]
    assert part.labels is not None
    return image, part.labels.of(index)[0].tolist()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}; mend or remove it") from e


def _bytes(value: bytes) -> Any:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))


def _writer(file: str, format: str) -> Any:
    if format == ARRAY_RECORD:
        try:
            from array_record.python.array_record_module import ArrayRecordWriter
        except ImportError as e:
            raise UserError(
                "--format=array_record needs the package array_record: pip install "
                "array_record, or use --format=tfrecord"
            ) from e
        return ArrayRecordWriter(file, "group_size:1")  # one seek per random read
    return tf.io.TFRecordWriter(file)


def _info(job: _Job, size: int) -> dict[str, Any]:
    return {
        "file": os.path.basename(job.file),
        "examples": len(job.positions),
        "bytes": int(size),
        "fingerprint": job.fingerprint,
    }


def _fingerprint(dataset: Dataset, part: Split, positions: np.ndarray) -> str:
    """Changes when a shard would hold other examples, labels or classes, or when a file
    was replaced."""
    digest = hashlib.sha256(json.dumps(dataset.class_names).encode())
    index = part.index(positions)
    for i in index.tolist():
        digest.update(part.name(i).encode() + b"\0")
    if part.labels is not None:
        for labels in part.labels.of(index):
            digest.update(labels.tobytes() + b"\0")
    if part.kind == "path":
        for path in part.fetch(index):
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _replace(file: str, data: bytes) -> None:
    """Writes a whole file or nothing."""
    with tf.io.gfile.GFile(file + ".tmp", "wb") as stream:
        stream.write(data)
    tf.io.gfile.rename(file + ".tmp", file, overwrite=True)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _failure(error: Exception, dest: str, done: int, shards: int) -> UserError:
    full = isinstance(error, tf.errors.ResourceExhaustedError) or (
        isinstance(error, OSError) and error.errno in _FULL
    )
    full |= os.strerror(errno.ENOSPC) in str(error)  # array_record's RuntimeError
    text = " ".join(str(error).split())[:200]
    what = "the disk is full" if full else f"{type(error).__name__}: {text}"
    return UserError(
        f"writing to {dest} failed after {done} of {shards} shards: {what}; make room "
        "or mend it and run the same command again, which keeps the finished shards"
    )


def define_flags() -> None:
    """The options of the command."""
    flags.DEFINE_enum("format", TFRECORD, FORMATS, "Of the files.")
    flags.DEFINE_string("split", "", "train or test; both if empty.")
    flags.DEFINE_integer("shards", 0, "Files per split; 0: of about 128 MiB each.")
    flags.DEFINE_integer("workers", 0, "Shards written at a time; 0: one per CPU.")


def main(arguments: list[str]) -> None:
    """Entry point: ``SOURCE DEST`` and the flags."""
    if len(arguments) != 2:
        raise UserError(
            f"got the arguments {arguments}: it must be SOURCE (a folder, a .csv or "
            ".jsonl manifest, or tfds:NAME) and DEST (a folder for the shards)"
        )
    source, dest = arguments
    options: dict[str, Any] = {
        k: flags.FLAGS[k].value for k in ("split", "format", "shards", "workers")
    }
    for name, index in write(source, dest, **options, progress=True).items():
        print(
            f"{name}: {index['examples']} examples of {len(index['class_names'])} "
            f"classes in {len(index['shards'])} {index['format']} shards"
        )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
