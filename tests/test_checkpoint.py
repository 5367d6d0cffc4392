# SPDX-License-Identifier: Apache-2.0
"""Saving, keeping and restoring; damage.py beside it damages every file of a real run."""

import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax import checkpoint
from vit_jax.checkpoint import Checkpointer
from vit_jax.config import CheckpointConfig
from vit_jax.errors import UserError
from vit_jax.program import State


def sharding(devices, *spec):
    return NamedSharding(Mesh(np.asarray(devices), ("data",)), P(*spec))


def make_state(value=1.0, ema=False, where=None):
    params = {"a": {"kernel": jnp.full((8, 4), value)}, "b": jnp.arange(8.0) * value}
    opt_state = ((), {"mu": jax.tree.map(jnp.zeros_like, params)}, jnp.int32(3))
    state = State(params, opt_state, jnp.int32(7), params if ema else {})
    return jax.device_put(state, where or sharding(jax.devices()[:1]))


def like(state, where=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where or x.sharding),
        state,
    )


def save(workdir, states, cfg=None, metrics=(), smallest=False):
    with_metrics = dict(metrics)
    c = Checkpointer(str(workdir), cfg or CheckpointConfig(), smallest=smallest)
    for step, state in states.items():
        c.evaluated(step, with_metrics.get(step, {}))
        c.save(state, step)
    c.wait()
    c.close()


def kept(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def test_what_is_restored_is_what_was_saved(tmp_path):
    state = make_state(2.5, ema=True)
    save(tmp_path, {7: state})
    found = Checkpointer(str(tmp_path), CheckpointConfig()).restore(like(state))
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_an_empty_workdir_restores_nothing(tmp_path):
    assert (
        Checkpointer(str(tmp_path), CheckpointConfig()).restore(like(make_state()))
        is None
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_restores_onto_another_number_of_devices(tmp_path, count):
    state = make_state(3.0, where=sharding(jax.devices()))
    save(tmp_path, {1: state})
    devices = jax.devices()[:count]
    target = like(state, sharding(devices))
    kernel = like(state.params["a"]["kernel"], sharding(devices, "data"))
    target.params["a"]["kernel"] = kernel
    found = Checkpointer(str(tmp_path), CheckpointConfig()).restore(target)
    assert found.params["a"]["kernel"].sharding.spec == P("data")
    np.testing.assert_array_equal(
        found.params["a"]["kernel"], state.params["a"]["kernel"]
    )


def test_keeps_the_newest_and_the_best(tmp_path):
    accuracy = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4}
    cfg = CheckpointConfig(keep=2, keep_best="test/accuracy")
    metrics = {s: {"test/accuracy": a} for s, a in accuracy.items()}
    save(tmp_path, {s: make_state(s) for s in accuracy}, cfg, metrics)
    assert kept(tmp_path) == ["2", "4", "5"]


def test_the_best_loss_is_the_smallest(tmp_path):
    cfg = CheckpointConfig(keep=1, keep_best="test/loss")
    metrics = {1: {"test/loss": 0.5}, 2: {"test/loss": 0.7}, 3: {"test/loss": 0.6}}
    save(tmp_path, {s: make_state(s) for s in metrics}, cfg, metrics, smallest=True)
    assert kept(tmp_path) == ["1", "3"]


@pytest.mark.parametrize("losses", [(np.nan, 0.5, 0.7, 0.8), (0.5, np.nan, 0.7, 0.8)])
def test_a_metric_that_is_nan_ranks_nowhere(losses, tmp_path):
    cfg = CheckpointConfig(keep=1, keep_best="test/loss")
    metrics = {i: {"test/loss": loss} for i, loss in enumerate(losses)}
    save(tmp_path, {s: make_state(s) for s in metrics}, cfg, metrics, smallest=True)
    assert kept(tmp_path) == [str(losses.index(0.5)), "3"]


def test_an_evaluation_that_follows_the_save_counts_as_well(tmp_path):
    """As after a restart, when the evaluation before it was cut short."""
    cfg = CheckpointConfig(keep=1, keep_best="test/accuracy")
    save(tmp_path, {1: make_state(), 2: make_state()}, cfg)
    rows = [{"step": 1, "test/accuracy": 0.1}]
    c = Checkpointer(str(tmp_path), cfg, rows)
    c.evaluated(2, {"test/accuracy": 0.9})
    c.save(make_state(), 3)
    c.wait()
    c.close()
    assert kept(tmp_path) == ["2", "3"]


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    save(tmp_path, {5: make_state(5.0)})
    partial = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "5", partial)
    assert checkpoint.load_params(str(tmp_path))["b"][1] == 5.0
    c = Checkpointer(str(tmp_path), CheckpointConfig())
    assert c.latest == 5
    c.close()
    assert not partial.exists()


