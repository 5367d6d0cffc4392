# SPDX-License-Identifier: Apache-2.0
"""Writes one split as shards of records, an index beside them.

The behaviour is that of ``python -m vit_jax.data.write_records``, see there.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import logging
import math
import os
import re
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from tqdm import tqdm

from vit_jax.data import graph, order
from vit_jax.data.examples import Dataset, Split, Unreadable
from vit_jax.data.records import IMAGE_KEY, LABEL_KEY, NAME_KEY
from vit_jax.data.shards import ARRAY_RECORD, FORMATS, TFRECORD, read_sidecar
from vit_jax.data.shrink import Shrink
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

SHARD_BYTES = 128 * 2**20  # aimed at: large reads, and enough shards to share out
_SHUFFLE = 0x77726974  # names the permutation of the examples


@dataclasses.dataclass(frozen=True)
class Writing:
    """One split on its way into a folder."""

    dataset: Dataset
    part: Split
    dest: str
    name: str
    format: str
    shrink: Shrink


@dataclasses.dataclass
class Job:
    """One shard: which examples, where to, and what identifies a finished one."""

    file: str
    positions: np.ndarray
    fingerprint: str
    done: int = 0  # examples, written or left out

    def __len__(self) -> int:
        return len(self.positions)


@dataclasses.dataclass(frozen=True)
class _Written:
    """A finished shard."""

    info: dict[str, Any]  # its entry in the index
    labels: np.ndarray
    left_out: list[dict[str, str]]
    reencoded: int  # images that --shorter_side changed


def write_split(
    writing: Writing, jobs: list[Job], own: list[Job], workers: int, progress: bool
) -> dict[str, Any] | None:
    """Writes those of the shards that are this process's ``own``; the index, where all
    are finished then."""
    _check_settings(writing)
    index_file = os.path.join(writing.dest, writing.name + ".json")
    if tf.io.gfile.exists(index_file):
        tf.io.gfile.remove(index_file)
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1)
    try:
        before = list(pool.map(_finished, own))
        left = [job for job, found in zip(own, before, strict=True) if found is None]
        _write_shards(writing, left, sum(map(len, own)), pool, progress)
        after = list(pool.map(_finished, jobs))
    finally:
        pool.shutdown(cancel_futures=True)
    finished = [found for found in after if found is not None]
    if len(finished) < len(jobs):
        log.warning(
            "%s: %d of %d shards are finished; the process that ends last writes %s",
            writing.name, len(finished), len(jobs), index_file,
        )  # fmt: skip
        return None
    index = _index(writing, finished)
    _replace(index_file, json.dumps(index, indent=1).encode())
    _remove_others(writing, {shard["file"] for shard in index["shards"]})
    return index


def _write_shards(
    writing: Writing,
    jobs: list[Job],
    images: int,
    pool: ThreadPoolExecutor,
    progress: bool,
) -> None:
    """Writes shards side by side. ``images``: those of finished ones included."""
    before = images - sum(map(len, jobs))
    bar = tqdm(
        desc=writing.name,
        total=images,
        initial=before,  # took no time
        unit=" images",
        disable=not progress,
    )
    try:
        left = {pool.submit(_write_shard, writing, job) for job in jobs}
        while left:
            finished, left = wait(left, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            bar.update(before + sum(job.done for job in jobs) - bar.n)
    except (OSError, RuntimeError, tf.errors.OpError) as e:
        pool.shutdown(cancel_futures=True)
        done = sum(job.done == len(job) for job in jobs)
        raise _failure(e, writing.dest, done, len(jobs)) from e
    finally:
        bar.close()


def _index(writing: Writing, shards: list[_Written]) -> dict[str, Any]:
    """What ``SPLIT.json`` says."""
    dataset = writing.dataset
    labels = np.concatenate([w.labels for w in shards])
    index = {
        "format": writing.format,
        "examples": sum(w.info["examples"] for w in shards),
        "multilabel": dataset.multilabel,
        "class_names": list(dataset.class_names),
        "class_counts": np.bincount(
            labels[labels >= 0], minlength=dataset.num_classes
        ).tolist(),
        "image_key": IMAGE_KEY,
        "label_key": LABEL_KEY,
        **dataclasses.asdict(writing.shrink),
        "reencoded": sum(w.reencoded for w in shards),
        "shards": [w.info for w in shards],
        "left_out": [bad for w in shards for bad in w.left_out],
    }
    if not index["examples"]:
        first = index["left_out"][0]
        raise UserError(
            f"none of the {len(writing.part)} images of the split {writing.name!r} can "
            f"be decoded: the first is {first['image']} ({first['reason']})"
        )
    return index


def make_jobs(writing: Writing, shards: int) -> list[Job]:
    size = len(writing.part)
    if not shards:
        sample = np.linspace(0, size - 1, min(size, 64)).astype(np.int64)
        found = [_encoded(writing, int(p))[0] for p in sample]
        mean = np.mean([len(f) if isinstance(f, bytes) else 0 for f in found])
        shards = min(max(1, math.ceil(mean * size / SHARD_BYTES)), size)
    if not 0 < shards <= size:
        raise UserError(f"--shards is {shards}: it must lie in [1, {size}]")
    shuffled = order.permutation(np.arange(size), size, _SHUFFLE)
    prefix = os.path.join(writing.dest, writing.name)
    jobs = []
    for i in range(shards):
        positions = shuffled[i * size // shards : (i + 1) * size // shards]
        file = f"{prefix}-{i:05d}-of-{shards:05d}.{writing.format}"
        jobs.append(Job(file, positions, _fingerprint(writing, positions)))
    return jobs


def _ours(writing: Writing) -> list[str]:
    """The files of this split in the folder, pieces of them included."""
    shard = rf"-\d+-of-\d+\.({'|'.join(FORMATS)})(\.npz)?"
    ours = re.compile(rf"{re.escape(writing.name)}(\.json|{shard})(\.\d+)?(\.tmp)?")
    return [f for f in tf.io.gfile.listdir(writing.dest) if ours.fullmatch(f)]


def _remove_others(writing: Writing, files: set[str]) -> None:
    """Removes shards of this split that are not in its index, and pieces of them."""
    keep = {writing.name + ".json"} | files | {file + ".npz" for file in files}
    for file in set(_ours(writing)) - keep:
        tf.io.gfile.remove(os.path.join(writing.dest, file))


def _check_settings(writing: Writing) -> None:
    """Refuses a folder with shards of another --shorter_side or --quality: those that
    are finished would be kept."""
    for file in _ours(writing):
        found = None
        if file.endswith(".npz"):
            with contextlib.suppress(UserError):  # cut short
                found = read_sidecar(os.path.join(writing.dest, file[: -len(".npz")]))
        if found is None:
            continue
        shrink = Shrink(*found.get("shrink", np.zeros(2, int)).tolist())
        if shrink != writing.shrink:
            raise UserError(
                f"{writing.dest} holds shards of the split {writing.name!r} with images "
                f"{shrink}, and this command writes them {writing.shrink}: shards of two "
                "writings do not mix; give the same flags, or another folder"
            )


def _write_shard(writing: Writing, job: Job) -> None:
    """Writes one shard. The sidecar is written last: it vouches for the shard."""
    sidecar, temporary = job.file + ".npz", job.file + ".tmp"
    if tf.io.gfile.exists(sidecar):  # of another one
        tf.io.gfile.remove(sidecar)
    try:
        arrays = _fill(writing, job, temporary)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        tf.io.gfile.rename(temporary, job.file, overwrite=True)
        _replace(sidecar, buffer.getvalue())
    except BaseException:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)
        raise


def _fill(writing: Writing, job: Job, file: str) -> dict[str, Any]:
    """Writes the records of a shard; returns what its sidecar holds."""
    part, format = writing.part, writing.format
    offsets, label_lists, left_out, reencoded = [0], [], [], 0
    writer = _writer(file, format)
    try:
        for position in job.positions.tolist():
            image, labels, changed = _encoded(writing, position)
            name = part.name_of(position)
            if isinstance(image, Unreadable):
                left_out.append({"image": name, "reason": image.reason})
            else:
                record = _record(image, labels, os.path.basename(name))
                writer.write(record)
                offsets.append(offsets[-1] + len(record) + 16)
                label_lists.append(labels)
                reencoded += changed
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
        "shrink": np.array(dataclasses.astuple(writing.shrink)),
        "reencoded": np.array(reencoded),
    }


def _finished(job: Job) -> _Written | None:
    """A shard that is written already; None where it is another one."""
    try:
        found = read_sidecar(job.file)
    except UserError:  # cut short
        return None
    if found is None or str(found["fingerprint"]) != job.fingerprint:
        return None
    if not tf.io.gfile.exists(job.file):
        return None
    size = tf.io.gfile.stat(job.file).length
    if size != found["bytes"] or "left_out" not in found:
        return None
    info = {
        "file": os.path.basename(job.file),
        "examples": len(found["label_counts"]),
        "bytes": size,
        "fingerprint": job.fingerprint,
    }
    left_out = json.loads(str(found["left_out"]))
    return _Written(info, found["labels"], left_out, int(found.get("reencoded", 0)))


def _record(image: bytes, labels: np.ndarray, name: str) -> bytes:
    feature = {
        IMAGE_KEY: _bytes(image),
        LABEL_KEY: tf.train.Feature(int64_list=tf.train.Int64List(value=labels)),
        NAME_KEY: _bytes(name.encode()),
    }
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    return example.SerializeToString(deterministic=True)


def _encoded(
    writing: Writing, position: int
) -> tuple[bytes | Unreadable, np.ndarray, bool]:
    """The image file to write (of pixels a PNG file, which loses nothing), where it can
    be decoded; its labels; and whether ``shrink`` changed it."""
    changed = False
    (image,), (labels,) = writing.part.read(np.array([position]))
    try:
        if writing.part.kind == "path":
            with open(image, "rb") as stream:
                image = stream.read()
        if writing.part.kind == "pixels":
            image = tf.io.encode_png(image).numpy()
        if not isinstance(image, Unreadable):
            made = writing.shrink(image, graph.pixels(image, "encoded"))
            changed, image = made is not image, made
    except OSError as e:
        image = Unreadable(str(e.strerror))
    except graph.ERRORS as e:
        image = Unreadable(graph.reason(e))
    return image, labels, changed


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
        # One seek per random read; images are compressed already.
        return ArrayRecordWriter(file, "group_size:1,uncompressed")
    return tf.io.TFRecordWriter(file)


def _fingerprint(writing: Writing, positions: np.ndarray) -> str:
    """Changes when a shard would hold other examples, labels, classes or sizes, or when
    a file was replaced."""
    part, shrink = writing.part, writing.shrink
    digest = hashlib.sha256(json.dumps(writing.dataset.class_names).encode())
    if shrink.shorter_side:
        digest.update(str(shrink).encode())
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
    """Writes a whole file or nothing; two processes may at the same time."""
    temporary = f"{file}.{os.getpid()}.tmp"
    with tf.io.gfile.GFile(temporary, "wb") as stream:
        stream.write(data)
    tf.io.gfile.rename(temporary, file, overwrite=True)


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
