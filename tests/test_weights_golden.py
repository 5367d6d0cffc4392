# SPDX-License-Identifier: Apache-2.0
"""Logits that other implementations computed from small released-layout files."""

from pathlib import Path

import numpy as np
import pytest
from compiled import apply

import vit_jax
from vit_jax.errors import UserError

GOLDEN = Path(__file__).parent / "golden"


def logits(model, params, images):
    return np.asarray(apply(model, params, images))


@pytest.mark.parametrize("case", ["vt_token_rep", "vt_resize", "bv_gap_rep"])
def test_released_layouts(case):
    model, params = vit_jax.load(GOLDEN / f"{case}.weights.npz")
    io = np.load(GOLDEN / f"{case}.io.npz")
    out, aux = apply(model, params, io["images"], method="forward")
    np.testing.assert_allclose(out, io["logits"], atol=1e-4)
    np.testing.assert_allclose(aux["pre_logits"], io["features"], atol=1e-4)


def test_hybrid(shared):
    model, params = vit_jax.load(shared / "golden" / "vt_hybrid.weights.npz")
    io = np.load(shared / "golden" / "vt_hybrid.io.npz")
    assert model.cfg.resnet == (1, 1)
    assert model.cfg.image_size == (64, 64)
    out = logits(model, params, io["images"])
    np.testing.assert_allclose(out, io["logits"], atol=1e-4)


def test_resized_positions():
    model, params = vit_jax.load(GOLDEN / "vt_resize.weights.npz", image_size=56)
    io = np.load(GOLDEN / "vt_resize56.io.npz")
    table = params["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_allclose(table, io["pos_embedding"], atol=1e-6)
    out = logits(model, params, io["images"])
    np.testing.assert_allclose(out, io["logits"], atol=1e-4)


def test_hugging_face_honours_gelu_and_epsilon():
    model, params = vit_jax.load(GOLDEN / "hf_vit")
    io = np.load(GOLDEN / "hf_vit" / "io.npz")
    out = logits(model, params, io["images"])
    np.testing.assert_allclose(out, io["logits"], atol=1e-5)
    assert model.cfg.gelu == "exact"
    assert model.cfg.layer_norm_eps == 1e-12
    with pytest.raises(UserError, match=r"gelu.*says 'exact'.*caller wants 'tanh'"):
        vit_jax.load(GOLDEN / "hf_vit", gelu="tanh")
