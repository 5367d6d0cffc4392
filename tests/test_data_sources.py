# SPDX-License-Identifier: Apache-2.0
"""What a source lists: classes, counts, splits, subsets; and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest
from data_files import encoded, picture, take, write_folder

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import sources
from vit_jax.errors import UserError

PLAIN = ({"op": "resize"},)


def test_digits_holds_out_a_fifth_of_every_class():
    cfg = DataConfig(source="digits", image_size=16)
    info = data.describe(cfg)
    assert (info.num_train, info.num_test, info.num_classes) == (1438, 359, 10)
    dataset = sources.load(cfg)
    train = dataset.train.labels.first(dataset.train.selected)
    test = dataset.test.labels.first(dataset.test.selected)
    assert not np.intersect1d(dataset.train.selected, dataset.test.selected).size
    np.testing.assert_allclose(np.bincount(test) / np.bincount(train), 0.25, atol=0.02)


def test_folder_with_and_without_a_test_folder(tmp_path):
    write_folder(tmp_path / "a", {"cat": 4, "dog": 6}, ("train", "val"))
    cfg = DataConfig(source="folder", path=str(tmp_path / "a"))
    assert data.describe(cfg) == data.DataInfo(2, ("cat", "dog"), 10, 10, False)
    write_folder(tmp_path / "b", {"cat": 5, "dog": 10})
    (tmp_path / "b/cat/deep").mkdir()
    (tmp_path / "b/cat/deep/x.JPEG").write_bytes(encoded(picture(0)))
    (tmp_path / "b/cat/.DS_Store").write_bytes(b"")
    (tmp_path / "b/cat/notes.txt").write_text("no image")
    cfg = dataclasses.replace(cfg, path=str(tmp_path / "b"))
    info = data.describe(cfg)
    assert (info.num_train, info.num_test) == (13, 3)


def test_labels_are_those_of_the_folder(tmp_path):
    """Every class has its own colour: the image says which label is right."""
    colours = {"red": (200, 0, 0), "blue": (0, 0, 200), "green": (0, 200, 0)}
    from PIL import Image

    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for i in range(5):
            image = Image.new("RGB", (20, 10 + i), colour)
            (tmp_path / name / f"{i}.png").write_bytes(encoded(image, "PNG"))
    cfg = DataConfig(source="folder", path=str(tmp_path), image_size=8)
    names = data.describe(cfg).class_names
    batches = [
        *data.eval_batches(cfg, batch=4),
        *take(data.train_batches(cfg, batch=4, seed=0), 3),
    ]
    for batch in batches:
        for i, label in enumerate(batch["label"]):
            if batch.get("mask", np.ones(4))[i]:
                assert tuple(batch["image"][i, 0, 0]) == colours[names[label]]


def test_csv_manifest_with_several_labels_and_ignored_images(tmp_path):
    rows = ["image,labels,split"]
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
        labels = ["a|c", "b", "", "-1", "c", "a|b|c"][i]
        rows.append(f"{i}.jpg,{labels},{'train' if i < 4 else 'test'}")
    (tmp_path / "set.csv").write_text("\n".join(rows))
    cfg = DataConfig(source="folder", path=str(tmp_path / "set.csv"), image_size=8)
    info = data.describe(cfg)
    assert info == data.DataInfo(3, ("a", "b", "c"), 4, 2, True)
    batch = next(data.eval_batches(cfg, batch=4, split="train"))
    expected = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(batch["label"], expected)
    np.testing.assert_array_equal(batch["mask"], [1, 1, 1, 0])
    trained = next(data.train_batches(cfg, batch=4, seed=0))["label"]
    assert trained.dtype == np.float32
    assert sorted(map(tuple, trained)) == sorted(
        map(tuple, [*expected[:3], [-1, -1, -1]])
    )


def test_jsonl_manifest_with_numbers(tmp_path):
    lines = []
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
        lines.append(json.dumps({"image": f"{i}.jpg", "label": i % 2}))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    cfg = DataConfig(source="folder", path=str(tmp_path / "set.jsonl"))
    assert data.describe(cfg) == data.DataInfo(2, ("0", "1"), 8, 2, False)


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "validation"), ("train ", "val")],
)
def test_splits_of_a_table_are_found_as_those_of_folders(tmp_path, train, test):
    rows = ["image,label,split"]
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
        rows.append(f"{i}.jpg,{'ab'[i % 2]},{test if i < 2 else train}")
    (tmp_path / "set.csv").write_text("\n".join(rows))
    cfg = DataConfig(source="folder", path=str(tmp_path / "set.csv"))
    assert data.describe(cfg) == data.DataInfo(2, ("a", "b"), 4, 2, False)


def test_class_and_split_0_of_a_jsonl_table(tmp_path):
    """Are no missing ones."""
    lines = []
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
        row = {"image": f"{i}.jpg", "labels": i % 2, "split": i // 2}
        lines.append(json.dumps(row))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    cfg = DataConfig(
        source="folder", path=str(tmp_path / "set.jsonl"), image_size=8,
        train_split="0", test_split="1",
    )  # fmt: skip
    (batch,) = data.eval_batches(cfg, batch=2)
    np.testing.assert_array_equal(batch["label"], [[1, 0], [0, 1]])


def test_test_labels_in_a_text_file(tmp_path):
    write_folder(tmp_path, {"cat": 2, "dog": 2}, ("train",))
    (tmp_path / "val").mkdir()
    for i in range(3):
        (tmp_path / f"val/{i}.JPEG").write_bytes(encoded(picture(i)))
    (tmp_path / "val.txt").write_text("0.JPEG 1\n1.JPEG cat\n2.JPEG 0\n")
    cfg = DataConfig(
        source="folder", path=str(tmp_path), image_size=8, test_split="val.txt"
    )
    assert data.describe(cfg).num_test == 3
    batch = next(data.eval_batches(cfg, batch=3))
    np.testing.assert_array_equal(batch["label"], [1, 0, 0])
    (tmp_path / "val.txt").write_text("a caption" * 999)
    with pytest.raises(UserError, match=r"line 1: 'a caption.* is not of the form"):
        data.describe(cfg)


def test_subset_and_holdout():
    cfg = DataConfig(source="digits", image_size=8)
    held = dataclasses.replace(cfg, holdout=0.1)
    dataset = sources.load(cfg)
    rest = sources.training_split(held, dataset).selected
    out = sources.evaluation_split(held, dataset, "test").selected
    assert sorted([*rest, *out]) == sorted(dataset.train.selected)
    small, large = (
        sources.training_split(dataclasses.replace(held, subset=n), dataset)
        for n in (50.0, 0.5)
    )
    assert set(small.selected) <= set(large.selected) <= set(rest)
    assert (np.bincount(small.labels.first(small.selected)) == 5).all()
    assert len(large) == round(0.5 * len(rest))
    uneven = dataclasses.replace(cfg, subset=200.0, subset_balanced=False)
    chosen = sources.training_split(uneven, dataset)
    assert len(set(chosen.selected)) == 200
    assert len(set(np.bincount(chosen.labels.first(chosen.selected)))) > 1


BROKEN = {
    "no path": (lambda p: "", "data.path is empty"),
    "missing": (lambda p: str(p / "nowhere"), "does not exist"),
    "address": (lambda p: "gs://bucket/photos", "is an address.*write_records"),
    "empty": (lambda p: str(p), "has no class folders"),
    "loose images": (
        lambda p: ((p / "1.jpg").write_bytes(b"") and "") or str(p),
        r"1 images lie in it directly",
    ),
    "empty class": (
        lambda p: (p / "cat").mkdir() or str(write_folder(p, {"dog": 1})),
        r"cat holds no images",
    ),
    "duplicate class": (
        lambda p: str(write_folder(p, {"Cat": 1, "cat": 1})),
        r"two classes of the same name, 'Cat' and 'cat'",
    ),
    "unknown test class": (
        lambda p: (
            write_folder(p / "train", {"cat": 2})
            and str(write_folder(p / "test", {"cta": 1}).parent)
        ),
        r"class 'cta', which the training set lacks: did you mean 'cat'",
    ),
    "manifest of nothing": (
        lambda p: _file(p, "m.csv", "image,label\n"),
        "lists no images",
    ),
    "manifest without label": (
        lambda p: _file(p, "m.csv", "image\na.jpg\n"),
        r"needs an image .* and a label",
    ),
    "manifest with missing files": (
        lambda p: _file(p, "m.csv", "image,label,split\na.jpg,1,train\n"),
        r"lists 1 files that do not exist",
    ),
    "manifest that is no json": (lambda p: _file(p, "m.jsonl", "{"), "line 1"),
    "wrong suffix": (lambda p: _file(p, "m.txt", "x"), r"must end in \.csv or \.jsonl"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_a_folder_may_not_be(case, tmp_path):
    make, message = BROKEN[case]
    cfg = DataConfig(source="folder", path=make(tmp_path))
    with pytest.raises(UserError, match=message):
        data.describe(cfg)


@pytest.mark.parametrize(
    ("classes", "share", "message"),
    [
        ({"cat": 1, "dog": 1}, 0.2, "no class has two of them"),
        ({"cat": 1, "dog": 1}, 0.9, "no class has two of them"),
    ],
)
def test_what_cannot_be_held_out_and_why(tmp_path, classes, share, message):
    write_folder(tmp_path, classes)
    cfg = DataConfig(source="folder", path=str(tmp_path), test_share=share)
    with pytest.raises(UserError, match=message):
        data.describe(cfg)


def test_labels_out_of_range_are_refused(tmp_path):
    (tmp_path / "0.jpg").write_bytes(encoded(picture(0)))
    path = _file(tmp_path, "m.csv", "image,label\n0.jpg,0\n0.jpg,7\n")
    cfg = DataConfig(source="folder", path=path, num_classes=5)
    with pytest.raises(UserError, match=r"line 3: label 7 is out of range"):
        data.describe(cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": 1e6}, r"data.subset is 1000000.0"),
        (
            {"subset": 1e-6},
            r"config.data.subset is 1e-06, which makes 0 examples of 1438",
        ),
        ({"holdout": 1.5}, r"data.holdout between 0 and 1"),
        ({"num_classes": 3}, r"data.num_classes is 3, but digits has 10"),
    ],
)
def test_impossible_choices(changes, message):
    with pytest.raises(UserError, match=message):
        data.describe(DataConfig(source="digits", **changes))


@pytest.mark.parametrize(
    ("batch", "count", "message"),
    [(0, 1, "batch is 0"), (10, 4, "multiple of the number of processes, 4")],
)
def test_impossible_batches(batch, count, message):
    with pytest.raises(UserError, match=message):
        data.train_batches(
            DataConfig(source="digits"), batch=batch, seed=0, process_count=count
        )


def _file(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)
