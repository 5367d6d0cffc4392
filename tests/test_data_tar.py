# SPDX-License-Identifier: Apache-2.0
"""Tar files read in place: WebDataset's shards and ImageNet's archives, and what can be
wrong with them."""

import io
import logging
import os
import tarfile

import numpy as np
import pytest
from data_files import encoded, picture, write_tar

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import sources, storage, tar, tar_index
from vit_jax.errors import UserError

IMAGES = [encoded(picture(i)) for i in range(8)]


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache"


def config(path, **changes):
    defaults = {
        "source": "tar",
        "image_size": 8,
        "cache_gib": 0.0,
        "test_split": "train",
    }
    return DataConfig(path=str(path), **defaults | changes)


def pairs(path, **changes):
    """(image, name of the class) of every example of the test split."""
    dataset = sources.load(config(path, **changes))
    images, labels = dataset.test.read(np.arange(len(dataset.test)))
    names = {-1: "", **dict(enumerate(dataset.class_names))}
    return [(im, names[int(*lb)]) for im, lb in zip(images, labels, strict=True)]


def test_images_meet_the_labels_of_their_keys(tmp_path):
    """Endings in capitals, keys with dots, folders, every kind of label, members that lie
    apart, keys that come again in another file, long names, and what is neither."""
    long = "deep/" * 40 + "x" * 120
    write_tar(
        tmp_path / "train-000.tar",
        {
            "./A.JPG": IMAGES[0], "./A.CLS": b"cat\n",
            "v1.2.jpeg": IMAGES[1], "v1.2.txt": b"\xef\xbb\xbfdog ",
            "v1.3.jpeg": IMAGES[2], "v1.3.json": b'{"label": "cat", "caption": "x"}',
            "n01/b.png": IMAGES[3], "n02/b.webp": IMAGES[4],
            "n02/b.cls": b"fox", "n01/b.cls": b"dog", "n01/b.txt": b"a caption",
            "._A.jpg": b"of a Mac", "notes.md": b"# hello",
        },
        format=tarfile.GNU_FORMAT,
    )  # fmt: skip
    with tarfile.open(tmp_path / "train-000.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("folder/"))  # an old archive's directory
    for i, format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        members = {
            f"{long}é.jpg": IMAGES[5],
            f"{long}é.cls": b"fox",
            "A.jpg": IMAGES[6],
            "A.json": b'{"cls": "dog"}',
            "nothing.jpg": IMAGES[7],
            "nothing.cls": b"-1",
        }
        write_tar(tmp_path / f"train-00{i + 1}.tar", members, format=format)
    write_tar(tmp_path / "train-003.tar", {})
    classes = ["cat", "dog", "cat", "dog", "fox"] + ["fox", "dog", ""] * 2
    assert pairs(tmp_path) == [*zip([*IMAGES, *IMAGES[5:]], classes, strict=True)]
    split = sources.load(config(tmp_path)).test
    assert split.name_of(0) == f"{tmp_path}/train-000.tar, A.JPG"
    assert split.name_of(5) == f"{tmp_path}/train-001.tar, {long}é.jpg"


def test_what_is_no_label_matters_only_where_no_other_counts(tmp_path):
    """Captions may be empty or anything, and so may be the text of no image."""
    members = {"README.txt": b"\xe9", "a.jpg": IMAGES[0], "a.cls": b"0"}
    members |= {"a.json": b"[1]", "a.txt": b""}
    assert pairs(write_tar(tmp_path / "x.tar", members)) == [(IMAGES[0], "0")]


def test_members_out_of_order_are_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    members = {"a.jpg": IMAGES[0], "b.jpg": IMAGES[1], "a.cls": b"0", "b.cls": b"1"}
    assert pairs(write_tar(tmp_path / "x.tar", members)) == [
        (IMAGES[0], "0"),
        (IMAGES[1], "1"),
    ]
    assert "the members of 2 keys, the first is 'a', do not lie together" in caplog.text


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])
    return file


