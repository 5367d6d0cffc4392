# SPDX-License-Identifier: Apache-2.0
"""Which folders are classes and which are splits, what is left out and what refused."""

import dataclasses
import os
import unicodedata

import numpy as np
import pytest
from data_files import encoded, picture, write_folder

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import write_records
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
    for name, folders in (("flat", r"'cat', 'dog'"), ("split", r"'train', 'val'")):
        with pytest.raises(UserError, match=rf"{knob} is 'tset', but .*\[{folders}"):
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


# ------------------------------------------------------------------------- bad files

ROWS = "image,label\na.jpg,x\na.jpg,é\n"
BAD_MANIFESTS = {
    "list": (
        "m.jsonl",
        '{"image": "a.jpg", "label": 1}\n[1]\n',
        r"line 2: \[1\] is no",
    ),
    "null": ("m.jsonl", "null\n", r"line 1: null is no object"),
    "latin-1": ("m.csv", ROWS.encode("latin-1"), r"line 3: the byte 0xe9 is not UTF-8"),
    "utf-16": ("m.csv", ROWS.encode("utf-16"), r"line 1: the byte 0xff is not UTF-8"),
    "long cell": ("m.csv", ROWS + "a" * 200_000, r"line 4: field larger than"),
    "one huge label": (
        "m.csv",
        "image,label\na.jpg,0\na.jpg,60000000\n",
        r"line 3: label 60000000 asks for 60000001 classes, with 2 images",
    ),
}


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
