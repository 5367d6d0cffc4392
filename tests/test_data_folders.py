# SPDX-License-Identifier: Apache-2.0
"""Which folders are classes and which are splits, what is left out and what refused."""

import dataclasses
import json
import os
import re
import unicodedata

import numpy as np
import pytest
from data_files import encoded, picture, write_folder

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import folders, write_records
from vit_jax.errors import UserError

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def described(path, **options):
    return data.describe(DataConfig(source="folder", path=str(path), **options))


def manifest(folder, content, name="m.csv"):
    (folder / "a.jpg").write_bytes(encoded(picture(0)))
    if isinstance(content, str):
        content = content.encode()
    (folder / name).write_bytes(content)
    return folder / name


# -------------------------------------------------------------------- classes, splits


@pytest.mark.parametrize("split", ["test", "val", "dev"])
def test_a_split_beside_class_folders_is_no_class(tmp_path, split):
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    write_folder(tmp_path, {"cat": 2}, (split,))
    with pytest.raises(UserError, match=rf"'{split}'.*no training split.*train/cat"):
        described(tmp_path, test_split="dev" if split == "dev" else "test")


def test_the_images_of_a_text_file_are_no_class(tmp_path):
    """Those of the class folders have the same names."""
    write_folder(tmp_path, {"cat": 2, "dog": 2, "test": 1})
    (tmp_path / "test.txt").write_text("000.jpg dog\n")
    cfg = DataConfig(
        source="folder", path=str(tmp_path), image_size=8, test_split="test.txt"
    )
    assert data.describe(cfg) == data.DataInfo(2, ("cat", "dog"), 4, 1, False)
    read = next(data.eval_batches(cfg, batch=1))["image"]
    alone = tmp_path / "alone"
    (alone / "train/cat").mkdir(parents=True)
    (alone / "test").mkdir()
    os.link(tmp_path / "test/000.jpg", alone / "test/000.jpg")
    os.link(tmp_path / "cat/000.jpg", alone / "train/cat/000.jpg")
    (alone / "test.txt").write_text("000.jpg cat\n")
    cfg = dataclasses.replace(cfg, path=str(alone))
    np.testing.assert_array_equal(read, next(data.eval_batches(cfg, batch=1))["image"])


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, {"bus": 5, "cat": 5, "train": 5})
    info = described(tmp_path)
    assert info == data.DataInfo(3, ("bus", "cat", "train"), 12, 3, False)


@pytest.mark.parametrize("knob", ["train_split", "test_split"])
def test_a_split_that_was_asked_for_is_never_replaced(tmp_path, knob):
    write_folder(tmp_path / "flat", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "split", {"cat": 2, "dog": 2}, ("train", "val"))
    assert described(tmp_path / "split", test_split="val").num_test == 4
    for name, have in (("flat", r"'cat', 'dog'"), ("split", r"'train', 'val'")):
        with pytest.raises(UserError, match=rf"{knob} is 'tset', but .*\[{have}"):
            described(tmp_path / name, **{knob: "tset"})
    rows = "image,label,split\na.jpg,x,train\na.jpg,y,val\n"
    with pytest.raises(UserError, match=rf"{knob} is 'tset', .* \['train', 'val'\]"):
        described(manifest(tmp_path, rows), **{knob: "tset"})
    file = manifest(tmp_path, "image,label\na.jpg,x\n", "unsplit.csv")
    with pytest.raises(UserError, match=rf"{knob} is 'tset', .* no column 'split'"):
        described(file, **{knob: "tset"})


def test_links_that_lead_back_are_not_followed(tmp_path):
    write_folder(tmp_path, {"cat": 5, "dog": 5})
    (tmp_path / "cat/up").symlink_to(tmp_path)
    (tmp_path / "cat/self").symlink_to(tmp_path / "cat")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.jpg").write_bytes(encoded(picture(0)))
    (tmp_path / "elsewhere").rename(tmp_path.parent / "elsewhere")
    (tmp_path / "dog/more").symlink_to(tmp_path.parent / "elsewhere")
    info = described(tmp_path)
    assert (info.num_train, info.num_test) == (9, 2)


