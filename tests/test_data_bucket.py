# SPDX-License-Identifier: Apache-2.0
"""Shards in a bucket: requests, memory and order at any size, and the disk cache."""

import dataclasses
import errno
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bucket import BATCH, HOSTS, LABELS, ROOT, Bucket, serve
from data_files import take, write_folder, write_parquets, write_tars

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import (
    disk_cache,
    order,
    records,
    sequential,
    shards,
    sources,
    storage,
)
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

RECORDS, SHARDS, SIZE = 2_000, 3, 1_000
PIECE = 64_000  # as large beside the shards as the real one is


@pytest.fixture(scope="module")
def server():
    here, there = Pipe()
    size = (RECORDS, SHARDS, SIZE)
    threading.Thread(target=serve, args=(there, size, 0.0, 1e12), daemon=True).start()
    url = f"http://127.0.0.1:{here.recv()}"
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = url
    yield Bucket(url)
    del os.environ["TENSORSTORE_GCS_HTTP_URL"]


@pytest.fixture
def bucket(server, monkeypatch):
    """With nothing kept on disk and pieces of a few records."""
    monkeypatch.setattr(storage, "_disks", {})
    for module in (storage, disk_cache):
        monkeypatch.setattr(module, "PIECE", PIECE)
    monkeypatch.setattr(disk_cache, "_RECORD", 4_000)
    server.set()
    return server


def config(**changes):
    return DataConfig(
        source="records", path=ROOT, image_size=8, cache_gib=0.0, **changes
    )


def label_of(numbers):
    """What the bucket makes up for records of these numbers."""
    starts = np.arange(SHARDS + 1) * RECORDS // SHARDS
    shard = np.searchsorted(starts, numbers, side="right") - 1
    return (numbers - starts[shard]) % LABELS


def labels(found):
    return np.array([label[0] for label in found])


