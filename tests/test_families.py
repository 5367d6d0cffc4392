# SPDX-License-Identifier: Apache-2.0
"""Every family of checkpoints: the outputs of independent implementations, at the sizes
that they were computed for, and the same bits after a way out and back."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import apply
from family_cases import CASES, HERE
from safetensors import numpy as safetensors

import vit_jax
from vit_jax import models, weights
from vit_jax.analysis import attention
from vit_jax.weights import fit


def test_cases_beside_the_project(shared):
    """Skipped, visibly, where only the few cases in the project are tested."""
    assert len(CASES) >= 41


def about(case):
    return json.loads((case / "meta.json").read_text())


def asked(case):
    """What ``load`` is called with: the folder, or the file and what it does not say."""
    if (case / "config.json").exists():
        return case, {}
    (source,) = case.glob("*.safetensors")
    return source, {"heads": about(case)["num_heads"]}


@functools.cache
def read(case):
    source, options = asked(case)
    return weights.read(source, **options)


def images_of(case, io):
    mean, std = (np.float32(about(case)[key]) for key in ("mean", "std"))
    return 2 * (io["images"] * std + mean) - 1


def run(model, params, case, io):
    return apply(model, params, images_of(case, io), method="forward")


def check(case, io, logits, out, atol):
    key = next(k for k in ("logits", "image_embeds", "features") if k in io.files)
    got = out["pre_logits"] if key == "features" else logits
    largest = max(1.0, np.abs(io[key]).max())
    np.testing.assert_allclose(got / largest, io[key] / largest, rtol=0, atol=atol)


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs(case):
    for file in sorted(case.glob("io*.npz")):
        io = np.load(file)
        if file.name == "io.npz":
            found = read(case)
            model, params = models.create(found.cfg), found.params
        else:
            source, options = asked(case)
            size = io["images"].shape[1:3]
            model, params = vit_jax.load(source, image_size=size, **options)
        check(case, io, *run(model, params, case, io), 1e-4)


# One case for each way of being unlike the others: tokens, positions, norms, MLPs, heads.
USED = [
    case
    for case in CASES
    if case.name
    in (
        *("hf_dinov2_reg_a", "orig_openai_clip_a", "timm_beit_a", "timm_dinov3_a"),
        *("timm_eva02_small_a", "timm_siglip_base_a", "timm_aimv2_a"),
        *("timm_deit_distilled_a", "timm_pe_core_a", "timm_mae_avg_a"),
    )
]


@pytest.mark.heavy
@pytest.mark.parametrize("case", USED, ids=lambda case: case.name)
def test_fine_tuning_and_prediction(case):
    source, options = asked(case)
    model, params = vit_jax.load_for_finetune(source, 3, **options)
    images = images_of(case, np.load(case / "io.npz"))[:2]
    labels = jnp.arange(len(images))

    @jax.jit
    def step(params):
        def loss(params):
            logits = model.apply({"params": params}, images)
            return -jax.nn.log_softmax(logits)[jnp.arange(len(images)), labels].mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)

    losses = []
    for _ in range(5):
        value, params = step(params)
        losses.append(float(value))
    assert losses[0] == pytest.approx(math.log(3), abs=1e-6)  # the new head is zero
    assert np.all(np.diff(losses) < 0)
    assert (np.argmax(apply(model, params, images), -1) < 2).all()


@pytest.mark.parametrize("case", USED, ids=lambda case: case.name)
def test_bfloat16(case):
    source, options = asked(case)
    model, params = vit_jax.load(source, dtype="bfloat16", **options)
    io = np.load(case / "io.npz")
    logits, out = run(model, params, case, io)
    out = {"pre_logits": np.asarray(out["pre_logits"], np.float32)}
    # bfloat16 has 8 bits, each layer rounds a few times.
    check(case, io, np.asarray(logits, np.float32), out, 0.05)


@pytest.mark.heavy
@pytest.mark.parametrize("case", USED, ids=lambda case: case.name)
def test_figures_leave_the_other_tokens_out(case):
    found = read(case)
    model = models.create(found.cfg)
    images = images_of(case, np.load(case / "io.npz"))[:1]
    a = attention.capture(model, found.params, images)
    grid, patch = attention.geometry(model, images.shape[1:3])
    prefix = models.prefix_tokens(found.cfg)
    tokens = prefix + math.prod(grid)
    layers, heads = found.cfg.depth, found.cfg.heads
    assert a.shape == (layers, 1, heads, tokens, tokens)
    rows = np.asarray(attention.rollout(a))
    np.testing.assert_allclose(rows.sum(-1), 1, rtol=1e-5)
    picture = np.asarray(attention.token_map(rows, grid)).reshape(1, -1)
    row = rows[:, 0] if prefix else rows.mean(1)
    np.testing.assert_allclose(picture, row[:, prefix:], rtol=1e-5)
    distance = np.asarray(attention.mean_distance(a, grid, patch))
    assert distance.shape == (layers, heads)
    assert np.all((distance > 0) & (distance < math.hypot(*images.shape[1:3])))


def _inner(ours, theirs):
    """Our arrays by their name in the other file, which may be longer in front."""
    for name, value in ours.items():
        towers = ("visual.trunk.", "visual.", "vit.", "")
        full = next(t + name for t in towers if t + name in theirs)
        yield full, value


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_own_layout_and_back(case, tmp_path):
    """load -> convert to its own layout -> load: equal bits, equal models."""
    found = read(case)
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


def test_a_bias_table_for_all_blocks(tmp_path):
    arrays = safetensors.load_file(HERE / "timm_beit_a" / "model.safetensors")
    names = [n for n in arrays if n.endswith("relative_position_bias_table")]
    first = arrays[names[0]]
    safetensors.save_file(
        arrays | dict.fromkeys(names, first), tmp_path / "each.safetensors"
    )
    rest = {n: a for n, a in arrays.items() if n not in names}
    shared = {"rel_pos_bias.relative_position_bias_table": first}
    safetensors.save_file(rest | shared, tmp_path / "shared.safetensors")
    each, one = (
        weights.read(tmp_path / f"{name}.safetensors", heads=3)
        for name in ("each", "shared")
    )
    assert each.cfg == one.cfg
    jax.tree.map(np.testing.assert_array_equal, each.params, one.params)


@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        (r"^", "module.backbone."),
        (r"^", "model."),
        (r"^blocks\.(\d+)\.", r"blocks.0.\1."),  # DINOv2's training, in pieces
    ],
)
def test_names_of_training_scripts(tmp_path, pattern, new):
    source = HERE / "timm_register_rows_a" / "model.safetensors"
    arrays = safetensors.load_file(source)
    other = {re.sub(pattern, new, name): array for name, array in arrays.items()}
    assert other.keys() != arrays.keys()
    safetensors.save_file(other, tmp_path / "x.safetensors")
    plain, found = (
        weights.read(f, heads=3) for f in (source, tmp_path / "x.safetensors")
    )
    assert found.cfg == plain.cfg
    jax.tree.map(np.testing.assert_array_equal, found.params, plain.params)


@pytest.mark.parametrize("name", ["beitv2_base", "deit_small"])
def test_what_only_a_file_name_tells(name, tmp_path):
    """DeiT's arrays are those of any ViT, and BEiT v2's those of BEiT."""
    source = HERE / "timm_beit_a" / "model.safetensors"
    arrays = safetensors.load_file(source)
    if name.startswith("deit"):
        found = weights.read(HERE / "timm_beit_a")
        plain = models.resolve(
            dataclasses.replace(found.cfg, relative_bias=False, positions="learned",
                                final_norm="tokens", head="token", class_token=False)
        )  # fmt: skip
        source = tmp_path / "plain.safetensors"
        weights.save(source, plain, fit.initial(plain))
        arrays = safetensors.load_file(source)
    for file, mean in ((name, (0.485, 0.456, 0.406)), ("model", ())):
        path = tmp_path / f"{file}.safetensors"
        safetensors.save_file(arrays, path)
        assert weights.read(path, heads=3).cfg.image_mean == mean


@pytest.mark.heavy
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
