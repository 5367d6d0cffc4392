# SPDX-License-Identifier: Apache-2.0
"""Exactness: resuming, other numbers of processes, and evaluation of every example."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from data_files import encoded, take, write_folder
from PIL import Image

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import sequential, write_records
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
    found["sequential"] = dataclasses.replace(
        found["tfrecord"], access="sequential", shuffle_buffer=16
    )
    return found


KINDS = ("folder", "cached", "tfrecord", "array_record", "sequential")


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
    count = 4 if kind == "sequential" else 2
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


@pytest.mark.parametrize("kind", ["folder", "tfrecord", "array_record"])
def test_an_epoch_holds_every_example_once(kind, configs):
    cfg = dataclasses.replace(configs[kind], train_transforms=({"op": "resize"},))
    batches = take(data.train_batches(cfg, batch=37, seed=0), 2)
    for b in batches:
        assert len({i.tobytes() for i in b["image"]}) == 37
        assert np.bincount(b["label"]).tolist() == [20, 17]
    assert (batches[0]["label"] != batches[1]["label"]).any()


def test_sequential_streams_pass_over_everything(configs):
    """Every stream draws its range once per pass; so few records are one stream, whose
    epochs are exact."""
    cfg = dataclasses.replace(
        configs["sequential"], train_transforms=({"op": "resize"},)
    )
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
    for kind in ("folder", "tfrecord", "array_record"):
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
import hashlib, sys
from vit_jax import data
from vit_jax.config import DataConfig
path, index, count, start, steps = sys.argv[1], *map(int, sys.argv[2:6])
cfg = DataConfig(source="folder", path=path, image_size=16, cache_gib=0.0)
batches = data.train_batches(cfg, batch=12, seed=7, start=start, process_index=index,
                             process_count=count)
for step, b in zip(range(start, steps), batches):
    for row, (image, label) in enumerate(zip(b["image"], b["label"])):
        name = hashlib.sha1(image.tobytes()).hexdigest()
        print(step, index * 12 // count + row, name, label, flush=True)
if len(sys.argv) > 6:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_real_processes_that_are_killed_and_come_back_in_another_number(photos):
    """Two processes make steps 0 and 1 and are killed; one makes steps 2 and 3."""

    def start(*args):
        command = [sys.executable, "-c", WORKER, str(photos), *map(str, args)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    jobs = [start(0, 2, 0, 2, 9), start(1, 2, 0, 2, 9), start(0, 1, 2, 4)]
    lines = sorted(
        (line for job in jobs for line in job.communicate()[0].splitlines()),
        key=lambda line: [int(v) for v in line.split()[:2]],
    )
    assert [job.returncode for job in jobs] == [-9, -9, 0]
    cfg = DataConfig(source="folder", path=str(photos), image_size=16, cache_gib=0.0)
    expected = [
        f"{step} {row} {hashlib.sha1(image.tobytes()).hexdigest()} {label}"
        for step, b in enumerate(take(data.train_batches(cfg, batch=12, seed=7), 4))
        for row, (image, label) in enumerate(zip(b["image"], b["label"], strict=True))
    ]
    assert lines == expected
