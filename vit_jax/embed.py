# SPDX-License-Identifier: Apache-2.0
"""Writes one vector per image, the representation that a model has of it.

    python -m vit_jax.embed SOURCE IMAGE|FOLDER|LIST|URL|KIND:PATH...
        --out=FILE.npz|FILE.parquet [--pooling=head|class|mean|none] [--layer=N]

SOURCE is anything that ``vit_jax.load`` takes; KIND:PATH a split of a source of data, such
as tar:shards/, parquet:hf://OWNER/NAME, records:DIR or tfds:cifar10, with --split. The file holds ``path`` (N,) and
``vector`` (N, D) float32, in the order of the images; ``--pooling=none`` keeps the token
of each patch, (N, h, w, D). Finished parts wait in ``FILE.parts``, where the same command
goes on after an interruption. An image that cannot be read is reported and left out; the
exit status is then 2.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from vit_jax import cli, inference, models, photos, sharding, weights
from vit_jax.config import choose
from vit_jax.errors import UserError, writing

POOLINGS = ("head", "class", "mean", "none")
# Images per part: what an interruption can cost.
PART = 1024


class Summary(NamedTuple):
    """What ``embed`` has done."""

    written: int
    failed: list[str]
    images_per_second: float


def embed(
    source: str,
    places: Sequence[str],
    out: str,
    *,
    layer: int = 0,
    pooling: str = "head",
    batch: int = 8,
    image_size: int = 0,
    split: str = "train",
) -> Summary:
    """Writes ``path`` and ``vector`` of images to ``out``.

    Args:
      source: of the weights.
      places: what ``photos.find`` takes, or "KIND:PATH" of a source of data.
      out: ``.npz`` or ``.parquet`` file, which must not exist.
      layer, pooling: see ``inference.vectors``.
      batch: images per device at a time.
      image_size: to resize the position embeddings to; 0: as stored.
      split: of the sources of data.

    Raises:
      UserError: no image can be read, a layer or pooling that the model does not have, or
        a file that exists or cannot be written.
    """
    suffix = Path(out).suffix
    write = choose("suffix of --out", suffix, {".npz": _npz, ".parquet": _parquet})
    if Path(out).exists():
        raise UserError(f"--out={out} exists: delete it or name another file")
    images = photos.OfDatasets(places, split)
    found = weights.read(source, image_size or None)
    found.report.log()
    _check(found.cfg, layer, pooling)
    with writing(f"--out={out}"):
        parts = _Parts(out, [source, layer, pooling, image_size, images.names])
        summary = _run(found, images, parts, layer, pooling, batch)
        if not summary.written:
            raise UserError("; ".join(summary.failed))
        write(Path(out), parts)
        shutil.rmtree(parts.folder)
    return summary


def _check(cfg: Any, layer: int, pooling: str) -> None:
    choose("--pooling", pooling, dict.fromkeys(POOLINGS))
    if (layer or pooling != "head") and models.is_resnet(cfg):
        raise UserError(
            f"--layer={layer} --pooling={pooling}: {cfg.name} is a ResNet, which has no "
            "tokens: use --layer=0 --pooling=head"
        )
    if not 0 <= layer <= cfg.depth:
        raise UserError(
            f"--layer={layer}: the model has layers 1 to {cfg.depth}; 0: last"
        )
    if layer and pooling == "head":
        raise UserError(
            f"--layer={layer}: the head reads the last layer only: give --pooling=class, "
            "mean or none"
        )
    if pooling == "class" and not models.has_class_token(cfg):
        raise UserError(
            "--pooling=class: the model has no class token: use mean or head"
        )


def _run(
    found: weights.Checkpoint,
    images: photos.OfDatasets,
    parts: "_Parts",
    layer: int,
    pooling: str,
    batch: int,
) -> Summary:
    function = functools.partial(inference.vectors, layer=layer, pooling=pooling)
    predictor = inference.create(found.cfg, found.params, function=function)
    rows = sharding.batch_sharding(predictor.mesh)

    def prepare(place: str) -> np.ndarray:
        image = images.read(place, found.cfg.channels)
        return photos.prepare(image, found.metadata, found.cfg.image_size)

    def vectors(images: np.ndarray) -> Any:
        return predictor(jax.device_put(images, rows))

    start = parts.done()
    bar = tqdm(
        total=len(images.names),
        initial=start,
        unit=" images",
        file=sys.stderr,
        mininterval=1,
    )
    begun = time.perf_counter()
    size = batch * predictor.mesh.size
    todo = photos.stream(images.names[start:], prepare, ahead=4 * size)
    with bar:  # whose line ends before that of an error
        for name, vector in photos.apply(vectors, todo, size):
            parts.add(name, vector)
            bar.update()
        parts.flush()
    seconds = max(time.perf_counter() - begun, 1e-9)
    written = sum(len(names) for names, _ in parts.read())
    return Summary(written, parts.failed(), (len(images.names) - start) / seconds)


class _Parts:
    """Finished parts of an embedding on disk: ``00000.npz``, ... each of ``PART`` images
    of the list, whichever of them could be read.

    Args:
      out: the file that they will become.
      task: what is embedded and how; parts of another task are refused.
    """

    def __init__(self, out: str, task: Any):
        self.folder = Path(f"{out}.parts")
        self._names: list[str] = []
        self._vectors: list[np.ndarray] = []
        self._errors: list[str] = []
        digest = hashlib.sha256(json.dumps(task).encode()).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = self.folder / "task"
        if stored.exists() and stored.read_text() != digest:
            raise UserError(
                f"{self.folder} holds parts of another command: delete that folder, or name "
                "another --out"
            )
        stored.write_text(digest)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.npz"))

    def done(self) -> int:
        """How many images of the list the finished parts cover."""
        return len(self._files()) * PART

    def add(self, name: str, vector: np.ndarray | UserError) -> None:
        if isinstance(vector, UserError):
            self._errors.append(str(vector))
        else:
            self._names.append(name)
            self._vectors.append(vector)
        if len(self._names) + len(self._errors) == PART:
            self.flush()

    def flush(self) -> None:
        """Writes a part whole: a kill leaves it or not."""
        if not self._names and not self._errors:
            return
        path = self.folder / f"{len(self._files()):05}.npz"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as f:
            np.savez(
                f,
                path=np.array(self._names, str),
                vector=np.array(self._vectors, np.float32),
                error=np.array(self._errors, str),
            )
        os.replace(partial, path)
        self._names, self._vectors, self._errors = [], [], []

    def read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Paths and vectors of the parts that have any."""
        for path in self._files():
            with np.load(path) as part:
                if len(part["path"]):
                    yield part["path"], part["vector"]

    def failed(self) -> list[str]:
        found: list[str] = []
        for path in self._files():
            with np.load(path) as part:
                found += part["error"].tolist()
        return found


