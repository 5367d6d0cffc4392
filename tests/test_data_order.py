# SPDX-License-Identifier: Apache-2.0
"""Order is a permutation per epoch, differs between epochs, and needs no tensorflow."""

import subprocess
import sys

import numpy as np
import pytest

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import order


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1437])
def test_every_example_once_per_epoch(size):
    drawn = order.train_indices(np.arange(3 * size), size, seed=5)
    for epoch in drawn.reshape(3, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    if size > 60:
        assert (drawn[:size] != drawn[size : 2 * size]).mean() > 0.9
        assert (drawn[:size] != np.arange(size)).mean() > 0.9


def test_any_position_is_computed_alone():
    everything = order.train_indices(np.arange(1000), 77, seed=1)
    some = np.array([999, 3, 500])
    np.testing.assert_array_equal(
        order.train_indices(some, 77, seed=1), everything[some]
    )
    far = order.train_indices(np.array([10**15]), 300_000_000, seed=1)
    assert 0 <= far[0] < 300_000_000


def test_permutations_are_uniform():
    size, epochs = 5, 6000
    index = np.tile(np.arange(size), epochs)
    keys = np.repeat(order.hash64(3, np.arange(epochs)), size)
    counts = np.zeros((size, size))
    np.add.at(counts, (index, order.permutation(index, size, keys)), 1)
    expected = epochs / size
    # 25 counts with a standard deviation of about sqrt(960) = 31 each.
    assert abs(counts - expected).max() < 5 * 31


def test_seeds_of_augmentation_differ_and_depend_on_seed_and_position_only():
    seeds = order.augmentation_seeds(np.arange(10_000), 0)
    assert len(np.unique(seeds, axis=0)) == 10_000
    np.testing.assert_array_equal(
        order.augmentation_seeds(np.array([77]), 0)[0], seeds[77]
    )
    assert (order.augmentation_seeds(np.arange(10), 1) != seeds[:10]).all()


@pytest.mark.parametrize("name", ["", "multilabel"])
def test_synthetic_is_a_function_of_seed_and_step(name):
    cfg = DataConfig(source="synthetic", name=name, image_size=8, num_classes=5)
    info = data.describe(cfg)
    assert info.multilabel == bool(name)
    assert info.num_classes == len(info.class_names) == 5
    whole = _steps(data.train_batches(cfg, batch=8, seed=0), 6)
    halves = [
        _steps(
            data.train_batches(cfg, batch=8, seed=0, process_index=i, process_count=2),
            6,
        )
        for i in range(2)
    ]
    for step, one in enumerate(whole):
        both = [h[step] for h in halves]
        for key in ("image", "label"):
            np.testing.assert_array_equal(
                np.concatenate([b[key] for b in both]), one[key]
            )
    late = next(data.train_batches(cfg, batch=8, seed=0, start=5))
    np.testing.assert_array_equal(late["image"], whole[5]["image"])
    other = next(data.train_batches(cfg, batch=8, seed=1))
    assert (other["image"] != whole[0]["image"]).any()
    assert whole[0]["image"].dtype == np.uint8
    assert whole[0]["label"].shape == ((8, 5) if name else (8,))
    masks = [
        b["mask"]
        for i in range(2)
        for b in data.eval_batches(cfg, batch=48, process_index=i, process_count=2)
    ]
    assert sum(m.sum() for m in masks) == info.num_test
    assert len({len(m) for m in masks}) == 1


@pytest.mark.process
def test_importing_and_synthetic_data_do_without_tensorflow():
    code = (
        "import sys; from vit_jax import data; from vit_jax.config import DataConfig;"
        "cfg = DataConfig(source='synthetic', image_size=4); data.describe(cfg);"
        "next(data.train_batches(cfg, batch=2, seed=0));"
        "next(data.eval_batches(cfg, batch=2));"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _steps(batches, count):
    return [b for _, b in zip(range(count), batches, strict=False)]