@pytest.mark.parametrize("name", ["007", "²", "٧"])
def test_a_folder_that_is_not_named_like_a_step_is_none(name, tmp_path):
    save(tmp_path, {5: make_state(5.0)})
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "5", root / name)
    assert checkpoint.steps(str(tmp_path)) == [5]


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


def largest(folder):
    """Where the arrays of an item are."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)  # fmt: skip


DAMAGE = {
    "an array flipped": lambda f: flip(largest(f / "params"), 0.7),
    "the optimizer flipped": lambda f: flip(largest(f / "opt"), 0.7),
    "an array cut": lambda f: largest(f / "params").write_bytes(b"x" * 50),
    "an array emptied": lambda f: largest(f / "params").write_bytes(b""),
    "an array gone": lambda f: largest(f / "params").unlink(),
    "arrays gone": lambda f: shutil.rmtree(f / "params" / "d"),
    "the names gone": lambda f: (f / "opt" / "_METADATA").unlink(),
    "the names flipped": lambda f: flip(f / "params" / "_METADATA"),
    "a manifest gone": lambda f: (f / "params" / "manifest.ocdbt").unlink(),
    "digests flipped": lambda f: flip(f / "digests" / "metadata"),
    "digests gone": lambda f: (f / "digests" / "metadata").unlink(),
    "half deleted": lambda f: [shutil.rmtree(f / x) for x in ("params", "digests")],
}


def noise(seed):
    state = make_state()
    values = np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)
    values = jax.device_put(values, sharding(jax.devices()[:1]))
    state.params["a"]["kernel"] = state.opt_state[1]["mu"]["a"]["kernel"] = values
    return state


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    save(workdir, {1: noise(1), 2: noise(2)})
    return workdir


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_it(
    damage, two_saved, tmp_path, caplog
):
    workdir = tmp_path / "run"
    shutil.copytree(two_saved, workdir)
    DAMAGE[damage](workdir / "checkpoints" / "2")
    c = Checkpointer(str(workdir), CheckpointConfig())
    found = c.restore(like(noise(0)))
    c.close()
    assert int(found.step) == 1
    jax.tree.map(np.testing.assert_array_equal, found.params, noise(1).params)
    (line,) = [r.getMessage() for r in caplog.records if r.name == checkpoint.__name__]
    assert re.fullmatch(r"\S+/2 is damaged \(.*\): \S+/1 is used instead", line), line
    assert kept(workdir) == ["1", "damaged-2"]


@pytest.mark.parametrize("damage", ["an array flipped", "an array cut", "half deleted"])
def test_damaged_parameters_are_not_loaded(damage, two_saved, tmp_path, caplog):
    shutil.copytree(two_saved, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    DAMAGE[damage](folder / "2")
    found = checkpoint.load_params(str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, found, noise(1).params)
    assert "2 is damaged" in caplog.text
    if damage != "half deleted":
        with pytest.raises(UserError, match=r"2 is damaged .*no intact checkpoint"):
            checkpoint.load_params(str(folder / "2"))


def test_with_no_intact_checkpoint_left_the_run_refuses(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path / "run")
    for step in ("1", "2"):
        DAMAGE["an array flipped"](tmp_path / "run" / "checkpoints" / step)
    c = Checkpointer(str(tmp_path / "run"), CheckpointConfig())
    with pytest.raises(UserError, match=r"2 is damaged .*1 is damaged .*no intact"):
        c.restore(like(noise(0)))
    c.close()
    assert kept(tmp_path / "run") == ["1", "2"]


def test_a_checkpoint_of_an_earlier_version_is_read_and_said_not_to_be_verified(
    two_saved, tmp_path, caplog
):
    shutil.copytree(two_saved, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "digests")
    c = Checkpointer(str(tmp_path / "run"), CheckpointConfig())
    assert int(c.restore(like(noise(0))).step) == 2
    c.close()
    assert "cannot be verified" in caplog.text


def test_a_checkpoint_is_deleted_by_renaming_first(tmp_path, monkeypatch):
    """A process that is killed meanwhile leaves no half of a checkpoint."""
    save(tmp_path, {1: make_state(), 2: make_state()})
    monkeypatch.setattr(type(epath.Path("/")), "rmtree", lambda self: None)
    save(tmp_path, {3: make_state()})
    monkeypatch.undo()
    assert checkpoint.steps(str(tmp_path)) == [2, 3]
    save(tmp_path, {})
    assert kept(tmp_path) == ["2", "3"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_a_digest_depends_on_bits_and_places_and_not_on_sharding(dtype):
    x = np.random.default_rng(0).integers(-99, 99, (16, 6)).astype(dtype)
    digest = lambda x, where=None: checkpoint.digest(jax.device_put(x, where)).tolist()
    plain = digest(x)
    assert plain == digest(x, sharding(jax.devices(), "data"))
    others = [x.T.copy().reshape(x.shape), np.roll(x, 1, 0), x[::-1], -x]
    for i in (0, 50, 95):  # the sign alone, in one place and in two
        for places in ([i], [i, (i + 2) % 96]):
            flipped = x.copy().reshape(-1)
            flipped[places] = -flipped[places]
            others.append(flipped.reshape(x.shape))
    found = [digest(other) for other in others]
    assert plain not in found
    assert len({tuple(f) for f in found}) == len(found)


def test_a_disk_that_is_full_is_one_message(tmp_path):
    """A limit on the size of files is the only full disk that a test can make."""
    c = Checkpointer(str(tmp_path), CheckpointConfig())
    c.save(make_state(1.0), 1)
    c.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        c.save(make_state(2.0), 2)  # in the background
        with pytest.raises(UserError, match=r"cannot be written .*large.*from step 1$"):
            c.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.steps(str(tmp_path)) == [1]


def test_saving_does_not_see_later_changes(tmp_path):
    """Saving is asynchronous, and the next step reuses the memory of the state."""
    state = make_state(1.0)
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    c = Checkpointer(str(tmp_path), CheckpointConfig())
    c.save(state, 1)
    for _ in range(5):
        state = add(state)
    c.close()
    np.testing.assert_array_equal(
        checkpoint.load_params(str(tmp_path))["b"], np.arange(8.0)
    )


def test_load_params_takes_the_average_where_there_is_one(tmp_path):
    state = make_state(1.0)._replace(
        ema={"a": {"kernel": jnp.full((8, 4), 9.0)}, "b": jnp.zeros(8)}
    )
    save(tmp_path, {1: state})
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "1"):
        params = checkpoint.load_params(str(path))
        assert params["a"]["kernel"][0, 0] == 9.0
        assert isinstance(params["b"], np.ndarray)


def test_load_params_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load_params(str(tmp_path))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, {1: make_state()})
    other = make_state()
    other.params["a"]["kernel"] = jnp.zeros((8, 5))
    with pytest.raises(UserError, match="another model"):
        Checkpointer(str(tmp_path), CheckpointConfig()).restore(
            like(other, sharding(jax.devices()[:1]))
        )
