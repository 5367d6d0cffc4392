# SPDX-License-Identifier: Apache-2.0
"""Images in Parquet files, as Hugging Face publishes them. ``data.source="parquet"``:

data/train-00000-of-00002.parquet    local, gs:// or hf://OWNER/NAME
data/test-00000-of-00001.parquet

A column "image" holds encoded images, as bytes or as a struct of bytes and path; a column
"label" their classes: whole numbers, whose names stand in the schema's metadata, or
names; lists of numbers where an image has several. An image labelled -1, or null, is
ignored.

The images of a row group can only be read together. They are kept while they fit into
``HELD`` bytes, so that up to that size reading at random costs each row group once. A
larger split is read from front to back and shuffled in memory, as records are on a
bucket, unless ``data.access`` says otherwise.
"""

import collections
import functools
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import parquet

from vit_jax.config import DataConfig
from vit_jax.data import classes, hub_sets, split_files
from vit_jax.data.examples import (
    IGNORED,
    Dataset,
    Image,
    Labels,
    Split,
    Unreadable,
    check_class_names,
)
from vit_jax.data.storage import Remote, is_remote
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError, one_line

log = logging.getLogger(__name__)

HELD = 2**31  # bytes of row groups that are kept, over all splits
_TOGETHER = 16  # files or row groups read at the same time
_IMAGE = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp")
_LABEL = ("label", "labels", "class", "cls", "target", "category", "fine_label")


def load(cfg: DataConfig) -> Dataset:
    """The data set of the Parquet files under ``cfg.path``."""
    found = hub_sets.find(cfg, ".parquet")
    opened = functools.cache(lambda name: Parquet(found.files(name)))
    train = opened(split_files.train_name(cfg, found.splits, found.root))
    columns = train.columns
    if columns.names:
        names = check_class_names(columns.names, found.root)
    else:
        spelled = classes.places(train.labels, train.name_of_label)
        names = classes.names(cfg, spelled, len(train), found.root)
    # Whole numbers are positions, whatever the names: a class called "3" may be another.
    indices = {str(i) if columns.names else name: i for i, name in enumerate(names)}

    def read(name: str, choosing: bool) -> Split:
        images = opened(name)
        train.check(images.files[0], images.columns)
        values = classes.numbers(images.labels, indices, images.name_of_label).values
        labels = Labels(values, images.label_starts)
        size, of_group = images.sizes.sum(), images.sizes.mean() / 2**20
        if size > HELD and (choosing or cfg.access == "random"):
            log.warning(_SLOW, name, size / 2**30, of_group, HELD / 2**30)
        return split_files.split(cfg, images, labels, choosing, bool(size > HELD))

    return split_files.dataset(
        cfg, found.splits, found.root, read, names, multilabel=columns.several
    )


_SLOW = (
    "the split %r, %.1f GiB, is read at random: each image may cost a row group, %.0f MiB, "
    "as only %.0f GiB of them are kept; write records of it (python -m "
    "vit_jax.data.write_records), or name a test split and use the whole training set, "
    "which is then read in sequence"
)


@dataclass(frozen=True)
class Columns:
    """What is read of a file."""

    image: str  # path of the column that holds the bytes
    label: str
    names: tuple[
        str, ...
    ]  # of the classes, where labels are their numbers; (): unknown
    several: bool  # labels per image


