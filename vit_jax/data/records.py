# SPDX-License-Identifier: Apache-2.0
"""Sharded TFRecord and ArrayRecord files: which splits there are, and what they hold.

Each record is a ``tf.train.Example`` with an encoded image and any number of labels.
``write_records`` lays a split out as

    train-00000-of-00064.tfrecord            the records, in random order
    train-00000-of-00064.tfrecord.npz        where each begins, and its labels
    train.json                               counts, class names, size of every shard

Shards made elsewhere work as well: without an index, their record headers are read once
at the start.
"""

import dataclasses
import functools
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import sequential, splits
from vit_jax.data.examples import (
    IGNORED,
    Dataset,
    Image,
    Split,
    Unreadable,
    check_class_names,
)
from vit_jax.data.shards import (
    ARRAY_RECORD,
    FORMATS,
    TFRECORD,
    Record,
    Shards,
    open_array_record,
    scan,
)
from vit_jax.data.split_files import check_whole
from vit_jax.data.storage import is_remote, keep_on_disk, names, whole
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

log = logging.getLogger(__name__)

IMAGE_KEY, LABEL_KEY, NAME_KEY = "image/encoded", "image/class/label", "image/filename"
_LABEL_KEYS = (LABEL_KEY, "label", "labels", "image/label", "image/labels")


def load(cfg: DataConfig) -> Dataset:
    """The record set under ``cfg.path``."""
    if not cfg.path:
        raise UserError(
            "config.data.source is 'records' but config.data.path is empty: set it to a "
            "folder with .tfrecord or .array_record files"
        )
    root = cfg.path if "://" in cfg.path else os.path.expanduser(cfg.path)
    found = names(root)
    if not found and not os.path.isdir(root):
        raise UserError(
            f"config.data.path {cfg.path!r} is not a folder: it must hold .tfrecord or "
            ".array_record files, such as vit_jax.data.write_records makes"
        )
    known = _splits(root, found)
    if cfg.disk_cache and is_remote(root):
        keep_on_disk(root, cfg.disk_cache, cfg.disk_cache_gib)
    wanted = cfg.test_split
    candidates = (wanted,) if wanted not in ("", "test") else splits.TEST
    test_name = next((n for n in candidates if n in known), "")
    by_class = bool(cfg.holdout or (cfg.subset and cfg.subset_balanced))
    by_class |= not test_name
    index, train = _read_split(cfg, root, cfg.train_split, known, by_class)
    test = None
    if test_name:
        test_index, test = _read_split(cfg, root, test_name, known)
        if test_index.class_names != index.class_names:
            raise UserError(
                f"{root}: the splits {cfg.train_split!r} and {test_name!r} have "
                "different class names: write both again from the same data"
            )
    elif wanted not in ("", "test"):
        raise splits.missing("test_split", wanted, root, sorted(known))
    elif train.sequence:
        raise UserError(
            f"{root} has no test split, and none can be held out of shards that are "
            "read in sequence: add one, or set config.data.access=random"
        )
    return Dataset(
        *splits.with_test(cfg, train, test),
        index.class_names,
        index.multilabel,
        splits=lambda name: _read_split(cfg, root, name, known)[1],
    )


@dataclasses.dataclass(frozen=True)
class Index:
    """What ``SPLIT.json`` says."""

    format: str
    files: tuple[str, ...]
    counts: tuple[int, ...]  # examples per shard
    sizes: tuple[int, ...]  # bytes per shard
    class_names: tuple[str, ...]
    multilabel: bool
    image_key: str = IMAGE_KEY
    label_key: str = LABEL_KEY
    fingerprints: tuple[str, ...] = ()  # of the shards; () or "": not known
    # Of shards without an index, which were scanned: where their records begin.
    offsets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


# ------------------------------------------------------------------------- discovery


