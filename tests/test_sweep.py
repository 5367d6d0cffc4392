# SPDX-License-Identifier: Apache-2.0
"""The sweep selects, retrains, can be stopped, and prints plain commands."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags
from tiny import TINY

from vit_jax import cli, config, sweep, train
from vit_jax.config import Config, SweepConfig
from vit_jax.errors import PREEMPTED, Diverged, UserError

CFG = Config(steps=7, sweep=SweepConfig(learning_rates=(0.1, 0.01, 1.0), seeds=2))


class Runs:
    """Stands in for ``train.train``: writes the metrics of a run.

    ``accuracy(learning rate, seed, held out)`` is None where it is asked to stop, nan
    where it diverges.
    """

    def __init__(self, accuracy):
        self.accuracy, self.started = accuracy, []

    def __call__(self, cfg, workdir):
        self.started.append((workdir, cfg.data.holdout))
        lr, held_out = cfg.optim.learning_rate, cfg.data.holdout > 0
        accuracy = self.accuracy(lr, cfg.seed, held_out)
        if accuracy is None:
            return train.Result(3, {}, preempted=True)
        if math.isnan(accuracy):
            raise Diverged("it broke")
        write(workdir, [(3, 0.0), (7, accuracy)])
        return train.Result(7, {}, preempted=False)


def write(workdir, points):
    Path(workdir).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": s, "test/accuracy": a}) for s, a in points]
    (Path(workdir) / "metrics.jsonl").write_text("\n".join(lines) + "\n")


class CommandLine:
    """Runs ``sweep.main`` in this process, with a stand-in for the runs."""

    def __init__(self, monkeypatch, workdir):
        self.monkeypatch, self.workdir = monkeypatch, workdir

    def __call__(self, runs, cfg=CFG, arguments=("--config=c.py",), only_list=False):
        values = {"workdir": f"{self.workdir}/", "list": only_list}
        argv = ["sweep", *arguments, f"--workdir={self.workdir}/"]
        self.monkeypatch.setattr(train, "train", runs)
        self.monkeypatch.setattr(cli, "read_config", lambda: cfg)
        self.monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**values))
        self.monkeypatch.setattr(sys, "argv", argv)
        return sweep.main([])


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    return CommandLine(monkeypatch, tmp_path)


def peak(lr, seed, held_out):
    """0.1 is best; final runs are a little better, and differ by seed."""
    return 1 - 0.1 * abs(math.log10(lr) + 1) - (0.05 if held_out else 0.01 * seed)


def test_selects_on_the_held_out_slice_and_retrains_with_every_seed(
    command_line, capsys
):
    runs = Runs(peak)
    assert command_line(runs) == 0
    found = json.loads((command_line.workdir / "sweep.json").read_text())
    assert found["learning_rate"] == 0.1
    assert found["selection"] == pytest.approx({"0.1": 0.95, "0.01": 0.85, "1.0": 0.85})
    assert found["final"] == pytest.approx([1.0, 0.99])
    assert found["mean"] == pytest.approx(0.995)
    assert found["std"] == pytest.approx(0.01 / 2**0.5)  # of a sample
    assert [holdout for _, holdout in runs.started] == [0.1] * 3 + [0.0] * 2
    said = capsys.readouterr().out
    assert "selection, run 2 of 3: lr 0.01 seed 0\n" in said
    assert "final, run 2 of 2: lr 0.1 seed 1\n" in said


def test_continues_after_being_stopped(command_line):
    """Finished runs stay; one without its last step is started again, where it was."""
    stopped = Runs(lambda lr, *a: None if lr == 0.01 else peak(lr, *a))
    assert command_line(stopped) == PREEMPTED
    assert len(stopped.started) == 2
    write(command_line.workdir / "select/lr_0.01", [(3, 0.99)])  # step 3 of 7
    again = Runs(peak)
    assert command_line(again) == 0
    started = [workdir.split("/")[-1] for workdir, _ in again.started]
    assert started == [
        "lr_0.01", "lr_1.0", "lr_0.1_seed_0", "lr_0.1_seed_1",
    ]  # fmt: skip
    assert command_line(nothing := Runs(peak)) == 0
    assert nothing.started == []


def test_a_learning_rate_that_diverges_loses(command_line, capsys):
    runs = Runs(lambda lr, *a: math.nan if lr == 1.0 else peak(lr, *a))
    assert command_line(runs) == 0
    text = (command_line.workdir / "sweep.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    assert found["learning_rate"] == 0.1
    assert found["selection"]["1.0"] is None
    said = capsys.readouterr().out
    assert "lr 1.0: it broke" in said
    assert "lr 1.0       held-out test/accuracy none" in said


def test_all_failing_is_an_error(command_line):
    with pytest.raises(UserError, match="none of the 3 runs"):
        command_line(Runs(lambda *a: math.nan))


def test_a_final_run_that_fails_ends_the_sweep(command_line):
    failing = Runs(
        lambda lr, seed, held_out: peak(lr, 0, True) if held_out else math.nan
    )
    with pytest.raises(UserError, match="it broke"):
        command_line(failing)
    assert not (command_line.workdir / "sweep.json").exists()


def test_a_grid_of_one_needs_no_selection(command_line):
    cfg = Config(steps=7, sweep=SweepConfig(learning_rates=(0.01,), seeds=3))
    runs = Runs(peak)
    assert command_line(runs, cfg) == 0
    assert len(runs.started) == 3
    assert not any("select" in workdir for workdir, _ in runs.started)


def test_a_single_seed_has_no_deviation(command_line, capsys):
    cfg = Config(steps=7, sweep=SweepConfig(learning_rates=(0.01,), seeds=1))
    assert command_line(Runs(peak), cfg) == 0
    found = json.loads((command_line.workdir / "sweep.json").read_text())
    assert found["std"] is None
    assert "+-" not in capsys.readouterr().out


def test_list_prints_what_is_left_as_plain_commands(command_line, capsys):
    arguments = ("--config=c.py:pets", "--config.data.path=my photos", "--list")
    command_line(Runs(peak), arguments=arguments, only_list=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0] == (
        f"{sys.executable} -m vit_jax.main --config=c.py:pets "
        "'--config.data.path=my photos' --config.optim.learning_rate=0.1 "
        "--config.data.holdout=0.1 --config.seed=0 "
        f"--workdir={command_line.workdir}/select/lr_0.1"
    )
    for lr in CFG.sweep.learning_rates:
        write(command_line.workdir / f"select/lr_{lr}", [(7, peak(lr, 0, True))])
    command_line(Runs(peak), only_list=True)
    lines = capsys.readouterr().out.splitlines()
    assert [re.findall(r"seed=(\d)", line) for line in lines] == [["0"], ["1"]]
    assert all("holdout=0.0" in line and "final/lr_0.1_seed" in line for line in lines)


def test_seeds_start_at_that_of_the_config():
    runs = sweep.final_runs(Config(seed=5), "w", 0.01)
    assert [(r.seed, r.workdir) for r in runs] == [
        (s, f"w/final/lr_0.01_seed_{s}") for s in (5, 6, 7)
    ]


def test_equal_learning_rates_take_the_smaller():
    results = {0.1: 0.5, 0.01: 0.5, 0.03: math.nan}
    for metric in ("test/accuracy", "test/loss"):
        assert sweep.best(results, metric) == 0.01


@pytest.mark.parametrize(
    ("metric", "learning_rate"),
    [
        ("test/accuracy", 0.1),
        ("test/loss", 1.0),
        ("calibration/ece", 1.0),
        ("calibration/brier", 1.0),
    ],
)
def test_the_best_loss_is_the_smallest(metric, learning_rate):
    results = {0.1: 0.9, 1.0: 0.2, 0.01: 0.5, 0.03: math.nan}
    assert sweep.best(results, metric) == learning_rate


def test_the_home_folder_of_a_workdir_is_found(command_line, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    command_line.workdir = "~/runs"
    assert command_line(Runs(peak)) == 0
    assert (tmp_path / "runs" / "sweep.json").exists()


def test_config_arguments_are_handed_on():
    argv = [
        "--config=a.py",
        "--workdir=x",
        "--config.steps",
        "9",
        "--list",
        "-config.b=1",
    ]
    kept = ["--config=a.py", "--config.steps", "9", "-config.b=1"]
    assert sweep.config_arguments(argv) == kept


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (SweepConfig(learning_rates=()), "learning_rates=() is empty"),
        (SweepConfig(learning_rates=(0.1, 0.1)), "twice"),
        (SweepConfig(metric="val/loss"), "'val/loss': the metrics of these runs begin"),
    ],
)
def test_bad_sweeps_are_refused(cfg, words):
    with pytest.raises(UserError, match=re.escape(words)):
        sweep.check(Config(sweep=cfg), "w")
    with pytest.raises(UserError, match="--workdir is missing"):
        sweep.check(Config(), "")
    with pytest.raises(UserError, match="give a local folder"):
        sweep.check(Config(), "file:///w")


def test_a_metric_that_no_run_has_is_refused_with_those_there_are(command_line):
    cfg = Config(steps=7, sweep=SweepConfig(metric="test/acuracy"))
    with pytest.raises(UserError, match="test/accuracy"):
        command_line(Runs(peak), cfg)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim__clip": 0.5}, "optim.clip: 0.0 -> 0.5"),
        ({"steps": 3}, "steps: 7 -> 3"),
        ({"sweep__holdout": 0.5}, "data.holdout: 0.1 -> 0.5"),
        ({"model__width": 8}, "model.width: 0 -> 8"),
        ({"log_every": 9, "eval__every": 1, "sweep__seeds": 1, "data__path": "x"}, ""),
    ],
)
def test_a_finished_run_of_another_config_is_no_result(change, words, command_line):
    """As a run leaves it, with what the data decides filled in."""
    command_line(Runs(peak))
    for run in sweep.selection_runs(CFG, str(command_line.workdir)):
        left = config.replace(run.configured(CFG), model__num_classes=10)
        (Path(run.workdir) / "config.json").write_text(config.to_json(left))
    changed = config.replace(CFG, **change)
    if not words:
        assert command_line(Runs(peak), changed) == 0
        return
    with pytest.raises(UserError, match=re.escape(words)):
        command_line(Runs(peak), changed)


@pytest.mark.heavy
def test_a_real_sweep(command_line):
    grid = SweepConfig(learning_rates=(1e-3, 1e-9), seeds=2)
    cfg = config.replace(TINY, steps=12, sweep=grid)
    assert command_line(train.train, cfg) == 0
    found = json.loads((command_line.workdir / "sweep.json").read_text())
    assert found["learning_rate"] == 1e-3
    assert len(found["final"]) == 2
    final = command_line.workdir / "final" / "lr_0.001_seed_1"
    run = config.read(final / "config.json")
    assert (run.optim.learning_rate, run.data.holdout, run.seed) == (1e-3, 0.0, 1)
