# SPDX-License-Identifier: Apache-2.0
"""Memory follows what the config allows, by what the process really takes."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz_images
import numpy as np
import pytest
from data_files import encoded, picture

from vit_jax.data import cache, shards
from vit_jax.data.examples import Labels, Split, listed


@pytest.mark.process
@pytest.mark.skipif(not fuzz_images.Memory.KNOWN, reason="needs /proc")
@pytest.mark.parametrize(("side", "count"), [(600, 160), (1600, 60)])
def test_a_decoded_split_takes_its_pixels_and_no_more(side, count):
    """Within a tenth of what ``cache_gib`` counts, also where a round of 16 images would
    be a quarter of it. In a process of its own: malloc keeps up to 64 MiB of an old one."""
    code = f"import test_data_memory as t; print(t.peak({side}, {count}))"
    folder = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=env)
    assert float(done.stdout) == pytest.approx(1, rel=0.1)


def peak(side: int, count: int) -> float:
    """What decoding takes at the most, as a share of the limit that it fits exactly."""
    limit = count * side * side * 3
    assert cache.cached(_split(side, count), 0.99 * limit, training=True) is None
    assert cache.cached(_split(side, 4), limit, training=True)  # the decoder's buffers
    memory = fuzz_images.Memory()
    found = cache.cached(_split(side, count), limit, training=True)
    assert found is not None
    assert found.size == limit
    return memory.taken() / limit


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
