# SPDX-License-Identifier: Apache-2.0
"""Prints a hash of the first batches of every source, to compare two versions by hand.

    python tests/data_hashes.py > before.txt     in one checkout
    python tests/data_hashes.py > after.txt      in the other; then diff

Every line is one way of reading the same small photographs: a source, with or without
unreadable files, in training or evaluation, on one process or two. It asks nothing of
the code but the public functions, so that old versions can run it as well.
"""

import hashlib
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from data_files import encoded, picture

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import write_records
from vit_jax.data.tensorflow_cpu import tf

EXAMPLES, BATCH, STEPS = 600, 12, 20


def images(*, bad: bool) -> list[bytes]:
    """Photographs; of the bad ones, some hold no image and some are torn inside."""
    made = [encoded(picture(i)) for i in range(EXAMPLES)]
    if bad:
        for i in range(5, EXAMPLES, 40):
            made[i] = b"hello" if i % 80 else b"<html>" * 20
        for i in range(7, EXAMPLES, 50):
            middle = len(made[i]) // 2
            made[i] = made[i][:middle] + b"\xff\xd8" + made[i][middle + 2 :]
    return made


def write_folder(root: Path, files: list[bytes]) -> None:
    for i, content in enumerate(files):
        folder = root / ("test" if i % 10 == 0 else "train") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:04d}.jpg").write_bytes(content)


def write_manifest(root: Path, files: list[bytes]) -> Path:
    """Images with zero to three labels each."""
    lines = []
    for i, content in enumerate(files):
        (root / f"{i}.jpg").write_bytes(content)
        labels = [name for bit, name in enumerate("abc") if i >> bit & 1]
        split = "test" if i % 10 == 0 else "train"
        row = {"image": f"{i}.jpg", "labels": labels, "split": split}
        lines.append(json.dumps(row))
    (root / "set.jsonl").write_text("\n".join(lines))
    return root / "set.jsonl"


def write_shards(root: Path, files: list[bytes], format: str) -> None:
    """Shards without an index, as others write them."""
    from array_record.python.array_record_module import ArrayRecordWriter

    for split, numbers in {
        "train": [i for i in range(len(files)) if i % 10],
        "test": range(0, len(files), 10),
    }.items():
        file = str(root / f"{split}-00000-of-00001.{format}")
        if format == "tfrecord":
            writer = tf.io.TFRecordWriter(file)
        else:
            writer = ArrayRecordWriter(file, "group_size:1")
        for i in numbers:
            feature = {
                "image": tf.train.Feature(
                    bytes_list=tf.train.BytesList(value=[files[i]])
                ),
                "label": tf.train.Feature(
                    int64_list=tf.train.Int64List(value=[i % 2 if i % 91 else 9])
                ),
            }
            features = tf.train.Features(feature=feature)
            record = tf.train.Example(features=features)
            writer.write(record.SerializeToString(deterministic=True))
        writer.close()


def configs(root: Path) -> dict[str, DataConfig]:
    """Every way of reading."""
    common = {"image_size": 16, "max_bad": 0.5}
    found = {
        "digits": DataConfig(source="digits", **common),
        "synthetic": DataConfig(source="synthetic", **common),
    }
    for state in ("clean", "bad"):
        files = images(bad=state == "bad")
        write_folder(root / state / "folder", files)
        path = str(root / state / "folder")
        for name, cache in (("folder", 0.0), ("cached", 1.0)):
            found[f"{name} {state}"] = DataConfig(
                source="folder", path=path, cache_gib=cache, **common
            )
        (root / state / "csv").mkdir()
        path = str(write_manifest(root / state / "csv", files))
        found[f"manifest {state}"] = DataConfig(
            source="folder", path=path, cache_gib=0.0, **common
        )
        for format in ("tfrecord", "array_record"):
            folder = root / state / format
            folder.mkdir()
            if state == "clean":
                photos = str(root / state / "folder")
                write_records.write(photos, str(folder), format=format, shards=3)
            else:
                write_shards(folder, files, format)
            for access in ("random", "sequential"):
                found[f"{format} {access} {state}"] = DataConfig(
                    source="records",
                    path=str(folder),
                    access=access,
                    shuffle_buffer=100,
                    num_classes=0 if state == "clean" else 2,
                    cache_gib=0.0,
                    **common,
                )
    return found


def digest(batches: list[list[dict[str, np.ndarray]]]) -> str:
    """Of the batches of one or more processes, side by side."""
    found = hashlib.sha256()
    for step in zip(*batches, strict=True):
        for key in sorted(step[0]):
            joined = np.concatenate([b[key] for b in step])
            found.update(f"{key} {joined.dtype} {joined.shape}".encode())
            found.update(np.ascontiguousarray(joined).tobytes())
    return found.hexdigest()[:16]


def read(cfg: DataConfig, mode: str, count: int) -> str:
    parts = []
    for i in range(count):
        share = {"process_index": i, "process_count": count}
        if mode == "eval":
            batches = data.eval_batches(cfg, batch=BATCH, **share)
        else:
            start = 15 if mode == "resumed" else 0
            batches = data.train_batches(cfg, batch=BATCH, seed=3, start=start, **share)
        parts.append(list(itertools.islice(batches, STEPS)))
    return digest(parts)


def main() -> None:
    wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        for name, cfg in configs(Path(scratch)).items():
            if wanted and not any(w in name for w in wanted):
                continue
            for mode, count in itertools.product(("train", "resumed", "eval"), (1, 2)):
                print(f"{name}, {mode}, {count}: {read(cfg, mode, count)}", flush=True)


if __name__ == "__main__":
    main()