def add(file, name, **attributes):
    with tarfile.open(file, "a") as archive:
        about = tarfile.TarInfo(name)
        for key, value in attributes.items():
            setattr(about, key, value)
        archive.addfile(about)
    return file


GOOD = {"a.jpg": IMAGES[0], "a.cls": b"0", "b.jpg": IMAGES[1], "b.cls": b"1"}


def of(changes):
    return lambda p: write_tar(p / "x.tar", GOOD | changes)


def packed(name, mode):
    def make(folder):
        content = write_tar(folder / "plain", GOOD).read_bytes()
        os.remove(folder / "plain")
        with tarfile.open(folder / name, f"w:{mode}") as archive:
            about = tarfile.TarInfo("a.jpg")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
        return folder

    return make


WRONG = {
    "no label": (of({"c.jpg": IMAGES[2]}), r"x.tar: 1 of 3 images have no label, .* 'c.jpg'"),
    "json without label": (
        of({"c.jpg": IMAGES[2], "c.json": b'{"caption": "x"}'}),
        r"1 of 3 images have no label",
    ),
    "list of labels": (of({"a.cls": b"", "a.json": b'{"label": [1]}'}), "label is empty"),
    "two labels": (
        of({"c.jpg": IMAGES[2], "c.json": b'{"label": [1, 2]}'}),
        r"c.json: the label \[1, 2\] is neither",
    ),
    "broken json": (of({"c.jpg": IMAGES[2], "c.json": b"{"}), r"c.json cannot be read"),
    "bytes for a label": (of({"b.cls": b"\xff"}), r"b.cls cannot be read"),
    "endless label": (of({"b.cls": b"x" * 2**21}), r"2,097,152 bytes is too long"),
    "two images": (of({"a.png": IMAGES[2]}), r"'a.jpg' and 'a.png', of the same key"),
    "negative": (of({"b.cls": b"-3"}), r"b.jpg: label -3 is out of range"),
    "half a member": (lambda p: cut(of({})(p), 900), r"x.tar is cut short: 'a.jpg' ends"),
    "no end": (
        lambda p: cut(write_tar(p / "x.tar", {"a.cls": b"1"}), 1024),
        r"is cut short after 1,024 bytes",
    ),
    "nothing": (lambda p: cut(of({})(p), 0), r"is cut short after 0 bytes"),
    "noise": (
        lambda p: (p / "x.tar").write_bytes(b"noise " * 999) and p,
        r"x.tar is not a tar file",
    ),
    "empty": (lambda p: write_tar(p / "x.tar", {}), r"hold no images"),
    "link": (
        lambda p: add(of({})(p), "c.jpg", type=tarfile.SYMTYPE, linkname="a.jpg"),
        r"'c.jpg' is a link",
    ),
    "gzip": (packed("x.tar.gz", "gz"), r"x.tar.gz is compressed.*gunzip"),
    "bzip2 by another name": (packed("x.tar", "bz2"), r"x.tar is compressed"),
    "no tar": (
        lambda p: (p / "a.zip").write_bytes(b"") or p,
        r"has no .tar files, but \['a.zip'\]",
    ),
    "missing": (lambda p: p / "nowhere", "does not exist"),
    "one of three": (
        lambda p: write_tar(p / "x-00000-of-00003.tar", GOOD).parent,
        r"holds 1 shards .* there are 3",
    ),
    "two classes of one name": (of({"a.cls": b"Cat", "b.cls": b"cat"}), "same name"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_tar_may_not_be(case, tmp_path):
    make, message = WRONG[case]
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=message) as found:
        data.describe(config(make(tmp_path / "data")))
    assert "\n" not in str(found.value)


def test_damage_anywhere_is_refused_or_named(tmp_path):
    """Not a traceback, and no label moves to another image."""
    whole = write_tar(tmp_path / "x.tar", GOOD).read_bytes()
    random = np.random.default_rng(0)
    size = whole.rindex(b"1\0") + 600
    right = {IMAGES[0]: "0", IMAGES[1]: "1"}
    ends = set()
    for i in range(300):
        content = bytearray(whole)
        if i % 2:
            content = content[: random.integers(size)]
        else:
            content[random.integers(size)] ^= 1 << random.integers(8)
        (tmp_path / "x.tar").write_bytes(content)
        try:
            found = pairs(tmp_path / "x.tar")
        except UserError:
            ends.add("refused")
            continue
        ends.add("read")
        for image, name in found:
            # A label's own bit, which no checksum covers, may be the one that changed.
            assert image not in right or name == right[image] or i % 2 == 0
    assert ends == {"read", "refused"}


def test_an_index_is_made_once_and_again_when_the_file_changes(
    tmp_path, monkeypatch, user_cache
):
    (tmp_path / "data").mkdir()
    file = write_tar(tmp_path / "data/x.tar", GOOD)
    walked = []
    real = tar_index.members
    monkeypatch.setattr(
        tar_index, "members", lambda *a: (walked.append(a[0]), real(*a))[1]
    )
    first = pairs(file)
    assert pairs(file) == first
    assert len(walked) == 1
    assert (tmp_path / "data/x.tar.npz").exists()
    (tmp_path / "data/x.tar.npz").write_bytes(b"cut short")
    assert pairs(file) == first
    write_tar(file, {"a.jpg": IMAGES[5], "a.cls": b"0"})
    os.utime(file, ns=(1, 1))
    assert pairs(file) == [(IMAGES[5], "0")]
    assert len(walked) == 3
    # Where the folder cannot be written, in the user's cache.
    (tmp_path / "data/x.tar.npz").unlink()
    (tmp_path / "data/x.tar.npz").mkdir()
    (tmp_path / "data/x.tar.npz/full").write_bytes(b"")
    assert pairs(file) == pairs(file)
    assert len(walked) == 4
    assert len([*user_cache.glob("tar/*.npz")]) == 1
    assert not [*tmp_path.glob("**/*.tmp")]


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "train.tar").symlink_to("/nowhere.tar")
    cfg = DataConfig(source="tar", path=str(tmp_path))
    with pytest.raises(UserError, match=r"train.tar cannot be read: .*No such file"):
        data.describe(cfg)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    file = write_tar(tmp_path / "x.tar", GOOD)
    images = tar.Tars([str(file)], tar_index.webdataset)
    cut(file, 1000)
    for read in (
        lambda: images.read(np.arange(2)),
        lambda: [*images.in_order(0, 0, 2)],
    ):
        with pytest.raises(
            UserError, match=r"a.jpg is cut short: the file has changed"
        ):
            read()