def test_files_that_cannot_be_read_are_counted_once(tmp_path, caplog):
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    for name in ("1.tif", "2.TIF", "3.heic", ".DS_Store"):
        (tmp_path / "cat" / name).write_bytes(b"")
    described(tmp_path)
    said = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(said) == 1
    assert "left out 3 files" in said[0]
    assert said[0].endswith("2 .tif, 1 .heic")


def test_an_accent_is_an_accent_however_it_is_written(tmp_path):
    write_folder(tmp_path / "split/train", {NFC: 2, "tea": 2})
    write_folder(tmp_path / "split/test", {NFD: 3})
    assert described(tmp_path / "split").num_test == 3
    write_folder(tmp_path / "flat", {NFC: 5, NFD: 5})
    info = described(tmp_path / "flat")
    assert info == data.DataInfo(1, (NFC,), 8, 2, False)
    file = manifest(tmp_path, f"image,label\na.jpg,{NFC}\na.jpg,{NFD}\n")
    assert described(file).class_names == (NFC,)


def test_outputs_without_a_class_have_names_of_their_own(tmp_path):
    write_folder(tmp_path, {"2": 2, "3": 2})
    names = described(tmp_path, num_classes=4).class_names
    assert names == ("2", "3", "unused 2", "unused 3")


# What follows is only listed: the images may be empty.


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def sets(root, *splits, classes=("cat", "dog")):
    """One image per class and split, two in the first split."""
    for split in splits:
        touch(root, *(f"{split}/{c}/1.jpg" for c in classes))
    return touch(root, *(f"{splits[0]}/{c}/2.jpg" for c in classes))


CAT_DOG = data.DataInfo(2, ("cat", "dog"), 4, 2, False)
SPLITS = {
    "capitals": ("Train", "Test"),
    "other words": ("Training", "Testing"),
    "a prefix": ("imagenet_train", "imagenet_val"),
    "a suffix": ("train2017", "val2017"),
    "a short prefix": ("x_train", "x_validation"),
    "a set": ("trainset", "testset"),
    "wrapped": ("photos/photos/train", "photos/photos/test"),
    "each wrapped": ("seg_train/seg_train", "seg_test/seg_test"),
    "rubbish beside": ("train", "test", "__MACOSX/train", ".cache/x"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_found_however_they_are_spelled(tmp_path, case):
    assert described(sets(tmp_path, *SPLITS[case])) == CAT_DOG


def test_classes_may_look_a_little_like_splits(tmp_path):
    names = ("contest", "test tube", "train station")
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in names for i in range(2)))
    assert described(tmp_path).class_names == names
    touch(tmp_path, "__MACOSX/contest/._0.jpg", "__pycache__/x.pyc", ".cache/x.jpg")
    assert described(tmp_path).class_names == names
    views = [f"{c}/{view}/1.jpg" for c in "abc" for view in ("back", "front")]
    touch(tmp_path / "views", *views)
    assert described(tmp_path / "views").class_names == ("a", "b", "c")


def test_splits_that_cannot_be_told_apart_are_refused(tmp_path):
    sets(tmp_path, "one", "two", classes=("cat", "cow", "dog"))
    with pytest.raises(UserError, match=r"\['one', 'two'\] .*train_split and --config"):
        described(tmp_path)
    info = described(tmp_path, train_split="one", test_split="two")
    assert (info.num_train, info.num_test) == (6, 3)
    assert described(tmp_path / "one", test_share=0.5).num_train == 3


