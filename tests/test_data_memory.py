# SPDX-License-Identifier: Apache-2.0
"""Memory follows what the config allows, by what the process really takes."""

import os

import numpy as np
import pytest
from data_files import encoded, picture

from vit_jax.data import cache, shards
from vit_jax.data.examples import Labels, listed

SIDE, IMAGES = 600, 160


def resident() -> int:
    """Bytes of this process in memory."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_decoded_split_takes_its_pixels_and_no_more():
    """165 MiB of them, within a tenth of what ``cache_gib`` counts."""
    image = encoded(picture(0, SIDE, SIDE))
    limit = IMAGES * SIDE * SIDE * 3

    def split(count):
        labels = Labels.single(np.zeros(count, np.int32))
        return listed("encoded", [image] * count, labels, str)

    assert cache.cached(split(IMAGES), 0.99 * limit, training=True) is None
    small = split(32)  # the decoder's own buffers
    assert cache.cached(small, limit, training=True)
    before = resident()
    found = cache.cached(split(IMAGES), 2 * limit, training=True)
    assert found is not None
    assert found.size == limit
    taken = resident() - before
    print(f"{taken / limit:.3f} of what it counts")
    assert taken == pytest.approx(limit, rel=0.1)


def test_offsets_of_many_shards_are_let_go_of(tmp_path, monkeypatch):
    """Those of a thousand records at most, however many shards are read."""
    monkeypatch.setattr(shards, "KEPT", 1_000)
    files = tuple(str(tmp_path / str(i)) for i in range(50))
    offsets = {file: np.arange(101) for file in files}
    found = shards.Shards(files, (100,) * 50, "tfrecord", (), offsets)
    for shard in range(50):
        assert len(found._offsets(shard)) == 101
    assert found._offsets.cache_info().currsize == 10
