# SPDX-License-Identifier: Apache-2.0
"""Exactness: resuming, other numbers of processes, and evaluation of every example."""

import collections
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    encoded,
    picture,
    take,
    write_folder,
    write_parquets,
    write_tars,
)
from PIL import Image

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import cache, graph, sequential, sources, write_records
from vit_jax.data.examples import Labels, listed
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

BATCH = 12


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    return write_folder(root, {"a": 20, "b": 17}, ("train", "test"))


@pytest.fixture(scope="module")
def configs(photos, tmp_path_factory):
    """The same 37 + 37 photos through every kind of source."""
    found = {
        "folder": DataConfig(
            source="folder", path=str(photos), image_size=16, cache_gib=0.0
        )
    }
    found["cached"] = dataclasses.replace(found["folder"], cache_gib=1.0)
    for format in ("tfrecord", "array_record"):
        dest = tmp_path_factory.mktemp(format)
        write_records.write(str(photos), str(dest), format=format, shards=3)
        found[format] = dataclasses.replace(
            found["folder"], source="records", path=str(dest)
        )
    tars = write_tars(photos, tmp_path_factory.mktemp("tar"))
    found["tar"] = dataclasses.replace(found["folder"], source="tar", path=str(tars))
    files = write_parquets(photos, tmp_path_factory.mktemp("parquet"))
    found["parquet"] = dataclasses.replace(
        found["folder"], source="parquet", path=str(files)
    )
    for kind in ("tfrecord", "tar", "parquet"):
        found[f"{kind} in sequence"] = dataclasses.replace(
            found[kind], access="sequential", shuffle_buffer=16
        )
    return found


AT_RANDOM = ("folder", "tfrecord", "array_record", "tar", "parquet")
IN_SEQUENCE = ("tfrecord in sequence", "tar in sequence", "parquet in sequence")
KINDS = (*AT_RANDOM, "cached", *IN_SEQUENCE)


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_and_other_process_counts_give_the_same_bits(
    kind, configs, monkeypatch
):
    monkeypatch.setattr(sequential, "STREAM_RECORDS", 9)  # as if there were more photos
    cfg = configs[kind]
    whole = take(data.train_batches(cfg, batch=BATCH, seed=7), 6)
    same(next(data.train_batches(cfg, batch=BATCH, seed=7, start=5)), whole[5])
    count = 4 if kind in IN_SEQUENCE else 2
    parts = [
        take(
            data.train_batches(
                cfg, batch=BATCH, seed=7, process_index=i, process_count=count
            ),
            4,
        )
        for i in range(count)
    ]
    for step in range(4):
        joined = {
            k: np.concatenate([p[step][k] for p in parts]) for k in ("image", "label")
        }
        same(joined, whole[step])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_sees_every_example_once(kind, configs):
    """37 examples, batch 16, two processes."""
    seen, batches = [], []
    for i in range(2):
        found = list(
            data.eval_batches(configs[kind], batch=16, process_index=i, process_count=2)
        )
        batches.append(len(found))
        for b in found:
            assert b["image"].shape == (8, 16, 16, 3)
            assert b["mask"].dtype == np.float32
            used = b["mask"] == 1
            assert not b["image"][~used].any()
            seen += [
                (hashlib.sha1(image.tobytes()).hexdigest(), int(label))
                for image, label in zip(b["image"][used], b["label"][used], strict=True)
            ]
    assert batches == [3, 3]
    assert len(seen) == len(set(seen)) == 37
    assert np.bincount([label for _, label in seen]).tolist() == [20, 17]


@pytest.mark.parametrize("kind", AT_RANDOM)
def test_an_epoch_holds_every_example_once(kind, configs):
    cfg = dataclasses.replace(configs[kind], train_transforms=({"op": "resize"},))
    batches = take(data.train_batches(cfg, batch=37, seed=0), 2)
    for b in batches:
        assert len({i.tobytes() for i in b["image"]}) == 37
        assert np.bincount(b["label"]).tolist() == [20, 17]
    assert (batches[0]["label"] != batches[1]["label"]).any()


