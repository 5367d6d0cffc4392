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


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("rule", positions.RULES)
def test_rows_of_other_tokens_stay(rows, rule):
    table = np.random.default_rng(0).normal(size=(1, rows + 20, 4)).astype(np.float32)
    got = positions.resize_table(table, (5, 4), (6, 7), rule)
    assert got.shape == (1, rows + 42, 4)
    np.testing.assert_array_equal(got[0, :rows], table[0, :rows])
    grid = positions.resize(table[0, rows:].reshape(5, 4, 4), (6, 7), rule)
    np.testing.assert_array_equal(got[0, rows:], grid.reshape(42, 4))


@pytest.mark.parametrize("rule", positions.RULES)
@pytest.mark.parametrize("size", [(3, 3), (9, 4), (12, 17)])
def test_constants_stay_constant(rule, size):
    grid = np.full((5, 6, 2), 3.0, np.float32)
    np.testing.assert_allclose(positions.resize(grid, size, rule), 3, atol=1e-6)


def keys(x, a):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0


@pytest.mark.parametrize(("new", "stretch"), [(4, 2), (16, 1)])
def test_bicubic_is_keys_with_the_a_of_torch(new, stretch):
    """An impulse returns the kernel: a = -0.75, and -0.5 stretched where antialiased."""
    grid = np.zeros((8, 1, 1), np.float32)
    grid[3] = 1
    at = (np.arange(new) + 0.5) * 8 / new - 0.5
    got = positions.resize(grid, (new, 1), "bicubic")[:, 0, 0]
    np.testing.assert_allclose(got, [keys(x - 3, -0.75) for x in at], atol=1e-6)
    sums = [sum(keys((x - j) / stretch, -0.5) for j in range(8)) for x in at]
    smooth = [keys((x - 3) / stretch, -0.5) for x in at]
    got = positions.resize(grid, (new, 1), "bicubic_antialias")[:, 0, 0]
    np.testing.assert_allclose(got, np.divide(smooth, sums), atol=1e-6)


def test_offset_samples_as_if_a_tenth_of_a_patch_more():
    grid = np.zeros((37, 1, 1), np.float32)
    grid[18] = 1
    at = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    got = positions.resize(grid, (16, 1), "bicubic_offset")[:, 0, 0]
    np.testing.assert_allclose(got, [keys(x - 18, -0.75) for x in at], atol=1e-6)


def test_relative_positions_keep_the_class_tokens_entries():
    table = np.random.default_rng(0).normal(size=(7 * 5 + 3, 2)).astype(np.float32)
    got = positions.resize_relative(table, (4, 3), (6, 6), "bicubic")
    assert got.shape == (11 * 11 + 3, 2)
    np.testing.assert_array_equal(got[-3:], table[-3:])
    grid = positions.resize(table[:35].reshape(7, 5, 2), (11, 11), "bicubic")
    np.testing.assert_array_equal(got[:-3], grid.reshape(121, 2))


@pytest.mark.parametrize("rule", ["corners", "bicubic_antialias"])
def test_kernels_for_larger_patches_see_the_same(rule):
    """FlexiViT: an enlarged patch has the embedding of the small one, exactly."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 4, 3, 5)).astype(np.float32)
    patch = rng.normal(size=(4, 4, 3))
    how = "bilinear" if rule == "corners" else rule
    large = positions.resize(patch, (7, 7), how)
    want = np.einsum("pqc,pqcd->d", patch, kernel)
    new = positions.resize_kernel(kernel, 7, rule)
    np.testing.assert_allclose(np.einsum("pqc,pqcd->d", large, new), want, atol=1e-5)