def _read_split(
    cfg: DataConfig,
    root: str,
    name: str,
    known: dict[str, list[str]],
    by_class: bool = False,
) -> tuple[Index, Split]:
    """``by_class``: the labels are needed to choose among the examples."""
    if name not in known:
        raise UserError(f"unknown split {name!r}: {root} has {sorted(known)}")
    index_file = os.path.join(root, name + ".json")
    content = whole(index_file)
    if content is None:
        index = _without_index(cfg, known[name])
    else:
        index = read_index(index_file, content)
        _check(index, index_file, known[name])
    shards = Shards(
        index.files, index.counts, index.format, index.fingerprints, index.offsets
    )
    chosen = bool(cfg.subset or cfg.holdout) or by_class
    in_sequence = cfg.access == "sequential" or (
        cfg.access == "auto" and is_remote(root) and not chosen
    )
    if in_sequence and (cfg.subset or cfg.holdout):
        raise UserError(
            "config.data.subset and config.data.holdout need random access to the "
            "records: set config.data.access=random"
        )
    parse = parser(
        index.image_key,
        index.label_key,
        len(index.class_names),
        multilabel=index.multilabel,
    )
    labels = shards.labels() if by_class and not in_sequence else None
    return index, split_of(shards, parse, cfg, in_sequence=in_sequence, labels=labels)


def read_index(file: str, content: bytes) -> Index:
    """Of what the ``SPLIT.json`` called ``file`` holds."""
    try:
        data = json.loads(content)
        shards = data["shards"]
        root = os.path.dirname(file)
        class_names = check_class_names(data["class_names"], file)
        index = Index(
            format=data["format"],
            files=tuple(os.path.join(root, s["file"]) for s in shards),
            counts=tuple(int(s["examples"]) for s in shards),
            sizes=tuple(int(s["bytes"]) for s in shards),
            class_names=class_names,
            multilabel=bool(data["multilabel"]),
            image_key=data.get("image_key", IMAGE_KEY),
            label_key=data.get("label_key", LABEL_KEY),
            fingerprints=tuple(s.get("fingerprint", "") for s in shards),
        )
        if index.format not in FORMATS or min(index.counts, default=0) < 0:
            raise ValueError(f"format {index.format!r}, counts {index.counts}")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{file} is not an index of records ({type(e).__name__}: {e}): write the "
            "records again with python -m vit_jax.data.write_records"
        ) from e
    if sum(index.counts) != data.get("examples", sum(index.counts)):
        raise UserError(
            f"{file} contradicts itself: its shards hold {sum(index.counts)} examples, "
            f"but it says {data['examples']}"
        )
    return index


def _check(index: Index, file: str, present: list[str]) -> None:
    """Refuses shards that are missing, cut short or not those of the index.

    Of those in a bucket the sizes are not asked for: a request for each of 30,000 would
    take minutes. What is wrong with one is said when it is read.
    """
    if not index.files or not sum(index.counts):
        raise UserError(f"{file} lists no examples")
    remote, listed = is_remote(file), set(present)
    for shard, size in zip(index.files, index.sizes, strict=True):
        if not (shard in listed if remote else os.path.exists(shard)):
            raise UserError(f"{shard}, which {file} lists, does not exist")
        found = size if remote else os.stat(shard).st_size
        if found != size:
            what = "is cut short" if found < size else "is not the one that was indexed"
            raise UserError(
                f"{shard} {what}: it has {found} bytes, but {file} says {size}; copy "
                "it again or write the records again"
            )


_OF = re.compile(r"-of-(\d+)")
_SHARD = re.compile(
    r"(?P<split>.*?)-\d+(-of-\d+)?\.?(?P<format>tfrecords?|array_?record)?$"
    r"|(?P<plain>.*)\.(?P<kind>tfrecords?|array_?record)(-\d+-of-\d+)?$"
)


def _splits(root: str, names: list[str]) -> dict[str, list[str]]:
    """Split name -> its shard files, by file name (or by index, where there is one)."""
    found: dict[str, list[str]] = {}
    for name in names:
        match = _SHARD.match(name.rstrip("/"))
        if match and not name.endswith((".json", ".npz", ".tmp")):
            split = match["split"] or match["plain"] or "train"
            # tfds calls its files SET-SPLIT.tfrecord-00000-of-00001
            split = split.split(".")[0].rsplit("-", 1)[-1] or "train"
            found.setdefault(split, []).append(os.path.join(root, name))
    for name in names:
        if name.endswith(".json"):
            found.setdefault(name[: -len(".json")], [])
    found = {s: f for s, f in found.items() if f or s + ".json" in names}
    if not any(found.values()):
        raise UserError(
            f"{root} holds no .tfrecord or .array_record files: make some with "
            "python -m vit_jax.data.write_records"
        )
    return found


