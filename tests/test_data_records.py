# SPDX-License-Identifier: Apache-2.0
"""Writing records, reading them back, and everything that can be wrong with them."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import threading
from concurrent.futures import wait

import data_files
import numpy as np
import pytest
from data_files import encoded, picture, take, write_folder
from PIL import Image
from tiny import TINY

from vit_jax import data, train
from vit_jax.config import DataConfig, replace
from vit_jax.data import (
    records,
    sequential,
    shard_writer,
    shards,
    sources,
    storage,
    write_records,
)
from vit_jax.errors import UserError
from vit_jax.workdir import read_metrics

FORMATS = ("tfrecord", "array_record")


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory):
    """12 images with 0 to 3 of the labels sky, sea, tree."""
    root = tmp_path_factory.mktemp("manifest")
    names, lines = ("sea", "sky", "tree"), []
    for i in range(12):
        (root / f"{i}.jpg").write_bytes(encoded(picture(i)))
        labels = [n for bit, n in enumerate(names) if i >> bit & 1]
        split = "train" if i < 8 else "test"
        lines.append(
            json.dumps({"image": f"{i}.jpg", "labels": labels, "split": split})
        )
    (root / "set.jsonl").write_text("\n".join(lines))
    return str(root / "set.jsonl")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{format: folder} of 10 + 10 photos of two classes, in two shards each."""
    photos = write_folder(
        tmp_path_factory.mktemp("photos"), {"a": 6, "b": 4}, ("train", "test")
    )
    found = {"photos": str(photos)}
    for format in FORMATS:
        found[format] = str(tmp_path_factory.mktemp(format))
        write_records.write(str(photos), found[format], format=format, shards=2)
    return found


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def config(path, **changes):
    return DataConfig(
        source="records", path=str(path), image_size=8, cache_gib=0.0, **changes
    )


