# SPDX-License-Identifier: Apache-2.0
"""How fast images reach the model, beside the obvious pipeline and the floor.

Pipelines over the same photographs and as many threads, timed in turns in one run:

    obvious        decode, random crop, resize, flip, scale to [-1, 1]: a little tf.data
    decode_only    what any pipeline must do: decode the crop, and nothing after it
    files          what training does with the JPEG files
    tfrecord ...   what training does where the same files lie in shards
    shrunk_S_Q     the same, in shards made with --shorter_side=S --quality=Q
"""

import dataclasses
import functools
import importlib.util
import io
import json
import logging
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import (
    decode,
    graph,
    order,
    pipeline,
    sources,
    transforms,
    write_records,
)
from vit_jax.data.shards import FORMATS
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

MOST = 1_000  # images of a folder that are used
CORES = (8, 24, 112, 224)  # of a workstation, and of hosts with 1, 4 and 8 v5e chips
SHRUNK = ((256, 90), (320, 95))  # (shorter side, quality)


def run(
    cfg: DataConfig,
    *,
    batch: int = 64,
    rounds: int = 7,
    steps: int = 20,
    photos: int = 256,
) -> dict[str, Any]:
    """Times the pipelines and compares pixels.

    Args:
      cfg: ``image_size``, ``train_transforms`` and ``decode`` are used, and with source
        "folder" the JPEG files below ``path`` (or in that manifest), at most ``MOST``
        evenly among them; otherwise ``photos`` pictures of 500 x 375 pixels are cut from
        the two photographs that ship with scikit-learn.
      rounds: turns each pipeline gets, ``steps`` batches each. Other programs share the
        machine: medians are reported, and a ratio is the median of those within a round.

    Returns:
      Ratios that the targets are about, by CPU time first because other programs weigh
      on those by wall time: "files" to the obvious pipeline and to decoding alone, and
      each of the others to "files"; ``cpu_ms_per_image`` and ``images_per_second`` of
      every pipeline; what hosts of more cores would deliver by that CPU time
      (``images_per_second_by_cores``), up to what the one thread that draws examples
      and labels lets through (``images_per_second_at_most``); and the
      ``pixel_difference`` to the exact path.

    Raises:
      UserError: the folder holds no JPEG file, or the config is wrong.
    """
    crop = _crop(cfg)
    with tempfile.TemporaryDirectory() as scratch:
        if cfg.source == "folder" and cfg.path:
            found = _files(cfg)
            paths = _jpegs(found[:: -(-len(found) // MOST)], cfg.path)
        else:
            paths = write_photos(Path(scratch), photos)
        size = float(np.mean([Path(p).stat().st_size for p in paths]))
        ours = _stored(cfg, paths, Path(scratch))
        makers = {
            "obvious": lambda: _obvious(paths, cfg.image_size, batch, crop),
            "decode_only": lambda: _decode_only(paths, batch, crop),
        } | {
            name: functools.partial(pipeline.train_batches, one, batch=batch, seed=0)
            for name, one in ours.items()
        }
        speed = _timed(makers, batch, rounds, steps)
        most = {name: 1 / _drawing(one, batch, steps) for name, one in ours.items()}
        difference = pixel_difference(ours["files"], min(64, len(paths)))
    return {
        "images": len(paths),
        "kilobytes_per_image": round(size / 1000, 1),
        "image_size": cfg.image_size,
        **_compared(speed["rate"], speed["cpu"], most),
        "pixel_difference": difference,
    }


def _compared(
    rate: dict[str, list[float]], cpu: dict[str, list[float]], most: dict[str, float]
) -> dict[str, Any]:
    """The part of :func:`run`'s result that follows from what each pipeline took in every
    round: images/s, CPU seconds per image; ``most``: images/s that drawing lets through.
    """
    slowness = {k: [1 / r for r in v] for k, v in rate.items()}

    def times(cost: dict[str, list[float]], faster: str, slower: str) -> float:
        pairs = zip(cost[faster], cost[slower], strict=True)
        return round(statistics.median(b / a for a, b in pairs), 3)

    def medians(of: dict[str, list[float]], scale: float) -> dict[str, float]:
        return {k: round(scale * statistics.median(v), 3) for k, v in of.items()}

    others = [name for name in most if name != "files"]
    return {
        "times_obvious_cpu": times(cpu, "files", "obvious"),
        "share_of_decode_only_cpu": times(cpu, "files", "decode_only"),
        "times_files_cpu": {k: times(cpu, k, "files") for k in others},
        "times_obvious": times(slowness, "files", "obvious"),
        "share_of_decode_only": times(slowness, "files", "decode_only"),
        "times_files": {k: times(slowness, k, "files") for k in others},
        "cpu_ms_per_image": medians(cpu, 1e3),
        "images_per_second": medians(rate, 1),
        "images_per_second_by_cores": {
            name: by_cores(statistics.median(cpu[name]), most[name]) for name in most
        },
        "images_per_second_at_most": {k: round(v) for k, v in most.items()},
    }


def by_cores(cpu: float, most: float) -> dict[str, int]:
    """Images per second of hosts with so many idle cores, at ``cpu`` seconds per
    image."""
    return {str(cores): round(min(cores / cpu, most)) for cores in CORES}


def _drawing(cfg: DataConfig, batch: int, steps: int) -> float:
    """CPU seconds per image of the thread that draws, which no other shares."""
    split = sources.training_split(cfg, sources.load(cfg))
    drawn = order.train_indices(np.arange((steps + 1) * batch), len(split), 0)
    first, *rest = np.split(drawn, steps + 1)
    split.read(first)
    started = time.thread_time()
    for index in rest:
        split.read(index)
    return (time.thread_time() - started) / (steps * batch)


def pixel_difference(cfg: DataConfig, batch: int) -> dict[str, float]:
    """|fast - exact| of a batch of training images, in steps of 0 to 255, same crops."""
    images = []
    for choice in ("fast", "exact"):
        one = dataclasses.replace(cfg, decode=choice)
        batches = pipeline.train_batches(one, batch=batch, seed=0)
        images.append(next(batches)["image"].astype(np.float32))
    difference = np.abs(images[0] - images[1])
    return {
        "mean": round(float(difference.mean()), 3),
        "p99.9": round(float(np.quantile(difference, 0.999)), 3),
    }


def write_photos(folder: Path, count: int) -> list[str]:
    """Random 500 x 375 cuts of scikit-learn's two photographs, as JPEG files.

    Decoding takes time in proportion to the bits: the quality is chosen to come near
    ImageNet's 0.64 bytes per pixel (its training archive has 115 kB per image, of
    469 x 387 pixels on average).
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    originals = [Image.fromarray(i) for i in load_sample_images().images]
    paths = []
    for i in range(count):
        image = originals[i % 2]
        x = int(rng.integers(image.width - 500 + 1))
        y = int(rng.integers(image.height - 375 + 1))
        paths.append(str(folder / f"{i:04d}.jpg"))
        image.crop((x, y, x + 500, y + 375)).save(paths[-1], quality=98)
    return paths


def _timed(
    makers: dict[str, Callable[[], Iterator[Any]]],
    batch: int,
    rounds: int,
    steps: int,
) -> dict[str, dict[str, list[float]]]:
    """Images per second, and CPU seconds per image, of every pipeline in every round."""
    rate: dict[str, list[float]] = {k: [] for k in makers}
    cpu: dict[str, list[float]] = {k: [] for k in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            batches = make()
            for _ in range(4):  # buffers fill, and threads find their number
                next(batches)
            wall, used = time.perf_counter(), time.process_time()
            for _ in range(steps):
                next(batches)
            done = steps * batch
            rate[name].append(done / (time.perf_counter() - wall))
            cpu[name].append((time.process_time() - used) / done)
            del batches  # stops its threads
    return {"rate": rate, "cpu": cpu}


def _crop(cfg: DataConfig) -> dict[str, Any]:
    """How large the config's crops are: what is decoded depends on it."""
    for ops in (cfg.train_transforms, transforms.DEFAULT_TRAIN):
        run = transforms.compose(
            ops, size=cfg.image_size, exact=False, knob="data.train_transforms"
        )
        for function, options in run.steps:
            if function is transforms.inception_crop:
                return {k: options[k] for k in ("area", "ratio")}
    raise AssertionError("the default has a crop")


def _files(cfg: DataConfig) -> list[str]:
    """The images of a manifest, or every JPEG file below a folder."""
    path = os.path.expanduser(cfg.path)
    if not os.path.isdir(path):
        split = sources.load(DataConfig(source="folder", path=path)).train
        return [str(p) for p in split.read(np.arange(len(split)))[0]]
    jpeg = (".jpg", ".jpeg", ".jpe", ".jfif")
    below = sorted(Path(path).rglob("*"))
    found = [str(p) for p in below if p.name.lower().endswith(jpeg)]
    if not found:
        raise UserError(f"config.data.path {cfg.path!r} holds no JPEG file to read")
    return found


def _jpegs(paths: list[str], folder: str) -> list[str]:
    """Those that all three pipelines can read."""

    def is_good(path: str) -> bool:
        try:
            return bool(decode.is_jpeg(tf.io.read_file(path))) and bool(
                graph.pixels(path, "path").size
            )
        except graph.ERRORS:
            return False

    good = [
        p for p, ok in zip(paths, graph.POOL.map(is_good, paths), strict=True) if ok
    ]
    if not good:
        raise UserError(
            f"none of {len(paths)} images in config.data.path {folder!r} is a JPEG file "
            "that can be decoded: the benchmark compares ways to read those"
        )
    if len(good) < len(paths):
        log.warning("left out %d files that are not good JPEGs", len(paths) - len(good))
    return good


def _obvious(
    paths: list[str], size: int, batch: int, crop: dict[str, Any]
) -> Iterator[Any]:
    def make(path: Any) -> Any:
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros([0, 0, 4]),
            area_range=crop["area"],
            aspect_ratio_range=crop["ratio"],
            min_object_covered=0.0,
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.image.resize(tf.slice(image, begin, extent), [size, size])
        image = tf.image.random_flip_left_right(image)
        return tf.ensure_shape(image / 127.5 - 1.0, (size, size, 3))

    dataset = tf.data.Dataset.from_tensor_slices(paths).repeat().shuffle(len(paths))
    dataset = dataset.map(make, num_parallel_calls=graph.THREADS).batch(batch)
    return dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def _decode_only(paths: list[str], batch: int, crop: dict[str, Any]) -> Iterator[Any]:
    def make(path: Any, seed: Any) -> Any:
        data = tf.io.read_file(path)
        shape = tf.image.extract_jpeg_shape(data)
        window = transforms.inception_window(shape, seed, **crop)
        pixels = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        return tf.reshape(pixels, [-1])[:1]  # so that collecting them costs nothing

    seeds = order.augmentation_seeds(np.arange(len(paths)), 0)
    dataset = tf.data.Dataset.from_tensor_slices((paths, seeds)).repeat()
    make = tf.autograph.experimental.do_not_convert(make)
    dataset = dataset.shuffle(len(paths)).map(make, num_parallel_calls=graph.THREADS)
    return dataset.batch(batch).prefetch(2).as_numpy_iterator()


def _stored(cfg: DataConfig, paths: list[str], scratch: Path) -> dict[str, DataConfig]:
    """The files, in one class, as training reads them from every kind of storage."""
    rows = [{"image": os.path.abspath(p), "label": 0, "split": "train"} for p in paths]
    # Another file: a test image that is trained on would be pointed out.
    tested = shutil.copy(paths[0], str(scratch / "test.jpg"))
    rows.append({"image": tested, "label": 0, "split": "test"})
    manifest = scratch / "images.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows))
    files = DataConfig(
        source="folder",
        path=str(manifest),
        cache_gib=0.0,
        image_size=cfg.image_size,
        train_transforms=cfg.train_transforms,
        decode=cfg.decode,
    )
    stored = {"files": files}

    def add(name: str, source: Any) -> str:
        (scratch / name).mkdir()
        stored[name] = dataclasses.replace(
            files, source=source, path=str(scratch / name), test_split="train"
        )
        return stored[name].path

    for format in FORMATS:
        folder = add(format, "records")
        write_records.write(str(manifest), folder, split="train", format=format)
    _write_tar(paths, os.path.join(add("tar", "tar"), "train.tar"))
    if importlib.util.find_spec("pyarrow"):
        _write_parquet(paths, os.path.join(add("parquet", "parquet"), "train.parquet"))
    for side, quality in SHRUNK:
        folder = add(f"shrunk_{side}_{quality}", "records")
        write_records.write(
            str(manifest), folder, split="train", shorter_side=side, quality=quality
        )
    return stored


def _write_tar(paths: list[str], file: str) -> None:
    """The files as a shard of WebDataset."""
    with tarfile.open(file, "w") as tar:
        for i, path in enumerate(paths):
            tar.add(path, f"{i:06d}.jpg")
            label = tarfile.TarInfo(f"{i:06d}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"0"))


def _write_parquet(paths: list[str], file: str) -> None:
    """The files as Hugging Face stores them."""
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": Path(p).read_bytes(), "path": p} for p in paths]
    table = pyarrow.table({"image": images, "label": [0] * len(paths)})
    parquet.write_table(table, file, row_group_size=100)
