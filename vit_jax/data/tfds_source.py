# SPDX-License-Identifier: Apache-2.0
"""Image classification sets of tensorflow-datasets, by name and split expression."""

import difflib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import records, splits
from vit_jax.data.examples import Dataset, Labels, Split, listed
from vit_jax.data.shards import ARRAY_RECORD, TFRECORD, Shards
from vit_jax.data.storage import is_remote
from vit_jax.errors import UserError

import tensorflow_datasets as tfds  # isort: skip  (after tensorflow_cpu)

log = logging.getLogger(__name__)


def load(cfg: DataConfig) -> Dataset:
    """The set ``cfg.name`` in ``cfg.path`` (tfds' own data_dir where that is empty)."""
    builder = prepared(cfg.name, cfg.path)
    names = class_names(builder)

    def split(name: str) -> Split:
        if _num_bytes(builder, name) > cfg.cache_gib * 2**30:
            return from_shards(cfg, builder, name)
        return read(builder, name, lambda example: example["label"])

    wanted = cfg.test_split
    if wanted == DataConfig.test_split:
        wanted = next(iter(splits.meant(wanted, builder.info.splits)), "")
    test = split(wanted) if wanted else None
    both = splits.with_test(cfg, split(cfg.train_split), test)
    return Dataset(*both, names, splits=split)


def class_names(builder: Any) -> tuple[str, ...]:
    """Of an image classification set; () where tfds does not know them."""
    features = builder.info.features
    for key in ("image", "label"):
        if key not in features:
            raise UserError(
                f"tfds set {builder.name!r} has no feature {key!r}, only "
                f"{sorted(features)}: it is not an image classification set"
            )
    return tuple(getattr(features["label"], "names", None) or ())


def unprepared(name: str, data_dir: str = "") -> Any:
    """The tfds builder, which knows the classes of a set before it is downloaded.

    Raises:
      UserError: there is no such set.
    """
    if not name:
        raise UserError(
            "config.data.source is 'tfds' but config.data.name is empty: set --config.data.name, "
            "for example to 'cifar10'"
        )
    where: Any = {"data_dir": str(Path(data_dir).expanduser())} if data_dir else {}
    if data_dir.startswith("gs://"):
        where = {"data_dir": data_dir}
    try:
        return tfds.builder(name, **where)
    except (tfds.core.DatasetNotFoundError, ValueError) as e:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name.split("/")[0], known, n=3, cutoff=0.5)
        hint = f"did you mean one of {near}? " if near else ""
        raise UserError(
            f"unknown tfds set {name!r} (config.data.name): {hint}"
            f"{str(e).splitlines()[0][:200]}"
        ) from e


def prepared(name: str, data_dir: str = "") -> Any:
    """The tfds builder, downloaded and prepared if that is still to be done."""
    builder = unprepared(name, data_dir)
    if not _is_prepared(builder):
        if name.split(":")[0] == "imagenet2012":
            check_imagenet_archives(Path(str(builder._data_dir_root)))
        log.info("preparing tfds set %s in %s", name, builder.data_dir)
        try:
            builder.download_and_prepare()
        except Exception as e:  # of many kinds: network, disk, checksum, manual step
            raise UserError(
                f"tfds set {name!r} is not in {builder.data_dir} and could not be "
                f"prepared: {type(e).__name__}: {str(e).strip()[:400]}"
            ) from e
    return builder


def read(
    builder: Any,
    split: str,
    label: Callable[[Any], Any],
    image: Callable[[bytes], bytes] = lambda encoded: encoded,
) -> Split:
    """One split in memory, as encoded images.

    ``split``: any tfds expression, such as ``train[:98%]``; ``label(example)`` gives
    the class; ``image`` changes the encoded image.
    """
    dataset = builder.as_dataset(
        split=split,
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    images, labels = [], []
    for example in dataset.as_numpy_iterator():
        images.append(image(example["image"]))
        labels.append(int(label(example)))
    return from_encoded(images, labels, f"{builder.name} {split}")


def from_encoded(images: list[Any], labels: list[int], name: str) -> Split:
    """A split held in memory, of encoded images."""
    return listed(
        "encoded", images, Labels.single(labels), lambda i: f"{name} example {i}"
    )


def from_shards(cfg: DataConfig, builder: Any, split: str) -> Split:
    """One split read from its files, for sets that do not fit in memory."""
    instructions = _info(builder, split).file_instructions
    files, counts, chosen, start = [], [], [], 0
    for part in instructions:
        if not files or files[-1] != str(part.filename):
            files.append(str(part.filename))
            counts.append(part.examples_in_shard)
            start = sum(counts) - part.examples_in_shard
        end = part.examples_in_shard if part.take < 0 else part.skip + part.take
        chosen.append(np.arange(part.skip, end) + start)
    format = ARRAY_RECORD if "array_record" in files[0] else TFRECORD
    shards = Shards(tuple(files), tuple(counts), format)
    # tfds stores features of the top level under their own names.
    parse = records.parser("image", "label", builder.info.features["label"].num_classes)
    selected = np.concatenate(chosen)
    whole = len(selected) == len(shards)
    in_sequence = cfg.access == "sequential" or (
        cfg.access == "auto" and is_remote(files[0]) and format == TFRECORD
    )
    if in_sequence and not whole:
        raise UserError(
            f"the slice {split!r} of {builder.name} needs random access to its files: "
            "set config.data.access=random"
        )
    found = records.split_of(shards, parse, cfg, in_sequence=in_sequence)
    return found if whole else found.select(selected)


_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def check_imagenet_archives(data_dir: Path) -> None:
    """Says which ImageNet archive is missing or misplaced, before tfds fails oddly."""
    manual = data_dir / "downloads" / "manual"
    missing = [n for n in (_TRAIN_TAR, _VAL_TAR) if not (manual / n).is_file()]
    if not missing:
        return
    inside = [p for p in manual.glob("*") if p.is_dir()]
    hints = []
    for name in missing:
        places = [p / name for p in (data_dir, manual.parent, *inside)]
        found = next((p for p in places if p.is_file()), None)
        hints.append(f"{name} is {f'at {found}, move it' if found else 'missing'}")
    raise UserError(
        f"ImageNet must be downloaded by hand (from image-net.org, after "
        f"registering): {'; '.join(hints)}. The exact tree is {manual}/{_TRAIN_TAR} "
        f"(about 138 GB) and {manual}/{_VAL_TAR} (about 6.3 GB), both left packed"
    )


def _info(builder: Any, split: str) -> Any:
    """What tfds knows about a split expression."""
    try:
        return builder.info.splits[split]
    except (ValueError, KeyError, AssertionError) as e:
        raise UserError(
            f"tfds set {builder.name!r} has no split {split!r}: it has "
            f"{sorted(builder.info.splits)}, and slices such as 'train[:98%]'"
        ) from e


def _num_bytes(builder: Any, split: str) -> float:
    """Size of a split on disk, in proportion for a slice."""
    total = sum(s.num_bytes for s in builder.info.splits.values())
    examples = sum(s.num_examples for s in builder.info.splits.values())
    return total * _info(builder, split).num_examples / max(examples, 1)


def _is_prepared(builder: Any) -> bool:
    return bool(builder.info.splits)
