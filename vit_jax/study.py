# SPDX-License-Identifier: Apache-2.0
"""Runs one of the paper's studies: a table, a figure and the log of every run.

    python -m vit_jax.study NAME --out=DIR [--scale=tiny|small|paper] [--seeds=N]
        [--data=FOLDER] [--shard=i/n] [--topology=v5e:16x16]

NAME is a key of STUDIES in ``vit_jax/studies.py``. DIR gets ``table.csv``,
``table.md``, the figure, ``log.jsonl``, ``index.html``, and under ``runs`` a workdir for
every row and seed. Start it again to continue: what is done is skipped. Machines share a
study with ``--shard=1/2`` and ``--shard=2/2``, in one DIR or in several whose ``runs``
are put together afterwards. ``--topology`` trains nothing, but compiles every row for
that slice of TPUs and prints its chip-hours; at the scale of the paper this is what
happens where there is no accelerator.
"""

import contextlib
import datetime
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from etils.epath import Path

from vit_jax import (
    benchmark,
    cli,
    config,
    costs,
    evaluate,
    hardware,
    program,
    studies,
    tpu,
    train,
)  # fmt: skip
from vit_jax.config import Config
from vit_jax.errors import PREEMPTED, Diverged, UserError
from vit_jax.scales import COMPUTE, Row, Scale, Study
from vit_jax.workdir import check_place, is_evaluation, read_metrics, write_whole

if __name__ == "__main__":
    cli.need("matplotlib")

from vit_jax.analysis import comparison, maps, report, tables
from vit_jax.analysis.subject import Subject
from vit_jax.analysis.tables import Outcome, Summary

SCALES = ("tiny", "small", "paper")
SLICE = "v5e:16x16"  # that the scale of the paper is planned for, if none is named
# Of a row that is named in another folder, or read with other workers.
_PLACES = ("data.path", "pretrained")


class Run(NamedTuple):
    """One row with one seed."""

    name: str
    row: Row
    seed: int
    workdir: Path
    cfg: Config


