# SPDX-License-Identifier: Apache-2.0
"""Memory follows what the config allows, by what the process really takes."""

import fuzz_images
import numpy as np
import pytest
from data_files import encoded, picture

from vit_jax.data import cache, shards
from vit_jax.data.examples import Labels, Split, listed

MIB = 2**20
needs_linux = pytest.mark.skipif(not fuzz_images.Memory.KNOWN, reason="needs /proc")


@needs_linux
def test_a_decoded_split_takes_its_pixels_and_no_more():
    """165 MiB of them, within a tenth of what ``cache_gib`` counts."""
    small = _split(600, 32)
    assert cache.cached(small, 165 * MIB, training=True)  # the decoder's own buffers
    _check_peak(side=600, count=160)


@needs_linux
@pytest.mark.heavy
def test_large_images_are_decoded_one_by_one():
    """Also where a round of 7.7 MB each would be a fifth of the limit."""
    _check_peak(side=1600, count=75)


def _check_peak(*, side: int, count: int) -> None:
    limit = count * side * side * 3
    assert cache.cached(_split(side, count), 0.99 * limit, training=True) is None
    memory = fuzz_images.Memory()
    found = cache.cached(_split(side, count), limit, training=True)
    assert found is not None
    assert found.size == limit
    taken = memory.taken()
    print(f"{taken / limit:.3f} of what it counts")
    assert taken == pytest.approx(limit, rel=0.1)


def _split(side: int, count: int) -> Split:
    image = encoded(picture(0, side, side))
    labels = Labels.single(np.zeros(count, np.int32))
    return listed("encoded", [image] * count, labels, str)


def test_offsets_of_many_shards_are_let_go_of(tmp_path, monkeypatch):
    """Those of a thousand records at most, however many shards are read."""
    monkeypatch.setattr(shards, "KEPT", 1_000)
    files = tuple(str(tmp_path / str(i)) for i in range(50))
    offsets = {file: np.arange(101) for file in files}
    found = shards.Shards(files, (100,) * 50, "tfrecord", (), offsets)
    for shard in range(50):
        assert len(found._offsets(shard)) == 101
    assert found._offsets.cache_info().currsize == 10