def test_a_test_set_that_is_not_sorted_by_class(tmp_path, caplog):
    """As small copies of ImageNet come: train/CLASS/images/, and a table for val/."""
    touch(tmp_path, *(f"train/n{i}/images/n{i}_{j}.JPEG" for i in "123" for j in "01"))
    touch(
        tmp_path, *(f"val/images/val_{i}.JPEG" for i in range(4)), "test/images/x.JPEG"
    )
    rows = "".join(f"val_{i}.JPEG n{1 + i % 3}\n" for i in range(4))
    (tmp_path / "val/val_annotations.txt").write_text(rows)
    match = r"has the class 'images'.*test_split to a list .*val/val_annotations.txt"
    with pytest.raises(UserError, match=match):
        described(tmp_path)
    info = described(tmp_path, test_split="val/val_annotations.txt")
    assert (info.num_train, info.num_test) == (6, 4)
    assert described(tmp_path, test_split="").num_test == 3
    # With tabs, it is a list without a doubt.
    (tmp_path / "val/val_annotations.txt").write_text(rows.replace(" ", "\t"))
    assert described(tmp_path).num_test == 4
    (tmp_path / "val/val_annotations.txt").unlink()
    touch(tmp_path, "valid/n1/1.jpg", "valid/n2/1.jpg")
    assert described(tmp_path).num_test == 2
    assert "test is left out" in caplog.text


def test_an_error_names_the_folder_to_point_at(tmp_path):
    sets(tmp_path / "set", "train", "val")
    touch(tmp_path, "test/1.jpg")
    with pytest.raises(
        UserError, match=rf"set --config.data.path={tmp_path / 'set'}, "
    ):
        described(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "cat/a/1.jpg", "cat/b/2.jpg", "dog/3.jpg", "dog/4.jpg")
    scandir = os.scandir

    def closed(folder):
        if str(folder).endswith("cat/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"cannot read the folder .*cat/b: Permission"):
        described(tmp_path)


def test_what_is_no_file_is_left_out(tmp_path):
    touch(tmp_path, *(f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(2)))
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    (tmp_path / "cat/also").symlink_to(tmp_path / "cat")
    (tmp_path / "cat/inside").mkdir()
    (tmp_path / "cat/twice").symlink_to(tmp_path / "cat/inside")
    touch(tmp_path, "cat/inside/1.jpg")
    assert described(tmp_path, test_share=1.0).num_test == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.heic", "holds no images, only 1 .heic: convert"),
        ("", "holds no images: remove it"),
    ],
)
def test_a_class_without_images(tmp_path, name, message):
    touch(tmp_path, "dog/1.jpg", "cat/.hidden", *([f"cat/{name}"] if name else []))
    with pytest.raises(UserError, match=rf"cat {message}"):
        described(tmp_path)


def test_classes_are_not_compared_each_with_each(tmp_path, monkeypatch):
    """Of 20,000 that would take a minute. A dict finds a name by its hash."""
    compared = []

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    touch(tmp_path, *(f"train/{i}/1.jpg" for i in range(100)))
    touch(tmp_path, *(f"test/{i}/1.jpg" for i in range(100)))
    monkeypatch.setattr(folders, "nfc", Name)
    assert described(tmp_path).num_test == 100
    assert len(compared) < 10 * 100


def test_drawings_among_photographs_are_mentioned(tmp_path, caplog):
    touch(tmp_path, *(f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(2)))
    described(tmp_path)
    assert "photographs" not in caplog.text
    touch(tmp_path, "cat/placeholder.gif")
    described(tmp_path)
    assert "1 .gif among 5 images count as photographs" in caplog.text


# ---------------------------------------------------------------------- lists, tables


def test_labels_and_images_of_several_words(tmp_path):
    sets(tmp_path, "train", classes=("bear", "polar bear"))
    touch(tmp_path, "val/a.jpg", "val/my a.jpg", "val/odd/b.jpg")
    lines = "a.jpg polar bear", "my a.jpg bear", "b.jpg\tpolar bear\t7", "odd/b.jpg 0"
    (tmp_path / "val.txt").write_text("\n".join(lines))
    cfg = DataConfig(source="folder", path=str(tmp_path), test_split="val.txt")
    test = folders.load(cfg).test
    assert test.labels is not None
    assert test.labels.first(np.arange(4)).tolist() == [1, 0, 1, 0]
    (tmp_path / "val.txt").write_text("a.jpg brown bear")
    with pytest.raises(UserError, match=r"line 1: unknown class 'brown bear': did you"):
        described(tmp_path, test_split="val.txt")
    (tmp_path / "val.txt").write_text("gone.jpg bear")
    with pytest.raises(
        UserError, match=r"line 1: 'gone.jpg bear' is not .* one of its"
    ):
        described(tmp_path, test_split="val.txt")


