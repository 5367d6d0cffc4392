# SPDX-License-Identifier: Apache-2.0
"""On eight fake devices: the same training from every strategy, state in parts, and
errors that name the knob."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vit_jax import sharding
from vit_jax.config import Config, DataConfig, ModelConfig, OptimConfig, replace
from vit_jax.errors import UserError
from vit_jax.program import build

pytestmark = pytest.mark.heavy

STEPS = 20
CONFIG = Config(
    model=ModelConfig(
        name="", width=32, depth=2, mlp_dim=64, heads=4, patch=8, num_classes=8, dropout=0.1, layers="scan"
    ),
    data=DataConfig(source="synthetic", image_size=16, num_classes=8),
    optim=OptimConfig(learning_rate=0.01, warmup=4, clip=1.0, weight_decay=0.01, polyak=0.9),
    batch=16,
    steps=STEPS,
)  # fmt: skip
VARIANTS = {
    "replicate": {},
    "zero": {"sharding": "zero"},
    "fsdp": {"sharding": "fsdp", "model__remat": "full"},
    "fsdp on 4 x 2": {"sharding": "fsdp", "mesh": (4, 2)},
    "zero on 2 x 2 x 2": {"sharding": "zero", "mesh": (2, 2, 2)},
    "tensor on 2": {"sharding": "tensor", "mesh": (4, 2)},
}


def run(cfg, steps=STEPS, start=None):
    """Losses of each step and the state after the last one, on batches that are a
    function of the step.

    Starts from ``start``, wherever that lies, or from what the program itself
    initializes.
    """
    program = build(cfg)
    with jax.set_mesh(program.mesh):
        state = (
            program.init()
            if start is None
            else jax.device_put(start, program.state_sharding)
        )
        losses = []
        for step in range(steps):
            rng = np.random.default_rng(step)
            label = rng.integers(0, 8, cfg.batch).astype(np.int32)
            image = (
                rng.integers(0, 256, (cfg.batch, 16, 16, 3)) // 2
                + 16 * label[:, None, None, None]
            )
            batch = {"image": image.astype(np.uint8), "label": label}
            state, metrics = program.train_step(
                state, jax.device_put(batch, program.batch_sharding)
            )
            losses.append(float(metrics["loss"]))
    return np.array(losses), state, program


@pytest.fixture(scope="module")
def start():
    return jax.device_get(build(CONFIG).init())


@pytest.fixture(scope="module")
def runs(start):
    """Runs by variant, each trained once however many tests look at it."""
    done = {}

    def get(name):
        if name not in done:
            # Compiling init takes as long as training: one strategy that divides the
            # state does it itself.
            own = name == "fsdp"
            done[name] = run(
                replace(CONFIG, **VARIANTS[name]), start=None if own else start
            )
        return done[name]

    return get


def share_per_device(state):
    leaves = jax.tree.leaves(state)
    return sum(x.addressable_shards[0].data.nbytes for x in leaves) / sum(
        x.nbytes for x in leaves
    )


@pytest.mark.parametrize("name", list(VARIANTS)[1:])
def test_every_strategy_trains_the_same(runs, name):
    expected, *_ = runs("replicate")
    losses, state, program = runs(name)
    assert expected[-1] < 0.9 * expected[0], "the comparison needs a model that learns"
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, state) == program.state_sharding


@pytest.mark.parametrize("name", ["zero", "fsdp", "fsdp on 4 x 2"])
def test_each_device_keeps_an_eighth_of_the_state(runs, name):
    """A little more: vectors are whole, and in a model this narrow they are 2 % of it."""
    assert 1 / 8 <= share_per_device(runs(name)[1]) < 0.16


def test_state_is_whole_along_the_other_axes(runs):
    assert share_per_device(runs("replicate")[1]) == 1.0
    assert 1 / 2 < share_per_device(runs("zero on 2 x 2 x 2")[1]) < 0.6


def test_tensor_divides_heads_and_mlp(runs):
    state = runs("tensor on 2")[1]
    block = state.params["Transformer"]["encoderblock"]
    attention, mlp = block["MultiHeadDotProductAttention_1"], block["MlpBlock_3"]
    query, out = attention["query"]["kernel"], attention["out"]["kernel"]
    assert query.sharding.spec == P(None, "column", "tensor", None)
    assert out.sharding.spec == P(None, "tensor", None, "column")
    assert mlp["Dense_0"]["kernel"].sharding.spec == P(None, "column", "tensor")
    assert "tensor" in mlp["Dense_1"]["kernel"].sharding.spec[1]


@pytest.mark.parametrize("strategy", ["fsdp", "tensor"])
def test_the_gate_of_an_mlp_lies_like_what_it_gates(strategy):
    cfg = replace(CONFIG, sharding=strategy, mesh=(4, 2), model__mlp="swiglu")
    params = build(cfg).state_sharding.params
    mlp = params["Transformer"]["encoderblock"]["MlpBlock_3"]
    assert mlp["gate"] == mlp["Dense_0"]
    assert re.fullmatch(sharding.CAST, "MlpBlock_3/gate/kernel")


def test_moments_lie_where_their_parameter_does(runs):
    state = runs("tensor on 2")[1]
    adam = next(s for s in state.opt_state if hasattr(s, "mu"))
    places = [
        jax.tree.map(lambda x: x.sharding, tree)
        for tree in (state.params, adam.mu, adam.nu, state.ema)
    ]
    assert all(p == places[0] for p in places)


ADAFACTOR = replace(
    CONFIG,
    optim__name="adafactor",
    model__width=64,
    model__mlp_dim=128,
    model__dropout=0.0,
)


def test_factored_moments_are_whole():
    """Their paths end like those of parameters, their shapes do not: in a model of 4
    heads and a bias (4, D_h) nothing of shape (1,) or (D,) can be divided among them."""
    cfg = replace(ADAFACTOR, sharding="tensor", mesh=(4, 2))
    shape = build(cfg).state_shape
    paths = jax.tree_util.tree_leaves_with_path
    params = {jax.tree_util.keystr(k): x for k, x in paths(shape.params)}
    kinds = set()
    for path, x in paths(shape.opt_state):
        name = jax.tree_util.keystr(path)
        own = next((p for k, p in params.items() if name.endswith(k)), None)
        same = own is not None and own.shape == x.shape
        kinds.add(same)
        assert x.sharding.spec == (own.sharding.spec if same else P()), name
    assert kinds == {True, False}


def test_adafactor_trains_the_same():
    cfg = replace(ADAFACTOR, model__depth=1)
    start = jax.device_get(build(cfg).init())
    expected, *_ = run(cfg, 8, start)
    losses, *_ = run(replace(cfg, sharding="tensor", mesh=(4, 2)), 8, start)
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_loop_and_scan_are_divided_alike():
    """The same spec per block, with and without the stacked axis in front."""
    strategy, mesh = (
        sharding.SHARDINGS["fsdp"],
        sharding.create_mesh(replace(CONFIG, sharding="fsdp", mesh=(4, 2))),
    )
    path = "Transformer/encoderblock{}/MlpBlock_3/Dense_0/kernel"
    one = sharding.storage_spec(strategy, mesh, path.format("_3"), (32, 64))
    stacked = sharding.storage_spec(strategy, mesh, path.format(""), (8, 32, 64))
    assert stacked == P(None, *one)
    assert one != P(None, None)


def test_accumulation_in_parts(start):
    """Dropout's random numbers depend on the micro-batches, so only strategies are
    compared."""
    cfg = replace(CONFIG, accumulate=2, model__dropout=0.0)
    expected, *_ = run(cfg, 5, start)
    losses, *_ = run(replace(cfg, sharding="fsdp"), 5, start)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("zero", P("column", None)), ("fsdp", P(("column", "row"), None))],
)
def test_slices_keep_copies(name, spec):
    """The network between slices carries gradients only: nothing is divided over it."""
    mesh = sharding.create_mesh(replace(CONFIG, sharding=name, mesh=(2, 2, 2)))
    strategy = sharding.SHARDINGS[name]
    assert sharding.storage_spec(strategy, mesh, "head/kernel", (64, 8)) == spec
    assert sharding.batch_sharding(mesh).spec == P(("slice", "row", "column"))


def test_forward_of_a_divided_state(runs):
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    outputs = []
    for name in ("replicate", "fsdp", "tensor on 2"):
        _, state, program = runs(name)
        outputs.append(
            program.forward(
                state.params, jax.device_put(images, program.batch_sharding)
            )["logits"]
        )
    for other in outputs[1:]:
        np.testing.assert_allclose(
            np.asarray(other), np.asarray(outputs[0]), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("saved", "restored"),
    [("replicate", "fsdp"), ("fsdp", "tensor on 2"), ("zero", "replicate")],
)
def test_restore_into_another_strategy(runs, tmp_path, saved, restored):
    from vit_jax.checkpoint import Checkpointer

    state, program = runs(saved)[1], runs(restored)[2]
    checkpoints = Checkpointer(str(tmp_path), CONFIG.checkpoint)
    checkpoints.save(state, STEPS)
    checkpoints.wait()
    found = checkpoints.restore(program.state_shape)
    checkpoints.close()
    assert jax.tree.map(lambda x: x.sharding, found) == program.state_sharding
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        found,
        state,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": (3, 2)}, r"config.mesh=\(3, 2\) is for 6 devices, but there are 8"),
        ({"mesh": (8, -1)}, r"config.mesh\[1\] is -1: it must be at least 1"),
        ({"mesh": (2, 2, 2, 1)}, r"config.mesh=\(2, 2, 2, 1\).*takes 1 to 3 numbers"),
        ({"mesh": (8,), "sharding": "tensor"}, r"config.mesh=\(8,\).*takes 2 to 4"),
        (
            {"batch": 12},
            r"config.batch=12 does not divide over 8 devices.*multiple of 8",
        ),
        (
            {"batch": 24, "accumulate": 2},
            r"config.batch=24.*config.accumulate.*multiple of 16",
        ),
        ({"sharding": "zerro"}, r"config.sharding is 'zerro': did you mean 'zero'"),
        ({"sharding": "tensor"}, r"config.sharding=tensor needs config.mesh"),
        (
            {"sharding": "tensor", "mesh": (1, 8)},
            r"config.mesh: the last number, 8, must divide the 4 heads",
        ),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(UserError, match=message):
        build(replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((64, 64, 1), "batch 64"),
        ((4096, 64, 1), "batch 4096 = 64 per device"),
        ((4096, 64, 2), "batch 4096 = 64 per device, in 2 micro-batches of 32"),
        ((8, 8, 4), "batch 8, in 4 micro-batches of 2"),
    ],
)
def test_text_of_a_batch(numbers, text):
    assert sharding.batch_text(*numbers) == text


@pytest.mark.parametrize(
    ("name", "mesh", "parts"),
    [("fsdp", (4, 2), 8), ("tensor", (2, 4), 2), ("tensor", (2, 2, 2), 4)],
)
def test_devices_along_tensor_share_images(name, mesh, parts):
    made = sharding.create_mesh(replace(CONFIG, sharding=name, mesh=mesh))
    assert sharding.batch_parts(made) == parts