def test_any_range_is_read_in_order_in_pieces_of_any_size(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    content = [random.bytes(random.integers(5_000)) for _ in range(40)]
    members = {}
    for i, image in enumerate(content):  # with something else between them
        members |= {f"{i}.jpg": image, f"{i}.txt": b"x"}
        members |= {f"{i}.bin": random.bytes(random.integers(5_000))}
    file = write_tar(tmp_path / "x.tar", members)
    images = tar.Tars([str(file)], tar_index.webdataset)
    for size in (700, 3_000, 10**6):
        monkeypatch.setattr(storage, "PIECE", size)
        for begin, stop in ((0, 40), (5, 6), (7, 7), (23, 40)):
            found = [image for _, image in images.in_order(0, begin, stop)]
            assert found == content[begin:stop]


def test_splits_by_the_names_of_files_and_folders(tmp_path):
    names = {
        "imagenet1k-train-0000.tar": "0",
        "Validation/0000.tar": "1",
        "shards/testing.tar": "-1",
    }
    for name, label in names.items():
        members = {"a.jpg": IMAGES[0], "a.cls": label.encode()}
        write_tar(tmp_path / name, members | {"b.jpg": IMAGES[1], "b.cls": b"1"})
    for wanted, found in {
        "val": "1",
        "validation": "1",
        "train": "0",
        "testing": "",
    }.items():
        assert pairs(tmp_path, test_split=wanted)[0] == (IMAGES[0], found)
    with pytest.raises(UserError, match=r"test_split is 'tset', but .*'testing'"):
        data.describe(config(tmp_path, test_split="tset"))


def test_a_test_set_without_labels_is_passed_over(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write_tar(tmp_path / "train-0.tar", GOOD)
    write_tar(tmp_path / "test-0.tar", {"a.jpg": IMAGES[3], "a.cls": b"-1"})
    write_tar(tmp_path / "val-0.tar", {"a.jpg": IMAGES[4], "a.cls": b"1"})
    assert pairs(tmp_path, test_split="test") == [(IMAGES[4], "1")]
    assert "no image of the split 'test' has a label, left out" in caplog.text
    (tmp_path / "test-0.tar").rename(tmp_path / "testing-0.tar")
    with pytest.raises(UserError, match="test_split 'testing' has a label"):
        data.describe(config(tmp_path, test_split="testing"))


def test_a_part_needs_random_access(tmp_path):
    write_tar(tmp_path / "train-0.tar", GOOD)
    for changes in ({"subset": 1.0}, {"holdout": 0.5}, {"test_split": ""}):
        with pytest.raises(UserError, match=r"set config.data.access=random"):
            data.describe(config(tmp_path, access="sequential", **changes))


# ------------------------------------------------------------------------------ ImageNet


def devkit(file, wnids, truth):
    """As small as it can be: leaves, one inner node, and the classes of the validation
    images."""
    from scipy.io import savemat

    kinds = [
        ("ILSVRC2012_ID", "i4"),
        ("WNID", "O"),
        ("words", "O"),
        ("num_children", "i4"),
    ]
    rows = [(i + 1, w, f"name of {w}", 0) for i, w in enumerate(wnids)]
    mat = io.BytesIO()
    savemat(mat, {"synsets": np.array([*rows, (99, "n00000000", "all", 3)], kinds)})
    folder = "ILSVRC2012_devkit_t12/data"
    text = "".join(f"{i}\n" for i in truth).encode()
    with tarfile.open(file, "w:gz") as archive:
        for name, content in {
            "meta.mat": mat.getvalue(),
            "ILSVRC2012_validation_ground_truth.txt": text,
        }.items():
            about = tarfile.TarInfo(f"{folder}/{name}")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def test_imagenet_in_its_archives(tmp_path):
    """The numbers of the devkit are not those of the classes."""
    wnids = ["n03126707", "n02012849", "n01440764"]
    inner = {}
    for i, wnid in enumerate(wnids):
        members = {f"{wnid}_{j}.JPEG": IMAGES[2 * i + j] for j in range(2)}
        inner[f"{wnid}.tar"] = write_tar(tmp_path / "inner", members).read_bytes()
    (tmp_path / "inner").unlink()
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    members = {f"ILSVRC2012_val_0000000{i + 1}.JPEG": IMAGES[i] for i in (2, 0, 1)}
    write_tar(tmp_path / "ILSVRC2012_img_val.tar", members)
    with pytest.raises(UserError, match=r"devkit_t12.tar.gz is missing"):
        data.describe(config(tmp_path))
    devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", wnids, [1, 3, 3])
    names = [f"name of {w}" for w in wnids]
    expected = [*zip(IMAGES, np.repeat(names, 2).tolist(), strict=False)]
    assert pairs(tmp_path) == expected
    assert sources.load(config(tmp_path)).class_names == tuple(sorted(names))
    tested = pairs(tmp_path / "ILSVRC2012_img_train.tar", test_split="test")
    assert tested == [
        (IMAGES[2], names[2]),
        (IMAGES[0], names[0]),
        (IMAGES[1], names[2]),
    ]
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(UserError, match="is not ImageNet's devkit, or damaged"):
        data.describe(config(tmp_path))
