# SPDX-License-Identifier: Apache-2.0
"""Models compiled as one program: operation by operation takes several times as long."""

import jax
import numpy as np


def apply(model, params, images, **options):
    """``model.apply``."""
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, **options))
    return run(params, images)


def init(model, seed=0):
    """``model.init`` for the size of images of its config."""
    images = np.zeros((1, *model.cfg.image_size, model.cfg.channels), np.float32)
    return jax.jit(model.init)(jax.random.key(seed), images)["params"]
