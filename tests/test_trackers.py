# SPDX-License-Identifier: Apache-2.0
"""Trackers: what they get, that a run goes on in the same one, and on without one."""

import importlib.util
import json
import logging
import shutil
import time
from typing import ClassVar

import pytest
from PIL import Image
from tiny import TINY
from trained import trained_workdir

from vit_jax import config, trackers, train
from vit_jax.errors import UserError
from vit_jax.workdir import read_metrics


class Recorder:
    """A tracker that remembers, and fails when told."""

    begun: ClassVar[list] = []

    def __init__(self, cfg, folder, known):
        self.id, self.rows, self.figures = known or "new", [], None
        self.known, self.cfg, self.fails = known, cfg, False
        Recorder.begun.append(self)

    def log(self, step, metrics):
        if self.fails:
            raise ConnectionError("the line\nis dead")
        self.rows.append({"step": step, **metrics})

    def close(self, figures):
        self.figures = [p.name for p in figures]


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Recorder)
    monkeypatch.setattr(Recorder, "begun", [])
    return Recorder


def short(steps):
    return config.replace(TINY, steps=steps, trackers=("wandb",))


@pytest.mark.heavy
def test_training_tells_what_it_writes_down(recorder, tmp_path):
    run = shutil.copytree(trained_workdir(), tmp_path / "run")
    (run / "figures").mkdir()
    (run / "figures" / "rollout.png").touch()
    cfg = config.replace(config.read(run / "config.json"), steps=5)
    train.train(config.replace(cfg, trackers=("wandb",)), str(run))
    (tracker,) = recorder.begun
    rows = [r for r in read_metrics(str(run)) if r["step"] == 5]
    assert len(rows) == 2  # of training and of evaluation
    for mine, stored in zip(tracker.rows, rows, strict=True):
        assert mine == pytest.approx(stored, rel=1e-6)
    assert tracker.cfg.steps == 5
    assert tracker.figures == ["rollout.png"]


def test_goes_on_in_the_same_run_and_begins_another_from_step_0(recorder, tmp_path):
    for start in (0, 1, 0):
        trackers.Trackers(short(2), str(tmp_path), start)
    assert [r.known for r in recorder.begun] == ["", "new", ""]


def test_one_that_fails_is_left_out_with_one_warning(recorder, tmp_path, caplog):
    class Refusing:
        def __init__(self, *args):
            raise SystemError("no account")

    cfg = config.replace(short(1), trackers=("wandb", "mlflow"))
    trackers.TRACKERS["mlflow"], mlflow = Refusing, trackers.TRACKERS["mlflow"]
    try:
        with caplog.at_level(logging.WARNING):
            all_of_them = trackers.Trackers(cfg, str(tmp_path), 0)
            recorder.begun[0].fails = True
            for step in (1, 2):
                all_of_them.log(step, {"train/loss": 1.0})
            all_of_them.close()
    finally:
        trackers.TRACKERS["mlflow"] = mlflow
    assert [r.getMessage() for r in caplog.records] == [
        "config.trackers: mlflow gets no more metrics: SystemError: no account",
        "config.trackers: wandb gets no more metrics: ConnectionError: the line is dead",
    ]
    assert recorder.begun[0].figures is None


def test_unknown_name():
    with pytest.raises(UserError, match=r"config\.trackers"):
        config.from_dict({"trackers": ["wandbb"]})


def test_damaged_ids_begin_a_new_run(recorder, tmp_path):
    (tmp_path / "trackers.json").write_text("[1")
    trackers.Trackers(short(1), str(tmp_path), 5)
    assert recorder.begun[0].known == ""
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "new"}


def twice(tmp_path):
    """Two processes of one run, the second of which continues the first."""
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "figures" / "drawn.png")
    for start in (0, 1):
        time.sleep(1.1 * start)  # folders of wandb are named by the second
        several = trackers.Trackers(short(2), str(tmp_path), start)
        several.log(start + 1, {"train/loss": 0.5 - start})
        several.close()
    return json.loads((tmp_path / "trackers.json").read_text())


@pytest.mark.skipif(
    not importlib.util.find_spec("wandb"), reason="needs the extra wandb"
)
@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = twice(tmp_path)["wandb"]
    written = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb"))
    assert len(written) == 2
    assert list((tmp_path / "wandb").glob("*/files/media/images/drawn*.png"))
    assert b"train/loss" in b"".join(p.read_bytes() for p in written)


@pytest.mark.skipif(
    not (importlib.util.find_spec("mlflow") and importlib.util.find_spec("sqlalchemy")),
    reason="needs the extra mlflow",
)
@pytest.mark.filterwarnings("default")
def test_mlflow_on_disk(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)  # where it puts figures
    monkeypatch.setattr(f"{__name__}.short", lambda n: config.replace(
        TINY, steps=n, trackers=("mlflow",)
    ))  # fmt: skip
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    try:
        run = twice(tmp_path)["mlflow"]
        history = mlflow.MlflowClient().get_metric_history(run, "train/loss")
        assert [a.path for a in mlflow.MlflowClient().list_artifacts(run, "figures")]
        assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, -0.5)]
    finally:
        mlflow.set_tracking_uri(None)
