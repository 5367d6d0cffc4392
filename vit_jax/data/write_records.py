# SPDX-License-Identifier: Apache-2.0
"""Turns a folder, a manifest or a tfds set into sharded records.

    python -m vit_jax.data.write_records photos/ records/
    python -m vit_jax.data.write_records labels.csv records/ --format=array_record
    python -m vit_jax.data.write_records tfds:cifar10 records/ --split=train

Images are copied as they are, in one fixed random order, so that shards can also be
read in sequence; those that cannot be decoded are listed and left out. Shards are
written side by side; one that is finished is not written again when the command is
repeated after an interruption. The index, SPLIT.json, is deleted first and written last:
shards of two runs are never read together.
"""

import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from vit_jax import cli
from vit_jax.config import DataConfig

if __name__ == "__main__":
    cli.need("tensorflow")

from vit_jax.data import graph, order, sources
from vit_jax.data.examples import Dataset, Split, Unreadable
from vit_jax.data.records import IMAGE_KEY, LABEL_KEY, NAME_KEY
from vit_jax.data.shards import ARRAY_RECORD, FORMATS, TFRECORD, read_sidecar
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

SHARD_BYTES = 128 * 2**20  # aimed at: large reads, and enough shards to share out
_LISTED = 20  # images that were left out are named one by one, up to this number
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
      The index of each split, which is also in ``dest/SPLIT.json``; its ``left_out``
      lists what could not be decoded.

    Raises:
      UserError: the source is not a data set or holds no image that can be decoded,
        ``dest`` is not a folder, or the disk is full.
    """
    if format not in FORMATS:
        raise UserError(f"--format is {format!r}: choose one of {list(FORMATS)}")
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
        result[name] = _write_split(
            dataset, part, dest, name, format, shards, workers, progress
        )
    return result


@dataclasses.dataclass
class _Job:
    """One shard: which examples, where to, and what identifies a finished one."""

    file: str
    positions: np.ndarray
    fingerprint: str
    done: int = 0  # examples, written or left out


@dataclasses.dataclass(frozen=True)
class _Written:
    """A finished shard."""

    info: dict[str, Any]  # its entry in the index
    labels: np.ndarray
    left_out: list[dict[str, str]]


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
    jobs = _jobs(dataset, part, os.path.join(dest, name), format, shards)
    index_file = os.path.join(dest, name + ".json")
    if tf.io.gfile.exists(index_file):
        tf.io.gfile.remove(index_file)
    written: dict[str, _Written] = {}
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    bar = tqdm(desc=name, total=len(part), unit=" images", disable=not progress)
    try:
        running = {pool.submit(_write_shard, job, part, format): job for job in jobs}
        left = set(running)
        while left:
            finished, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in finished:
                written[running[future].file] = future.result()
            bar.update(sum(job.done for job in jobs) - bar.n)
    except (OSError, RuntimeError, tf.errors.OpError) as e:
        pool.shutdown(cancel_futures=True)
        raise _failure(e, dest, len(written), len(jobs)) from e
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    in_order = [written[job.file] for job in jobs]
    labels = np.concatenate([w.labels for w in in_order])
    index = {
        "format": format,
        "examples": sum(w.info["examples"] for w in in_order),
        "multilabel": dataset.multilabel,
        "class_names": list(dataset.class_names),
        "class_counts": np.bincount(
            labels[labels >= 0], minlength=dataset.num_classes
        ).tolist(),
        "image_key": IMAGE_KEY,
        "label_key": LABEL_KEY,
        "shards": [w.info for w in in_order],
        "left_out": [bad for w in in_order for bad in w.left_out],
    }
    if not index["examples"]:
        first = index["left_out"][0]
        raise UserError(
            f"none of the {len(part)} images of the split {name!r} can be decoded: the "
            f"first is {first['image']} ({first['reason']})"
        )
    _replace(index_file, json.dumps(index, indent=1).encode())
    _remove_others(dest, name, {w.info["file"] for w in in_order})
    return index


def _jobs(
    dataset: Dataset, part: Split, prefix: str, format: str, shards: int
) -> list[_Job]:
    size = len(part)
    if not shards:
        sample = np.linspace(0, size - 1, min(size, 64)).astype(np.int64)
        found = [_encoded(part, int(p))[0] for p in sample]
        mean = np.mean([len(f) if isinstance(f, bytes) else 0 for f in found])
        shards = min(max(1, math.ceil(mean * size / SHARD_BYTES)), size)
    if not 0 < shards <= size:
        raise UserError(f"--shards is {shards}: it must lie in [1, {size}]")
    shuffled = order.permutation(np.arange(size), size, _SHUFFLE)
    jobs = []
    for i in range(shards):
        positions = shuffled[i * size // shards : (i + 1) * size // shards]
        file = f"{prefix}-{i:05d}-of-{shards:05d}.{format}"
        jobs.append(_Job(file, positions, _fingerprint(dataset, part, positions)))
    return jobs


def _remove_others(dest: str, name: str, files: set[str]) -> None:
    """Removes shards of this split that are not in its index, and pieces of them."""
    ours = re.compile(
        rf"{re.escape(name)}(\.json|-\d+-of-\d+\.({'|'.join(FORMATS)})(\.npz)?)(\.tmp)?"
    )
    keep = {name + ".json"} | files | {file + ".npz" for file in files}
    for file in tf.io.gfile.listdir(dest):
        if ours.fullmatch(file) and file not in keep:
            tf.io.gfile.remove(os.path.join(dest, file))


def _write_shard(job: _Job, part: Split, format: str) -> _Written:
    """Writes one shard unless it is there already.

    The sidecar is written last: it vouches for the shard.
    """
    sidecar = job.file + ".npz"
    if tf.io.gfile.exists(sidecar):
        found = _finished(job)
        if found is not None:
            job.done = len(job.positions)
            return found
        tf.io.gfile.remove(sidecar)
    temporary = job.file + ".tmp"
    try:
        arrays = _fill(job, part, temporary, format)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        tf.io.gfile.rename(temporary, job.file, overwrite=True)
        _replace(sidecar, buffer.getvalue())
    except BaseException:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)
        raise
    return _written(job, arrays)


def _fill(job: _Job, part: Split, file: str, format: str) -> dict[str, Any]:
    """Writes the records of a shard; returns what its sidecar holds."""
    offsets, label_lists, left_out = [0], [], []
    writer = _writer(file, format)
    try:
        for position in job.positions.tolist():
            image, labels = _encoded(part, position)
            name = part.name_of(position)
            if isinstance(image, Unreadable):
                left_out.append({"image": name, "reason": image.reason})
            else:
                record = _record(image, labels, os.path.basename(name))
                writer.write(record)
                offsets.append(offsets[-1] + len(record) + 16)
                label_lists.append(labels)
            job.done += 1
    finally:
        writer.close()
    size = tf.io.gfile.stat(file).length
    if format == TFRECORD and size != offsets[-1]:
        raise OSError(errno.ENOSPC, "the shard is shorter than what was written")
    return {
        "offsets": np.array(offsets if format == TFRECORD else [], np.int64),
        "labels": np.concatenate([np.zeros(0, np.int32), *label_lists]),
        "label_counts": np.array([len(x) for x in label_lists], np.int32),
        "bytes": np.array(size),
        "fingerprint": np.array(job.fingerprint),
        "left_out": np.array(json.dumps(left_out)),
    }


def _finished(job: _Job) -> _Written | None:
    """A shard that an earlier run wrote; None where it is another one."""
    try:
        found = read_sidecar(job.file)
    except UserError:  # cut short
        return None
    if found is None or str(found["fingerprint"]) != job.fingerprint:
        return None
    if not tf.io.gfile.exists(job.file):
        return None
    same = tf.io.gfile.stat(job.file).length == found["bytes"]
    return _written(job, found) if same and "left_out" in found else None


def _written(job: _Job, sidecar: dict[str, Any]) -> _Written:
    info = {
        "file": os.path.basename(job.file),
        "examples": len(sidecar["label_counts"]),
        "bytes": int(sidecar["bytes"]),
        "fingerprint": job.fingerprint,
    }
    return _Written(info, sidecar["labels"], json.loads(str(sidecar["left_out"])))


def _record(image: bytes, labels: np.ndarray, name: str) -> bytes:
    feature = {
        IMAGE_KEY: _bytes(image),
        LABEL_KEY: tf.train.Feature(int64_list=tf.train.Int64List(value=labels)),
        NAME_KEY: _bytes(name.encode()),
    }
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    return example.SerializeToString(deterministic=True)


def _encoded(part: Split, position: int) -> tuple[bytes | Unreadable, np.ndarray]:
    """The image file as it is (pixels become a PNG file, which loses nothing), where it
    can be decoded, and its labels."""
    (image,), (labels,) = part.read(np.array([position]))
    try:
        if part.kind == "path":
            with open(image, "rb") as stream:
                image = stream.read()
        if part.kind == "pixels":
            return tf.io.encode_png(image).numpy(), labels
        if not isinstance(image, Unreadable):
            graph.pixels(image, "encoded")
    except OSError as e:
        image = Unreadable(str(e.strerror))
    except graph.ERRORS as e:
        image = Unreadable(graph.reason(e))
    return image, labels


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


def _fingerprint(dataset: Dataset, part: Split, positions: np.ndarray) -> str:
    """Changes when a shard would hold other examples, labels or classes, or when a file
    was replaced."""
    digest = hashlib.sha256(json.dumps(dataset.class_names).encode())
    for position in positions.tolist():
        digest.update(part.name_of(position).encode() + b"\0")
    if part.labels is not None:
        for labels in part.labels.of(part.index(positions)):
            digest.update(labels.tobytes() + b"\0")
    if part.kind == "path":
        for path in part.read(positions)[0]:
            # One that is gone will be among those left out.
            status = os.stat(path) if os.path.exists(path) else os.stat_result([0] * 10)
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
        left_out = index["left_out"]
        for bad in left_out[:_LISTED]:
            print(f"  left out: {bad['image']}: {bad['reason']}")
        if len(left_out) > _LISTED:
            more = len(left_out) - _LISTED
            print(f"  and {more} more, which {os.path.join(dest, name)}.json lists")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
