# SPDX-License-Identifier: Apache-2.0
"""Weight-standardised ResNets: stems and baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from vit_jax.models.resnet import ResidualUnit, StdConv


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes_and_stages(name, size, **fields):
    """Shapes of parameters, and of what each stage returns."""
    model = vit_jax.create_model(name, **fields)
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    run = lambda images: model.init_with_output(
        jax.random.key(0), images, mutable=["params", "intermediates"],
        capture_intermediates=True,
    )  # fmt: skip
    logits, variables = jax.eval_shape(run, images)
    seen = variables["intermediates"]
    shapes = {k: v["__call__"][0].shape[1:] for k, v in seen.items() if "__call__" in v}
    return logits.shape, variables["params"], shapes


def test_stages_of_r50_b16():
    fields = {"num_classes": 3, "layers": "scan"}
    logits, params, stages = shapes_and_stages("R50+B/16", (224, 224), **fields)
    assert logits == (2, 3)
    assert stages["conv_root"] == (112, 112, 64)
    assert stages["block1"] == (56, 56, 256)
    assert stages["block2"] == (28, 28, 512)
    assert stages["block3"] == (14, 14, 1024)
    assert stages["embedding"] == (14, 14, 768)
    units = {k: len(v) for k, v in params.items() if k.startswith("block")}
    assert units == {"block1": 3, "block2": 4, "block3": 9}
    kernel = lambda *path: jax.tree_util.tree_reduce(
        lambda _, x: x.shape, params[path[0]][path[1]][path[2]], None
    )
    assert params["conv_root"]["kernel"].shape == (7, 7, 3, 64)
    assert kernel("block1", "unit1", "conv1") == (1, 1, 64, 64)
    assert kernel("block1", "unit1", "conv2") == (3, 3, 64, 64)
    assert kernel("block1", "unit1", "conv_proj") == (1, 1, 64, 256)
    assert kernel("block2", "unit1", "conv1") == (1, 1, 256, 128)
    assert kernel("block2", "unit1", "conv_proj") == (1, 1, 256, 512)
    assert kernel("block3", "unit1", "conv3") == (1, 1, 256, 1024)
    assert params["embedding"]["kernel"].shape == (1, 1, 1024, 768)
    assert set(params["block1"]["unit2"]) == {
        *("conv1", "conv2", "conv3", "gn1", "gn2", "gn3")
    }
    assert params["block1"]["unit1"]["gn_proj"]["scale"].shape == (256,)


def test_r_ti_16_has_stride_32_in_spite_of_its_name():
    _, params, stages = shapes_and_stages("R+ViT-Ti/16", (224, 224), layers="scan")
    assert params["embedding"]["kernel"].shape == (8, 8, 64, 192)
    assert stages["embedding"] == (7, 7, 192)
    table = params["Transformer"]["posembed_input"]["pos_embedding"]
    assert table.shape == (1, 50, 192)


@pytest.mark.parametrize("size", [(64, 96), (65, 90)])
def test_the_token_grid_is_what_the_stem_returns(size):
    """Also for sizes that no stride divides: padding rounds up."""
    fields = {"width": 16, "heads": 2, "mlp_dim": 8, "depth": 1, "head": "gap"}
    fields |= {"patch": 2, "resnet": (1, 1, 1)}
    _, params, stages = shapes_and_stages("", size, **fields)
    cfg = vit_jax.create_model("", **fields).cfg
    grid = vit_jax.models.token_grid(cfg, size)
    assert stages["embedding"] == (*grid, 16)
    table = params["Transformer"]["posembed_input"]["pos_embedding"]
    assert table.shape == (1, grid[0] * grid[1], 16)


def test_the_kernel_is_standardised():
    """The image of a delta is the kernel: mean 0 and deviation 1 per output channel."""
    kernel = 5 + 3 * random(3, 3, 2, 4)
    delta = jnp.zeros((2, 5, 5, 2)).at[0, 2, 2, 0].set(1).at[1, 2, 2, 1].set(1)
    out = StdConv(4, 3).apply({"params": {"kernel": kernel}}, delta)
    w = np.asarray(out)[:, 1:4, 1:4][:, ::-1, ::-1].transpose(1, 2, 0, 3)
    np.testing.assert_allclose(w.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(w.std((0, 1, 2)), 1, atol=1e-4)
    raw = np.asarray(kernel)
    mean, deviation = (
        raw.mean((0, 1, 2), keepdims=True),
        raw.std((0, 1, 2), keepdims=True),
    )
    np.testing.assert_allclose(w, (raw - mean) / (deviation + 1e-5), atol=1e-5)
    # The epsilon is added outside of the root: it matters for tiny kernels.
    out = StdConv(4, 3).apply({"params": {"kernel": kernel * 1e-5}}, delta)
    w = np.asarray(out)[:, 1:4, 1:4][:, ::-1, ::-1].transpose(1, 2, 0, 3)
    expected = deviation * 1e-5 / (deviation * 1e-5 + 1e-5)
    np.testing.assert_allclose(w.std((0, 1, 2)), expected.reshape(-1), rtol=1e-2)


def test_strides_pad_after_rather_than_before():
    """3 x 3 with stride 2 on an even size: 0 before, 1 after, so the corner is seen."""
    kernel = random(3, 3, 1, 1)
    conv = lambda x: StdConv(1, 3, stride=2).apply({"params": {"kernel": kernel}}, x)
    rows = jax.jacobian(lambda x: conv(x)[0, :, 0, 0])(jnp.ones((1, 4, 4, 1)))
    seen = np.any(np.asarray(rows)[:, 0, :, :, 0], axis=-1)
    np.testing.assert_array_equal(seen, [[1, 1, 1, 0], [0, 0, 1, 1]])


@pytest.mark.heavy
def test_a_new_unit_is_the_identity_and_strides_on_the_3x3():
    x = jax.nn.relu(random(1, 4, 4, 128))
    unit = ResidualUnit(32, 1, "float32")
    params = jax.jit(unit.init)(jax.random.key(0), x)["params"]
    assert set(params) == {"conv1", "conv2", "conv3", "gn1", "gn2", "gn3"}
    assert not np.any(params["gn3"]["scale"])
    assert np.all(params["gn1"]["scale"] == 1)
    np.testing.assert_array_equal(unit.apply({"params": params}, x), x)

    strided = ResidualUnit(32, 2, "float32")
    shapes = jax.eval_shape(strided.init, jax.random.key(0), x)["params"]
    assert {"conv_proj", "gn_proj"} < set(shapes)
    _, seen = jax.eval_shape(
        lambda: strided.init_with_output(
            jax.random.key(0), x, mutable=True, capture_intermediates=True
        )
    )
    size = lambda name: seen["intermediates"][name]["__call__"][0].shape[1]
    assert (size("conv1"), size("conv2"), size("conv_proj")) == (4, 2, 2)


@pytest.mark.heavy
def test_group_norm_has_32_groups_and_statistics_over_space():
    """The projection branch of a unit whose main branch is 0 shows the norm alone."""
    x = random(1, 3, 3, 64)
    unit = ResidualUnit(32, 1, "float32")
    params = jax.jit(unit.init)(jax.random.key(0), x)["params"]
    options = {"mutable": ["intermediates"], "capture_intermediates": True}
    y, seen = unit.apply({"params": params}, x, **options)
    seen = seen["intermediates"]
    before = np.asarray(seen["conv_proj"]["__call__"][0]).reshape(9, 32, 4)
    mean, variance = (
        before.mean((0, 2), keepdims=True),
        before.var((0, 2), keepdims=True),
    )
    expected = ((before - mean) / np.sqrt(variance + 1e-6)).reshape(1, 3, 3, 128)
    np.testing.assert_allclose(seen["gn_proj"]["__call__"][0], expected, atol=1e-4)
    np.testing.assert_allclose(y, np.maximum(expected, 0), atol=1e-4)


@pytest.mark.heavy
def test_a_baseline():
    fields = {"resnet": (1, 1), "resnet_width": 1, "num_classes": 3, "head_bias": -2.0}
    model = vit_jax.create_model("", remat="full", **fields)
    images = random(2, 32, 40, 3)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits, out = jax.jit(lambda v, x: model.apply(v, x, train=True, method="forward"))(
        variables, images
    )
    np.testing.assert_array_equal(logits, np.full((2, 3), -2.0))  # a zero kernel
    assert out["tokens"].shape == (2, 4 * 5, 512)
    np.testing.assert_allclose(out["pre_logits"], out["tokens"].mean(1), atol=1e-5)
    low = vit_jax.create_model("", dtype="bfloat16", **fields)
    logits, out = jax.eval_shape(
        lambda v, x: low.apply(v, x, method="forward"), variables, images
    )
    assert (logits.dtype, out["tokens"].dtype) == ("float32", "bfloat16")
    with pytest.raises(vit_jax.errors.UserError, match="shape"):
        model.apply(variables, images[..., :1])
