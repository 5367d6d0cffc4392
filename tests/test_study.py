# SPDX-License-Identifier: Apache-2.0
"""A study runs its rows, continues, is shared, shows what diverged, and judges claims."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
from tiny import TINY

from vit_jax import (
    config,
    costs,
    hardware,
    models,
    plan,
    program,
    studies,
    study,
    tpu,
    train,
)
from vit_jax.analysis import comparison, tables
from vit_jax.analysis.tables import Outcome, Summary
from vit_jax.config import replace
from vit_jax.errors import PREEMPTED, Diverged, UserError
from vit_jax.scales import Claim, Row, Scale, Study

pytestmark = pytest.mark.heavy

QUICK = replace(
    TINY, steps=2, eval__every=0, checkpoint__every=0, log_every=0, optim__warmup=0.0
)
WILD = replace(QUICK, steps=4, optim__learning_rate=1e38, max_bad_steps=1)


def pair(scale: Scale) -> Study:
    """A row, one that starts from it, and one that diverges."""
    del scale
    rows = {
        "first": Row(QUICK, line="a", x=1),
        "second": Row(QUICK, "first", line="a", x=2, paper="0.5"),
        "wild": Row(WILD, line="b", x=1),
    }
    claims = (Claim("more is better", ("second",), ("first",)),)
    return Study("Two rows", "test/accuracy", "bars", rows, claims)


def stand_in(cfg, workdir):
    """Takes the place of training: the same numbers for the same config."""
    if cfg.optim.learning_rate > 1:
        raise Diverged("the loss was not finite")
    value = 0.25 + cfg.seed / 8 + bool(cfg.pretrained) / 2
    line = {"step": cfg.steps, "test/accuracy": value}
    Path(workdir, "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return train.Result(cfg.steps, {"test/accuracy": value}, preempted=False)


@pytest.fixture
def run(command, monkeypatch):
    """``python -m vit_jax.study pair --out=DIR ...``, without training."""
    monkeypatch.setitem(studies.STUDIES, "pair", pair)
    monkeypatch.setattr(train, "train", stand_in)
    return lambda out, *flags, name="pair": command(
        name, f"--out={out}", "--seeds=2", *flags, module="vit_jax.study"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the study, trained in one go."""
    out = tmp_path_factory.mktemp("study")
    folder = study.Folder("pair", pair(Scale("tiny")), Scale("tiny"), str(out))
    for name, seed in study.units(folder.study, 2, (1, 1)):
        assert study.finish(folder, folder.run(name, seed))
    study.write(folder, 2)
    return out


@pytest.fixture
def undisturbed(run, tmp_path):
    assert run(tmp_path / "undisturbed").returncode == 0
    return tmp_path / "undisturbed"


def table(out):
    return list(csv.DictReader((out / "table.csv").read_text().splitlines()))


def written(out):
    return [(out / name).read_text() for name in ("table.csv", "table.md", "log.jsonl")]


def test_it_writes_a_table_with_mean_and_deviation(trained):
    rows = table(trained)
    assert [r["row"] for r in rows] == ["first", "second", "wild"]
    for r in rows[:2]:
        a, b = float(r["seed_0"]), float(r["seed_1"])
        assert float(r["mean"]) == pytest.approx((a + b) / 2, abs=1e-6)
        assert float(r["std"]) == pytest.approx(abs(a - b) / 2**0.5, abs=1e-6)
        assert r["seeds"] == "2"
    assert rows[1]["paper"] == "0.5"
    found = json.loads((trained / "runs/second/seed_1/result.json").read_text())
    assert found["metrics"]["test/accuracy"] == float(rows[1]["seed_1"])
    page = (trained / "index.html").read_text()
    assert "Two rows" in page
    assert "data:image/png" in page
    assert (trained / "pair.png").stat().st_size > 1000
    log = [json.loads(x) for x in (trained / "log.jsonl").read_text().splitlines()]
    assert {(m["row"], m["seed"]) for m in log if "test/accuracy" in m} == {
        (name, seed) for name in ("first", "second") for seed in (0, 1)
    }


def test_a_row_that_diverged_is_shown(trained):
    *_, wild = table(trained)
    assert (wild["mean"], wild["diverged"], wild["seeds"]) == ("", "2", "0")
    assert "diverged (2 of 2)" in (trained / "table.md").read_text()


def test_killed_and_continued_it_gives_the_same(
    undisturbed, run, tmp_path, monkeypatch
):
    calls = []

    def killed(cfg, workdir):
        calls.append(workdir)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stand_in(cfg, workdir)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    assert len(list(tmp_path.glob("out/runs/*/*/result.json"))) == 2
    assert run(tmp_path / "out").returncode == 0
    assert written(tmp_path / "out") == written(undisturbed)