def test_numbers_are_one_class_however_they_are_written(tmp_path):
    rows = [{"image": "a.jpg", "label": v} for v in (0, 1, 1.0, "1", "1.0", "-1")]
    file = manifest(tmp_path, "\n".join(map(json.dumps, rows)), "m.jsonl")
    assert described(file, test_share=0.5).class_names == ("0", "1")


SUSPICIOUS = {
    "numbered from 1": (
        "image,label\na.jpg,1\na.jpg,2\n",
        "1 of 3 classes have no image, the first is 0: are the classes numbered from 0",
    ),
    "two labels": ("image,label\na.jpg,x\na.jpg,y\n", r"1 images are listed again"),
    "in both splits": (
        "image,label,split\na.jpg,x,train\na.jpg,x,test\n",
        r"\['x'\] train .*line 2\) and as \['x'\] test .*line 3",
    ),
    "commas": ('image,labels\na.jpg,"cat,dog"\n', r'"\|"'),
}


@pytest.mark.parametrize("case", SUSPICIOUS)
def test_labels_that_are_hardly_meant_are_mentioned(tmp_path, case, caplog):
    rows, message = SUSPICIOUS[case]
    described(manifest(tmp_path, rows), test_share=1.0)
    assert re.search(message, caplog.text)


# ------------------------------------------------------------------------- bad files

