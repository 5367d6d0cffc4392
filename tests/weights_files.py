# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints for the tests of weights/, written with numpy alone."""

import numpy as np

import vit_jax
from vit_jax.weights import fit

SMALL = dict(width=16, depth=2, mlp_dim=24, heads=2, patch=8, num_classes=5)
POSITIONS = "Transformer/posembed_input/pos_embedding"


def small_model(image_size=16, **fields):
    """(model, flat parameters) with random values everywhere, nothing zero or one."""
    model = vit_jax.create_model("", image_size=image_size, **{**SMALL, **fields})
    shapes = fit.flatten(fit._shapes(model.cfg))
    rng = np.random.default_rng(0)
    flat = {
        k: rng.normal(0.1, 0.5, s.shape).astype(np.float32) for k, s in shapes.items()
    }
    return model, flat


def save_npz(path, flat):
    np.savez(path, **flat)
    return str(path)


def assert_same(params, flat, but=()):
    """Every array equal to the bit, except those whose name is in ``but``."""
    params = fit.flatten(params)
    assert params.keys() == flat.keys()
    for name in flat.keys() - set(but):
        np.testing.assert_array_equal(np.asarray(params[name]), flat[name], name)