def test_two_shards_give_the_same_in_one_folder_or_in_two(undisturbed, run, tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    ended = run(first, "--shard=1/2")
    assert "not done yet" in ended.stdout
    assert "not done" in (first / "table.md").read_text()
    shutil.copytree(first, second)
    shutil.rmtree(second / "runs")
    assert run(second, "--shard=2/2").returncode == 0
    done = lambda out: {p.parent for p in out.rglob("result.json")}
    assert len(done(first)) + len(done(second)) == 6
    shutil.copytree(second / "runs", first / "runs", dirs_exist_ok=True)
    assert run(first).returncode == 0
    assert written(first) == written(undisturbed)


def test_every_run_is_in_one_shard_with_what_it_follows():
    made = pair(Scale("tiny"))
    every = study.units(made, 3, (1, 1))
    for parts in ([(1, 2), (2, 2)], [(0, 2), (1, 2)], [(i, 5) for i in range(5)]):
        split = [study.units(made, 3, part) for part in parts]
        assert sorted(unit for part in split for unit in part) == sorted(every)
        for part in split:
            assert all(("first", s) in part for name, s in part if name == "second")


def test_asked_to_stop_it_says_so(run, tmp_path, monkeypatch):
    stopped = train.Result(1, {}, preempted=True)
    monkeypatch.setattr(train, "train", lambda cfg, workdir: stopped)
    ended = run(tmp_path)
    assert ended.returncode == PREEMPTED
    assert "start the same command to continue" in ended.stdout


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        (
            "position",
            "--seeds=1",
            "unknown study 'position': did you mean 'positions'?",
        ),
        ("pair", "--scale=huge", "unknown scale in --scale 'huge': "),
        ("pair", "--seeds=0", "--seeds=0: give 1 or more"),
        ("pair", "--shard=3/2", "--shard=3/2: give i/n"),
        ("pair", "--shard=1", "--shard=1: give i/n"),
        ("pair", "--data=/no/such", "--data=/no/such is no folder"),
        ("pair", "--topology=v9", "unknown --topology='v9'"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, name, flag, message):
    ended = run(tmp_path / "out", flag, name=name)
    assert ended.error.startswith(f"error: {message}")


def test_a_missing_data_set_is_named(run, tmp_path):
    """The folder is there, but not the set that the study reads."""
    ended = run(tmp_path / "out", f"--data={tmp_path}", name="positions")
    assert ended.error.startswith(
        f"error: --data={tmp_path}: {tmp_path}/mnist does not"
    )


def test_a_folder_of_something_else_is_refused(undisturbed, run, tmp_path):
    ended = run(undisturbed, name="positions")
    assert "holds the study 'pair' at the scale 'tiny', not 'positions'" in ended.error
    assert "at the scale 'tiny', not 'pair' at 'small'" in run(undisturbed, "--scale=small").error  # fmt: skip
    (tmp_path / "letters.txt").write_text("mine")
    assert "holds other files and no study" in run(tmp_path).error


def test_a_run_with_another_config_is_refused(trained):
    changed = lambda scale: pair(scale)._replace(rows={"first": Row(replace(QUICK, batch=8))})  # fmt: skip
    folder = study.Folder("pair", changed(Scale("tiny")), Scale("tiny"), str(trained))  # fmt: skip
    with pytest.raises(UserError, match=r"run of 'first' with another config \(batch: 16 -> 8"):  # fmt: skip
        folder.outcome(folder.run("first", 0))


def rows_of(**values):
    def outcomes(numbers) -> list[Outcome | None]:
        return [Outcome({"m": v}, "" if math.isfinite(v) else "why") for v in numbers]

    return [Summary(name, Row(QUICK), outcomes(v)) for name, v in values.items()]


def verdict(claim, **values):
    made = Study("", "m", "bars", {})
    return tables.verdict(made, claim, rows_of(**values))


def test_a_claim_is_judged_by_the_differences_of_the_seeds():
    more = Claim("", ("a",), ("b",))
    # Differences 1, 2, 3: mean 2, deviation 1, 4.303 / sqrt(3) times it is 2.48.
    assert (
        verdict(more, a=(2, 4, 6), b=(1, 2, 3)) == "not resolved: +2 ± 2.5 over 3 seeds"
    )
    assert verdict(more, a=(11, 12, 13), b=(1, 2, 3.1)).startswith("agrees: +9.97 ±")
    assert verdict(more, a=(1, 2, 3), b=(11, 12, 13.1)).startswith("opposite")
    assert verdict(more, a=(1,), b=(0,)) == "no verdict from 1 seed"
    assert verdict(more, a=(1, 2, math.nan), b=(0, 0, 0)) == "no verdict from 2 seeds"
    same = more._replace(equal=True)
    assert verdict(same, a=(2, 4, 6), b=(1, 2, 3)).startswith("no difference seen")
    assert verdict(same, a=(11, 12, 13), b=(1, 2, 3.1)).startswith("differs")
    assert verdict(Claim("", ("a",), ()), a=(5, 5.1, 5)).startswith("agrees: +5.03")


@pytest.mark.parametrize("kind", sorted(comparison.KINDS))
def test_every_kind_of_figure_stands_missing_numbers(kind):
    arrays = {
        "bars": {"names": "ab", "values": [[1, 2], [math.nan] * 2], "metric": "m"},
        "lines": {
            "names": "abc", "lines": ("l", "l", "k"), "x": (1, 2, 1), "x_label": "x",
            "values": [[1, 2], [math.nan] * 2, [math.nan, 1]], "metric": "m",
        },
        "curves": {"names": "ab", "logs": [[[(1, 0.1), (2, 0.2)], [(1, 0.2)]], [[], []]], "metric": "m"},
        "distance": {"names": "ab", "heads": [[[(1, 0.5), (2, 0.7)]], []]},
    }  # fmt: skip
    axes = comparison.draw(kind, arrays[kind]).axes
    assert axes[0].has_data()


@pytest.mark.parametrize("scale", study.SCALES)
@pytest.mark.parametrize("root", ["", "/data"])
def test_every_row_of_every_study_is_a_possible_model(scale, root):
    for make in studies.STUDIES.values():
        made = make(Scale(scale, root, "model.npz"))
        named = {n for c in made.claims for n in (*c.higher, *c.lower)}
        named |= {row.after for row in made.rows.values() if row.after}
        assert named <= set(made.rows)
        models_seen = {row.cfg.model for row in made.rows.values()}
        for cfg in models_seen:
            models.resolve(cfg)
        for row in made.rows.values():
            config.checked(row.cfg)
            assert 16 <= row.cfg.data.image_size <= 512


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(studies.STUDIES))
def test_every_row_builds_at_the_scale_of_the_paper(name, capsys):
    made = studies.STUDIES[name](Scale("paper"))
    costs.check(made)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(made.rows)


