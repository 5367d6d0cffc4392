# SPDX-License-Identifier: Apache-2.0
"""Every family of checkpoints: the outputs of independent implementations, at the sizes
that they were computed for, and the same bits after a way out and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from compiled import apply
from safetensors import numpy as safetensors

import vit_jax
from vit_jax import weights
from vit_jax.weights import fit

HERE = Path(__file__).parent / "golden" / "families"
SHARED = Path(__file__).parent.parent.parent / "shared"
CASES = sorted(
    {p.parent.name: p.parent for root in (SHARED / "golden" / "families", HERE)
     for p in root.glob("*/meta.json")}.values()
)  # fmt: skip


def test_cases_beside_the_project(shared):
    """Skipped, visibly, where only the few cases in the project are tested."""
    assert len(CASES) >= 41


def load(case, read=weights.read, **options):
    about = json.loads((case / "meta.json").read_text())
    source = case
    if not (case / "config.json").exists():
        (source,) = case.glob("*.safetensors")
        options["heads"] = about["num_heads"]
    return read(source, **options), about


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs(case):
    for file in sorted(case.glob("io*.npz")):
        io = np.load(file)
        size = {} if file.name == "io.npz" else {"image_size": io["images"].shape[1:3]}
        (model, params), about = load(case, vit_jax.load, **size)
        mean, std = (np.float32(about[key]) for key in ("mean", "std"))
        images = 2 * (io["images"] * std + mean) - 1
        logits, out = apply(model, params, images, method="forward")
        key = next(k for k in ("logits", "image_embeds", "features") if k in io.files)
        got = out["pre_logits"] if key == "features" else logits
        largest = max(1.0, np.abs(io[key]).max())
        np.testing.assert_allclose(got / largest, io[key] / largest, rtol=0, atol=1e-4)


def _inner(ours, theirs):
    """Our arrays by their name in the other file, which may be longer in front."""
    for name, value in ours.items():
        (full, *_) = [n for n in (f"visual.{name}", f"vit.{name}", name) if n in theirs]
        yield full, value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_own_layout_and_back(case, tmp_path):
    """load -> convert to its own layout -> load: equal bits, equal models."""
    found, _ = load(case)
    folder = (case / "config.json").exists() and "(Hugging" in found.metadata.family
    path = tmp_path / ("out" if folder else "out.safetensors")
    weights.save(path, found.cfg, found.params, found.metadata, "own")
    # What the source library loads strictly: the same names and shapes, but for what no
    # image encoder needs.
    file = path / "model.safetensors" if folder else path
    (source,) = case.glob("*.safetensors")
    ours, theirs = safetensors.load_file(file), safetensors.load_file(source)
    assert all(
        theirs[name].shape == value.shape for name, value in _inner(ours, theirs)
    )
    again = weights.read(path)
    assert again.cfg == found.cfg
    assert again.metadata.class_names == found.metadata.class_names
    a, b = fit.flatten(found.params), fit.flatten(again.params)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


@pytest.mark.parametrize("size", ["224x224", "518x518", "196x322"])
def test_a_pretrained_model(shared, size):
    folder = shared / "pretrained" / "vit_s14_dinov2_saliency"
    file = folder / f"io_{size}.npz"
    io = np.load(file)
    model, params = vit_jax.load(folder, image_size=io["pixels"].shape[1:3])
    images = io["pixels"].astype(np.float32) / 127.5 - 1
    _, out = apply(model, params, images, method="forward")
    np.testing.assert_allclose(out["pre_logits"], io["features"], rtol=0, atol=1e-3)
    tokens = out["tokens"]
    np.testing.assert_allclose(tokens[:, :4], io["tokens_first"], rtol=0, atol=1e-3)
    mean = tokens[:, 1:].mean(1)
    np.testing.assert_allclose(mean, io["tokens_mean"], rtol=0, atol=1e-3)
