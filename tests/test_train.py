# SPDX-License-Identifier: Apache-2.0
"""The program and the loop, in one process. Kills and signals are in test_preemption.py."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from vit_jax import config, data, train
from vit_jax.checkpoint import Checkpointer, load_params
from vit_jax.errors import UserError
from vit_jax.feed import Feed, put
from vit_jax.measure import Profiler
from vit_jax.preemption import Preemption
from vit_jax.program import build
from vit_jax.workdir import read_metrics

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def program():
    return build(TINY)


@pytest.fixture(scope="module")
def batches(program):
    source = data.train_batches(program.cfg.data, batch=TINY.batch, seed=TINY.seed)
    return [put(next(source), program.batch_sharding) for _ in range(4)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir with a whole run, and its result."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train.train(TINY, str(workdir))


def curve(cfg, devices, steps):
    """Losses of the first steps."""
    program = build(cfg, devices)
    state = program.init()
    source = data.train_batches(program.cfg.data, batch=cfg.batch, seed=cfg.seed)
    losses = []
    for _ in range(steps):
        state, metrics = program.train_step(
            state, put(next(source), program.batch_sharding)
        )
        losses.append(float(metrics["loss"]))
    return np.asarray(losses)


def test_state_counts_steps_and_is_float32(program, batches):
    state, _ = program.train_step(program.init(), batches[0])
    assert int(state.step) == 1
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_one_and_eight_devices_train_alike():
    one, eight = curve(TINY, jax.devices()[:1], 20), curve(TINY, jax.devices(), 20)
    assert one[-1] < one[0]
    # float32 sums in another order: a few 1e-7 per step
    np.testing.assert_allclose(one, eight, rtol=1e-5)


def test_micro_batches_train_like_one_batch_with_labels_that_do_not_count(batches):
    """The ignored labels fall on some of the micro-batches only."""
    label = batches[0]["label"].at[jnp.array([0, 1, 4, 5, 8])].set(-1)
    found = []
    for accumulate in (1, 2):
        program = build(config.replace(TINY, accumulate=accumulate))
        batch = put(
            jax.device_get(batches[0] | {"label": label}), program.batch_sharding
        )
        _, metrics = program.train_step(program.init(), batch)
        found.append((metrics["loss"], metrics["accuracy"], metrics["grad_norm"]))
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize(
    ("n", "step", "last", "expected"),
    [
        (10, 10, 20, True),
        (10, 11, 20, False),
        (10, 20, 20, True),
        (0, 10, 20, False),
        (0, 20, 20, True),
        (7, 20, 20, True),
    ],
)
def test_every(n, step, last, expected):
    assert train.every(n, step, last) == expected


def test_a_run_leaves_what_the_design_promises(finished):
    workdir, result = finished
    assert result.step == 20
    assert set(result.metrics) >= {"test/accuracy", "test/loss"}
    assert (
        config.from_dict(
            json.loads((workdir / "config.json").read_text())
        ).model.num_classes
        == 5
    )
    assert json.loads((workdir / "dataset.json").read_text())["num_classes"] == 5
    assert list(workdir.glob("events.out.tfevents.*"))
    assert (workdir / "checkpoints" / "20").is_dir()
    lines = read_metrics(str(workdir))
    assert [m["step"] for m in lines if "train/loss" in m] == [5, 10, 15, 20]
    assert [m["step"] for m in lines if "test/accuracy" in m] == [10, 20]
    assert {
        "train/images_per_second",
        "train/data_wait",
        "train/learning_rate",
        "train/grad_norm",
    } <= set(lines[0])


def test_the_same_command_again_only_evaluates(finished):
    workdir, result = finished
    lines = (workdir / "metrics.jsonl").read_text()
    again = train.train(TINY, str(workdir))
    assert again.metrics == result.metrics
    assert not again.preempted
    assert (workdir / "metrics.jsonl").read_text() == lines


def test_two_runs_are_bit_identical(finished, tmp_path):
    train.train(TINY, str(tmp_path))
    a, b = load_params(str(finished[0])), load_params(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_ten_and_ten_steps_are_twenty(finished, tmp_path):
    """Lines of steps after the checkpoint go, that of a killed writer as well."""
    train.train(config.replace(TINY, steps=10), str(tmp_path))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 15, "train/loss": 1.0}\n{"step": 16, "train/l')
    train.train(TINY, str(tmp_path))
    a, b = load_params(str(finished[0])), load_params(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    steps = [m["step"] for m in read_metrics(str(tmp_path)) if "train/loss" in m]
    assert steps == [5, 10, 15, 20]


@pytest.mark.parametrize(
    "change",
    [
        {"model__width": 32},
        {"data__image_size": 32},
        {"seed": 1},
        {"batch": 32},
        {"loss": "sigmoid"},
    ],
)
def test_a_workdir_of_another_run_is_refused(finished, change):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match="another config") as e:
        train.train(config.replace(TINY, **change), str(workdir))
    assert next(iter(change)).replace("__", ".") in str(e.value)
    assert (workdir / "config.json").read_text() == before


def test_a_damaged_config_is_named(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        train.train(TINY, str(tmp_path / "run"))


def test_a_workdir_in_the_home_folder(tmp_path, monkeypatch):
    """All of it: the shell does not expand the ~ of --workdir=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    train.train(config.replace(TINY, steps=3), "~/run")
    found = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints"} <= found