def test_a_bucket_is_read_in_sequence_in_large_pieces(bucket):
    dataset = records.load(config())
    reader = dataset.train.sequence(np.arange(64), 64, 0)
    bucket.set()
    steps = [reader.draw(step, {}) for step in range(RECORDS // 64)]
    index = np.concatenate([rows.index for rows in steps])
    assert len(set(index.tolist())) == len(index)  # of one pass
    for rows in steps:
        np.testing.assert_array_equal(labels(rows.labels), label_of(rows.index))
    seen = bucket.set()
    assert seen["requests"] < len(index) / 10
    assert sum(b["mask"].sum() for b in data.eval_batches(config(), batch=64)) == (
        RECORDS // SHARDS
    )


@pytest.mark.parametrize("kept", [shards.KEPT, 1])
def test_random_reads_of_a_bucket_are_exact(bucket, monkeypatch, kept):
    """With all offsets in memory, and where there are too many of them."""
    monkeypatch.setattr(shards, "KEPT", kept)
    split = records.load(config(access="random")).train
    first = np.array([0, 665, 666, 1_333, RECORDS - 1])
    split.read(first)  # whatever is read once per shard
    bucket.set()
    index = order.train_indices(np.arange(100), RECORDS, 0)
    images, found = split.read(index)
    np.testing.assert_array_equal(labels(found), label_of(index))
    assert all(image.startswith(b"\xff\xd8") for image in images)
    seen = bucket.set()
    assert seen["requests"] == (200 if kept == 1 else 100)
    assert seen["bytes"] <= 100 * (SIZE + 16)


def test_resuming_late_reads_no_more_than_beginning(bucket):
    counts = []
    for step in (0, 1_000_000):
        reader = records.load(config()).train.sequence(np.arange(16), 16, 0)
        bucket.set()
        rows = reader.draw(step, {})
        reader._pool.shutdown()
        counts.append(bucket.set()["bytes"])
        np.testing.assert_array_equal(labels(rows.labels), label_of(rows.index))
    assert counts[1] < 1.5 * counts[0]


def test_a_bucket_is_read_in_sequence_unless_told_otherwise(bucket):
    assert data.describe(config()).in_sequence
    assert not data.describe(config(access="random")).in_sequence


def test_sharing_out_a_set_with_too_many_records_to_choose_among(bucket, monkeypatch):
    monkeypatch.setattr(shards, "_CHOSEN", RECORDS - 1)
    with pytest.raises(UserError, match=r"holds 2,000 records, and up to 1,999 can be"):
        data.describe(config(holdout=0.1))


def test_the_order_of_three_billion_records_is_a_permutation():
    """Without making it: no two of a million positions meet, of any epoch."""
    size = 3_000_000_000
    for begin in (0, size - 500_000, 10**6 * BATCH):
        found = order.train_indices(np.arange(begin, begin + 200_000), size, 0)
        assert found.min() >= 0
        assert found.max() < size
        one_epoch = begin // size == (begin + 200_000) // size
        assert not one_epoch or len(np.unique(found)) == len(found)


@pytest.mark.parametrize("buffer", [2_048, 0, 65_536])  # 0: 16 batches
def test_the_share_of_neighbours_that_meet_is_as_computed(buffer, tmp_path):
    size, batch = 65_536, 1_024
    files = shards.Shards((str(tmp_path / "x"),), (size,), "tfrecord")
    read = lambda file, begin, stop: iter(range(begin, stop))
    files.in_order = read  # ty: ignore
    reader = sequential.TrainReader(
        files, lambda r: (r, np.zeros(1, np.int32)), buffer, np.arange(batch), batch, 0
    )
    index = np.concatenate([reader.draw(i, {}).index for i in range(size // batch)])
    of = np.empty(size, int)
    of[index] = np.repeat(np.arange(size // batch), batch)
    measured = (of[1:] == of[:-1]).mean()
    shuffle = sequential.Shuffle.of(size, batch, buffer)
    assert measured == pytest.approx(shuffle.neighbours, rel=0.15)
    assert shuffle.uniform == pytest.approx(1 / 64, rel=0.01)
    assert buffer or shuffle.neighbours == pytest.approx(1 / 16, rel=0.1)
    if buffer == size:  # every stream is shuffled as a whole
        assert shuffle.neighbours == pytest.approx(shuffle.uniform, rel=0.1)


def test_as_many_reads_go_out_as_arrive_while_one_takes(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert storage.at_a_time(0.005) == 20  # 4,000 a second, each under way for 5 ms
    assert storage.at_a_time(0.05) == 200
    assert storage.at_a_time(1e-5) == 4
    assert storage.at_a_time(9.0) == 512


# ------------------------------------------------------------------------ disk cache


def cached(folder, **changes):
    return config(disk_cache=str(folder), **({"disk_cache_gib": 1.0} | changes))


def whole_pass(cfg):
    """Everything once, in sequence; what is to be stored has been."""
    reader = records.load(cfg).train.sequence(np.arange(64), 64, 0)
    for step in range(RECORDS // 64):
        rows = reader.draw(step, {})
        np.testing.assert_array_equal(labels(rows.labels), label_of(rows.index))
    reader._pool.shutdown()
    for disk in storage._disks.values():
        disk.close()


def new_process(monkeypatch):
    monkeypatch.setattr(storage, "_disks", {})


@pytest.mark.parametrize("access", ["random", "sequential"])
def test_what_was_read_comes_from_the_disk(bucket, tmp_path, monkeypatch, access):
    for _ in range(2):  # some are passed over while many are being stored
        whole_pass(cached(tmp_path))
    new_process(monkeypatch)
    bucket.set()
    if access == "sequential":
        whole_pass(cached(tmp_path))
    else:
        split = records.load(cached(tmp_path, access="random")).train
        index = order.train_indices(np.arange(200), RECORDS, 0)
        np.testing.assert_array_equal(labels(split.read(index)[1]), label_of(index))
    assert bucket.set()["bytes"] < 200_000  # index, sidecars, versions; not 2 MB


def test_random_reads_fill_the_disk_in_the_background(bucket, tmp_path):
    split = records.load(cached(tmp_path, access="random")).train
    for start in range(0, RECORDS, 100):
        index = order.train_indices(np.arange(start, start + 100), RECORDS, 0)
        np.testing.assert_array_equal(labels(split.read(index)[1]), label_of(index))
    storage._disks[ROOT].close()
    assert len(list(tmp_path.rglob("*.tfrecord-*"))) > 0.8 * RECORDS * SIZE / PIECE


def test_pieces_that_are_damaged_or_replaced_are_read_again(
    bucket, tmp_path, monkeypatch
):
    whole_pass(cached(tmp_path))
    for i, file in enumerate(sorted(tmp_path.rglob("*.tfrecord-*"))):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes([content, content[:-9], b"", content[:5]][i % 4])
    left = next(tmp_path.rglob("*.tfrecord-*")).parent / "x-1-2.77.tmp"
    left.write_bytes(b"of a process that was killed")
    os.utime(left, (0, 0))
    new_process(monkeypatch)
    whole_pass(cached(tmp_path))  # compares every label, and records have checksums
    assert not left.exists()


def test_records_that_the_disk_spoils_later_are_read_again(bucket, tmp_path):
    for _ in range(2):
        whole_pass(cached(tmp_path))
    for file in tmp_path.rglob("*.tfrecord-*"):
        content = bytearray(file.read_bytes())
        content[300::500] = bytes(len(content[300::500]))
        file.write_bytes(content)
    whole_pass(cached(tmp_path))


@pytest.mark.heavy
def test_the_cache_keeps_to_its_size_and_removes_what_other_sets_left(
    bucket, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(disk_cache, "_LEAST", 0)
    limit = 10 * PIECE
    other = tmp_path / "0123456789abcdef"
    other.mkdir()
    for i in range(5):
        (other / f"train-0-of-1-cafe-{i}").write_bytes(bytes(PIECE))
    (tmp_path / "size").write_text("wrong")
    cfg = cached(tmp_path, disk_cache_gib=limit / 2**30)
    for _ in range(2):
        whole_pass(cfg)
    used = sum(f.stat().st_size for f in tmp_path.rglob("*-*-*"))
    assert 0.8 * limit < used <= limit
    assert not list(other.iterdir())
    assert int((tmp_path / "size").read_text()) == used
    assert caplog.text.count("is full: what does not fit in config.data.disk_cache_gib")


def test_processes_share_a_cache(bucket, tmp_path, monkeypatch):
    """As many caches of one folder as processes would have, at the same time."""
    monkeypatch.setattr(disk_cache, "_LEAST", 0)
    limit = 12 * PIECE
    caches = [disk_cache.DiskCache(str(tmp_path), limit / 2**30) for _ in range(4)]
    folder, name = ROOT, f"train-00001-of-{SHARDS:05d}.tfrecord"
    read = storage._store(folder).read
    expected = read(name, slice(0, 600_000)).result().value

    def use(cache):
        for start in range(0, 600_000, 50_000):
            found = cache.read(read, folder, name, start, start + 50_000)
            assert found.result().value == expected[start : start + 50_000]
        cache.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, caches))
    files = [f for f in tmp_path.rglob("*-*-*")]
    assert not [f for f in files if f.suffix == ".tmp"]
    assert sum(f.stat().st_size for f in files) <= limit


def not_a_folder(path, monkeypatch):
    path.write_text("")


def read_only(path, monkeypatch):
    """A file system that refuses, which a mode does not to the superuser."""

    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)


def full(path, monkeypatch):
    def refuse(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_a_folder, "File exists"),
        (read_only, "Read-only file system"),
        (full, "No space left on device"),
    ],
)
def test_a_disk_that_cannot_be_written_to_costs_one_line(
    bucket, tmp_path, monkeypatch, caplog, spoil, message
):
    folder = tmp_path / "cache"
    spoil(folder, monkeypatch)
    with caplog.at_level(logging.WARNING):
        whole_pass(cached(folder))
    lines = [r.message for r in caplog.records if "disk_cache" in r.message]
    assert len(lines) == 1
    assert (
        f"config.data.disk_cache {folder} cannot be written to ({message})" in lines[0]
    )


def test_a_cache_that_holds_nothing_is_refused(bucket, tmp_path):
    with pytest.raises(
        UserError, match=r"config.data.disk_cache_gib is 0.0001: it must"
    ):
        data.describe(cached(tmp_path, disk_cache_gib=0.0001))


# ------------------------------------------------------------------- tar and Parquet


class InMemory:
    """A folder of tensorflow's file system in memory, in place of a bucket's."""

    ahead, at_once = 2, False
    sent = 0

    def __init__(self, folder):
        self.folder = folder

    def read(self, name, byte_range):
        found = Future()
        with tf.io.gfile.GFile(f"{self.folder}/{name}", "rb") as stream:
            content = stream.read()
        if (byte_range.stop or 0) > len(content):
            found.set_exception(ValueError("OUT_OF_RANGE"))
            return found
        InMemory.sent += len(content[byte_range])
        stamp = SimpleNamespace(generation=b"1")
        found.set_result(SimpleNamespace(value=content[byte_range], stamp=stamp))
        return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """{source: folder} of 20 + 20 photographs, which also lie in ram://SOURCE."""
    pytest.importorskip("pyarrow")
    root = tmp_path_factory.mktemp("photos")
    write_folder(root / "in", {"a": 12, "b": 8}, ("train", "test"))
    found = {}
    for source, write in (("tar", write_tars), ("parquet", write_parquets)):
        found[source] = write(root / "in", root / source)
        for file in found[source].rglob("*.*"):
            remote = f"ram://{source}/{file.relative_to(found[source])}"
            tf.io.gfile.makedirs(os.path.dirname(remote))
            with tf.io.gfile.GFile(remote, "wb") as stream:
                stream.write(file.read_bytes())
    return found


def drawn(cfg):
    """All images and labels of the training set: at random, or of a pass in sequence."""
    split = sources.load(cfg).train
    if split.sequence is None:
        return [(i, int(*y)) for i, y in zip(*split.read(np.arange(20)), strict=True)]
    sequence = split.sequence(np.arange(20), 20, 0)
    rows = sequence.draw(0, {})
    sequence._pool.shutdown()  # what is read ahead belongs to this pass
    return [(i, int(*y)) for i, y in zip(rows.images, rows.labels, strict=True)]


@pytest.mark.parametrize("access", ["random", "sequential"])
@pytest.mark.parametrize("source", ["tar", "parquet"])
def test_tar_and_parquet_through_the_disk_cache(
    source, access, photos, tmp_path, monkeypatch
):
    for module in (storage, disk_cache):
        monkeypatch.setattr(module, "PIECE", 2_000)
    monkeypatch.setattr(disk_cache, "_RECORD", 1_000)
    monkeypatch.setattr(disk_cache, "_STORING", 10_000)
    monkeypatch.setattr(storage, "_store", InMemory)
    options = {"source": source, "access": access, "image_size": 8, "cache_gib": 0.0}
    expected = drawn(DataConfig(path=str(photos[source]), **options))
    cfg = DataConfig(path=f"ram://{source}", disk_cache=str(tmp_path), **options)
    sent = []
    for _ in range(2):
        new_process(monkeypatch)
        InMemory.sent = 0
        assert drawn(cfg) == expected
        sent.append(InMemory.sent)
        for disk in storage._disks.values():
            disk.close()
    size = sum(f.stat().st_size for f in photos[source].rglob("train*.*"))
    assert sent[0] > size / 2
    assert sent[1] < sent[0] / 10  # versions, and the last pieces of files
    with pytest.raises(UserError, match=r"disk_cache_gib is 1e-06: it must be at"):
        sources.load(dataclasses.replace(cfg, disk_cache_gib=1e-6))


def test_batches_are_the_same_from_a_bucket_and_from_a_disk(bucket, tmp_path):
    plain = take(data.train_batches(config(), batch=32, seed=1), 3)
    for cfg in (cached(tmp_path), cached(tmp_path)):
        for a, b in zip(plain, data.train_batches(cfg, batch=32, seed=1), strict=False):
            np.testing.assert_array_equal(a["image"], b["image"])
            np.testing.assert_array_equal(a["label"], b["label"])
    assert BATCH % HOSTS == 0
