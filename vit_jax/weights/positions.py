# SPDX-License-Identifier: Apache-2.0
"""Tables of positions, and patch kernels, for another size: the rules of each family.

===================== ==================================================================
"corners"             linear, corners stay corners: the official code, big_vision
"bilinear"            half-pixel centres, no antialiasing: BEiT in transformers
"bilinear_antialias"  SigLIP 2 in transformers
"bicubic"             torch's (Keys, a = -0.75): transformers, DeiT, MAE, MoCo v3
"bicubic_offset"      the same, 0.1 patches wider: DINO and DINOv2 of the authors
"bicubic_antialias"   torch's kernel with antialiasing (a = -0.5): timm, DINOv2 with
                      registers
===================== ==================================================================

Letters: h, w rows and columns of patches; D width; k heads; P patch side.
"""

import numpy as np

RULES = (
    "corners",
    "bilinear",
    "bilinear_antialias",
    "bicubic",
    "bicubic_offset",
    "bicubic_antialias",
)


def resize(
    grid: np.ndarray, size: tuple[int, int], rule: str = "corners"
) -> np.ndarray:
    """(h, w, D) -> (*size, D) by a separable rule of :data:`RULES`."""
    h, w, _ = grid.shape
    if (h, w) == size:
        return grid
    rows, columns = _matrix(h, size[0], rule), _matrix(w, size[1], rule)
    wide = grid.astype(np.float64)
    new = np.einsum("ah,bw,hwd->abd", rows, columns, wide, optimize=True)
    return new.astype(grid.dtype)


def resize_table(
    table: np.ndarray, old: tuple[int, int], new: tuple[int, int], rule: str = "corners"
) -> np.ndarray:
    """(1, h w + r, D) with r rows of other tokens in front, which stay as they are."""
    width = table.shape[-1]
    extra = table.shape[1] - old[0] * old[1]
    grid = resize(table[0, extra:].reshape(*old, width), new, rule)
    return np.concatenate([table[0, :extra], grid.reshape(-1, width)])[None]


def waves(grid: tuple[int, int], width: int) -> np.ndarray:
    """(1, h w, D) in float32: AIMv2's table for images of any size."""
    omega = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    y, x = np.indices(grid).reshape(2, -1, 1) * omega.reshape(1, 1, -1)
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=-1)
    return table[None].astype(np.float32)


def resize_relative(
    table: np.ndarray, old: tuple[int, int], new: tuple[int, int], rule: str = "bicubic"
) -> np.ndarray:
    """((2h-1)(2w-1) + r, k) of BEiT, with r entries of the class token at the end."""
    (h, w), (a, b) = ((2 * n - 1, 2 * m - 1) for n, m in (old, new))
    grid = resize(table[: h * w].reshape(h, w, -1), (a, b), rule)
    return np.concatenate([grid.reshape(a * b, -1), table[h * w :]])


def resize_kernel(kernel: np.ndarray, side: int, rule: str = "corners") -> np.ndarray:
    """(P, P, C, D) -> (side, side, C, D), so that resized patches get equal embeddings.

    The pseudo-inverse of resizing, as in FlexiViT (2212.08013).
    """
    rule = "bilinear" if rule == "corners" else rule  # images have no corners to keep
    to_new = np.linalg.pinv(_matrix(kernel.shape[0], side, rule).T)
    wide = kernel.astype(np.float64)
    return np.einsum("ap,bq,pqcd->abcd", to_new, to_new, wide, optimize=True).astype(
        kernel.dtype
    )


def _matrix(old: int, new: int, rule: str) -> np.ndarray:
    """(new, old): how each new row is made of the old ones."""
    if rule == "corners":
        # Equal to scipy.ndimage.zoom(order=1); one target row samples the centre.
        at = np.linspace(0, old - 1, new) if new > 1 else np.array([(old - 1) / 2])
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))
    antialias = rule.endswith("antialias")
    step = old / (new + 0.1 if rule.endswith("offset") else new)
    at = (np.arange(new) + 0.5) * step - 0.5
    stretch = max(step, 1.0) if antialias else 1.0
    taps = np.arange(-2, old + 2)
    distance = np.abs(at[:, None] - taps) / stretch
    if rule.startswith("bilinear"):
        weights = np.maximum(0, 1 - distance)
    else:
        weights = _cubic(distance, -0.5 if antialias else -0.75)
    inside = weights[:, 2:-2]
    if antialias:  # what lies outside does not count
        return inside / inside.sum(axis=1, keepdims=True)
    inside[:, 0] += weights[:, :2].sum(axis=1)  # the border goes on outside
    inside[:, -1] += weights[:, -2:].sum(axis=1)
    return inside


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))