def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path, monkeypatch):
    scores = iter([0.9, 0.1])  # after step 8 and 16
    monkeypatch.setattr(
        train, "evaluate", lambda *_: {"test/accuracy": next(scores), "test/loss": 1.0}
    )
    cfg = config.replace(
        TINY, steps=16, eval__every=8, checkpoint__every=5, checkpoint__keep=1,
        checkpoint__keep_best="test/accuracy",
    )  # fmt: skip
    train.train(cfg, str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["16", "8"]


def test_an_unknown_best_metric_is_refused_and_nothing_lost(tmp_path):
    cfg = config.replace(TINY, steps=3, checkpoint__keep_best="test/acuracy")
    with pytest.raises(UserError, match="did you mean 'test/accuracy'"):
        train.train(cfg, str(tmp_path))
    assert (tmp_path / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize("done", [0, 4])
def test_stopped_in_the_last_evaluation_a_run_is_not_finished(
    tmp_path, monkeypatch, done
):
    cfg = config.replace(TINY, steps=4)
    if done:
        train.train(cfg, str(tmp_path))
    with monkeypatch.context() as stopped:
        stopped.setattr(train, "evaluate", lambda *_: None)
        assert train.train(cfg, str(tmp_path)).preempted
    assert (tmp_path / "checkpoints" / "4").is_dir()
    result = train.train(cfg, str(tmp_path))
    assert not result.preempted
    assert "test/accuracy" in result.metrics


def test_a_last_step_that_is_skipped_is_saved(program, tmp_path):
    def train_step(state, batch):
        state, metrics = program.train_step(state, batch)
        if int(state.step) == 4:
            metrics |= {"loss": jnp.float32(jnp.nan), "skipped": jnp.float32(1)}
        return state, metrics

    cfg = config.replace(program.cfg, steps=4, log_every=1)
    short = dataclasses.replace(program, cfg=cfg)
    info = data.describe(cfg.data)
    workdir = str(tmp_path)
    with (
        contextlib.closing(Checkpointer(workdir, cfg.checkpoint)) as checkpoints,
        contextlib.closing(Preemption()) as preemption,
    ):
        loop = train.Loop(short, info, workdir, checkpoints, preemption, train_step)
        loop.run(program.init())
        checkpoints.wait()
        assert checkpoints.latest == 4
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert None not in losses[:3]
    assert losses[3] is None


def test_an_evaluation_that_was_cut_short_is_made_up_for(tmp_path, monkeypatch):
    """Told to stop while it evaluates a run saves that step; the next one evaluates it
    first, and keep_best sees it."""
    cfg = config.replace(
        TINY, steps=6, eval__every=2, checkpoint__every=2, checkpoint__keep=1,
        checkpoint__keep_best="test/accuracy",
    )  # fmt: skip
    scores = {2: 0.5, 4: 0.9, 6: 0.1}
    seen = []

    def evaluate(program, info, state, preemption):
        step = int(state.step)
        if step == 4 and not seen.count(4):
            seen.append(4)
            preemption.signalled = True
            return None
        seen.append(step)
        return {"test/accuracy": scores[step]}

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert train.train(cfg, str(tmp_path)).preempted
    assert not train.train(cfg, str(tmp_path)).preempted
    assert seen == [2, 4, 4, 6]
    rows = [m for m in read_metrics(str(tmp_path)) if "test/accuracy" in m]
    assert [(m["step"], m["test/accuracy"]) for m in rows] == list(scores.items())
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]


def test_a_run_with_lora_continues_with_the_same_bits(tmp_path, monkeypatch):
    """The factors are part of what is saved, though the parameters are plain ones."""
    changed = dataclasses.replace(TINY.optim, name="adam", lora=2)
    cfg = config.replace(TINY, optim=changed, steps=4, eval__every=2)
    straight, stopped = str(tmp_path / "straight"), str(tmp_path / "stopped")
    train.train(cfg, straight)

    def stop(program, info, state, preemption):
        preemption.signalled = True

    with monkeypatch.context() as interrupted:
        interrupted.setattr(train, "evaluate", stop)
        assert train.train(cfg, stopped).preempted
    assert (tmp_path / "stopped" / "checkpoints" / "2").is_dir()
    assert not train.train(cfg, stopped).preempted
    for a, b in zip(
        jax.tree.leaves(load_params(straight)),
        jax.tree.leaves(load_params(stopped)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_metric_that_is_nan_does_not_cost_the_best_checkpoint(tmp_path, monkeypatch):
    losses = iter([math.nan, 0.5, 0.7, 0.8])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"test/loss": next(losses)})
    cfg = config.replace(
        TINY, steps=8, eval__every=2, checkpoint__keep=1,
        checkpoint__keep_best="test/loss",
    )  # fmt: skip
    train.train(cfg, str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]


def test_asked_to_stop_while_it_starts_a_run_leaves_before_it_restores(
    tmp_path, monkeypatch
):
    describe = data.describe

    def slow(cfg):
        os.kill(os.getpid(), signal.SIGTERM)
        return describe(cfg)

    monkeypatch.setattr(data, "describe", slow)
    for name in ("_initial_state", "Loop"):
        begun = lambda *_, name=name, **__: pytest.fail(name)
        monkeypatch.setattr(train, name, begun)
    assert train.train(TINY, str(tmp_path)).preempted


def test_asked_to_stop_while_it_initializes_a_run_leaves_before_it_compiles(
    tmp_path, monkeypatch
):
    initialize = train._initial_state

    def slow(program):
        os.kill(os.getpid(), signal.SIGTERM)
        return initialize(program)

    monkeypatch.setattr(train, "_initial_state", slow)
    monkeypatch.setattr(train.Loop, "_compile", lambda *_: pytest.fail("it compiles"))
    result = train.train(TINY, str(tmp_path))
    assert (result.step, result.preempted) == (0, True)


def test_a_run_says_how_many_images_a_device_has(capsys):
    """Those of a tensor axis share theirs."""
    cfg = config.replace(TINY, sharding="tensor", mesh=(4, 2))
    train._say_sizes(build(cfg), data.describe(cfg.data))
    assert "batch 16 = 4 per device;" in capsys.readouterr().out


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(finished, tmp_path):
    """The whole way: the same parameters and metrics as without the damage."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = load_params(str(run))
    for file in (run / "checkpoints" / "20" / "params" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    train.train(TINY, str(run))
    jax.tree.map(np.testing.assert_array_equal, before, load_params(str(run)))
    losses = [
        [(m["step"], m["train/loss"]) for m in read_metrics(str(r)) if "train/loss" in m]
        for r in (finished[0], run)
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert (run / "checkpoints" / "damaged-20").is_dir()


def test_a_config_is_not_stored_before_the_checkpoint_is_restored(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    for folder in (run / "checkpoints").iterdir():
        shutil.rmtree(folder / "params")
    before = (run / "config.json").read_text()
    with pytest.raises(UserError, match="no intact checkpoint"):
        train.train(config.replace(TINY, log_every=7), str(run))
    assert (run / "config.json").read_text() == before


def test_steps_below_those_done_are_said(finished, capsys):
    train.train(config.replace(TINY, steps=12), str(finished[0]))
    assert "config.steps=12 is below step 20" in capsys.readouterr().out
    train.train(TINY, str(finished[0]))


def test_a_workdir_that_is_removed_ends_the_run(tmp_path, monkeypatch):
    workdir = tmp_path / "run"

    def evaluate(*_):
        shutil.rmtree(workdir)
        return {"test/accuracy": 0.5}

    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(UserError, match="was removed or replaced"):
        train.train(config.replace(TINY, steps=4, eval__every=2), str(workdir))
    assert not workdir.exists()


def test_the_last_lines_name_the_run_and_count_without_decimals(capsys):
    """TensorBoard would call a --logdir "."."""
    done = train.Result(4, {"test/count": 359.0}, preempted=False)
    checkpoints: Any = SimpleNamespace(latest=0)
    train._say_end(done, TINY, "runs/a", checkpoints)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["test/count", "359"]
    assert any(x.endswith("tensorboard --logdir_spec a:runs/a") for x in lines)


def test_a_lack_of_memory_names_its_causes(program):
    reason = "RESOURCE_EXHAUSTED: Out of memory allocating 125488831888 bytes."
    text = train.out_of_memory(program, reason)
    assert "117 GiB" in text
    assert "17 tokens" in text
    assert "config.sharding=fsdp" in text
    alone = train.out_of_memory(build(TINY, jax.devices()[:1]), reason)
    assert "sharding" not in alone


def test_a_profile_may_be_resumed_in_its_middle(tmp_path):
    profiler = Profiler("8:15", str(tmp_path), 20)
    profiler.step(15, {})  # resumed at step 9: there is nothing to stop
    for window in (profiler, Profiler("1:3", str(tmp_path), 20)):
        window.step(1, {})
        window.close()  # the run ended inside of the window
    with pytest.raises(UserError, match=r"config.profile='12:5'"):
        Profiler("12:5", str(tmp_path), 20)
    with pytest.raises(UserError, match=r"config.profile='0:5'.* first step is 1"):
        Profiler("0:5", str(tmp_path), 20)  # no step 0 is ever trained


def test_a_profile_of_steps_that_never_come_is_refused(tmp_path):
    cfg = config.replace(TINY, profile="21:25")
    with pytest.raises(UserError, match=r"config.profile='21:25'.*config.steps=20"):
        train.train(cfg, str(tmp_path))


@pytest.mark.parametrize("scheme", ["file", "http", "az"])
def test_a_workdir_of_an_unknown_kind_is_refused(scheme):
    with pytest.raises(UserError, match="give a local folder or a gs:// address"):
        train.train(TINY, f"{scheme}://tmp/run")


def test_the_last_lines_can_be_typed_as_they_are(capsys, tmp_path, monkeypatch):
    """Whatever the shell would make of a name, and with one where it is not given."""
    saved: Any = SimpleNamespace(latest=0, path=str)
    (tmp_path / "my run").mkdir()
    monkeypatch.chdir(tmp_path / "my run")
    for workdir in ("/tmp/a b", "."):
        train._say_end(train.Result(1, {}, False), TINY, workdir, saved)
    said = capsys.readouterr().out
    assert "vit_jax.predict '/tmp/a b' IMAGE" in said
    assert "--logdir_spec 'my run:.'" in said


def test_a_workdir_that_cannot_be_written(program, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*cannot be written"):
        train.train(TINY, str(tmp_path / "file" / "run"))


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    cfg = config.replace(TINY, steps=10, checkpoint__every=5, max_bad_steps=3)
    train.train(cfg, str(tmp_path))
    good = load_params(str(tmp_path))
    # Momentum of the good run, then steps so large that the loss overflows.
    cfg = config.replace(
        cfg, steps=40, optim__learning_rate=1e30, checkpoint__every=1000
    )
    with pytest.raises(
        UserError,
        match=r"not finite in 3 steps in a row, up to step \d+.*is finite: \S+checkpoints/10",
    ):
        train.train(cfg, str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "5"]
    jax.tree.map(np.testing.assert_array_equal, good, load_params(str(tmp_path)))


def test_feed_hands_on_order_and_errors(program):
    def source():
        yield {"image": np.zeros((16, 2), np.float32)}
        yield {"image": np.ones((16, 2), np.float32)}
        raise UserError("the third batch is bad")

    feed = Feed(source(), program.batch_sharding)
    assert [float(next(feed)["image"][0, 0]) for _ in range(2)] == [0.0, 1.0]
    with pytest.raises(UserError, match="third batch"):
        next(feed)
    feed.close()


def test_evaluation_counts_every_example_once():
    """A number of examples that the batch of 16 does not divide, on 8 devices."""
    cfg = config.replace(TINY, data__holdout=37 / 1024)
    info = data.describe(cfg.data)
    assert info.num_test == 37
    program = build(cfg, info=info)
    results = train.evaluate(program, info, program.init())
    assert results["test/count"] == info.num_test
    right = results["test/accuracy"] * info.num_test
    assert right == pytest.approx(round(right), abs=1e-4)


def test_checkpoints_restore_the_whole_state(finished):
    workdir, _ = finished
    program = build(TINY)
    checkpoints = Checkpointer(str(workdir), TINY.checkpoint)
    state = checkpoints.restore(program.state_shape)
    assert int(state.step) == 20
