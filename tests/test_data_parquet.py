# SPDX-License-Identifier: Apache-2.0
"""Data sets of Hugging Face as Parquet files, and what can be wrong with them."""

import logging

import numpy as np
import pyarrow as pa
import pytest
from data_files import encoded, hub_schema, picture, take, write_parquet, write_tar
from pyarrow import parquet as pq
from test_weights_fetch import COMMIT, site

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import parquet, sources
from vit_jax.errors import UserError

IMAGES = [encoded(picture(i)) for i in range(12)]
__all__ = ["site"]  # a fixture


def config(path, **changes):
    defaults = {"source": "parquet", "image_size": 8, "cache_gib": 0.0}
    return DataConfig(path=str(path), **defaults | {"test_split": "train"} | changes)


def rows(labels, image=lambda content: {"bytes": content, "path": "x.jpg"}):
    return [
        {"image": image(c), "label": v} for c, v in zip(IMAGES, labels, strict=False)
    ]


def pairs(path, **changes):
    """(image, label) of every example of the test split, by class names."""
    dataset = sources.load(config(path, **changes))
    images, labels = dataset.test.read(np.arange(len(dataset.test)))
    names = {-1: "", **dict(enumerate(dataset.class_names))}
    return [
        (im, [names[v] for v in lb.tolist()])
        for im, lb in zip(images, labels, strict=True)
    ]


def named(labels):
    return [(c, [v]) for c, v in zip(IMAGES, labels, strict=False)]


PLAIN = pa.schema([("image", pa.binary()), ("label", pa.string())])


@pytest.mark.parametrize(
    ("schema", "labels", "expected"),
    [
        # Positions, though the names are numbers too.
        (hub_schema(["2", "0", "1"]), [0, 1, 2, -1, None], ["2", "0", "1", "", ""]),
        (hub_schema(), [3, 0, -1], ["3", "0", ""]),
        (hub_schema(label=pa.uint8()), [3, 0], ["3", "0"]),
        (hub_schema(label=pa.string()), ["dog", "cat", None], ["dog", "cat", ""]),
        (hub_schema(label=pa.large_string()), ["b", "a"], ["b", "a"]),
        (
            hub_schema(label=pa.dictionary(pa.int32(), pa.string())),
            ["b", "a", "b"],
            ["b", "a", "b"],
        ),
    ],
)  # fmt: skip
def test_labels(schema, labels, expected, tmp_path):
    for size in (2, 100):
        file = write_parquet(tmp_path / "x.parquet", rows(labels), schema, size)
        assert pairs(file) == named(expected)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "img", "jpg"])
def test_images_in_a_plain_column(kind, name, tmp_path):
    schema = pa.schema([("note", pa.string()), (name, kind), ("cls", pa.int64())])
    found = [{name: c, "cls": i} for i, c in enumerate(IMAGES[:3])]
    write_parquet(tmp_path / "0.parquet", found, schema)
    assert pairs(tmp_path) == named("012")


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8()])
def test_several_labels(kind, tmp_path):
    schema = hub_schema(label=pa.list_(kind))
    ignored = [-1 if kind == pa.int64() else None]
    labels = [[0, 2], [], [1], None, ignored]
    file = write_parquet(tmp_path / "x.parquet", rows(labels), schema, 2)
    info = data.describe(config(file))
    assert (info.num_classes, info.multilabel) == (3, True)
    (batch,) = data.eval_batches(config(file), batch=5)
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(batch["label"], expected)
    np.testing.assert_array_equal(batch["mask"], [1, 1, 1, 0, 0])


def test_nulls_are_named_and_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    found = rows([0, 1] * 6)
    found[1]["image"] = None
    found[2]["image"]["bytes"] = None
    found[3]["image"]["bytes"] = b"<html>403</html>" * 9
    found[4]["label"] = None
    file = write_parquet(tmp_path / "x.parquet", found, hub_schema())
    for access in ("random", "sequential"):
        cfg = config(file, max_bad=0.3, access=access)
        (batch,) = data.eval_batches(cfg, batch=12)
        assert batch["mask"].tolist() == [1, 0, 0, 0, 0] + [1] * 7
        assert batch["label"][batch["mask"] == 1].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
        whole = take(data.train_batches(cfg, batch=6, seed=0), 5)
        late = next(data.train_batches(cfg, batch=6, seed=0, start=4))
        np.testing.assert_array_equal(whole[4]["image"], late["image"])
        assert all((b["image"].reshape(6, -1).std(1) > 0).all() for b in whole)
    assert "x.parquet: 1 labels are null; they are ignored" in caplog.text
    bad = data.bad_examples()
    assert (
        bad[f"{file}, row 1"]
        == bad[f"{file}, row 2"]
        == "the row has no bytes of an image"
    )
    assert f"{file}, row 3" in bad
    with pytest.raises(UserError, match=r"\d of 12 examples cannot be read"):
        next(data.eval_batches(config(file, max_bad=0.1), batch=12))