ROWS = "image,label\na.jpg,x\na.jpg,é\n"
BAD_MANIFESTS = {
    "list": (
        "m.jsonl",
        '{"image": "a.jpg", "label": 1}\n[1]\n',
        r"line 2: \[1\] is not an object",
    ),
    "null": ("m.jsonl", "null\n", r"line 1: null is not an object"),
    "latin-1": ("m.csv", ROWS.encode("latin-1"), r"line 3: the byte 0xe9 is not UTF-8"),
    "utf-16": ("m.csv", ROWS.encode("utf-16"), r"line 1: the byte 0xff is not UTF-8"),
    "long cell": ("m.csv", ROWS + "a" * 200_000, r"line 4: field larger than"),
    "one huge label": (
        "m.csv",
        "image,label\na.jpg,0\na.jpg,60000000\n",
        r"line 3: label 60000000 asks for 60000001 classes, with 2 images",
    ),
    "comma": (
        "m.csv",
        "image,label\na.jpg,x\na.jpg,weird,cat\n",
        r"line 3 has 3 fields, but the header has 2.*comma into quotes",
    ),
    "a field too few": ("m.csv", "image,label\na.jpg\n", r"line 2 has 1 fields"),
    "open quote": (
        "m.csv",
        'image,label\na.jpg,"x\na.jpg,y\na.jpg,y\n',
        r"line 2: .*is a quote left open",
    ),
    "blank split": (
        "m.csv",
        "image,label,split\na.jpg,x,train\na.jpg,x,\n",
        r"line 3: the split is empty, but other rows have \['train'\]",
    ),
    "two spellings of a split": (
        "m.csv",
        "image,label,split\na.jpg,x,train\na.jpg,x,Train \n",
        r"line 2: the splits 'Train' and 'train' differ only in capitals",
    ),
    "fraction": (
        "m.jsonl",
        '{"image": "a.jpg", "label": 1.5}',
        r"line 1: the label '1.5'",
    ),
    "bool": (
        "m.jsonl",
        '{"image": "a.jpg", "label": true}',
        r"line 1: the label True is",
    ),
    "object": (
        "m.jsonl",
        '{"image": "a.jpg", "label": {}}',
        r"line 1: the label {} is",
    ),
    "NaN": ("m.jsonl", '{"image": "a.jpg", "label": NaN}', r"line 1: the label 'nan'"),
    "no label": (
        "m.jsonl",
        '{"image": "a.jpg", "label": null}',
        r"line 1: .* is empty",
    ),
    "half a character": (
        "m.jsonl",
        '{"image": "a.jpg", "label": "\\ud800"}',
        r"line 1: the label .* is not a name",
    ),
    "image of a number": (
        "m.jsonl",
        '{"image": 3, "label": 1}',
        r"line 1 has the columns",
    ),
    "deep": ("m.jsonl", "[" * 100_000, r"line 1: not JSON"),
    "labels in an object": (
        "m.jsonl",
        '{"image": "a.jpg", "labels": {"x": 1}}',
        r"line 1: the label {'x': 1} is neither",
    ),
    "many digits": ("m.jsonl", "1" * 5000, r"line 1: not JSON"),
}
# Those whose message does not begin with a line.
BAD_TABLES = {
    "all ignored": ("image,label\na.jpg,-1\n", r"names no class: its labels are \[\]"),
    "no header": (
        "a.jpg,dog\n",
        r"has the columns \['a.jpg', 'dog'\]: is the header line missing\? It needs",
    ),
    "semicolons": (
        "image;label\na.jpg;x\n",
        r"has .*separated by ';' instead of a comma",
    ),
    "a column twice": (
        "image,label,Label\na.jpg,x,y\n",
        r"has .*each may come only once",
    ),
    "a folder": ("image,label\n.,x\n", r"lists 1 files that are folders"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_what_a_table_may_not_be(tmp_path, case):
    content, message = BAD_TABLES[case]
    with pytest.raises(UserError, match=rf"m.csv {message}"):
        described(manifest(tmp_path, content))


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_what_a_manifest_may_not_hold(tmp_path, case):
    name, content, message = BAD_MANIFESTS[case]
    with pytest.raises(UserError, match=rf"{name}, {message}"):
        described(manifest(tmp_path, content, name))


def test_a_text_file_in_another_encoding(tmp_path):
    write_folder(tmp_path, {"cat": 2}, ("train", "val"))
    (tmp_path / "val.txt").write_bytes(b"000.jpg cat\n000.jpg caf\xe9\n")
    with pytest.raises(UserError, match=r"val.txt, line 2: the byte 0xe9 is not UTF-8"):
        described(tmp_path, test_split="val.txt")
    (tmp_path / "val.txt").write_bytes(b"\xef\xbb\xbfcat/000.jpg cat\n")
    assert described(tmp_path, test_split="val.txt").num_test == 1


def test_a_file_name_that_is_not_utf8(tmp_path):
    write_folder(tmp_path, {"cat": 2, "dog": 2})
    odd = os.fsencode(tmp_path) + b"/cat/caf\xe9.jpg"
    try:
        os.link(tmp_path / "cat/000.jpg", odd)
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(UserError, match=r"caf\\xe9.jpg' is not UTF-8: rename"):
        described(tmp_path)


def test_what_records_cannot_be_written_from_or_to(tmp_path):
    source, file = write_folder(tmp_path / "in", {"a": 3, "b": 3}), tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"cannot make the folder .*file"):
        write_records.write(str(source), str(file))
    with pytest.raises(UserError, match=r"--workers is -1: it must be at least 0"):
        write_records.write(str(source), str(tmp_path / "out"), workers=-1)
    for photo in source.rglob("*.jpg"):
        photo.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"none of the \d images .* can be decoded"):
        write_records.write(str(source), str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_set_that_is_all_test_set(tmp_path):
    """What is only evaluated on need not have a folder test/: every image counts."""
    write_folder(tmp_path, {"a": 3, "b": 4})
    cfg = DataConfig(source="folder", path=str(tmp_path), image_size=8, test_share=1.0)
    info = data.describe(cfg)
    assert (info.num_train, info.num_test) == (0, 7)
    batches = list(data.eval_batches(cfg, batch=4))
    assert sum(b["mask"].sum() for b in batches) == 7
    with pytest.raises(UserError, match=r"no training examples.*data\.test_share"):
        data.train_batches(cfg, batch=2, seed=0)


def test_validation_has_several_spellings(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2}, ("train", "val"))
    cfg = DataConfig(source="folder", path=str(tmp_path), test_split="validation")
    assert data.describe(cfg).num_test == 4
