# SPDX-License-Identifier: Apache-2.0
"""1,797 scans of handwritten digits, 8 x 8 pixels, that ship with scikit-learn."""

import numpy as np
from sklearn.datasets import load_digits

from vit_jax.config import DataConfig
from vit_jax.data import splits
from vit_jax.data.examples import Dataset, Labels, listed


def load(cfg: DataConfig) -> Dataset:
    """All of them; a share is held out for testing."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.reshape(-1, 8, 8) * (255 / 16)  # 0..16 -> 0..255
    grey = np.round(pixels).astype(np.uint8)
    images = np.repeat(grey[..., None], 3, axis=-1)
    every = listed("pixels", images, Labels.single(labels), "digit {}".format)
    both = splits.with_test(cfg, every, None)
    return Dataset(*both, tuple(str(i) for i in range(10)))