def _npz(out: Path, parts: _Parts) -> None:
    """Part by part, so that memory does not grow with the number of images."""
    kinds = [(p.dtype, v.shape[1:], len(p)) for p, v in parts.read()]
    total = sum(n for *_, n in kinds)
    arrays = {
        "path": (max(k for k, *_ in kinds), (total,), 0),
        "vector": (np.dtype(np.float32), (total, *kinds[0][1]), 1),
    }
    partial = out.with_name(f"{out.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as file:
        for name, (dtype, shape, which) in arrays.items():
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            with file.open(f"{name}.npy", "w", force_zip64=True) as f:
                np.lib.format.write_array_header_2_0(f, header)
                for part in parts.read():
                    f.write(part[which].astype(dtype).tobytes())
    os.replace(partial, out)


def _parquet(out: Path, parts: _Parts) -> None:
    """A row per image; of patch tokens, ``vector`` is flat and ``shape`` (h, w, D)."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {
        "path": pa.string(),
        "vector": pa.list_(pa.float32()),
        "shape": pa.list_(pa.int32()),
    }
    schema = pa.schema(list(kinds.items()))
    partial = out.with_name(f"{out.name}.partial")
    with parquet.ParquetWriter(partial, schema) as writer:
        for names, vectors in parts.read():
            flat = pa.array(vectors.ravel())
            offsets = np.arange(len(names) + 1, dtype=np.int32) * vectors[0].size
            columns = [
                pa.array(names.tolist()),
                pa.ListArray.from_arrays(pa.array(offsets), flat),
                pa.array([list(vectors.shape[1:])] * len(names), kinds["shape"]),
            ]
            writer.write_table(pa.table(columns, schema=schema))
    os.replace(partial, out)


def main(arguments: list[str]) -> int:
    options = flags.FLAGS
    if len(arguments) < 2 or not options.out:
        raise UserError(
            "give a checkpoint, images and a file: python -m vit_jax.embed SOURCE FOLDER "
            "--out=vectors.npz"
        )
    source, *places = arguments
    done = embed(
        source,
        places,
        options.out,
        layer=options.layer,
        pooling=options.pooling,
        batch=options.batch,
        image_size=options.image_size,
        split=options.split,
    )
    for error in done.failed:
        print(f"error: {error}", file=sys.stderr)
    print(
        f"wrote {options.out}: {done.written:,} images, {done.images_per_second:.3g} images/s"
        + (f", {len(done.failed)} could not be read" if done.failed else "")
    )
    return cli.USER_ERROR if done.failed else 0


def define_flags() -> None:
    flags.DEFINE_string("out", "", "The .npz or .parquet file to write.")
    flags.DEFINE_integer("layer", 0, "After which layer, from 1; 0: the last norm.")
    flags.DEFINE_string(
        "pooling",
        "head",
        "head: what the head reads; class: the class token; mean: of the patches; none: "
        "the token of each patch.",
    )
    flags.DEFINE_integer("batch", 8, "Images per device at a time.", lower_bound=1)
    flags.DEFINE_string("split", "train", "Of a source of data (KIND:PATH).")
    cli.define_image_size_flag()


if __name__ == "__main__":
    define_flags()
    cli.run(main)