@pytest.mark.parametrize("format", FORMATS)
def test_index_says_what_was_written(written, format):
    with open(f"{written[format]}/train.json") as stream:
        index = json.load(stream)
    assert index["class_names"] == ["a", "b"]
    assert index["class_counts"] == [6, 4]
    assert [s["examples"] for s in index["shards"]] == [5, 5]
    assert data.describe(config(written[format])) == data.DataInfo(
        2, ("a", "b"), 10, 10, False
    )
    balanced = config(written[format], subset=4.0)
    labels = next(data.train_batches(balanced, batch=4, seed=0))["label"]
    assert sorted(labels) == [0, 0, 1, 1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_any_number_of_labels(multilabel, tmp_path, format, cache):
    write_records.write(multilabel, str(tmp_path), format=format, shards=3)
    cfg = dataclasses.replace(config(tmp_path), cache_gib=cache)
    assert data.describe(cfg) == data.DataInfo(3, ("sea", "sky", "tree"), 8, 4, True)
    labels = np.concatenate(
        [b["label"] for b in take(data.train_batches(cfg, batch=4, seed=0), 2)]
    )
    assert labels.dtype == np.float32
    everything = {tuple(float(i >> bit & 1) for bit in range(3)) for i in range(8)}
    assert {tuple(row) for row in labels} == everything


@pytest.mark.heavy
def test_training_on_any_number_of_labels(multilabel, tmp_path):
    """The sigmoid loss of eight images learned by heart, one without a label, one with
    all."""
    records, run = str(tmp_path / "records"), str(tmp_path / "run")
    write_records.write(multilabel, records)
    cfg = replace(
        TINY,
        data=dataclasses.replace(
            config(records), image_size=16, train_transforms=({"op": "resize"},)
        ),
        loss="sigmoid",
        batch=8,
        steps=100,
        eval__every=100,
        checkpoint__every=0,
        optim__learning_rate=1e-2,
        optim__weight_decay=0.0,
    )
    train.train(cfg, run)
    lines = read_metrics(run)
    losses = [m["train/loss"] for m in lines if "train/loss" in m]
    # Three fair labels cost 3 ln 2 = 2.08 until the images are told apart.
    assert losses[0] == pytest.approx(3 * math.log(2), abs=0.3)
    assert losses[-1] < math.log(2)
    final = [m for m in lines if "test/loss" in m][-1]
    assert final["test/count"] == 3  # of 4, one has no label: no answer would be right
    assert math.isfinite(final["test/loss"])


def test_an_interrupted_writer_goes_on_where_it_was(written, tmp_path):
    copy = copy_of(written["tfrecord"], tmp_path)
    kept = copy / "train-00000-of-00002.tfrecord"
    lost = copy / "train-00001-of-00002.tfrecord"
    before = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    (copy / "train.json").unlink()
    write_records.write(written["photos"], str(copy), shards=2)
    assert (kept.stat().st_mtime_ns, lost.read_bytes()) == before
    # Other labels make other shards, though the names are the same.
    other = write_folder(tmp_path / "other", {"a": 5, "b": 5}, ("train", "test"))
    write_records.write(str(other), str(copy), shards=2)
    assert kept.stat().st_mtime_ns != before[0]


@pytest.mark.parametrize("format", FORMATS)
def test_shards_of_two_runs_are_never_read_together(tmp_path, format, monkeypatch):
    """The classes change places, and the second run is killed after its first shard."""
    photos = write_folder(tmp_path / "photos", {"cat": 4, "dog": 4}, ("train", "test"))
    dest = tmp_path / "records"

    def write():
        write_records.write(
            str(photos), str(dest), format=format, shards=2, workers=1, split="train"
        )

    write()
    before = (dest / "train.json").read_text()
    (photos / "train/cat").rename(photos / "train/wildcat")
    (photos / "test/cat").rename(photos / "test/wildcat")
    real, begun = shard_writer._write_shard, []

    def killed(*args):
        begun.append(args)
        if len(begun) > 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(shard_writer, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        write()
    with pytest.raises(UserError, match="has no index"):
        data.describe(config(dest))
    # Not even with an index from elsewhere, which fits in every size.
    (dest / "train.json").write_text(before)
    for access in ("random", "sequential"):
        cfg = config(dest, access=access, test_split="train")
        with pytest.raises(UserError, match=r"is not the (shard|one) that"):
            list(data.eval_batches(cfg, batch=8))
    monkeypatch.undo()
    write()
    cfg = config(dest, test_split="train")
    assert data.describe(cfg).class_names == ("dog", "wildcat")


def test_replaced_images_are_written_again_and_old_shards_removed(tmp_path):
    photos = write_folder(tmp_path / "photos", {"a": 4, "b": 4}, ("train",))
    dest = tmp_path / "records"
    write_records.write(str(photos), str(dest), split="train", shards=3)
    (dest / "train-00001-of-00007.tfrecord.tmp").write_bytes(b"of a killed run")
    (dest / "mine.tfrecord").write_bytes(b"of somebody else")
    for file in photos.rglob("*.jpg"):
        file.write_bytes(encoded(Image.new("RGB", (20, 20), (250, 0, 0))))
    for count in (3, 2):
        write_records.write(str(photos), str(dest), split="train", shards=count)
        cfg = config(dest, test_split="train")
        image = next(data.eval_batches(cfg, batch=4))["image"]
        assert image[..., 0].min() > 200
        assert image[..., 1:].max() < 50
    of_two = [f"train-{i:05d}-of-00002.tfrecord" for i in range(2)]
    kept = {"mine.tfrecord", "train.json", *of_two, *(f + ".npz" for f in of_two)}
    assert {p.name for p in dest.iterdir()} == kept


def test_records_can_be_written_from_records(written, tmp_path, monkeypatch):
    """As from a tfds set that is too large for memory: its records hold the labels."""
    source = records.load(config(written["tfrecord"]))
    monkeypatch.setattr(write_records.sources, "load", lambda cfg: source)
    index = write_records.write("tfds:large", str(tmp_path), split="train")["train"]
    assert index["class_counts"] == [6, 4]
    images = [
        sorted(image.tobytes() for image in b["image"])
        for path in (written["tfrecord"], tmp_path)
        for b in data.eval_batches(config(path, test_split="train"), batch=10)
    ]
    assert images[0] == images[1]


def test_images_that_cannot_be_decoded_are_listed_and_left_out(tmp_path, capsys):
    """The second writing finds the shards finished, and lists them all the same."""
    photos = write_folder(tmp_path / "photos", {"a": 6, "b": 4}, ("train", "test"))
    good = encoded(picture(0))
    bad = {"cut": good[:-200], "html": b"<html>403</html>" * 9, "empty": b""}
    for name, content in bad.items():
        (photos / f"train/a/{name}.jpg").write_bytes(content)
    (photos / "train/b/gone.jpg").symlink_to("/nowhere/gone.jpg")
    dest = tmp_path / "records"
    for _ in range(2):
        index = write_records.write(
            str(photos), str(dest), split="train", shards=3, progress=True
        )["train"]
        left_out = {b["image"].split("/")[-1]: b["reason"] for b in index["left_out"]}
        assert set(left_out) == {"cut.jpg", "html.jpg", "empty.jpg", "gone.jpg"}
        assert "No such file" in left_out["gone.jpg"]
        assert index["examples"] == 10
        assert index["class_counts"] == [6, 4]
        cfg = config(dest, test_split="train", max_bad=0.0)
        assert sum(b["mask"].sum() for b in data.eval_batches(cfg, batch=5)) == 10
    shown = capsys.readouterr().err
    assert "14/14" in shown  # images, not shards
    assert "images/s" in shown


def test_a_shard_is_not_waited_for_to_show_progress(written, tmp_path, monkeypatch):
    """The last image of the only shard is not written before the bar has moved."""
    moved, made = threading.Event(), itertools.count(1)

    class Bar(shard_writer.tqdm):
        def update(self, n=1):
            super().update(n)
            if 0 < self.n < self.total:
                moved.set()

    def record(*args, real=shard_writer._record):
        assert next(made) < 10 or moved.wait(30), "nothing was shown"
        return real(*args)

    often = lambda left, timeout, return_when: wait(left, 0.01, return_when)
    monkeypatch.setattr(shard_writer, "wait", often)
    monkeypatch.setattr(shard_writer, "tqdm", Bar)
    monkeypatch.setattr(shard_writer, "_record", record)
    write_records.write(
        written["photos"], str(tmp_path), split="train", shards=1, progress=True
    )


class Patient:
    """Stands for a mounted file system: records how many reads are under way."""

    def __init__(self, kv):
        self.kv, self.begun, self.most = kv, 0, 0

    def read(self, name, byte_range):
        self.begun += 1
        self.most = max(self.most, self.begun)
        return Answer(self, self.kv.read(name, byte_range=byte_range))


class Answer:
    def __init__(self, patient, reading):
        self.patient, self.reading = patient, reading

    def result(self):
        self.patient.begun -= 1
        return self.reading.result()


@pytest.mark.parametrize("format", FORMATS)
def test_once_a_disk_is_slow_a_batch_is_asked_for_together(
    format, written, tmp_path, monkeypatch
):
    """A local one is read without other threads; on a slow one a batch waits for one
    read, however long that takes."""
    folder = copy_of(written[format], tmp_path)
    split = sources.load(config(folder)).train
    before = split.read(np.arange(10))
    store = storage._store(str(folder))
    assert store.at_once
    monkeypatch.setattr(storage, "_LATE", -1.0)  # every read is late
    split.read(np.arange(10))
    assert not store.at_once
    split.read(np.arange(10))  # the first ones are timed
    store.kv = Patient(store.kv)
    after = split.read(np.arange(10))
    assert after[0] == before[0]
    assert store.kv.most == (10 if format == "tfrecord" else 0)


def test_shards_without_an_index_are_scanned_once(tmp_path, monkeypatch):
    write_tfrecord(tmp_path / "train.tfrecord", [[0], [1], [0], [1]])
    write_tfrecord(tmp_path / "test.tfrecord", [[0]])
    real, scanned = records.scan, []

    def counted(file):
        scanned.append(file)
        return real(file)

    monkeypatch.setattr(records, "scan", counted)
    monkeypatch.setattr(shards, "scan", counted)
    take(data.train_batches(config(tmp_path, num_classes=2), batch=4, seed=0), 2)
    assert len(scanned) == len(set(scanned)) == 2


def test_shards_sorted_by_class_are_pointed_out(tmp_path, caplog):
    write_tfrecord(tmp_path / "train.tfrecord", [[0]] * 20 + [[1]] * 20)
    write_tfrecord(tmp_path / "test.tfrecord", [[0]])
    for buffer, said in ((10, True), (0, False)):
        caplog.clear()
        cfg = config(
            tmp_path, num_classes=2, access="sequential", shuffle_buffer=buffer
        )
        next(data.train_batches(cfg, batch=4, seed=0))
        assert ("all have the same label" in caplog.text) == said


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_while_writing(written, tmp_path, format):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    for i in range(2):
        file = tmp_path / f"train-{i:05d}-of-00002.{format}.tmp"
        file.symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"failed after \d of 2 shards.*run the same command"
    ):
        write_records.write(
            written["photos"], str(tmp_path), split="train", format=format, shards=2
        )
    assert not list(tmp_path.glob("*.json"))
    for file in tmp_path.glob("*.tmp"):  # of a shard that was not begun
        file.unlink()
    write_records.write(
        written["photos"], str(tmp_path), split="train", format=format, shards=2
    )
    assert data.describe(config(tmp_path)).num_train == 8


def test_command(written, tmp_path, command):
    done = command(written["photos"], tmp_path, module="vit_jax.data.write_records")
    assert done.returncode == 0
    assert "train: 10 examples of 2 classes in 1 tfrecord shards" in done.stdout
    assert data.describe(config(tmp_path)).num_train == 10


def change_index(folder, **changes):
    file = folder / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(folder):
    file = folder / "train-00001-of-00002.tfrecord"
    file.write_bytes(file.read_bytes()[:-7])


def exchange(folder):
    """A shard of the right size that is not the one that was indexed."""
    file = folder / "train-00001-of-00002.tfrecord"
    content = file.read_bytes()
    file.write_bytes(b"\1" + content[1:])


SIDECAR = "train-00001-of-00002.tfrecord.npz"

WRONG = {
    "cut short": (cut, r"is cut short: it has \d+ bytes"),
    "shard missing": (
        lambda f: (f / "train-00001-of-00002.tfrecord").unlink(),
        "does not exist",
    ),
    "index says more": (
        lambda f: change_index(f, examples=11),
        r"contradicts itself: its shards hold 10 examples, but it says 11",
    ),
    "duplicate classes": (
        lambda f: change_index(f, class_names=["a", "A"]),
        "two classes of the same name",
    ),
    "no index at all": (
        lambda f: [p.unlink() for p in f.glob("*.json")],
        r"set config.data.num_classes",
    ),
    "broken index": (lambda f: (f / "train.json").write_text("{}"), "is not an index"),
    "binary index": (
        lambda f: (f / "train.json").write_bytes(b"\xff\xfe\0"),
        "is not an index",
    ),
    "unknown format": (
        lambda f: change_index(f, format="foo"),
        "is not an index.*format 'foo'",
    ),
    "sidecar cut short": (
        lambda f: (f / SIDECAR).write_bytes((f / SIDECAR).read_bytes()[:50]),
        rf"{SIDECAR} cannot be read",
    ),
    "other contents": (exchange, r"does not match its index at record 0"),
    "test set of other classes": (
        lambda f: change_index(f, class_names=["x", "y"]),
        "different class names",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_index_that_disagrees_with_its_shards(case, written, tmp_path):
    change, message = WRONG[case]
    copy = copy_of(written["tfrecord"], tmp_path)
    change(copy)
    with pytest.raises(UserError, match=message):
        take(data.train_batches(config(copy), batch=5, seed=0), 4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("access", ["random", "sequential"])
@pytest.mark.parametrize("sidecars", [True, False])
def test_counts_that_disagree_with_the_shards(
    format, access, sidecars, written, tmp_path
):
    copy = copy_of(written[format], tmp_path)
    with open(copy / "train.json") as stream:
        shards = json.load(stream)["shards"]
    shards[0]["examples"] -= 1
    shards[1]["examples"] += 1
    change_index(copy, shards=shards)
    for file in [] if sidecars else copy.glob("*.npz"):
        file.unlink()
    cfg = config(copy, access=access, test_split="train")
    with pytest.raises(UserError, match=r"holds (5|more than the 4) records"):
        list(data.eval_batches(cfg, batch=10))


@pytest.mark.parametrize("format", ["tfrecord", "array_record"])
def test_a_record_with_a_flipped_bit_is_a_bad_example(format, written, tmp_path):
    copy = copy_of(written[format], tmp_path)
    file = copy / f"train-00000-of-00002.{format}"
    content = bytearray(file.read_bytes())
    content[300] ^= 1  # in the first record
    file.write_bytes(content)
    for access in ("random", "sequential"):
        cfg = config(copy, access=access, max_bad=0.1, test_split="train")
        assert sum(b["mask"].sum() for b in data.eval_batches(cfg, batch=10)) == 9
    reasons = [r for name, r in data.bad_examples().items() if str(file) in name]
    assert reasons == ["the record is damaged"]


@pytest.mark.parametrize("choice", [{"subset": 4.0}, {"holdout": 0.2}])
def test_classes_that_are_not_known_are_not_taken_for_known(choice, written, tmp_path):
    copy = copy_of(written["tfrecord"], tmp_path)
    (copy / SIDECAR).unlink()
    with pytest.raises(UserError, match=rf"{SIDECAR}.* is missing.*subset_balanced"):
        data.describe(config(copy, **choice))
    # Where nothing depends on them, they are not needed.
    assert data.describe(config(copy)).num_train == 10
    at_random = config(copy, subset=4.0, subset_balanced=False)
    assert data.describe(at_random).num_train == 4
    for file in copy.glob("*.npz"):
        file.unlink()
    if "subset" in choice:
        with pytest.raises(UserError, match=r"config.data.subset_balanced=False"):
            data.describe(config(copy, **choice))
    else:
        assert data.describe(config(copy, **choice)).num_test == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"is cut short: record 4 ends beyond"),
        (WRONG["shard missing"][0], r"holds 1 shards .*, but .* say that there are 2"),
    ],
)
def test_shards_that_are_wrong_without_an_index(change, message, written, tmp_path):
    copy = copy_of(written["tfrecord"], tmp_path)
    change(copy)
    for file in [*copy.glob("*.json"), *copy.glob("*.npz")]:
        file.unlink()
    with pytest.raises(UserError, match=message):
        data.describe(config(copy, num_classes=2))


@pytest.mark.parametrize("name", ["train.json", SIDECAR, SIDECAR[: -len(".npz")]])
def test_what_cannot_be_opened_is_named(name, written, tmp_path):
    """A folder in its place fails as a file does that one may not read."""
    copy = copy_of(written["tfrecord"], tmp_path)
    if name.endswith(".tfrecord"):  # where no index says how long it is
        for file in [*copy.glob("*.json"), *copy.glob("*.npz")]:
            file.unlink()
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} cannot be read: Is a directory"):
        next(data.train_batches(config(copy, num_classes=2), batch=10, seed=0))