class Parquet(split_files.Listed):
    """The images of several Parquet files as one list.

    Raises:
      UserError: a file is damaged, has not the columns, or others than the first; also
        where there is no image.
    """

    def __init__(self, files: Sequence[str]):
        with ThreadPoolExecutor(_TOGETHER) as pool:
            found = list(pool.map(_look, files))
        super().__init__(files, [about.num_rows for about, *_ in found], "row")
        if not len(self):
            raise UserError(f"{files[0]} and the other files of its split have no rows")
        abouts, columns, self.labels, counts = zip(*found, strict=True)
        self.columns: Columns = columns[0]
        for file, other in zip(files, columns, strict=True):
            self.check(file, other)
        self.label_starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        self._abouts: Sequence[parquet.FileMetaData] = abouts
        self._groups = [
            (file, group)
            for file, about in enumerate(abouts)
            for group in range(about.num_row_groups)
        ]
        parts = [abouts[file].row_group(group) for file, group in self._groups]
        self._begin = np.concatenate([[0], np.cumsum([p.num_rows for p in parts])])
        # Bytes of the images of each row group.
        self.sizes = np.array([_image_bytes(p, self.columns.image) for p in parts])
        self._pool = ThreadPoolExecutor(_TOGETHER, "vit_jax parquet")
        self._kept: collections.OrderedDict[int, Group] = collections.OrderedDict()
        self._lock = threading.Lock()

    def check(self, file: str, other: Columns) -> None:
        """Raises UserError where a file has other columns."""
        if other != self.columns:
            raise UserError(
                f"{file} has other columns or class names than {self.files[0]}: "
                f"{other} and {self.columns}"
            )

    def name_of_label(self, index: int) -> str:
        """The row of one of the labels, which may be several per row."""
        return self.name(int(np.searchsorted(self.label_starts, index, "right")) - 1)

    def read(self, index: np.ndarray) -> list[Image]:
        """Images by number; the row groups they need are read at the same time."""
        numbers = np.searchsorted(self._begin, index, side="right") - 1
        wanted = np.unique(numbers).tolist()
        groups = dict(zip(wanted, self._pool.map(self._group, wanted), strict=True))
        rows = (index - self._begin[numbers]).tolist()
        return [
            _image(groups[g], row)
            for g, row in zip(numbers.tolist(), rows, strict=True)
        ]

    def in_order(
        self, file: int, begin: int, stop: int
    ) -> Iterator[split_files.Numbered]:
        at, end = int(self.starts[file]) + begin, int(self.starts[file]) + stop
        while at < end:
            number = int(np.searchsorted(self._begin, at, side="right")) - 1
            group, first = self._read(number), int(self._begin[number])
            for i in range(at, min(end, int(self._begin[number + 1]))):
                yield i, _image(group, i - first)
                at = i + 1

    def _group(self, number: int) -> "Group":
        """A row group; those that were used last are kept."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        found = self._read(number)
        with self._lock:
            self._kept[number] = found
            while len(self._kept) > 1 and self.sizes[[*self._kept]].sum() > HELD:
                self._kept.popitem(last=False)
        return found

    def _read(self, number: int) -> "Group":
        file, group = self._groups[number]
        try:
            with _opened(self.files[file], self._abouts[file]) as opened:
                table = opened.read_row_group(group, [self.columns.image])
        except (pa.ArrowException, OSError, tf.errors.OpError) as e:
            return Unreadable(f"its row group cannot be read: {one_line(e)}")
        column = table.column(0)
        return (
            pc.struct_field(column, [0]) if pa.types.is_struct(column.type) else column
        )


Group = pa.ChunkedArray | Unreadable  # the images of a row group, or why there are none


def _image(group: Group, row: int) -> Image:
    if isinstance(group, Unreadable):
        return group
    value = group[row].as_py()
    return Unreadable("the row has no bytes of an image") if value is None else value


def _image_bytes(part: parquet.RowGroupMetaData, column: str) -> int:
    columns = (part.column(i) for i in range(part.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == column)


# ----------------------------------------------------------------------- what files say


def _opened(
    file: str, about: parquet.FileMetaData | None = None
) -> parquet.ParquetFile:
    source = Remote(file) if is_remote(file) else file
    return parquet.ParquetFile(source, metadata=about, page_checksum_verification=True)


def _look(
    file: str,
) -> tuple[parquet.FileMetaData, Columns, classes.Spelled, np.ndarray]:
    """(what the footer says, columns, labels, int64 (rows,): how many each row has)"""
    try:
        with _opened(file) as opened:
            columns = _columns(file, opened.schema_arrow)
            labels = opened.read([columns.label]).column(0).combine_chunks()
            about = opened.metadata
            if pa.types.is_integer(labels.type):
                labels = labels.cast(pa.int64())  # so that there is room for -1
    except (pa.ArrowException, OSError, tf.errors.OpError) as e:
        raise UserError(
            f"{file} is no Parquet file, or damaged ({one_line(e)}): copy it again"
        ) from e
    if labels.null_count:
        log.warning("%s: %d labels are null; they are ignored", file, labels.null_count)
    counts = np.ones(len(labels), np.int64)
    if columns.several:
        lists = [[IGNORED] if x is None else x for x in labels.to_pylist()]
        counts = np.array([len(x) for x in lists], np.int64)
        labels = pa.array([v for x in lists for v in x], pa.int64())
    if pa.types.is_dictionary(labels.type):
        labels = labels.dictionary_decode()
    if not pa.types.is_integer(labels.type):
        labels = labels.cast(pa.string())
    missing = str(IGNORED) if pa.types.is_string(labels.type) else IGNORED
    coded = labels.fill_null(missing).dictionary_encode()
    spelled = [
        classes.text(v, f"{file}, {columns.label}")
        for v in coded.dictionary.to_pylist()
    ]
    return about, columns, (spelled, coded.indices.to_numpy()), counts


def _columns(file: str, schema: pa.Schema) -> Columns:
    """Raises UserError where there is no image, or no label."""
    features = _features(schema)
    types = {field.name: field.type for field in schema}
    there = "the columns are " + ", ".join(f"{n} ({t})" for n, t in types.items())
    image = _choose(types, features, _IMAGE, "Image")
    if not image:
        raise UserError(
            f"{file} has no column 'image' of encoded images, nor {', '.join(_IMAGE[1:])}: "
            f"{there}"
        )
    leaf = _leaf(image, types[image])
    if not leaf:
        raise UserError(
            f"{file} holds no images: its column {image!r} is {types[image]}, not bytes or "
            "a struct with bytes; embed the images in it, or name the files in a .csv table"
        )
    label = _choose(types, features, _LABEL, "ClassLabel")
    if not label:
        raise UserError(
            f"{file} has no column 'label', nor {', '.join(_LABEL[1:])}: {there}"
        )
    kind, feature = types[label], features.get(label) or {}
    several = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if several:
        kind, feature = kind.value_type, feature.get("feature") or feature
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    named = any(test(kind) for test in text)
    if not (pa.types.is_integer(kind) or (named and not several)):
        raise UserError(
            f"{file}: the column {label!r} is {types[label]}: labels are whole numbers, "
            "lists of them, or names"
        )
    names = feature.get("names") or () if pa.types.is_integer(kind) else ()
    return Columns(leaf, label, tuple(map(str, names)), several)


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """What the library datasets has written about the columns."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return {
            k: v for k, v in about["info"]["features"].items() if isinstance(v, dict)
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _choose(
    types: Mapping[str, Any],
    features: Mapping[str, Any],
    names: Sequence[str],
    kind: str,
) -> str:
    """The column of a usual name, or the only one of a kind of the library datasets."""
    usual = next((name for name in names if name in types), "")
    of_kind = [n for n, f in features.items() if n in types and f.get("_type") == kind]
    return usual or (of_kind[0] if len(of_kind) == 1 else "")


def _leaf(name: str, kind: pa.DataType) -> str:
    """The path of the bytes of a column; "": there are none."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if any(is_binary(kind) for is_binary in tests):
        return name
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        if any(
            f.name == "bytes" and any(is_binary(f.type) for is_binary in tests)
            for f in fields
        ):
            return f"{name}.bytes"
    return ""
