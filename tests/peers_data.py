# SPDX-License-Identifier: Apache-2.0
"""The input pipeline beside those of big_vision, torchvision and Grain, by CPU time.

    pip install torch torchvision grain opencv-python-headless
    python tests/peers_data.py [--photos=500] [--rounds=5] [--hogs=0]

Run by hand. All read the same JPEG files of 500 x 375 pixels and make uint8 or float
crops of 224, mirrored at random, in batches of 64 with as many threads or processes as
there are CPUs. Each round starts every pipeline once, in a process of its own, in turn;
CPU time includes that of its children. ``--hogs`` processes that only burn time keep the
host busy: ``shares`` then says how many of them a pipeline outweighs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

BATCH, SIZE, WARM, STEPS = 64, 224, 4, 16
CPUS = os.cpu_count() or 1


def ours(paths: list[str]) -> Iterator[Any]:
    from vit_jax.config import DataConfig
    from vit_jax.data import pipeline

    rows = [{"image": p, "label": 0, "split": "train"} for p in paths]
    rows.append({"image": __file__, "label": 0, "split": "test"})  # is not read
    manifest = Path(paths[0]).parent / "images.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    cfg = DataConfig(
        source="folder", path=str(manifest), image_size=SIZE, cache_gib=0.0
    )
    return pipeline.train_batches(cfg, batch=BATCH, seed=0)


def shrunk(paths: list[str]) -> Iterator[Any]:
    """The shards that ``write_shrunk`` made."""
    from vit_jax.config import DataConfig
    from vit_jax.data import pipeline

    folder = str(Path(paths[0]).parent / "shrunk")
    cfg = DataConfig(
        source="records",
        path=folder,
        image_size=SIZE,
        cache_gib=0.0,
        test_split="train",
    )
    return pipeline.train_batches(cfg, batch=BATCH, seed=0)


def write_shrunk(paths: list[str]) -> None:
    from vit_jax.data import write_records

    next(ours(paths))  # writes the manifest
    folder = Path(paths[0]).parent
    write_records.write(
        str(folder / "images.jsonl"),
        str(folder / "shrunk"),
        split="train",
        shorter_side=256,
        quality=90,
    )


def big_vision(paths: list[str]) -> Iterator[Any]:
    """decode_jpeg_and_inception_crop(224) | flip_lr | value_range(-1, 1), as its recipes
    for ImageNet have it."""
    import tensorflow as tf

    def make(path: Any) -> Any:
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros([0, 0, 4]),
            area_range=(0.05, 1.0),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, (SIZE, SIZE))
        image = tf.image.random_flip_left_right(image)
        return tf.ensure_shape(image / 127.5 - 1.0, (SIZE, SIZE, 3))

    data = tf.data.Dataset.from_tensor_slices(paths).repeat().shuffle(len(paths))
    data = data.map(make, num_parallel_calls=CPUS).batch(BATCH)
    return data.prefetch(2).as_numpy_iterator()


class Listed:
    """Files for loaders that index; made at module level, for their processes."""

    def __init__(self, paths: list[str], make: Any):
        self.paths, self.make = paths, make

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.paths[index])


def torchvision(paths: list[str]) -> Iterator[Any]:
    """Pillow, RandomResizedCrop, flip, to tensor, normalise, in worker processes."""
    import torch
    from PIL import Image
    from torchvision import transforms

    torch.set_num_threads(1)
    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.05, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    listed: Any = Listed(paths, lambda p: steps(Image.open(p).convert("RGB")))
    sampler = torch.utils.data.RandomSampler(
        listed, num_samples=10**6, replacement=True
    )
    return iter(
        torch.utils.data.DataLoader(listed, BATCH, sampler=sampler, num_workers=CPUS)
    )


def grain(paths: list[str]) -> Iterator[Any]:
    """Its threads, with OpenCV: decode, crop, resize, flip."""
    import cv2
    import grain.python as pygrain

    cv2.setNumThreads(1)

    class Make(pygrain.RandomMapTransform):
        def random_map(self, element: Any, rng: np.random.Generator) -> Any:
            image = cv2.imdecode(np.fromfile(element, np.uint8), cv2.IMREAD_COLOR_RGB)
            height, width = image.shape[:2]
            ratio = rng.uniform(0.75, 1.33)
            low, high = (np.sqrt(a * height * width / ratio) for a in (0.05, 1.0))
            h = int(rng.uniform(low, min(high, height, width / ratio)))
            w = int(h * ratio)
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image = cv2.resize(image[top : top + h, left : left + w], (SIZE, SIZE))
            return cv2.flip(image, 1) if rng.random() < 0.5 else image

    data = pygrain.MapDataset.source(paths).shuffle(seed=0).repeat()
    data = (
        data.seed(0)
        .random_map(Make())
        .to_iter_dataset(
            pygrain.ReadOptions(num_threads=CPUS, prefetch_buffer_size=2 * BATCH)
        )
    )
    return iter(data.batch(BATCH))


PIPELINES = {
    "ours": ours,
    "ours, shrunk": shrunk,
    "big_vision": big_vision,
    "torchvision": torchvision,
    "grain": grain,
}


def time_one(name: str, paths: list[str], hogs: list[int]) -> dict[str, float]:
    """CPU ms per image, images/s and, on a busy host, the share of the CPUs."""

    def used() -> float:
        usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF,)]
        return sum(u.ru_utime + u.ru_stime for u in usage) + sum(map(cpu, children()))

    batches = PIPELINES[name](paths)
    for _ in range(WARM):
        next(batches)
    start, before, hogged = time.perf_counter(), used(), sum(map(cpu, hogs))
    for _ in range(STEPS):
        next(batches)
    images, seconds = STEPS * BATCH, used() - before
    found = {
        "cpu_ms": 1e3 * seconds / images,
        "images_per_second": images / (time.perf_counter() - start),
    }
    if hogs:
        found["shares"] = seconds / (sum(map(cpu, hogs)) - hogged) * len(hogs)
    return found


def cpu(process: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children() -> list[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(c) for task in tasks for c in task.read_text().split()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hogs", type=int, default=0)
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--files", default="", help=argparse.SUPPRESS)
    parser.add_argument("--pids", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        paths = sorted(map(str, Path(args.files).glob("*.jpg")))
        hogs = [int(p) for p in args.pids.split(",") if p]
        print(json.dumps(time_one(args.one, paths, hogs)), flush=True)
        os._exit(0)  # threads and workers that prefetch are not waited for
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PIPELINES}
    burning = [sys.executable, "-c", "while True: pass"]
    with tempfile.TemporaryDirectory() as folder:
        from vit_jax.data import benchmark

        write_shrunk(benchmark.write_photos(Path(folder), args.photos))
        hogs = [subprocess.Popen(burning) for _ in range(args.hogs)]
        try:
            for _ in range(args.rounds):
                for name in PIPELINES:
                    command = [sys.executable, __file__, f"--one={name}"]
                    command += [
                        f"--files={folder}",
                        "--pids=" + ",".join(str(h.pid) for h in hogs),
                    ]
                    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
        finally:
            for hog in hogs:
                hog.kill()
    for name, runs in found.items():
        middle = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        pairs = zip(found["ours"], runs, strict=True)
        ratio = statistics.median(a["cpu_ms"] / b["cpu_ms"] for a, b in pairs)
        print(f"{name:<14}", *(f"{k} {v:.2f}" for k, v in middle.items()), end=" ")
        print(f"ours / this, by CPU {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
