# SPDX-License-Identifier: Apache-2.0
"""``python -m vit_jax.evaluate`` on workdirs and files, and its mistakes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from tiny import TINY
from trained import trained_workdir

from vit_jax import cli, config, weights
from vit_jax import workdir as run_files
from vit_jax.errors import UserError
from vit_jax.evaluate import _class_names, evaluate, table
from vit_jax.evaluators import vtab
from vit_jax.workdir import read_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def workdir():
    return trained_workdir()


def with_evaluators(*entries):
    return config.replace(TINY, eval__evaluators=entries, batch=64)


def test_a_workdir_gives_the_numbers_of_its_training(workdir, tmp_path):
    metrics = evaluate(workdir, out=str(tmp_path / "out"))
    logged = [r for r in read_metrics(workdir) if "test/accuracy" in r][-1]
    assert metrics["test/count"] == 128
    assert metrics["test/accuracy"] == logged["test/accuracy"]
    np.testing.assert_allclose(metrics["test/loss"], logged["test/loss"], rtol=1e-5)
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved == {"source": workdir, "metrics": metrics}
    assert "test/accuracy" in (tmp_path / "out" / "evaluation.txt").read_text()


def test_loading_a_run_is_silent(workdir, caplog):
    """Orbax warned about each read of a checkpoint."""
    weights.load(workdir)
    assert [r.getMessage() for r in caplog.records if r.name == "absl"] == []


def test_a_run_in_a_bucket_brings_its_config(workdir, tmp_path, monkeypatch):
    """``gs://bucket`` stands for a local folder."""
    opened = []
    real = epath.Path

    def path(place):
        opened.append(str(place))
        return real(str(place).replace("gs://bucket", str(tmp_path)))

    (tmp_path / "run").symlink_to(workdir)
    monkeypatch.setattr(epath, "Path", path)
    found = run_files.stored_config("gs://bucket/run")
    assert opened == ["gs://bucket/run"]
    assert found is not None
    assert found.data.num_classes == 5
    assert run_files.stored_config("gs://bucket/none") is None
    (tmp_path / "dtd").symlink_to(workdir)
    assert 0 <= vtab.read("gs://bucket")["dtd"] <= 1


