# SPDX-License-Identifier: Apache-2.0
"""Position tables for another image size: the rule of the official code (spec 3.4).

Letters: h, w rows and columns of patches; D width. Tables are (1, h*w, D), or
(1, 1+h*w, D) with the row of the class token first.
"""

import numpy as np


def resize(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, D) -> (*size, D) by separable linear interpolation that keeps the corners.

    Equal to ``scipy.ndimage.zoom(order=1)``, which the official code calls; half-pixel
    bilinear (``jax.image.resize``) differs by the size of the entries themselves. One
    target row or column samples the centre.
    """
    h, w, _ = grid.shape
    if (h, w) == size:
        return grid
    rows, columns = _weights(h, size[0]), _weights(w, size[1])
    return np.einsum(
        "ah,bw,hwd->abd", rows, columns, grid.astype(np.float64), optimize=True
    ).astype(grid.dtype)


def resize_table(
    table: np.ndarray,
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    stored_row: bool,
    wanted_row: bool,
    new_row: np.ndarray | None = None,
) -> np.ndarray:
    """Table of another grid, in each of the four cases of the class token's row.

    ============ ============ ======================================================
    stored_row   wanted_row   row 0 of the result
    ============ ============ ======================================================
    yes          yes          is kept
    yes          no           is dropped
    no           yes          ``new_row`` (D,); zeros if None
    no           no           there is none
    ============ ============ ======================================================

    Zeros are exact where the file adds its class token after the positions
    (big_vision).
    """
    width = table.shape[-1]
    row, grid = table[0, :stored_row], table[0, stored_row:]
    grid = resize(grid.reshape(*old, width), new).reshape(-1, width)
    if not wanted_row:
        return grid[None]
    if not stored_row:
        row = np.zeros((1, width), table.dtype) if new_row is None else new_row[None]
    return np.concatenate([row, grid])[None]


def _weights(old: int, new: int) -> np.ndarray:
    """(new, old) matrix of linear interpolation; end points map to end points."""
    at = np.linspace(0, old - 1, new) if new > 1 else np.array([(old - 1) / 2])
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))
