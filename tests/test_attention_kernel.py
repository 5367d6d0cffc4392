# SPDX-License-Identifier: Apache-2.0
"""The kernel for TPUs, run by its interpreter, against einsums in float32."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import apply, init
from tiny import TINY

from vit_jax import kernels, models, sharding
from vit_jax.config import replace
from vit_jax.errors import UserError
from vit_jax.kernels import Attend
from vit_jax.models import attention_tpu
from vit_jax.models.attention_tpu import Kernel
from vit_jax.program import build

MIB = 2**20
V5E = 128 * MIB


def shapes(seed=0):
    """Widths of a head, with tokens drawn at random: (images, tokens, heads, head_dim,
    heads of a block, queries of a block, dtype)."""
    draw = random.Random(seed)
    few, many = lambda: draw.randrange(16, 40), lambda: 2 * draw.randrange(17, 25) + 1
    # Heads that fill registers: two, four or a half of one, or cut by their edges.
    yield 2, few(), 2, 64, 2, 0, "float32"
    yield 1, few(), 2, 64, 2, 0, "bfloat16"
    yield 1, many(), 2, 64, 2, 16, "float32"
    yield 1, 32, 4, 64, 2, 16, "bfloat16"
    yield 1, few(), 4, 32, 4, 0, "float32"
    yield 1, few(), 2, 128, 1, 0, "float32"
    yield 1, few(), 4, 96, 4, 0, "float32"
    yield 1, many(), 4, 96, 4, 16, "bfloat16"
    # Those that do not.
    for head_dim, heads in ((48, 3), (64, 3), (72, 2), (80, 1), (88, 1), (104, 2)):
        yield 1, few(), heads, head_dim, heads, 0, "float32"


# So many heads or tokens take minutes to compile.
SLOW = [
    (1, 197, 2, 72, 2, 0, "bfloat16"),
    (1, 257, 2, 80, 2, 0, "bfloat16"),
    (1, 577, 3, 48, 3, 0, "float32"),
    (1, 20, 16, 72, 16, 0, "float32"),
    (2, 28, 8, 80, 8, 0, "bfloat16"),
    (1, 43, 8, 80, 8, 16, "float32"),
    (1, 21, 16, 88, 16, 0, "bfloat16"),
    (1, 20, 16, 104, 16, 0, "float32"),
]


def operands(images, tokens, heads, head_dim, dtype):
    width = heads * head_dim
    keys = jax.random.split(jax.random.key(tokens), 3)
    arrays = [
        jax.random.normal(keys[0], (images, tokens, width)),
        [w for w in jax.random.normal(keys[1], (3, width, heads, head_dim)) / width**0.5],
        [b for b in jax.random.normal(keys[2], (3, heads, head_dim))],
    ]  # fmt: skip
    do = jax.random.normal(jax.random.key(1), (images, tokens, width))
    return jax.tree.map(lambda x: x.astype(dtype), arrays), do.astype(dtype)


def results(attend, arrays, do):
    """Outputs, and gradients of tokens, kernels and biases."""

    @jax.jit
    def both(arrays, do):
        out, vjp = jax.vjp(attend, *arrays)
        tokens, kernels, biases = vjp(do)
        return [out, tokens, jnp.stack(kernels), jnp.stack(biases)]

    return [np.asarray(x, np.float64) for x in both(arrays, do)]


def errors(found, expected):
    return np.array([
        np.linalg.norm(a - b) / np.linalg.norm(b)
        for a, b in zip(found, expected, strict=True)
    ])  # fmt: skip


@pytest.fixture
def fixed(monkeypatch):
    """Lets a test say which blocks the kernel is made of."""

    def fix(kernel):
        monkeypatch.setattr(attention_tpu, "kernel", lambda **_: kernel)

    return fix


@pytest.mark.heavy
@pytest.mark.parametrize(
    "shape",
    [*shapes(), *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_einsums(fixed, shape):
    images, tokens, heads, head_dim, block, queries, dtype = shape
    fixed(Kernel(heads, head_dim, 1, block, queries, interpret=True))
    attend, einsum = Attend("pallas", interpret=True), Attend("einsum")
    arrays, do = operands(images, tokens, heads, head_dim, jnp.float32)
    exact = results(einsum, arrays, do)
    if dtype == "float32":
        assert errors(results(attend, arrays, do), exact).max() < 1e-4
        return
    arrays, do = operands(images, tokens, heads, head_dim, jnp.bfloat16)
    ours = errors(results(attend, arrays, do), exact)
    theirs = errors(results(einsum, arrays, do), exact)
    assert (ours <= 1.2 * theirs).all()


def test_several_images_in_a_block_are_kept_apart(fixed):
    arrays, do = operands(4, 20, 2, 64, jnp.float32)
    exact = results(Attend("einsum"), arrays, do)
    fixed(Kernel(2, 64, 2, 2, interpret=True))
    assert errors(results(Attend("pallas"), arrays, do), exact).max() < 1e-4


def test_large_logits_do_not_overflow(fixed):
    fixed(Kernel(2, 64, 1, 2, interpret=True))
    (tokens, weights, biases), do = operands(1, 24, 2, 64, jnp.float32)
    arrays = (300 * tokens, weights, biases)
    exact = results(Attend("einsum"), arrays, do)
    found = results(Attend("pallas"), arrays, do)
    assert np.isfinite(found[0]).all()
    assert errors(found[:1], exact[:1]).max() < 1e-3


# Which blocks ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "tokens", "heads", "head_dim", "block"),
    [
        # B/16, L/16 and H/14 at 224: all heads of one image or two.
        (64, 196, 12, 64, (2, 12, 0)),
        (64, 197, 16, 64, (1, 16, 0)),
        (16, 256, 16, 80, (1, 16, 0)),
        # S/16 and Ti/16: several images, three heads, which do not fill registers.
        (64, 196, 6, 64, (4, 6, 0)),
        (64, 197, 3, 64, (8, 3, 0)),
        (512, 65, 2, 64, (32, 2, 0)),
        # At 384 some of the heads, at 518 some of the queries too.
        (8, 577, 16, 64, (1, 8, 0)),
        (8, 1370, 16, 80, (1, 8, 464)),
        (8, 1025, 16, 64, (1, 8, 352)),
        # so400m, g and G.
        (16, 729, 16, 72, (1, 16, 368)),
        (16, 256, 16, 88, (1, 16, 0)),
        (16, 256, 16, 104, (1, 16, 0)),
    ],
)
def test_blocks(images, tokens, heads, head_dim, block):
    found = attention_tpu.kernel(
        images=images,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        itemsize=2,
        vmem=V5E,
    )
    assert found
    assert (found.block_images, found.block_heads, found.queries) == block
    assert found.memory(tokens, 2) < V5E


def test_a_step_is_smaller_where_there_is_less_memory():
    shape = {"images": 16, "tokens": 256, "heads": 16, "head_dim": 80, "itemsize": 2}
    found = attention_tpu.kernel(**shape, vmem=16 * MIB)
    assert found
    assert (found.block_heads, found.vmem) == (8, 0)


@pytest.mark.parametrize(
    "changes",
    [{"head_dim": 136}, {"head_dim": 20}, {"heads": 3, "tokens": 1000}, {"vmem": 0}, {"tokens": 4000, "vmem": 16 * MIB}],
)  # fmt: skip
def test_shapes_without_a_kernel(changes):
    shape = {"images": 4, "tokens": 197, "heads": 4, "head_dim": 64, "itemsize": 2, "vmem": V5E}  # fmt: skip
    assert attention_tpu.kernel(**shape)
    assert attention_tpu.kernel(**shape | changes) is None


# In a model ------------------------------------------------------------------

SMALL = replace(
    TINY,
    model__width=128,
    model__heads=2,
    model__mlp_dim=64,
    model__depth=2,
    model__layers="scan",
    steps=20,
)


@pytest.fixture
def everywhere(monkeypatch):
    """The kernel is chosen on CPUs, where its interpreter runs it."""

    def choose(cfg, mesh):
        return Attend("pallas", mesh, vmem=V5E, interpret=True), "pallas"

    monkeypatch.setattr(kernels, "choose", choose)


def losses(cfg, start):
    """Of 20 steps, and the jaxpr of a step."""
    program = build(cfg)
    draw = np.random.default_rng(0)
    found = []
    with jax.set_mesh(program.mesh):
        step = program.train_step.trace(program.state_shape, program.batch_shape)
        compiled = step.lower().compile()
        state = jax.device_put(start, program.state_sharding)
        for _ in range(cfg.steps):
            label = draw.integers(0, 5, cfg.batch).astype(np.int32)
            image = draw.integers(0, 256, (cfg.batch, 16, 16, 3)).astype(np.uint8)
            batch = {"image": image, "label": label}
            batch = jax.device_put(batch, program.batch_sharding)
            state, metrics = compiled(state, batch)
            found.append(float(metrics["loss"]))
    return np.array(found), str(step.jaxpr)


@pytest.fixture(scope="module")
def expected():
    start = jax.device_get(build(SMALL).init())
    found, program = losses(SMALL, start)
    assert "pallas_call" not in program
    return start, found


@pytest.mark.heavy
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sharding": "fsdp", "mesh": (4, 2), "model__remat": "full"},
        {"sharding": "tensor", "mesh": (4, 2), "model__remat": "dots"},
    ],
    ids=["replicate", "fsdp, full", "tensor, dots"],
)
def test_a_model_trains_the_same(everywhere, expected, changes):
    start, exact = expected
    found, program = losses(replace(SMALL, **changes), start)
    assert attention_tpu.FORWARD in program
    assert attention_tpu.BACKWARD in program
    np.testing.assert_allclose(found, exact, rtol=1e-4)


@pytest.mark.heavy
def test_who_looks_at_the_weights_sees_the_same_logits():
    cfg = models.resolve(replace(SMALL, model__num_classes=5, model__image_size=(16, 16)).model)  # fmt: skip
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1)
    params = init(models.create(cfg))
    attend = Attend("pallas", vmem=V5E, interpret=True)
    model = models.create(cfg, attend=attend)
    logits = apply(model, params, images)
    seen, out = apply(model, params, images, mutable=["intermediates"])
    assert any("attention" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(out))  # fmt: skip
    np.testing.assert_allclose(logits, seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "knob"),
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"rope": "dinov3"}, "rope"),
        ({"positions": "relative"}, "positions"),
        ({"relative_bias": True}, "relative_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_what_the_kernel_does_not_know_is_left_to_einsums(changes, knob):
    cfg = models.resolve(replace(SMALL, model__num_classes=5, model__image_size=(16, 16)).model)  # fmt: skip
    cfg = dataclasses.replace(cfg, **changes)
    assert models.beyond_attend(cfg, train=True) == f"config.model.{knob}"

    def fail(*_):
        raise AssertionError

    model = models.create(cfg, attend=fail)
    images = jnp.zeros((2, 16, 16, 3))
    key = jax.random.key(0)
    shapes = jax.eval_shape(models.create(cfg).init, key, images)
    jax.eval_shape(
        lambda p: model.apply(p, images, train=True, rngs={"dropout": key}), shapes
    )


# The choice ------------------------------------------------------------------


@pytest.mark.heavy
def test_nothing_changes_on_a_cpu():
    """Not a character of the program: its text is that of a run that asks for xla."""
    texts = []
    for attention in ("auto", "xla"):
        program = build(replace(SMALL, model__attention=attention))
        assert program.attention == ""
        lowered = program.train_step.lower(program.state_shape, program.batch_shape)
        texts.append(lowered.as_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("pallas", r"config.model.attention=pallas: it is for TPUs, and this is cpu"),
        ("cudnn", r"config.model.attention=cudnn: it is for GPUs, and this is cpu"),
    ],
)
def test_a_kernel_for_another_machine(wanted, message):
    with pytest.raises(UserError, match=message):
        build(replace(SMALL, model__attention=wanted))


class Described:
    """A TPU that is not there."""

    platform, device_kind = "tpu", "TPU v5 lite"


def mesh_of(device, mesh=None):
    found = mesh or sharding.create_mesh(SMALL)
    fake = type("Mesh", (), {"shape": found.shape, "axis_names": found.axis_names})()
    fake.devices, fake.size = np.full(1, device), found.size
    return fake


B16 = replace(SMALL, model__width=0, model__heads=0, model__mlp_dim=0, model__depth=0, model__patch=0, model__name="ViT-B/16", model__image_size=(224, 224), model__num_classes=10)  # fmt: skip


def test_a_described_tpu_is_taken_at_its_word():
    attend, line = kernels.choose(B16, mesh_of(Described()))
    assert attend
    assert (attend.kind, attend.vmem) == ("pallas", V5E)
    assert line == "pallas, which a run checks first"
    assert kernels.choose(replace(B16, model__attention="xla"), mesh_of(Described())) == (None, "")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__qk_norm": True}, "it does not know config.model.qk_norm"),
        ({"model__name": "R50x1"}, "a ResNet has no attention"),
        ({"model__image_size": (1600, 1600)}, "10001 tokens, 12 heads of 64 do not fit"),
    ],
)  # fmt: skip
def test_why_a_tpu_has_no_kernel(changes, reason):
    attend, line = kernels.choose(replace(B16, **changes), mesh_of(Described()))
    assert attend is None
    assert line.startswith(f"xla, because {reason}")
    with pytest.raises(UserError, match=f"config.model.attention=pallas: {reason}"):
        kernels.choose(replace(B16, model__attention="pallas", **changes), mesh_of(Described()))  # fmt: skip


class Clock:
    """Makes every call of the slow ones take so much longer."""

    def __init__(self, *seconds):
        self.now, self.seconds, self.calls = 0.0, seconds, 0

    def perf_counter(self):
        # Ten looks at the clock for each of the two.
        self.now += self.seconds[self.calls // 10] if self.calls % 2 else 0.0
        self.calls += 1
        return self.now


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kernel", "einsum", "line"),
    [
        (1.0, 2.0, "pallas 2.0 x xla, differs by"),
        (2.0, 1.0, "xla, because pallas is 0.5 x xla, differs by"),
    ],
)
def test_a_kernel_has_to_be_faster(monkeypatch, kernel, einsum, line):
    monkeypatch.setattr(kernels.tpu, "cached", lambda key, find_out: find_out())
    monkeypatch.setattr(kernels, "time", Clock(kernel, einsum))
    model = models.resolve(replace(SMALL, model__image_size=(16, 16)).model)
    attend = Attend("pallas", vmem=V5E, interpret=True)
    assert kernels.prove(attend, model, 2).startswith(line)


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (lambda self, qkv: qkv[..., :128] * 1.1, "xla, because pallas is "),
        (lambda self, qkv: 1 / 0, "xla, because pallas failed: ZeroDivisionError"),
    ],
    ids=["wrong", "failing"],
)
def test_a_kernel_has_to_be_right(monkeypatch, broken, line):
    """However fast."""
    monkeypatch.setattr(kernels.tpu, "cached", lambda key, find_out: find_out())
    monkeypatch.setattr(kernels, "time", Clock(0.1, 9.0))
    monkeypatch.setattr(Kernel, "forward", broken)
    model = models.resolve(replace(SMALL, model__image_size=(16, 16)).model)
    attend = Attend("pallas", vmem=V5E, interpret=True)
    assert kernels.prove(attend, model, 2).startswith(line)


@pytest.fixture
def proof(monkeypatch, tmp_path):
    """Proves an attention that only claims to be so fast and so different; says how
    often it was compared."""
    asked = []

    def prove(speed, difference, model=B16.model, mesh=None, images=8):
        def compare(attend, model, images):
            asked.append((model.heads, model.width, images))
            if speed is None:
                raise RuntimeError("INTERNAL:\n  the device is\n gone")
            return speed, difference

        monkeypatch.setattr(kernels, "_compare", compare)
        return kernels.prove(Attend("pallas", mesh, vmem=V5E), models.resolve(model), images)  # fmt: skip

    cached = {"jax_compilation_cache_dir": str(tmp_path), "jax_enable_compilation_cache": True}  # fmt: skip
    before = {name: getattr(jax.config, name) for name in cached}
    for settings in (cached, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        if settings is cached:
            yield prove, asked


def test_a_proof_is_remembered_by_shape_and_a_failure_is_not(proof):
    prove, asked = proof
    failed = "xla, because pallas failed: RuntimeError: INTERNAL: the device is gone"
    assert prove(None, 0.0) == failed
    line = "pallas 2.1 x xla, differs by 4e-03 (up to 2e-02 is rounding)"
    assert prove(2.1, 4e-3) == line
    assert prove(0.5, 1.0) == line, "as it was found before"
    assert len(asked) == 2
    assert prove(0.9, 4e-3, images=16).startswith("xla, because pallas is 0.9 x xla")
    other = dataclasses.replace(B16.model, name="ViT-S/16")
    assert prove(3.0, float("nan"), other) == (
        "xla, because pallas is 3.0 x xla, differs by nan (up to 2e-02 is rounding)"
    )
    assert len(asked) == 4


def test_a_proof_is_of_the_heads_that_a_device_has(proof):
    prove, asked = proof
    prove(2.0, 0.0, mesh=mesh_of(Described(), sharding.create_mesh(replace(SMALL, sharding="tensor", mesh=(4, 2)))))  # fmt: skip
    assert asked == [(6, 384, 8)]


@pytest.mark.parametrize(
    ("others", "line"),
    [
        ([[True, True], [True, True]], "pallas 2.1 x xla, differs by 4e-03"),
        ([[True, True], [True, False]], "xla, because pallas is 2.1 x xla, differs by 4e-03 (up to 2e-02 is rounding) here, but not everywhere"),
    ],
)  # fmt: skip
def test_one_process_that_disagrees_decides_for_all(proof, monkeypatch, others, line):
    prove, _ = proof
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather = lambda votes: np.array([votes, others[1]])
    monkeypatch.setattr(kernels.multihost_utils, "process_allgather", gather)
    assert prove(2.1, 4e-3).startswith(line)


def test_a_compiler_that_does_not_know_the_options_of_the_kernel(monkeypatch):
    """It would end the run at its first step."""
    monkeypatch.setattr(kernels.tpu, "cached", lambda key, find_out: find_out())
    options = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    monkeypatch.setattr(Attend, "compiler_options", options)
    model = models.resolve(replace(SMALL, model__image_size=(16, 16)).model)
    attend = Attend("pallas", vmem=V5E, interpret=True)
    line = kernels.prove(attend, model, 2)
    assert line.startswith("xla, because pallas failed: JaxRuntimeError: INVALID_ARGUMENT: No such compile option")  # fmt: skip


def test_images_that_do_not_divide_are_left_to_einsums():
    """Such as a single one on eight devices."""
    attend = Attend("pallas", sharding.create_mesh(SMALL), vmem=V5E, interpret=True)
    arrays, _ = operands(3, 16, 2, 64, jnp.float32)
    jaxpr = str(jax.make_jaxpr(attend)(*arrays))
    assert "pallas_call" not in jaxpr
    arrays, _ = operands(8, 16, 2, 64, jnp.float32)
    assert "pallas_call" in str(jax.make_jaxpr(attend)(*arrays))
