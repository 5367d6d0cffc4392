# SPDX-License-Identifier: Apache-2.0
"""Names what is in images.

    python -m vit_jax.predict SOURCE IMAGE|FOLDER|LIST|URL... [--top=5] [--json]
        [--csv=FILE] [--parquet=FILE]

SOURCE is anything that ``vit_jax.load`` takes. Class names and preprocessing come from
the checkpoint; where it states none, the official evaluation applies: the whole image
resized to the model's size, pixels in [-1, 1]. An image that cannot be read is reported
and the others go on; the exit status is then 2.
"""

import contextlib
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from vit_jax import cli, inference, photos, weights
from vit_jax.errors import UserError, writing

_BATCH = 8

Result = dict[str, Any]


def define_flags() -> None:
    flags.DEFINE_integer("top", 5, "How many classes to name per image.", lower_bound=1)
    flags.DEFINE_boolean("json", False, "One JSON object per image, one per line.")
    flags.DEFINE_string(
        "csv", "", "Also write a table: image, rank, class, probability."
    )
    flags.DEFINE_string("parquet", "", "Also write that table as Parquet.")
    cli.define_image_size_flag()


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        raise UserError(
            "give a checkpoint and at least one image: python -m vit_jax.predict SOURCE "
            "IMAGE... [--top=5] [--json]"
        )
    source, *places = arguments
    options = flags.FLAGS
    failed = 0
    with contextlib.ExitStack() as stack:
        tables = [
            stack.enter_context(table(path))
            for table, path in ((_csv, options.csv), (_parquet, options.parquet))
            if path
        ]
        for result in predict(source, places, options.top, options.image_size):
            for write in tables:
                write(result)
            if "error" in result:
                failed += 1
                print(f"error: {result['error']}", file=sys.stderr)
            if options.json:
                cli.print_json(result)
            elif "error" not in result:
                print(result["image"])
                for entry in result["top"]:
                    print(f"  {entry['probability']:8.2%}  {entry['class']}")
            sys.stdout.flush()
    return cli.USER_ERROR if failed else 0


def predict(
    source: str, places: Sequence[str], top: int = 5, image_size: int = 0
) -> Iterator[Result]:
    """``{"image": name, "top": [{"class", "probability"}, ...]}`` for each image, in
    order; one that cannot be read has ``"error"`` as well, and no ``top``.

    Args:
      source: of the weights.
      places: what ``photos.find`` takes.
      top: how many classes.
      image_size: to resize the position embeddings to; 0: as stored.

    Raises:
      UserError: no image can be read (before the weights are, where their headers show
        it), or a wrong checkpoint.
    """
    images = photos.readable(places)
    found = weights.read(source, image_size or None)
    found.report.log()
    cfg = found.cfg
    if not cfg.num_classes or cfg.head in ("none", "masked_patch"):
        raise UserError(
            f"{source} classifies nothing: it has "
            + ("no head" if not cfg.num_classes else f"the head {cfg.head!r}")
            + "; fine-tune it first (vit_jax.load_for_finetune)"
        )
    names = found.metadata.class_names or tuple(map(str, range(cfg.num_classes)))
    activation = jax.nn.sigmoid if found.metadata.multilabel else jax.nn.softmax
    predictor = inference.create(cfg, found.params, devices=jax.devices()[:1])

    def prepare(place: str) -> np.ndarray:
        image = photos.read(place, cfg.channels)
        return photos.prepare(image, found.metadata, cfg.image_size)

    def probabilities(batch: np.ndarray) -> jax.Array:
        return activation(predictor(batch)["logits"])

    # One shape, one compilation.
    size = min(_BATCH, len(images))
    failed: list[Result] = []
    for name, p in photos.apply(probabilities, photos.stream(images, prepare), size):
        if isinstance(p, UserError):
            failed.append({"image": name, "top": [], "error": str(p)})
            continue
        # Only when an image could be read is it sure that the others are the exception.
        yield from failed
        failed.clear()
        best = np.argsort(-p, kind="stable")[:top]
        entries = [{"class": names[i], "probability": float(p[i])} for i in best]
        yield {"image": name, "top": entries}
    if len(failed) == len(images):
        raise UserError("; ".join(f["error"] for f in failed))
    yield from failed


def _rows(result: Result) -> list[tuple[Any, ...]]:
    return [
        (result["image"], i + 1, entry["class"], entry["probability"])
        for i, entry in enumerate(result["top"])
    ]


_COLUMNS = ("image", "rank", "class", "probability")


@contextlib.contextmanager
def _csv(path: str) -> Iterator[Callable[[Result], None]]:
    with writing(f"--csv={path}"), open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(_COLUMNS)
        yield lambda result: writer.writerows(_rows(result))


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Callable[[Result], None]]:
    import pyarrow as pa
    from pyarrow import parquet

    types = (pa.string(), pa.int32(), pa.string(), pa.float32())
    schema = pa.schema(list(zip(_COLUMNS, types, strict=True)))
    held: list[tuple[Any, ...]] = []
    with writing(f"--parquet={path}"), parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            columns = list(zip(*held, strict=True)) or [()] * len(_COLUMNS)
            writer.write_table(pa.table(list(map(list, columns)), schema=schema))
            held.clear()

        def write(result: Result) -> None:
            held.extend(_rows(result))
            if len(held) > 50_000:
                flush()

        yield write
        flush()


if __name__ == "__main__":
    define_flags()
    cli.run(main)
