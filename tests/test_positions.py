# SPDX-License-Identifier: Apache-2.0
"""Every position embedding against a plain loop, and where it is added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import models
from vit_jax.config import ModelConfig
from vit_jax.models.attention import MultiHeadAttention
from vit_jax.models.positions import POSITIONS, PositionEmbedding

ROWS, COLUMNS, D = 2, 3, 16
SIZE = (ROWS * 8, COLUMNS * 8)


def config(**fields):
    sizes = {"width": D, "depth": 2, "mlp_dim": 24, "heads": 2, "patch": 8}
    return models.resolve(ModelConfig(name="", **sizes, **fields))


def filled(shapes, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def table_of(**fields):
    module = PositionEmbedding(config(**fields), SIZE)
    variables = module.init(jax.random.key(0))
    return np.asarray(module.apply(variables)), variables.get("params", {})


@pytest.mark.parametrize("head", ["token", "gap"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_tables_have_a_row_per_token(positions, head):
    table, params = table_of(positions=positions, head=head)
    assert table.shape == (1, ROWS * COLUMNS + (head == "token"), D)
    assert table.dtype == np.float32
    assert (positions == "sincos2d") == (not params)


@pytest.mark.parametrize("head", ["token", "gap"])
def test_learned2d_by_a_loop(head):
    table, params = table_of(positions="learned2d", head=head)
    patches = table[0, 1:] if head == "token" else table[0]
    x, y = params["pos_embedding_x"], params["pos_embedding_y"]
    assert (x.shape, y.shape) == ((1, COLUMNS, D // 2), (ROWS, 1, D // 2))
    for i in range(ROWS):
        for j in range(COLUMNS):
            expected = np.concatenate([x[0, j], y[i, 0]])
            np.testing.assert_array_equal(patches[i * COLUMNS + j], expected)
    if head == "token":
        np.testing.assert_array_equal(table[0, 0], params["pos_embedding_cls"][0, 0])


@pytest.mark.parametrize("head", ["token", "gap"])
def test_sincos2d_by_a_loop(head):
    table, _ = table_of(positions="sincos2d", head=head)
    patches = table[0, 1:] if head == "token" else table[0]
    omega = [10_000 ** (-i / (D // 4 - 1)) for i in range(D // 4)]
    for y in range(ROWS):
        for x in range(COLUMNS):
            waves = [
                [f(p * w) for w in omega] for p in (x, y) for f in (np.sin, np.cos)
            ]
            np.testing.assert_allclose(
                patches[y * COLUMNS + x], np.concatenate(waves), atol=1e-6
            )
    if head == "token":
        assert not np.any(table[0, 0])


def test_sincos2d_is_separable():
    """The first half tells the column only, the second half the row only."""
    table, _ = table_of(positions="sincos2d", head="gap")
    grid = table.reshape(ROWS, COLUMNS, D)
    assert np.ptp(grid[..., : D // 2], axis=0).max() == 0
    assert np.ptp(grid[..., D // 2 :], axis=1).max() == 0
    assert len(np.unique(table[0].round(5), axis=0)) == ROWS * COLUMNS


def test_relative_attention_by_a_loop():
    """Softmax of (q_i k_j + q_i r_(i-j)) / sqrt(D_h), class token at position 0."""
    cfg = config(positions="relative", head="token")
    module = MultiHeadAttention(cfg, image_size=SIZE)
    rng, s = np.random.default_rng(0), ROWS * COLUMNS + 1
    z = rng.normal(size=(2, s, D)).astype(np.float32)
    params = filled(jax.eval_shape(module.init, jax.random.key(0), z, z)["params"])
    table = params["posembed_relative"]["pos_embedding"]
    assert table.shape == (2 * s - 1, D // 2)  # of a head, shared by the heads
    _, seen = jax.jit(
        lambda p, z: module.apply({"params": p}, z, z, mutable=["intermediates"])
    )(params, z)

    project = lambda n: (
        np.einsum("bsd,dkh->bskh", z, params[n]["kernel"])
        + params[n]["bias"].reshape(1, 1, 2, D // 2)
    )
    q, k = project("query"), project("key")
    logits = np.zeros((2, 2, s, s))
    for i in range(s):
        for j in range(s):
            for head in range(2):
                r = table[i - j + s - 1]
                key = k[:, j, head] + r.reshape(1, -1)
                logits[:, head, i, j] = (q[:, i, head] * key).sum(-1) / (D // 2) ** 0.5
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = seen["intermediates"]["attention"][0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


ALLOWED = [(p, at) for p in POSITIONS for at in ("stem", "every", "shared")]


@pytest.mark.parametrize(("positions", "at"), [*ALLOWED, ("relative", "stem")])
def test_where_the_tables_are(positions, at):
    model = models.create(config(positions=positions, position_at=at))
    images = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    paths = jax.tree_util.tree_leaves_with_path(shapes["Transformer"])
    owners = {p[0].key for p, _ in paths if "pos_embedding" in p[-1].key}
    blocks = {"encoderblock_0", "encoderblock_1"}
    if positions == "sincos2d":
        assert not owners
    elif positions == "relative" or at == "every":
        assert owners == blocks
    else:
        assert owners == {"posembed_input"}


@pytest.fixture(scope="module")
def block_inputs():
    """What the first LayerNorm of each block sees, and the parameters."""
    images = jnp.asarray(
        np.random.default_rng(0).uniform(-1, 1, (1, *SIZE, 3)), "float32"
    )

    def call(**fields):
        model = models.create(config(head="gap", **fields))
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        params = filled(shapes)
        for i in range(2):  # the blocks do nothing, so that all they add is positions
            block = params["Transformer"][f"encoderblock_{i}"]
            for dense in (
                block["MultiHeadDotProductAttention_1"]["out"],
                block["MlpBlock_3"]["Dense_1"],
            ):
                dense["kernel"] *= 0
                dense["bias"] *= 0
        options = {
            "mutable": ["intermediates"],
            "capture_intermediates": lambda module, _: module.name == "embedding",
        }
        _, seen = jax.jit(lambda p: model.apply({"params": p}, images, **options))(
            params
        )
        seen = seen["intermediates"]
        x = np.asarray(seen["embedding"]["__call__"][0]).reshape(1, -1, D)
        z = [seen["Transformer"][f"encoderblock_{i}"]["tokens"][0] for i in range(2)]
        return params["Transformer"], x, *z

    return call


def test_positions_are_added_once_at_the_stem(block_inputs):
    encoder, x, z0, z1 = block_inputs()
    table = encoder["posembed_input"]["pos_embedding"]
    np.testing.assert_allclose(z0, x + table, atol=1e-5)
    np.testing.assert_allclose(z1, z0, atol=1e-6)


def test_positions_are_added_by_every_block(block_inputs):
    encoder, x, z0, z1 = block_inputs(position_at="every")
    tables = [
        encoder[f"encoderblock_{i}"]["posembed_input"]["pos_embedding"]
        for i in range(2)
    ]
    np.testing.assert_allclose(z0, x + tables[0], atol=1e-5)
    np.testing.assert_allclose(z1, z0 + tables[1], atol=1e-5)


def test_positions_are_shared_by_every_block(block_inputs):
    encoder, x, z0, z1 = block_inputs(position_at="shared")
    table = encoder["posembed_input"]["pos_embedding"]
    np.testing.assert_allclose(z0, x + table, atol=1e-5)
    np.testing.assert_allclose(z1, z0 + table, atol=1e-5)


def test_no_positions(block_inputs):
    encoder, x, z0, _ = block_inputs(positions="none")
    assert "posembed_input" not in encoder
    np.testing.assert_array_equal(z0, x)