def test_a_damaged_row_group_is_named(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", rows([0, 1] * 6), hub_schema(), 4)
    with pq.ParquetFile(file) as opened:
        at = opened.metadata.row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[at : at + 20] = bytes(20)
    file.write_bytes(content)
    found = [image for image, _ in pairs(file)]
    assert found[:4] + found[8:] == IMAGES[:4] + IMAGES[8:]
    reasons = {image.reason.split(":")[0] for image in found[4:8]}
    assert reasons == {"its row group cannot be read"}
    (batch,) = data.eval_batches(config(file, max_bad=0.5), batch=12)
    assert batch["mask"].sum() == 8


def of(schema, labels=(0, 1), **changes):
    return lambda p: write_parquet(p / "x.parquet", rows(labels, **changes), schema)


def table(**columns):
    return lambda p: write_parquet(
        p / "x.parquet", pa.table(columns).to_pylist(), pa.table(columns).schema
    )


def two(first, second, name="train-00001-of-00002.parquet"):
    def make(folder):
        write_parquet(folder / "train-00000-of-00002.parquet", rows([0, 1]), first)
        write_parquet(folder / name, rows([0, 1]), second)
        return folder

    return make


def cut(folder):
    file = of(hub_schema())(folder)
    file.write_bytes(file.read_bytes()[:-50])
    return file


PATHS = pa.struct([("path", pa.string())])
WRONG = {
    "no image": (
        table(label=[0], url=["x"]),
        r"x.parquet has no column 'image'.*columns are label \(int64\), url \(string\)",
    ),
    "no label": (table(image=[b"x"], n=[1]), r"no column 'label'.*image \(binary\), n \(int64\)"),
    "struct of paths": (
        of(hub_schema(image=PATHS), image=lambda c: {"path": "a.jpg"}),
        r"holds no images: its column 'image' is struct<path: string>.*\.csv table",
    ),
    "column of paths": (table(image=["a.jpg"], label=[0]), "'image' is string, not bytes"),
    "pixels": (table(image=[[1, 2]], label=[0]), r"'image' is list<.*>, not bytes"),
    "floats": (table(image=[b"x"], label=[0.5]), r"column 'label' is double: labels are"),
    "lists of names": (table(image=[b"x"], label=[["a"]]), r"labels are whole numbers, lists"),
    "out of range": (of(hub_schema(["a", "b"]), [0, 2]), r"row 1: label 2 is out of range"),
    "negative": (of(hub_schema(["a", "b"]), [0, -2]), r"row 1: label -2 is out of range"),
    "huge label": (of(hub_schema(), [0, 2**40]), r"label 1099511627776 asks for"),
    "no label at all": (of(hub_schema(), [-1, -1]), r"names no class|no image .* has a label"),
    "empty name": (of(hub_schema(label=pa.string()), ["a", " "]), "label is empty"),
    "same names": (of(hub_schema(["a", "A"])), "two classes of the same name"),
    "no rows": (of(hub_schema(), []), "have no rows"),
    "cut short": (cut, r"x.parquet is no Parquet file, or damaged \(.+\): copy it again"),
    "not parquet": (
        lambda p: (p / "x.parquet").write_bytes(b"hello") and p,
        r"is no Parquet file, or damaged",
    ),
    "other names": (
        two(hub_schema(["a", "b"]), hub_schema(["b", "a"])),
        r"00001-of-00002.parquet has other columns or class names than .*00000-of",
    ),
    "a file missing": (
        lambda p: write_parquet(p / "train-00000-of-00002.parquet", rows([0])).parent,
        r"data set holds 1 shards .* there are 2",
    ),
    "nothing there": (lambda p: (p / "a.txt").write_text("") or p, r"has no .parquet files"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_parquet_file_may_not_be(case, tmp_path):
    make, message = WRONG[case]
    with pytest.raises(UserError, match=message) as found:
        data.describe(config(make(tmp_path)))
    assert "\n" not in str(found.value)


def test_test_sets_of_other_classes_and_without_labels(tmp_path):
    names = ["a", "b"]
    write_parquet(
        tmp_path / "train-00000-of-00001.parquet", rows([0, 1]), hub_schema(names)
    )
    test = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(test, rows([-1, -1, -1]), hub_schema(names))
    write_parquet(
        tmp_path / "validation-00000-of-00001.parquet", rows([1]), hub_schema(names)
    )
    assert pairs(tmp_path, test_split="test") == named("b")  # whose labels are known
    write_parquet(test, rows([0, 1, 0]), hub_schema(["b", "a"]))
    with pytest.raises(UserError, match=r"test-.* has other columns or class names"):
        data.describe(config(tmp_path, test_split="test"))


CONFIGS = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: data/a*.parquet}
  - {split: validation, path: [data/b0.parquet, 0]}
- config_name: large
  data_files: data/*.parquet
license: mit
---
# A set
"""


def test_configurations(tmp_path):
    for name, labels in {"a0": [0], "a1": [1], "b0": [2]}.items():
        write_parquet(
            tmp_path / f"data/{name}.parquet", rows(labels), hub_schema("xyz")
        )
    # No README: all are for training, and none has a word that says otherwise.
    assert data.describe(config(tmp_path)).num_train == 3
    (tmp_path / "README.md").write_text(CONFIGS)
    message = (
        r"has the configurations \['large', 'small'\]: choose one with config.data.name"
    )
    with pytest.raises(UserError, match=message):
        data.describe(config(tmp_path))
    info = data.describe(config(tmp_path, name="small", test_split="test"))
    assert (info.num_train, info.num_test) == (2, 1)
    assert data.describe(config(tmp_path, name="large")).num_train == 3
    for pattern in ("./data/a*.parquet", "**/data/a*.parquet"):
        found = CONFIGS.replace("data/a*.parquet", f'"{pattern}"')
        (tmp_path / "README.md").write_text(found)
        assert data.describe(config(tmp_path, name="small")).num_train == 2
    found = CONFIGS.replace("small", "small\n  default: true")
    (tmp_path / "README.md").write_text(found)
    for name in ("small", "default"):
        assert data.describe(config(tmp_path, name=name)).num_train == 2
    with pytest.raises(UserError, match=r"config.data.name.*'smal'"):
        data.describe(config(tmp_path, name="smal"))
    (tmp_path / "README.md").write_text("---\nconfigs: {\n---")
    assert data.describe(config(tmp_path)).num_train == 3


def test_folders_of_the_same_splits_are_configurations(tmp_path):
    for i, name in enumerate(("fine", "coarse")):
        for split in ("train", "test"):
            write_parquet(
                tmp_path / name / split / "0000.parquet", rows([i]), hub_schema("ab")
            )
    with pytest.raises(UserError, match=r"\['coarse', 'fine'\]"):
        data.describe(config(tmp_path))
    assert pairs(tmp_path, name="coarse", test_split="test") == named("b")


def test_a_split_that_memory_does_not_hold_is_read_in_sequence(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.WARNING)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", rows([0, 1] * 6), hub_schema(), 2)
    assert sources.load(config(tmp_path)).train.sequence is None
    monkeypatch.setattr(parquet, "HELD", 4000)
    assert sources.load(config(tmp_path, test_split="test")).train.sequence
    assert not caplog.text
    # A part of it can only be read at random, which says what it costs.
    split = sources.load(config(tmp_path, subset=4.0)).train
    assert split.sequence is None
    assert "each image may cost a row group" in caplog.text
    order = np.random.default_rng(0).permutation(12)
    assert split.read(order)[0] == [IMAGES[i] for i in order]
    kept = parquet.Parquet([str(tmp_path / "train.parquet")])
    for i in order:
        kept.read(order[:1] * 0 + i)
        assert kept.sizes[[*kept._kept]].sum() <= 4000


# --------------------------------------------------------------------------- of the Hub


def publish(site, files, commit=COMMIT, revision="main", name="me/set"):
    """As ``Site.repository``, but of a data set, and beside what is there."""
    before, site.files = site.files, {}
    site.repository(name, files, revision)
    for path, content in site.files.items():
        path = path.replace("/api/models/", "/api/datasets/", 1)
        path = path if path.startswith("/api/") else f"/datasets{path}"
        content = content.replace(COMMIT.encode(), commit.encode())
        before[path.replace(COMMIT, commit)] = content
    site.files = before


@pytest.mark.parametrize("source", ["parquet", "tar"])
def test_a_set_of_the_hub(source, site, tmp_path, monkeypatch):
    file = tmp_path / "x"
    if source == "tar":
        members = {"0.jpg": IMAGES[0], "0.cls": b"b", "1.jpg": IMAGES[1], "1.cls": b"a"}
        write_tar(file, members)
    else:
        write_parquet(file, rows([1, 0]), hub_schema("abc"))
    names = ("train-00000-of-00001", "test-00000-of-00001", "extra-00000-of-00001")
    files = {f"data/{name}.{source}": file.read_bytes() for name in names}
    publish(site, files | {"README.md": b"# hello", "data/other.txt": b""})
    options = {"source": source, "test_split": "test"}
    for path in ("hf://me/set", "hf://datasets/me/set", "hf://me/set@main/data"):
        assert pairs(path, **options) == named("ba")
        assert data.describe(config(path, **options)).num_train == 2
    assert not [p for p in site.requests if "extra" in str(p)]  # not asked for
    with pytest.raises(UserError, match=r"no such repository|cannot be downloaded"):
        data.describe(config("hf://me/other", **options))
    publish(site, {"photos.zip": b""}, name="me/zip")
    with pytest.raises(UserError, match=rf"hf://me/zip has no .{source} files"):
        data.describe(config("hf://me/zip", **options))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pairs("hf://me/set", **options) == named("ba")


def test_a_set_that_the_hub_has_converted(site, tmp_path):
    publish(site, {"photos.zip": b"", "README.md": b""})
    with pytest.raises(UserError, match="nor has the Hub converted it"):
        data.describe(config("hf://me/set"))
    file = write_parquet(tmp_path / "x.parquet", rows([1, 0]), hub_schema("ab"))
    files = {"default/train/0000.parquet": file.read_bytes(), "README.md": b""}
    publish(site, files, "f" * 40, "refs/convert/parquet")
    assert pairs("hf://me/set") == named("ba")
