# SPDX-License-Identifier: Apache-2.0
"""Small image files and folders for the data tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 24, width: int = 32) -> Image.Image:
    """Smooth colours, so that JPEG keeps them nearly as they are."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    if format == "JPEG":
        options = {"quality": 95} | options
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_folder(root: Path, classes: dict[str, int], splits=("",)) -> Path:
    """``root/split/class/i.jpg``; every image is another one."""
    number = 0
    for split in splits:
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                number += 1
                (folder / f"{i:03d}.jpg").write_bytes(encoded(picture(number)))
    return root


def take(batches, count):
    return [b for _, b in zip(range(count), batches, strict=False)]


def listing(photos: Path) -> dict[str, list[tuple[str, str, bytes]]]:
    """{split: [(name, class, encoded image), ...]} of what ``write_folder`` wrote."""
    return {
        split.name: [
            (f"{p.parent.name}-{p.stem}", p.parent.name, p.read_bytes())
            for p in sorted(split.glob("*/*.jpg"))
        ]
        for split in sorted(photos.iterdir())
    }


def write_tar(file: Path, members: dict[str, bytes], **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return file


def write_tars(photos: Path, dest: Path, shards: int = 3) -> Path:
    """The photos of ``write_folder`` as shards of WebDataset; their classes as names in
    .txt, .cls and .json, each in some of the shards."""
    for split, images in listing(photos).items():
        for i in range(shards):
            members = {}
            for name, label, content in images[i::shards]:
                kind = (".txt", ".cls", ".json")[i % 3]
                text = f'{{"label": "{label}"}}' if kind == ".json" else f"{label}\n"
                members |= {f"{name}.jpg": content, name + kind: text.encode()}
            write_tar(dest / f"{split}-{i:06d}.tar", members)
    return dest


def hub_schema(names=(), **types):
    """A schema with what the library datasets writes beside it."""
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"image": image, "label": pa.int64()} | types
    label = {"names": [*names], "_type": "ClassLabel"} if names else {"_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": label}
    about = json.dumps({"info": {"features": features}})
    return pa.schema([*types.items()], metadata={"huggingface": about})


def write_parquet(file: Path, rows: list[dict], schema=None, row_group_size=5) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    parquet.write_table(table, file, row_group_size=row_group_size)
    return file


def write_parquets(photos: Path, dest: Path, shards: int = 3) -> Path:
    """The photos of ``write_folder`` as the Hub has them."""
    for split, images in listing(photos).items():
        names = sorted({label for _, label, _ in images})
        for i in range(shards):
            rows = [
                {"image": {"bytes": content, "path": name}, "label": names.index(label)}
                for name, label, content in images[i::shards]
            ]
            file = dest / f"data/{split}-{i:05d}-of-{shards:05d}.parquet"
            write_parquet(file, rows, hub_schema(names))
    return dest


def write_tfrecord(
    file: Path,
    rows: list[tuple[bytes, list[int]]],
    image_key: str = "image",
    label_key: str = "label",
) -> Path:
    """Encoded images and their labels, without an index, as others write them."""
    from vit_jax.data.tensorflow_cpu import tf

    file.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for content, labels in rows:
            image = tf.train.BytesList(value=[content])
            number = tf.train.Int64List(value=labels)
            features = {
                image_key: tf.train.Feature(bytes_list=image),
                label_key: tf.train.Feature(int64_list=number),
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
    return file


def write_tfrecords(photos: Path, dest: Path, shards: int = 3) -> Path:
    """The photos of ``write_folder`` as TFRecords without an index."""
    for split, images in listing(photos).items():
        names = sorted({label for _, label, _ in images})
        rows = [(content, [names.index(label)]) for _, label, content in images]
        for i in range(shards):
            file = dest / f"{split}-{i:05d}-of-{shards:05d}.tfrecord"
            write_tfrecord(file, rows[i::shards])
    return dest