def test_results_are_not_written_to_a_folder_called_gs(workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--out=gs://b/x cannot be written: .* local"):
        evaluate(workdir, out="gs://b/x")
    assert not any(tmp_path.iterdir())


def test_a_folder_of_hugging_face_is_not_a_run(shared):
    with pytest.raises(UserError, match=r"brings no config.json of a run: say what"):
        evaluate(str(shared / "golden" / "hf_vit"))


@pytest.fixture(scope="module")
def npz(workdir, tmp_path_factory):
    found = weights.read(workdir)
    path = str(tmp_path_factory.mktemp("npz") / "model.npz")
    weights.save(path, found.cfg, found.params, found.metadata)
    return path


@pytest.mark.heavy
def test_every_evaluator_runs_on_a_file(npz, workdir, tmp_path):
    cfg = with_evaluators(
        {"type": "accuracy"},
        {"type": "accuracy", "split": "train"},
        {"type": "calibration"},
        {"type": "per_class"},
        {"type": "fewshot", "shots": (1, 2), "seeds": 2},
        {"type": "knn", "k": (3,)},
        {"type": "linear_probe", "l2": (0.1,), "iterations": 3},
    )
    metrics = evaluate(npz, cfg, out=str(tmp_path))
    assert metrics["test/accuracy"] == evaluate(workdir)["test/accuracy"]
    assert metrics["clean_train/count"] == 1024
    names = {"calibration/ece", "per_class/mean", "fewshot/2shot", "knn/accuracy_k3"}
    assert names | {"linear_probe/accuracy"} <= set(metrics)
    assert all(np.isfinite(v) for v in metrics.values())
    assert (tmp_path / "confusion.npz").exists()
    lines = (tmp_path / "evaluation.txt").read_text().splitlines()
    assert len(lines) == len(metrics)


def test_stated_normalisation_and_transforms_are_applied(npz, tmp_path):
    found = weights.read(npz)
    mean, std = [0.5] * 3, [0.5] * 3
    same = dataclasses.replace(
        found.metadata,
        transforms=({"op": "resize"}, {"op": "normalize", "mean": mean, "std": std}),
    )
    other = dataclasses.replace(
        found.metadata,
        transforms=(
            {"op": "resize"},
            {"op": "normalize", "mean": [5.0] * 3, "std": std},
        ),
    )
    losses = []
    for i, about in enumerate((same, other)):
        path = str(tmp_path / f"{i}.npz")
        weights.save(path, found.cfg, found.params, about)
        losses.append(evaluate(path, TINY)["test/loss"])
    expected = evaluate(npz, TINY)["test/loss"]
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    assert abs(losses[1] - expected) > 1e-4


@pytest.mark.heavy
def test_stored_sizes_follow_the_resolution_of_the_evaluation(npz, tmp_path):
    found = weights.read(npz)
    cut = lambda side: (
        {"op": "resize", "size": side * 5 // 4},
        {"op": "central_crop", "size": side},
    )
    about = dataclasses.replace(found.metadata, transforms=cut(16))
    path = str(tmp_path / "sizes.npz")
    weights.save(path, found.cfg, found.params, about)
    cfg = with_evaluators({"type": "knn", "k": (1,)})
    cfg = config.replace(cfg, data__source="digits", data__image_size=24)
    cfg = config.replace(cfg, data__num_classes=10)
    expected = evaluate(npz, config.replace(cfg, data__eval_transforms=cut(24)))
    assert evaluate(path, cfg) == expected


def test_a_number_that_is_not_finite_is_nan_in_text_and_null_in_json(
    npz, tmp_path, monkeypatch
):
    numbers = {"test/loss": float("nan"), "a": float("inf"), "test/count": 1234.0}
    monkeypatch.setattr("vit_jax.evaluators.run", lambda context: numbers)
    evaluate(npz, TINY, out=str(tmp_path))
    lines = (tmp_path / "evaluation.txt").read_text().splitlines()
    assert [x.split()[1] for x in lines] == ["nan", "inf", "1,234"]
    saved = (tmp_path / "evaluation.json").read_text()
    metrics = json.loads(saved, parse_constant=lambda name: pytest.fail(name))
    assert metrics["metrics"] == dict(numbers, **{"test/loss": None, "a": None})


def test_what_fails_leaves_the_results_of_before(npz, tmp_path):
    (tmp_path / "evaluation.txt").write_text("old")
    with pytest.raises(UserError, match="has 7 classes"):
        evaluate(npz, config.replace(TINY, data__num_classes=7), out=str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.txt"]
    assert (tmp_path / "evaluation.txt").read_text() == "old"


def test_names_of_the_outputs():
    own, data = ("a", "b"), ("b", "a")
    assert _class_names(own, own, 2) == own
    assert _class_names((), data, 2) == data
    assert _class_names((), data, 3) == ("0", "1", "2")
    assert _class_names(("x", "y"), data, 2) == ("x", "y")
    assert _class_names(own, data, 2) == own


def test_another_number_of_classes(npz):
    cfg = config.replace(TINY, data__num_classes=7)
    with pytest.raises(
        UserError, match=r"has 7 classes and the model 5: choose .*'fewshot'"
    ):
        evaluate(npz, cfg)
    cfg = config.replace(cfg, eval__evaluators=({"type": "knn", "k": (1,)},))
    assert 0 <= evaluate(npz, cfg)["knn/accuracy_k1"] <= 1


# VTAB ---------------------------------------------------------------------------


def test_vtab_means_are_those_of_table_9():
    for column, expected in {
        "h14_jft": (86.69, 87.00, 65.03, 77.63),
        "l16_jft": (85.56, 86.73, 62.96, 76.29),
        "l16_i21k": (83.27, 84.65, 57.50, 72.71),
    }.items():
        got = vtab.means({t: getattr(row, column) for t, row in vtab.TASKS.items()})
        names = ["mean_natural", "mean_specialized", "mean_structured", "mean"]
        np.testing.assert_allclose([got[n] for n in names], expected, atol=0.006)
    assert vtab.means({"dtd": 0.5}) == {}
    all_but_structured = {
        t: 0.5 for t, r in vtab.TASKS.items() if r.group != "structured"
    }
    assert set(vtab.means(all_but_structured)) == {"mean_natural", "mean_specialized"}


def test_vtab_table_of_workdirs(tmp_path):
    for task, accuracy in (("dtd", 0.5), ("pets", 0.75)):
        (tmp_path / task).mkdir()
        rows = [
            {"step": 1, "test/accuracy": 0.1},
            {"step": 2, "test/accuracy": accuracy},
        ]
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / task / "metrics.jsonl").write_text(text)
    found = vtab.read(str(tmp_path))
    assert found == {"dtd": 0.5, "pets": 0.75}
    lines = vtab.table(found).splitlines()
    assert len(lines) == 1 + 19 + 3 + 1
    pets = next(x for x in lines if "Pets" in x).split()
    assert pets == ["Pets", "75.00", "97.20", "96.70", "92.70"]
    assert lines[-1].split() == ["mean", "of", "19", "-", "77.63", "76.29", "72.71"]
    assert "Pets" in table({"vtab/pets": 0.75, "test/accuracy": 0.5})
    with pytest.raises(UserError, match=r"holds no workdir .* named after a VTAB task"):
        vtab.read(str(tmp_path / "none"))


# The command ----------------------------------------------------------------------


def test_the_command_prints_one_json_object(workdir, command, monkeypatch):
    monkeypatch.setattr(cli, "connect", lambda: print("as Gloo does"))
    result = command(workdir, "--json", module="vit_jax.evaluate")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["test/count"] == 128
    assert "as Gloo does" in result.stderr


def test_mistakes_in_the_command_are_one_line(npz, tmp_path, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").write_text("")
    tiny = "--config=tests/tiny.py"
    bad = "--config.eval.evaluators=({'type':'acuracy'},)"
    for args, words in (
        ([], ["expected one SOURCE"]),
        ([npz], ["brings no config.json", "--config=configs/X.py"]),
        ([npz, tiny, f"--out={tmp_path}/file"], ["--out=", "cannot be written"]),
        ([npz, tiny, bad], ["'acuracy'", "did you mean 'accuracy'"]),
    ):  # fmt: skip
        line = command(*args, module="vit_jax.evaluate").error
        for word in words:
            assert word in line


def test_nothing_to_measure(workdir):
    with pytest.raises(UserError, match=r"evaluators is empty.*fewshot"):
        evaluate(workdir, config.replace(TINY, eval__evaluators=()))