def test_a_folder_that_cannot_be_listed_is_named(written, monkeypatch):
    def closed(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", closed)
    with pytest.raises(UserError, match=r"tfrecord.* cannot be read: Permission"):
        data.describe(config(written["tfrecord"], holdout=0.1))


def write_tfrecord(file, labels):
    return data_files.write_tfrecord(
        file, [(encoded(picture(i)), found) for i, found in enumerate(labels)]
    )


def test_records_that_somebody_else_wrote(tmp_path):
    write_tfrecord(tmp_path / "train-0-of-2.tfrecord", [[0], [1], [2]])
    write_tfrecord(tmp_path / "train-1-of-2.tfrecord", [[1], [1]])
    write_tfrecord(tmp_path / "val.tfrecord", [[2]])
    cfg = config(tmp_path, num_classes=3)
    assert data.describe(cfg) == data.DataInfo(3, ("0", "1", "2"), 5, 1, False)
    labels = next(data.train_batches(cfg, batch=5, seed=0))["label"]
    assert sorted(labels) == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("cache", [0.0, 1.0])
@pytest.mark.parametrize("labels", [[3], [-2], [0, 1]])
def test_a_record_with_an_impossible_label_is_not_used(tmp_path, labels, cache):
    write_tfrecord(tmp_path / "train.tfrecord", [[0], [1], [2], labels])
    write_tfrecord(tmp_path / "test.tfrecord", [[0]])
    cfg = dataclasses.replace(
        config(tmp_path, num_classes=3, max_bad=0.5), cache_gib=cache
    )
    for batch in take(data.train_batches(cfg, batch=4, seed=0), 3):
        assert set(batch["label"]) <= {0, 1, 2}
    reasons = [r for n, r in data.bad_examples().items() if str(tmp_path) in n]
    assert len(reasons) == 1
    assert "label" in reasons[0]
    strict = dataclasses.replace(cfg, max_bad=0.0)
    with pytest.raises(UserError, match=r"more than the share config\.data\.max_bad"):
        take(data.train_batches(strict, batch=4, seed=0), 3)


@pytest.mark.parametrize(("buffer", "streams"), [(1, 1), (0, 2)])
def test_bad_records_in_sequence_are_replaced(tmp_path, buffer, streams, monkeypatch):
    """By others of their window or, if that holds none, of their stream; the same ones
    whichever are known to be bad."""
    monkeypatch.setattr(sequential, "STREAM_RECORDS", 16 // streams)
    labels = [[9] if i % 8 in (1, 2, 5) else [i % 2] for i in range(16)]
    write_tfrecord(tmp_path / "train.tfrecord", labels)
    write_tfrecord(tmp_path / "test.tfrecord", [[0], [9], [1]])
    cfg = config(
        tmp_path,
        num_classes=2,
        max_bad=0.5,
        access="sequential",
        shuffle_buffer=buffer,
    )
    whole = take(data.train_batches(cfg, batch=4, seed=0), 4)
    assert all(set(b["label"]) <= {0, 1} for b in whole)
    late = next(data.train_batches(cfg, batch=4, seed=0, start=3))
    np.testing.assert_array_equal(late["image"], whole[3]["image"])
    if streams > 1:
        half = data.train_batches(
            cfg, batch=4, seed=0, process_index=1, process_count=2
        )
        for b, expected in zip(half, whole[:2], strict=False):
            np.testing.assert_array_equal(b["image"], expected["image"][2:])
    tested = list(data.eval_batches(cfg, batch=2))
    assert sum(b["mask"].sum() for b in tested) == 2


def test_a_stream_of_nothing_but_bad_records_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(sequential, "STREAM_RECORDS", 1)
    write_tfrecord(tmp_path / "train.tfrecord", [[9], [9], [0], [1]])
    write_tfrecord(tmp_path / "test.tfrecord", [[0]])
    cfg = config(tmp_path, num_classes=2, max_bad=0.9, access="sequential")
    with pytest.raises(UserError, match=r"none of the records from .*record 0 to"):
        take(data.train_batches(cfg, batch=2, seed=0), 4)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "config.data.path is empty"),
        ("nowhere", "is not a folder"),
        (".", "holds no .tfrecord"),
    ],
)
def test_a_folder_without_records(path, message, tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=message):
        data.describe(config(tmp_path / path if path else ""))


