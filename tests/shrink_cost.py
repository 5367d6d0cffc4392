# SPDX-License-Identifier: Apache-2.0
"""What shards made for training cost: in pixels, and in accuracy. Run by hand.

    python tests/shrink_cost.py fidelity [--photos=40]
    python tests/shrink_cost.py training --images=cifar10/ [--steps=300]

``fidelity``: crops of 224 as training draws them, cut from the shrunk photographs at the
same place to a fraction of a pixel, minus those cut from the originals. ``training``:
the same small model on small images of a folder, enlarged twelve times, and on shards
that were shrunk again, over three seeds; both are tested on the enlarged originals.
"""

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from tiny import TINY

from vit_jax import train
from vit_jax.config import DataConfig, replace
from vit_jax.data import benchmark, write_records
from vit_jax.data.shrink import Shrink
from vit_jax.workdir import read_metrics

SETTINGS = [(256, 80), (256, 90), (256, 95), (320, 90), (320, 95)]
CROPS = 8  # of each photograph


def cut(image: np.ndarray, window: np.ndarray, smooth: bool = False) -> np.ndarray:
    """uint8 (224, 224, 3): the window (top, left, height, width, as shares of the
    image), resized bilinearly as ``inception_crop`` does; ``smooth``: with anti-aliasing."""
    top, left, height, width = window * (image.shape[:2] * 2)
    if smooth:
        shape = tuple(max(224, round(v)) for v in (width, height))
        wide = cut_to(image, (top, left, height, width), shape)
        return cv2.resize(wide, (224, 224), interpolation=cv2.INTER_AREA)
    return cut_to(image, (top, left, height, width), (224, 224))


def cut_to(image: np.ndarray, window: tuple, shape: tuple[int, int]) -> np.ndarray:
    top, left, height, width = window
    down, right = height / shape[1], width / shape[0]
    matrix = np.array(
        [[right, 0, left + right / 2 - 0.5], [0, down, top + down / 2 - 0.5]]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        image, matrix, shape, flags=flags, borderMode=cv2.BORDER_REPLICATE
    )


def windows(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Of ``inception_crop``: the ratio is uniform, then the height."""
    found: list[np.ndarray] = []
    while len(found) < CROPS:
        ratio = rng.uniform(0.75, 1.33)
        low, high = (np.sqrt(a * height * width / ratio) for a in (0.05, 1.0))
        h = rng.uniform(low, min(high, height, width / ratio))
        top, left = rng.uniform(0, height - h), rng.uniform(0, width - h * ratio)
        found.append(
            np.array([top / height, left / width, h / height, h * ratio / width])
        )
    return np.array(found)


def fidelity(photos: int) -> None:
    """Prints the table of docs/data.md."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [
            Path(p).read_bytes() for p in benchmark.write_photos(Path(folder), photos)
        ]
    images = [np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files]
    places = [windows(*image.shape[:2], rng) for image in images]
    expected = [[cut(i, w) for w in p] for i, p in zip(images, places, strict=True)]

    def row(
        name: str, made: Callable[[int], np.ndarray], size: float, smooth: bool
    ) -> None:
        difference = np.abs(
            np.array(
                [
                    [cut(made(i), w, smooth) for w in places[i]]
                    for i in range(len(files))
                ]
            ).astype(int)
            - np.array(expected)
        )
        print(
            f"| {name} | {size / 1e3:.0f} | {difference.mean():.1f} "
            f"| {np.quantile(difference, 0.999):.0f} |",
            flush=True,
        )

    mean = statistics.mean(map(len, files))
    row("the originals, with anti-aliasing", lambda i: images[i], mean, True)
    for side, quality in SETTINGS:
        shrink = Shrink(side, quality)
        made = [shrink(f, i) for f, i in zip(files, images, strict=True)]
        pixels = [np.asarray(Image.open(io.BytesIO(m)).convert("RGB")) for m in made]
        size = statistics.mean(map(len, made))
        row(f"{side}, quality {quality}", pixels.__getitem__, size, False)


def enlarged(images: Path, dest: Path, count: int) -> None:
    """``count`` training images, and half as many to test on, 384 pixels a side."""
    found = sorted(images.glob("train/*/*"))
    rng = np.random.default_rng(0)
    for i, number in enumerate(rng.permutation(len(found))[: count * 3 // 2]):
        file = found[number]
        split = "train" if i < count else "test"
        into = dest / split / file.parent.name
        into.mkdir(parents=True, exist_ok=True)
        large = Image.open(file).convert("RGB").resize((384, 384), 3)
        large.save(into / f"{file.stem}.jpg", quality=98)


def training(images: str, count: int, steps: int) -> None:
    """Prints the test accuracies of both."""
    cfg: Any = replace(
        TINY,
        model__width=96,
        model__depth=4,
        model__mlp_dim=192,
        model__heads=3,
        optim__schedule="cosine",
        optim__warmup=steps // 10,
        batch=64,
        steps=steps,
        eval__every=steps,
        checkpoint__every=0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        photos, shards = Path(scratch, "photos"), Path(scratch, "shards")
        enlarged(Path(images), photos, count)
        write_records.write(
            str(photos), str(shards), split="train", shorter_side=256, quality=90
        )
        write_records.write(str(photos), str(shards), split="test")
        common = {"image_size": 32, "cache_gib": 0.0}
        sources = {
            "originals": DataConfig(source="folder", path=str(photos), **common),
            "256, quality 90": DataConfig(source="records", path=str(shards), **common),
        }
        found: dict[str, list[float]] = {name: [] for name in sources}
        for seed in range(3):
            for name, data in sources.items():
                workdir = Path(scratch, f"{name} {seed}")
                train.train(replace(cfg, data=data, seed=seed), str(workdir))
                last = [m for m in read_metrics(str(workdir)) if "test/accuracy" in m]
                found[name].append(last[-1]["test/accuracy"])
                print(seed, name, found[name][-1], flush=True)
    for name, values in found.items():
        mean, spread = statistics.mean(values), statistics.stdev(values)
        print(
            f"{name}: {100 * mean:.1f} ± {100 * spread:.1f} % over {len(values)} seeds"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["fidelity", "training"])
    parser.add_argument("--photos", type=int, default=40)
    parser.add_argument("--images", default="cifar10")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if args.what == "fidelity":
        fidelity(args.photos)
    else:
        training(args.images, args.count, args.steps)