@pytest.mark.parametrize("kind", IN_SEQUENCE)
def test_sequential_streams_pass_over_everything(kind, configs):
    """Every stream draws its range once per pass; so few records are one stream, whose
    epochs are exact."""
    cfg = dataclasses.replace(configs[kind], train_transforms=({"op": "resize"},))
    drawn = {}
    for b in take(data.train_batches(cfg, batch=BATCH, seed=0), 37):
        for image in b["image"]:
            drawn[image.tobytes()] = drawn.get(image.tobytes(), 0) + 1
    assert set(drawn.values()) == {BATCH}
    message = "which 3 processes cannot share: use a number .* that divides 1, or"
    with pytest.raises(UserError, match=message):
        data.train_batches(cfg, batch=12, seed=0, process_count=3)


def test_a_jpeg_damaged_in_the_middle_is_left_out_where_the_crop_shows_it(tmp_path):
    """Its crops above the damage are used, whichever were tried before."""
    rng = np.random.default_rng(0)

    def photo():
        return encoded(Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)))

    root = write_folder(tmp_path, {"a": 1, "b": 1}, ("train", "test"))
    bad = []
    for i in range(10):
        content = photo()
        if i < 5:  # as if another file began there
            middle = len(content) // 2
            content = content[:middle] + b"\xff\xd8" + content[middle + 2 :]
            bad.append(str(root / f"train/a/x{i}.jpg"))
        (root / f"train/a/x{i}.jpg").write_bytes(content)
    (root / "train/a/none.jpg").write_bytes(b"")
    cfg = DataConfig(
        source="folder", path=str(root), image_size=8, cache_gib=0.0, max_bad=0.9
    )
    whole = take(data.train_batches(cfg, batch=BATCH, seed=0), 8)
    found = {name for name in data.bad_examples() if str(root) in name}
    none = str(root / "train/a/none.jpg")
    assert none in found
    assert len(found) > 1
    assert found <= {*bad, none}
    late = take(data.train_batches(cfg, batch=BATCH, seed=0, start=5), 3)
    for b, expected in zip(late, whole[5:], strict=True):
        same(b, expected)
    half = data.train_batches(
        cfg, batch=BATCH, seed=0, process_index=1, process_count=2
    )
    for b, expected in zip(half, whole, strict=False):
        same(b, {k: v[BATCH // 2 :] for k, v in expected.items()})
    # The whole image cannot be made: in evaluation it is left out.
    tested = [*data.eval_batches(cfg, batch=4, split="train")]
    assert sum(b["mask"].sum() for b in tested) == 7


def test_all_kinds_give_the_same_label_multiset_per_epoch(configs):
    found = {}
    for kind in AT_RANDOM:
        batch = next(data.train_batches(configs[kind], batch=37, seed=0))
        found[kind] = sorted(batch["label"].tolist())
    assert len({tuple(v) for v in found.values()}) == 1


def test_batches_with_another_seed_differ(configs):
    a, b = (
        next(data.train_batches(configs["cached"], batch=BATCH, seed=s)) for s in (0, 1)
    )
    assert (a["image"] != b["image"]).any()


def test_floats_where_the_transforms_say_so(configs):
    ops = ({"op": "resize"}, {"op": "value_range"})
    cfg = dataclasses.replace(configs["cached"], eval_transforms=ops)
    image = next(data.eval_batches(cfg, batch=4))["image"]
    assert image.dtype == np.float32
    assert -1 <= image.min() < image.max() <= 1


def test_exact_decoding_is_close_to_fast(configs):
    fast = configs["folder"]
    exact = dataclasses.replace(fast, decode="exact")
    a, b = (
        next(data.train_batches(c, batch=BATCH, seed=0))["image"].astype(int)
        for c in (fast, exact)
    )
    assert 0 < np.abs(a - b).mean() < 4


WORKER = """
import hashlib, json, os, signal, sys
from vit_jax import data
from vit_jax.config import DataConfig
index = int(sys.argv[2])
for kind, fields in json.loads(sys.argv[1]).items():
    batches = data.train_batches(DataConfig(**fields), batch=12, seed=7,
                                 process_index=index, process_count=2)
    for step, b in zip(range(2), batches):
        for row, (image, label) in enumerate(zip(b["image"], b["label"])):
            name = hashlib.sha1(image.tobytes()).hexdigest()
            print(kind, step, index * 6 + row, name, label, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_real_processes_that_are_killed_and_come_back_in_another_number(configs):
    """Two processes make steps 0 and 1 and are killed; this one makes steps 2 and 3."""
    chosen = {kind: configs[kind] for kind in AT_RANDOM}
    fields = json.dumps({k: dataclasses.asdict(cfg) for k, cfg in chosen.items()})
    command = [sys.executable, "-c", WORKER, fields]
    jobs = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    lines = [line for job in jobs for line in job.communicate()[0].splitlines()]
    assert [job.returncode for job in jobs] == [-9, -9]

    def made(kind, start, steps):
        batches = data.train_batches(chosen[kind], batch=12, seed=7, start=start)
        return [
            f"{kind} {step} {row} {hashlib.sha1(image.tobytes()).hexdigest()} {label}"
            for step, b in enumerate(take(batches, steps), start)
            for row, (image, label) in enumerate(zip(b["image"], b["label"], strict=True))
        ]  # fmt: skip

    for kind in chosen:
        before = [line for line in lines if line.startswith(f"{kind} ")]
        assert sorted(before + made(kind, 2, 2)) == sorted(made(kind, 0, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_pass_traces_nothing(kind, configs, monkeypatch):
    """Nor do bad examples met in it: neither tf.functions nor tf.data pipelines."""
    cfg = configs[kind]
    list(data.eval_batches(cfg, batch=BATCH))
    whole = next(data.train_batches(cfg, batch=BATCH, seed=0))

    def traced(*args, **kwargs):
        raise AssertionError("something is traced again")

    monkeypatch.setattr(tf.Graph, "_create_op_internal", traced)
    assert sum(b["mask"].sum() for b in data.eval_batches(cfg, batch=BATCH)) == 37
    same(next(data.train_batches(cfg, batch=BATCH, seed=0)), whole)


def test_a_bad_example_costs_its_own_decoding(tmp_path, monkeypatch):
    """Only its group is made one by one; what is known to be bad is not tried again."""
    root = write_folder(tmp_path, {"a": 15, "b": 16}, ("train", "test"))
    (root / "train/a/bad.jpg").write_bytes(b"<html>403</html>" * 9)
    cfg = DataConfig(
        source="folder", path=str(root), image_size=8, cache_gib=0.0, max_bad=0.1
    )
    calls = collections.Counter()
    for name in ("group", "alone"):
        real = getattr(graph.Maker, name)

        def counted(self, *args, name=name, real=real):
            calls[name] += 1
            return real(self, *args)

        monkeypatch.setattr(graph.Maker, name, counted)
    stream = data.train_batches(cfg, batch=32, seed=0)
    take(stream, 6)
    # The group's eight, and what stands in for the bad one where it was not known yet, in
    # each of the at most three steps that had been begun when it was met; nothing later.
    found = calls["alone"]
    assert 9 <= found <= 27
    take(stream, 6)
    assert calls["alone"] == found
    assert calls["group"] >= 48


def test_every_thread_has_work_however_small_the_batch(monkeypatch):
    """Two groups for each of eight, though a step is one group."""
    monkeypatch.setattr(graph, "THREADS", 8)
    begun = threading.Semaphore(0)

    class Pool:
        def submit(self, function, *args):
            begun.release()
            return real.submit(function, *args)

    real = graph.POOL
    monkeypatch.setattr(graph, "POOL", Pool())
    cfg = DataConfig(source="digits", image_size=8)
    stream = data.train_batches(cfg, batch=4, seed=0)
    # Before the first batch is asked for.
    assert all(begun.acquire(timeout=30) for _ in range(2 * 8))
    take(stream, 1)


def test_new_files_in_deep_folders_are_seen(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos", {"a/b/c": 3, "d": 3})
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = DataConfig(source="folder", path="~/photos", image_size=8)
    assert data.describe(cfg).num_train + data.describe(cfg).num_test == 6
    (tmp_path / "photos/a/b/c/new.jpg").write_bytes(encoded(picture(99)))
    assert data.describe(cfg).num_train + data.describe(cfg).num_test == 7


def test_a_list_that_is_written_again_is_read_again(tmp_path):
    """Which changes no folder."""
    root = write_folder(tmp_path / "photos", {"a": 2, "b": 2}, ("train", "val"))
    cfg = DataConfig(source="folder", path=str(tmp_path), test_split="val.txt")
    for count in (1, 2):
        lines = [f"00{i}.jpg b\n" for i in range(count)]
        (root / "val.txt").write_text("".join(lines))
        os.utime(root / "val.txt", (count, count))  # clocks of file systems are coarse
        assert data.describe(cfg).num_test == count


def test_a_listing_is_not_made_again_while_nothing_changes(photos, monkeypatch):
    cfg = DataConfig(source="folder", path=str(photos), image_size=8)
    first = data.describe(cfg)
    monkeypatch.setattr(sources, "load", lambda cfg: pytest.fail("listed again"))
    assert data.describe(dataclasses.replace(cfg, max_bad=0.5)) == first


def split_of_photos(folder, sizes):
    """One image per (height, width), in one colour each."""
    files = []
    for i, (height, width) in enumerate(sizes):
        image = Image.new("RGB", (width, height), (i % 256, 7, 99))
        files.append(str(folder / f"{i}.png"))
        image.save(files[-1])
    return listed("path", files, Labels.single(np.arange(len(files))), str)


def test_decoded_splits_stay_within_the_limit(tmp_path):
    """What is held is allocated once, in the size of the images and not a byte more."""
    sizes = [(20 + i % 7, 30) for i in range(60)]
    split = split_of_photos(tmp_path, sizes)
    total = sum(h * w * 3 for h, w in sizes)
    found = cache.cached(split, total + 1000, training=True)
    assert found.size == found.pixels.nbytes == total
    assert found.pixels.base is None  # owns its memory
    images, labels = found.fetch(np.array([3, 59]))
    assert [i.shape for i in images] == [(23, 30, 3), (23, 30, 3)]
    assert (images[1] == [59, 7, 99]).all()
    assert [list(x) for x in labels] == [[3], [59]]
    assert cache.cached(split, total + 1000, training=True) is found


def test_what_does_not_fit_is_not_held(tmp_path):
    """Found out by the real sizes, though most images and their mean are small."""
    sizes = [(10, 10)] * 200
    sizes[1] = (400, 400)  # which the sample of 32 passes over
    split = split_of_photos(tmp_path, sizes)
    assert cache.cached(split, 300_000, training=True) is None
    assert cache.cached(split, 600_000, training=True) is not None


def test_the_limit_holds_for_all_splits_together(tmp_path):
    """An evaluation is not held beside training where both are too much, and what is no
    longer read makes room for what is."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a, b = (split_of_photos(tmp_path / d, [(10, 10)] * 10) for d in "ab")

    class Reader:
        pass

    reader = Reader()
    held = cache.cached(a, 4000, training=True)
    held.users.add(reader)
    assert cache.cached(b, 4000, training=False) is None
    assert cache.cached(b, 6000, training=False) is not None
    del reader
    c = split_of_photos(tmp_path, [(10, 10)] * 10)
    cache.cached(c, 6000, training=False)
    assert a not in cache._kept
    assert {b, c} <= set(cache._kept)


@pytest.mark.process
def test_tensorflow_says_nothing_of_its_own(tmp_path):
    """At import, which leaves Keras out, and of damaged images, after jax has set its own
    level of logging."""
    root = write_folder(tmp_path, {"a": 6, "b": 6}, ("train", "test"))
    (root / "train/a/bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    code = (
        "import jax; from vit_jax import data; from vit_jax.config import DataConfig;"
        "cfg = DataConfig(source='folder', path='.', image_size=8, cache_gib=0.0);"
        "next(data.train_batches(cfg, batch=13, seed=0));"
        "import os, sys; assert 'keras' not in sys.modules;"
        "assert 'TF_USE_LEGACY_KERAS' not in os.environ"
    )
    names = ("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS")
    clean = {k: v for k, v in os.environ.items() if k not in names}
    clean["PYTHONPATH"] = str(Path(data.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=clean,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith("skipped the unreadable example")