def test_unknown_format(written, tmp_path):
    with pytest.raises(UserError, match="unknown --format 'csv'"):
        write_records.write(written["photos"], str(tmp_path), format="csv")


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        (
            "photos",
            "nope",
            r"the split 'nope' is asked for, but .* has \['test', 'train'\]",
        ),
        (
            "synthetic:",
            "",
            "'synthetic' are made while .*: there are none to read",
        ),
    ],
)
def test_what_cannot_be_written(written, tmp_path, source, split, message):
    with pytest.raises(UserError, match=message):
        write_records.write(written.get(source, source), str(tmp_path), split=split)


@pytest.mark.heavy
def test_cifar_and_mnist_as_folders_and_as_records(shared, tmp_path):
    """A sample of both sets, as they come and rewritten: the same labels per epoch."""
    import tarfile

    for archive in ("cifar10-jpeg.tar.xz", "mnist-png.tar.xz"):
        root = tmp_path / archive.split("-")[0]
        if not (shared / "data" / archive).exists():
            pytest.skip(f"needs {archive}")
        taken = {}
        with tarfile.open(shared / "data" / archive, "r|xz") as tar:
            for member in tar:
                parts = member.name.strip("./").split("/")
                if not member.isfile() or len(parts) != 3:
                    continue
                folder = tuple(parts[:2])
                taken[folder] = taken.get(folder, 0) + 1
                if taken[folder] <= 3:
                    file = root.joinpath(*parts)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(tar.extractfile(member).read())
                elif len(taken) == 20 and min(taken.values()) >= 3:
                    break
        folder_cfg = DataConfig(source="folder", path=str(root), image_size=8)
        write_records.write(str(root), str(tmp_path / "records"), shards=2)
        size = data.describe(folder_cfg).num_train
        multisets = [
            sorted(next(data.train_batches(c, batch=size, seed=0))["label"])
            for c in (folder_cfg, config(tmp_path / "records"))
        ]
        assert multisets[0] == multisets[1]
        shutil.rmtree(tmp_path / "records")