class Folder:
    """Everything of one study in one folder."""

    def __init__(self, name: str, study: Study, scale: Scale, out: str):
        self.name, self.study, self.scale = name, study, scale
        check_place("--out", out)
        self.path = Path(os.path.expanduser(out))
        self._claim()

    def _claim(self) -> None:
        """Refuses a folder that holds something else."""
        about = {"study": self.name, "scale": self.scale.name}
        mark = self.path / "study.json"
        try:
            if mark.exists():
                found = json.loads(mark.read_text())
                if found != about:
                    raise UserError(
                        f"--out={self.path} holds the study {found.get('study')!r} at the "
                        f"scale {found.get('scale')!r}, not {self.name!r} at "
                        f"{self.scale.name!r}: give another folder"
                    )
                return
            held = any(self.path.iterdir()) if self.path.exists() else False
            if held and not (self.path / "runs").is_dir():
                raise UserError(
                    f"--out={self.path} holds other files and no study: give a new folder"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            mark.write_text(json.dumps(about) + "\n")
        except (OSError, ValueError, AttributeError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f"--out={self.path} cannot be used: {e}") from e

    def run(self, name: str, seed: int) -> Run:
        row = self.study.rows[name]
        cfg = config.replace(row.cfg, seed=seed)
        if row.after:
            before = self.run(row.after, seed).workdir
            cfg = config.replace(cfg, pretrained=str(before))
        slug = re.sub(r"[^\w.+-]+", "_", name)
        return Run(name, row, seed, self.path / "runs" / slug / f"seed_{seed}", cfg)

    def outcome(self, run: Run) -> Outcome | None:
        """Of a run that is done; None: it is not.

        Raises:
          UserError: it was done with another config.
        """
        path = run.workdir / "result.json"
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            old = config.from_dict(found["config"])
            metrics = {
                k: math.nan if v is None else v for k, v in found["metrics"].items()
            }
            done = Outcome(metrics, found["diverged"])
        except (OSError, ValueError, LookupError, AttributeError) as e:
            raise UserError(f"{path} cannot be read ({e}): remove it") from e
        changes = config.difference(old, run.cfg)
        other = [
            f"{k}: {a!r} -> {b!r}" for k, (a, b) in changes.items() if k not in _PLACES
        ]
        if other:
            raise UserError(
                f"--out={self.path} holds a run of {run.name!r} with another config "
                f"({'; '.join(other)[:300]}): give another folder"
            )
        return done


def units(study: Study, seeds: int, shard: tuple[int, int]) -> list[tuple[str, int]]:
    """The (row, seed) pairs of a shard, in an order in which they can be done. Rows that
    follow another go with it."""
    index, count = shard
    found, number = [], 0
    for seed in range(seeds):
        for name, row in study.rows.items():
            if row.after:
                continue
            if number % count == index % count:
                found += [(n, seed) for n in _with_followers(study, name)]
            number += 1
    return found


def _with_followers(study: Study, name: str) -> list[str]:
    following = [n for n, row in study.rows.items() if row.after == name]
    return [name, *(x for n in following for x in _with_followers(study, n))]


def finish(folder: Folder, run: Run) -> bool:
    """Does or continues a run, unless it is done. False: it was asked to stop."""
    if folder.outcome(run):
        return True
    before = folder.run(run.row.after, run.seed) if run.row.after else None
    start = time.process_time()
    done = Outcome({}, "")
    if before and (why := (folder.outcome(before) or done).diverged):
        done = Outcome({}, f"{before.name} diverged: {why}")
    else:
        run.workdir.mkdir(parents=True, exist_ok=True)
        log = run.workdir / "log.txt"
        try:
            with log.open("a") as f, contextlib.redirect_stdout(f):
                metrics = MEASURES[run.row.measure](run, folder.study)
            if metrics is None:
                return False
            done = Outcome(metrics, "")
        except Diverged as e:
            done = Outcome({}, str(e))
    value = done.metrics.get(folder.study.metric, math.nan)
    if not done.diverged and run.row.shown and not math.isfinite(value):
        done = Outcome(done.metrics, f"{folder.study.metric} is not finite")
    seconds = time.process_time() - start
    finite = lambda v: float(f"{v:.7g}") if math.isfinite(v) else None
    result = {
        "row": run.name,
        "seed": run.seed,
        "metrics": {k: finite(v) for k, v in done.metrics.items()},
        "diverged": done.diverged,
        "cpu_seconds": round(seconds, 1),
        "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": config.to_dict(run.cfg),
    }
    run.workdir.mkdir(parents=True, exist_ok=True)
    write_whole(run.workdir / "result.json", json.dumps(result, indent=1) + "\n")
    number = f"{folder.study.metric} {value:.4f}" if math.isfinite(value) else "done"
    shown = "diverged" if done.diverged else number
    print(
        f"{run.name}, seed {run.seed}: {shown}; {seconds:.0f} CPU seconds", flush=True
    )
    return True


# What is done with a row -------------------------------------------------------------


def _train(run: Run, study: Study) -> dict[str, float] | None:
    del study
    result = train.train(run.cfg, str(run.workdir))
    return None if result.preempted else result.metrics


def _distance(run: Run, study: Study) -> dict[str, float] | None:
    """The mean attention distance of every head, relative to uniform attention."""
    metrics = _train(run, study)
    if metrics is None:
        return None
    found = maps.distance_arrays(Subject(str(run.workdir)))
    heads = found["distance"] / found["uniform"]
    each = {
        f"distance/layer{i}/head{j}": float(heads[i, j])
        for i in range(heads.shape[0])
        for j in range(heads.shape[1])
    }
    means = heads.mean(1)
    return {
        **metrics,
        "distance/nearest": float(heads.min()),
        "distance/growth": float(means[-1] - means[0]),
        **each,
    }


def _features(run: Run, study: Study) -> dict[str, float]:
    """A classifier on the features of a checkpoint; the seed draws its examples."""
    kind, shots = (
        run.cfg.eval.evaluators[0]["type"],
        run.cfg.eval.evaluators[0]["shots"],
    )
    entry = {"type": kind, "shots": shots, "seeds": run.seed + 1}
    cfg = config.replace(run.cfg, eval__evaluators=(entry,))
    found = evaluate.evaluate(run.cfg.pretrained, cfg)
    return {study.metric: found[f"{kind}/{shots[0]}shot_seed{run.seed}"]}


def _speed(run: Run, study: Study) -> dict[str, float]:
    """Inference of this machine, and how many images its memory would hold."""
    del study
    found = benchmark.infer(run.cfg, 3, 3)
    return {
        "speed/images_per_second": found["images_per_second"],
        "speed/largest_batch": float(largest_batch(run.cfg)),
    }


MEASURES = {
    "train": _train,
    "distance": _distance,
    "features": _features,
    "speed": _speed,
}


def largest_batch(cfg: Config) -> int:
    """Images that fit at once, as the compiled forward pass of two batches tells: what
    is the same for both are parameters."""
    chip = hardware.chip_of(jax.devices()[0].device_kind)
    room = (chip.hbm_gib if chip and chip.hbm_gib else 16.0) * 2**30
    sizes = []
    for batch in (8, 16):
        p = program.build(config.replace(cfg, batch=batch))
        lowered = p.forward.lower(p.state_shape.params, p.batch_shape["image"])
        sizes.append(2**30 * benchmark.memory(lowered.compile())["peak_gib"])
    image = max(sizes[1] - sizes[0], 1) / 8
    return max(int((room - (sizes[0] - 8 * image)) / image), 0)


# What is written ---------------------------------------------------------------------


def summarize(folder: Folder, seeds: int) -> list[Summary]:
    """The rows that are shown."""
    return [
        Summary(name, row, [folder.outcome(folder.run(name, s)) for s in range(seeds)])
        for name, row in folder.study.rows.items()
        if row.shown
    ]


def log_lines(folder: Folder, seeds: int) -> Iterator[str]:
    """What the runs measured, and the loss at the end of training; nothing that another
    machine would measure differently."""
    for name in folder.study.rows:
        for seed in range(seeds):
            lines = read_metrics(str(folder.run(name, seed).workdir))
            last = [m for m in lines if "train/loss" in m][-1:]
            short = [{k: m[k] for k in ("step", "train/loss")} for m in last]
            for m in [*filter(is_evaluation, lines), *short]:
                values = {k: v if math.isfinite(v) else None for k, v in m.items()}
                yield json.dumps({"row": name, "seed": seed, **values}) + "\n"


def write(folder: Folder, seeds: int) -> None:
    """The table, the figure, the log and the page, of what is done."""
    study, out = folder.study, folder.path
    rows = summarize(folder, seeds)
    table, claims = tables.markdown(study, rows), tables.claims(study, rows)
    write_whole(out / "table.csv", tables.to_csv(study, rows))
    write_whole(out / "table.md", f"# {study.title}\n\n{table}\n{claims}")
    write_whole(out / "log.jsonl", "".join(log_lines(folder, seeds)))
    print(f"\n{study.title}, scale {folder.scale.name}\n\n{table}\n{claims}")
    pictures = {}
    if any(r.finite(study.metric) for r in rows):
        figure = comparison.draw(study.figure, drawn(folder, rows))
        path = out / f"{folder.name}.png"
        figure.savefig(path, dpi=150)
        pictures[path] = f"{study.title}: {study.metric} of every row"
    facts = {
        "scale": folder.scale.name,
        "seeds": seeds,
        "written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    page = report.write_html(
        out / "index.html", study.title, facts, pictures, {}, {"table": table, "claims": claims}
    )  # fmt: skip
    missing = sum(o is None for r in rows for o in r.outcomes)
    if missing:
        print(f"{missing} runs are not done yet: other shards, or start this again")
    print(f"wrote {page}")


def drawn(folder: Folder, rows: Sequence[Summary]) -> dict[str, Any]:
    """What the figure of a study is drawn from, as ``analysis/comparison.py`` wants
    it."""
    study = folder.study
    names = [r.name for r in rows]
    values = [r.values(study.metric) for r in rows]
    if study.figure == "bars":
        return {"names": names, "values": values, "metric": study.metric}
    if study.figure == "lines":
        x = [costs.flops(study, r.row) if study.x == COMPUTE else r.row.x for r in rows]
        return {
            "names": names, "lines": [r.row.line for r in rows], "x": x,
            "values": values, "x_label": study.x, "metric": study.metric,
        }  # fmt: skip
    seeds = range(len(rows[0].outcomes))
    if study.figure == "curves":
        logs = [
            [[(m["step"], m[study.metric]) for m in read_metrics(str(folder.run(n, s).workdir)) if study.metric in m] for s in seeds]
            for n in names
        ]  # fmt: skip
        return {"names": names, "logs": logs, "metric": study.metric}
    heads = [[_heads(o.metrics) for o in r.outcomes if o and not o.diverged] for r in rows]  # fmt: skip
    return {"names": names, "heads": heads}


def _heads(metrics: Mapping[str, float]) -> list[tuple[int, float]]:
    """Layer (from 1) and distance of every head."""
    found = {k: re.fullmatch(r"distance/layer(\d+)/head\d+", k) for k in metrics}
    return [(int(m[1]) + 1, metrics[k]) for k, m in found.items() if m]


# The command ---------------------------------------------------------------------------


def check_data(study: Study, given: str) -> None:
    """Refuses ``--data=given`` where a set that a row reads is not there."""
    for row in study.rows.values():
        path = row.cfg.data.path
        if row.cfg.data.source == "folder" and not Path(path).is_dir():
            raise UserError(
                f"--data={given}: {path} does not exist: the study reads class folders "
                "from there, train/CLASS and test/CLASS"
            )


def parse_shard(text: str) -> tuple[int, int]:
    """``1/2`` -> (1, 2). Parts may be counted from 1 or from 0."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 0 <= int(found[1]) <= int(found[2]) or not int(found[2]):
        raise UserError(f"--shard={text}: give i/n with i from 1 to n, such as 1/2")
    return int(found[1]), int(found[2])


def main(argv: list[str]) -> int:
    f = flags.FLAGS
    known = ", ".join(studies.STUDIES)
    if len(argv) != 1:
        raise UserError(f"expected the NAME of one study, got {argv}: the studies are {known}")  # fmt: skip
    make = config.choose("study", argv[0], studies.STUDIES)
    config.choose("scale in --scale", f.scale, dict.fromkeys(SCALES))
    if f.seeds < 1:
        raise UserError(f"--seeds={f.seeds}: give 1 or more")
    shard = parse_shard(f.shard)
    if not f.out:
        raise UserError("--out is missing: give the folder of the study")
    root = os.path.abspath(os.path.expanduser(f.data)) if f.data and "://" not in f.data else f.data  # fmt: skip
    if root and "://" not in root and not Path(root).is_dir():
        raise UserError(f"--data={f.data} is no folder: it must hold the data sets of the study, such as cifar10/")  # fmt: skip
    scale = Scale(f.scale, root, f.checkpoint)
    study = make(scale)
    folder = Folder(argv[0], study, scale, f.out)
    check_data(study, f.data)
    costs.check(study)
    if f.topology or (scale.paper and jax.default_backend() == "cpu"):
        if not f.topology:
            print(f"no accelerator here, so nothing is trained: planned for {SLICE}")
        costs.chip_hours(study, tpu.topology(f.topology or SLICE), f.seeds)
        return 0
    for name, seed in units(study, f.seeds, shard):
        if not finish(folder, folder.run(name, seed)):
            print("asked to stop: start the same command to continue")
            return PREEMPTED
    write(folder, f.seeds)
    return 0


def define_flags() -> None:
    flags.DEFINE_string("out", "", "Folder of the study; started again, it continues.")
    flags.DEFINE_string("scale", "tiny", "tiny: one CPU core; small: one GPU; paper.")
    flags.DEFINE_integer("seeds", 3, "Runs of every row.")
    flags.DEFINE_string("shard", "1/1", "i/n: only the i-th of n parts of the runs.")
    flags.DEFINE_string(
        "data", "", "Folder of the data sets, such as cifar10/ and mnist/ as class "
        "folders; without it, tiny uses scikit-learn's digits.",
    )  # fmt: skip
    flags.DEFINE_string(
        "checkpoint", "", "A pre-trained model, for the study transfer."
    )
    flags.DEFINE_string(
        "topology", "", "Train nothing, plan for these TPUs, such as v5e:16x16."
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