def _without_index(cfg: DataConfig, files: list[str]) -> Index:
    """What can be told of shards that somebody else wrote."""
    if not cfg.num_classes:
        raise UserError(
            f"{os.path.dirname(files[0])} has no index that says how many classes there "
            "are: set config.data.num_classes, or write the data again with python "
            "-m vit_jax.data.write_records"
        )
    check_whole(files, _OF)
    offsets: dict[str, np.ndarray] = {}
    array = "array" in os.path.basename(files[0])
    if array:
        counts = [open_array_record(f).num_records() for f in files]
        if 0 in counts:  # what is cut short looks like this as well
            raise UserError(
                f"{files[counts.index(0)]} holds no records: copy it again or remove it"
            )
    else:
        started = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            offsets = dict(zip(files, pool.map(scan, files), strict=True))
        counts = [len(o) - 1 for o in offsets.values()]
        log.info(
            "counted %d records in %.1f s", sum(counts), time.monotonic() - started
        )
    format = ARRAY_RECORD if array else TFRECORD
    first = Shards((files[0],), (counts[0],), format, (), offsets)
    image_key, label_key, several = _keys(first.read(np.array([0]))[0], files[0])
    return Index(
        format,
        tuple(files),
        tuple(counts),
        (),
        tuple(str(i) for i in range(cfg.num_classes)),
        several or cfg.name == "multilabel",
        image_key,
        label_key,
        offsets=offsets,
    )


def _keys(record: Record, file: str) -> tuple[str, str, bool]:
    """(image key, label key, several labels) of a record whose layout is unknown."""
    try:
        assert isinstance(record, bytes)
        features = tf.train.Example.FromString(record).features.feature
    except Exception as e:  # protobuf's DecodeError has no stable home
        raise UserError(f"{file} does not hold tf.train.Example records") from e
    images = [k for k, v in features.items() if _is_image(v.bytes_list.value)]
    labels = [k for k, v in features.items() if len(v.int64_list.value)]
    label = next((k for k in _LABEL_KEYS if k in labels), "")
    label = label or next((k for k in sorted(labels) if "label" in k), "")
    if len(images) != 1 or not label:
        raise UserError(
            f"{file}: cannot tell the image and the label apart in records with the "
            f"features {sorted(features)}: call them {IMAGE_KEY!r} and {LABEL_KEY!r}"
        )
    return images[0], label, len(features[label].int64_list.value) > 1


_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF")


def _is_image(values: Any) -> bool:
    return len(values) == 1 and values[0].startswith(_MAGIC)


def parser(
    image_key: str, label_key: str, num_classes: int, *, multilabel: bool = False
) -> sequential.Parse:
    """Record -> (encoded image, labels), or Unreadable where it is damaged or has
    labels that cannot be."""

    def parse(record: Record) -> tuple[Image, np.ndarray]:
        if isinstance(record, Unreadable):
            return record, _NO_LABELS
        try:
            features = tf.train.Example.FromString(record).features.feature
        except Exception:  # protobuf's DecodeError has no stable home
            return Unreadable("the record is not a tf.train.Example"), _NO_LABELS
        images = features[image_key].bytes_list.value
        if len(images) != 1:
            reason = f"the record holds {len(images)} images under {image_key!r}"
            return Unreadable(reason), _NO_LABELS
        found = list(features[label_key].int64_list.value)
        if not all(IGNORED <= label < num_classes for label in found):
            reason = f"a label is out of range: it must be in [0, {num_classes - 1}]"
            return Unreadable(f"{reason}, not {found}"), _NO_LABELS
        if len(found) > 1 and not multilabel:
            reason = f"several labels in a single-label data set: {found}"
            return Unreadable(reason), _NO_LABELS
        return images[0], np.array(found, np.int32)

    return parse


def split_of(
    shards: Shards,
    parse: sequential.Parse,
    cfg: DataConfig,
    *,
    in_sequence: bool,
    labels: Any = None,
) -> Split:
    """The records as a list of encoded images."""

    def fetch(index: np.ndarray) -> tuple[list[Image], list[np.ndarray]]:
        found = [parse(record) for record in shards.read(index)]
        return [image for image, _ in found], [label for _, label in found]

    sequence = functools.partial(sequential.reader, shards, parse, cfg.shuffle_buffer)
    return Split(
        len(shards),
        "encoded",
        fetch,
        shards.name,
        labels,
        sequence if in_sequence else None,
    )


_NO_LABELS = np.zeros(0, np.int32)