def test_planning_builds_and_compiles_every_row(run, tmp_path, monkeypatch):
    """What does not fit is planned again with everything sharded."""
    planned = []

    def planner(cfg, target):
        planned.append(cfg.sharding)
        fits = cfg.optim.learning_rate < 1 or cfg.sharding == "fsdp"
        return {
            "fits": fits, "chip_hours": 8.0, "hours": 0.5, "step_ms": 1.0, "mfu": 0.5,
            "peak_hbm_gib": 99.0, "hbm_gib": 16.0,
        }  # fmt: skip

    monkeypatch.setattr(plan, "plan", planner)
    slice_ = tpu.Topology("v5e:16x16", hardware.CHIPS["v5e"], ())
    monkeypatch.setattr(tpu, "topology", lambda name: slice_)
    ended = run(tmp_path, "--scale=paper")
    assert "planned for v5e:16x16" in ended.stdout
    assert planned == ["replicate", "replicate", "replicate", "fsdp"]
    end = [" ".join(line.split()) for line in ended.stdout.splitlines()]
    assert "all rows, 1 seed 24 chip-hours on v5e:16x16" in end
    assert "all rows, 2 seeds 48 chip-hours on v5e:16x16" in end
    assert not list(tmp_path.rglob("result.json"))


def test_speed_features_and_attention_are_measured(trained, tmp_path):
    shots = ({"type": "fewshot", "shots": (2,)},)
    source = str(trained / "runs/first/seed_0")
    rows = {
        "speed": Row(replace(QUICK, model__num_classes=5), measure="speed"),
        "features": Row(
            replace(QUICK, pretrained=source, eval__evaluators=shots),
            measure="features",
        ),
        "distance": Row(QUICK, measure="distance"),
    }
    made = Study("", "test/accuracy", "bars", rows)
    folder = study.Folder("all", made, Scale("tiny"), str(tmp_path))
    found = {}
    for name, row in rows.items():
        run = folder.run(name, 1)
        run.workdir.mkdir(parents=True)
        found[name] = study.MEASURES[row.measure](run, made)
    assert found["speed"]["speed/images_per_second"] > 0
    # 16 GiB, less the parameters, over at least the bytes of an image.
    assert 0 < found["speed"]["speed/largest_batch"] < 16 * 2**30 / (16 * 16 * 3)
    assert 0 <= found["features"]["test/accuracy"] <= 1
    heads = [v for k, v in found["distance"].items() if "/layer" in k]
    assert len(heads) == QUICK.model.depth * QUICK.model.heads
    assert min(heads) == found["distance"]["distance/nearest"]
    # At initialisation attention is nearly uniform.
    assert heads == pytest.approx([1] * len(heads), abs=0.2)


def test_the_compute_of_a_row_includes_what_it_follows():
    made = pair(Scale("tiny"))
    built = program.build(QUICK)
    own = 6 * models.macs(built.cfg.model) * QUICK.batch * QUICK.steps
    assert costs.flops(made, made.rows["first"]) == pytest.approx(own, rel=0.01)
    assert costs.flops(made, made.rows["second"]) == pytest.approx(2 * own, rel=0.01)
