# SPDX-License-Identifier: Apache-2.0
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def save(workdir, states, cfg=None, metrics=()):
    with_metrics = dict(metrics)
    c = Checkpointer(str(workdir), cfg or CheckpointConfig())
    for step, state in states.items():
        c.save(state, step, with_metrics.get(step, {}))
    c.close()


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
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [2, 4, 5]


def test_the_best_loss_is_the_smallest(tmp_path):
    cfg = CheckpointConfig(keep=1, keep_best="test/loss")
    metrics = {1: {"test/loss": 0.5}, 2: {"test/loss": 0.7}, 3: {"test/loss": 0.6}}
    save(tmp_path, {s: make_state(s) for s in metrics}, cfg, metrics)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [1, 3]


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    save(tmp_path, {5: make_state(5.0)})
    partial = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "5", partial)
    assert checkpoint.load_params(str(tmp_path))["b"][1] == 5.0
    c = Checkpointer(str(tmp_path), CheckpointConfig())
    assert c.latest == 5
    c.close()  # waits for the cleaning, which goes on beside the start of the run
    assert not partial.exists()


@pytest.mark.parametrize(
    "file", ["opt/_METADATA", "params/_METADATA", "params/manifest.ocdbt", "params/d"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it(tmp_path, file):
    save(tmp_path, {1: make_state(1.0), 2: make_state(2.0)})
    path = tmp_path / "checkpoints" / "2" / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    c = Checkpointer(str(tmp_path), CheckpointConfig())
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged .*checkpoints/1$"):
        c.restore(like(make_state()))
    c.close()
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    c = Checkpointer(str(tmp_path), CheckpointConfig())
    found = c.restore(like(make_state()))
    np.testing.assert_array_equal(found.params["b"], np.arange(8.0))


def test_a_disk_that_is_full_is_one_message(tmp_path):
    """A limit on the size of files is the only full disk that a test can make."""
    c = Checkpointer(str(tmp_path), CheckpointConfig())
    c.save(make_state(1.0), 1, {})
    c.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        c.save(make_state(2.0), 2, {})  # in the background
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
    c.save(state, 1, {})
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
