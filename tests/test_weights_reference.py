# SPDX-License-Identifier: Apache-2.0
"""Exports in the real ``transformers`` and ``timm``: equal logits.

Needs an interpreter with torch, transformers and timm: this one, or the one that
``VIT_JAX_REFERENCE_PYTHON`` names (it needs no JAX).
"""

import json
import shutil

import numpy as np
import pytest
from family_cases import CASES

import vit_jax
from vit_jax import weights
from vit_jax.weights import fit

pytestmark = [pytest.mark.reference, pytest.mark.process]


def random_model(**fields):
    """A model whose every array matters: nothing zero, norms not the identity."""
    model = vit_jax.create_model("", **fields)
    rng = np.random.default_rng(0)
    flat = fit.flatten(fit.initial(model.cfg))
    flat = {
        k: (v + 0.05 * rng.normal(size=v.shape)).astype(np.float32)
        for k, v in flat.items()
    }
    return model, fit.unflatten(flat)


SIZES = dict(width=64, depth=2, mlp_dim=96, heads=4, patch=8, num_classes=7)


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_transformers_computes_the_same(reference, tmp_path, gelu):
    model, params = random_model(**SIZES, image_size=32, gelu=gelu, layer_norm_eps=1e-6)
    weights.save(tmp_path / "hf", model.cfg, params)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    theirs = reference("hf", tmp_path / "hf", images, tmp_path)
    np.testing.assert_allclose(
        model.apply({"params": params}, images), theirs, atol=1e-5
    )


TIMM = {
    "token": ("vit_tiny_patch16_224", {}, {}),
    "gap": ("vit_base_patch16_gap_224", {"head": "gap"}, {}),
    "map": ("vit_base_patch16_siglip_gap_224", {"head": "map"}, {"global_pool": "map"}),
    # The stem's convolutions standardise with another epsilon there, hence 2e-3.
    "hybrid": ("vit_base_r50_s16_224", {"resnet": (3, 4, 9), "patch": 1}, {}),
    "root only": ("vit_tiny_r_s16_p8_224", {"resnet_width": 1}, {}),
}


@pytest.mark.parametrize("case", TIMM)
def test_timm_computes_the_same(reference, tmp_path, case):
    architecture, fields, arguments = TIMM[case]
    size = 64 if fields.get("resnet_width") or fields.get("resnet") else 32
    model, params = random_model(
        **{**SIZES, "image_size": size, "gelu": "exact", **fields}
    )
    c = model.cfg
    arguments = {
        "img_size": size,
        "embed_dim": c.width,
        "depth": c.depth,
        "num_heads": c.heads,
        "mlp_ratio": c.mlp_dim / c.width,
        "num_classes": c.num_classes,
        "patch_size": c.patch,
        **arguments,
    }
    file = tmp_path / "model.safetensors"
    weights.save(file, c, params)
    images = np.random.default_rng(1).uniform(-1, 1, (2, size, size, 3))
    images = images.astype(np.float32)
    wanted = f"{file},{architecture},{json.dumps(arguments)}"
    theirs = reference("timm", wanted, images, tmp_path)
    ours = model.apply({"params": params}, images)
    tolerance = 2e-3 if c.resnet_width else 1e-5
    np.testing.assert_allclose(ours, theirs, atol=tolerance)
    assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_pre": True, "gelu": "quick", "layer_norm_eps": 1e-5},
        {"head": "gap", "class_token": True, "final_norm": "pooled"},
        {"head": "map", "registers": 2, "gelu": "tanh"},
        {"head": "gap", "registers": 2},
        {"distillation": "head"},
        {"image_size": (32, 48)},
    ],
)
def test_timm_builds_the_model_from_a_folder(reference, tmp_path, fields):
    """From its config.json alone, with every array in its place."""
    usual = {**SIZES, "image_size": 32, "gelu": "exact", "layer_norm_eps": 1e-6}
    model, params = random_model(**{**usual, **fields})
    if model.cfg.norm_pre:  # timm's patch embedding has no bias then
        params["embedding"]["bias"] *= 0
    weights.save(tmp_path / "m", model.cfg, params, layout="timm")
    size = (2, *model.cfg.image_size, 3)
    images = np.random.default_rng(1).uniform(-1, 1, size).astype(np.float32)
    theirs = reference("timm", tmp_path / "m", images, tmp_path)
    np.testing.assert_allclose(
        model.apply({"params": params}, images), theirs, atol=1e-5
    )
    assert np.abs(theirs).max() > 0.1


def test_own_layouts_in_their_own_libraries(reference, tmp_path):
    """What ``convert --format=own`` writes loads strictly, by its config.json alone."""
    written = {}
    for case in CASES:
        if not (case / "config.json").exists() or case.name == "timm_xp_a":
            continue  # a class of timm that no published architecture has
        found = weights.read(case)
        folder = tmp_path / "own" / case.name
        weights.save(folder, found.cfg, found.params, found.metadata, "own")
        shutil.copy(case / "io.npz", folder)
        written[case.name] = found.cfg
    theirs = reference("own", tmp_path / "own", np.zeros(0), tmp_path)
    assert len(written) >= 4
    for name, cfg in written.items():
        io = np.load(tmp_path / "own" / name / "io.npz")
        key = next(k for k in ("logits", "image_embeds", "features") if k in io.files)
        if f"{name}/{key}" in theirs.files:
            got = theirs[f"{name}/{key}"]
        else:
            tokens = theirs[f"{name}/tokens"]
            got = tokens.mean(1) if cfg.head == "gap" else tokens[:, 0]
        largest = max(1.0, np.abs(io[key]).max())
        np.testing.assert_allclose(got, io[key], rtol=0, atol=1e-4 * largest)
