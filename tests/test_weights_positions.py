# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from scipy import ndimage

from vit_jax.weights import positions


def test_linear_between_corners():
    grid = np.array([[0, 1], [2, 3]], np.float32)[..., None]
    want = [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]]
    np.testing.assert_allclose(positions.resize(grid, (3, 3))[..., 0], want, atol=1e-7)
    row = positions.resize(grid, (4, 4))[0, :, 0]
    np.testing.assert_allclose(row, [0, 1 / 3, 2 / 3, 1], atol=1e-7)


@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((16, 12), (9, 20)), ((5, 5), (2, 2))],
)
def test_equals_what_the_official_code_calls(old, new):
    grid = np.random.default_rng(0).normal(size=(*old, 6)).astype(np.float32)
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    want = ndimage.zoom(grid, zoom, order=1)
    got = positions.resize(grid, new)
    np.testing.assert_allclose(got, want, atol=1e-6)
    for corner in [(0, 0), (0, -1), (-1, 0), (-1, -1)]:
        np.testing.assert_allclose(got[corner], grid[corner], atol=1e-6)


def test_same_size_is_the_same_array():
    grid = np.ones((3, 4, 2), np.float32)
    assert positions.resize(grid, (3, 4)) is grid


def test_one_row_and_from_one_row():
    grid = np.arange(9, dtype=np.float32).reshape(3, 3, 1)
    assert positions.resize(grid, (1, 1))[0, 0, 0] == 4  # the centre
    assert (positions.resize(grid[:1, :1], (2, 2)) == 0).all()


@pytest.mark.parametrize("tokens", [196, 197, 576, 577])
@pytest.mark.parametrize("wanted_row", [True, False])
def test_class_token_row(tokens, wanted_row):
    side, stored_row = int(tokens**0.5), tokens in (197, 577)
    table = np.random.default_rng(0).normal(size=(1, tokens, 4)).astype(np.float32)
    new_row = np.full(4, 7.0, np.float32)
    got = positions.resize_table(
        table,
        (side, side),
        (6, 5),
        stored_row=stored_row,
        wanted_row=wanted_row,
        new_row=new_row,
    )
    assert got.shape == (1, 30 + wanted_row, 4)
    grid = positions.resize(table[0, stored_row:].reshape(side, side, 4), (6, 5))
    np.testing.assert_array_equal(got[0, wanted_row:], grid.reshape(30, 4))
    if wanted_row:
        np.testing.assert_array_equal(got[0, 0], table[0, 0] if stored_row else new_row)
