# SPDX-License-Identifier: Apache-2.0
"""Selects a learning rate as the paper does (Appendix B.1.1).

    python -m vit_jax.sweep --config=configs/finetune.py --workdir=DIR
        [--config.key=value ...] [--list]

One run per learning rate of ``config.sweep.learning_rates``, compared on a held-out
part of the training set; then ``config.sweep.seeds`` runs on the whole training set
with the best one. Their mean and standard deviation on the test set are reported and
written to ``DIR/sweep.json``. Every run is what the plain command that ``--list`` prints
does, in a workdir of its own under DIR, so runs may also be started elsewhere. Start the
sweep again to continue: finished runs are recognised by their metrics and config.
"""

import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from vit_jax import cli, config, evaluators, train
from vit_jax.config import Config
from vit_jax.errors import PREEMPTED, Diverged, UserError
from vit_jax.progress import say
from vit_jax.workdir import check_place, is_evaluation, may_change, read_metrics

# What a run that goes on may change, and one that is finished was decided by.
_DECIDES = ("steps", "optim.", "data.eval_transforms", "data.test_split")


class Run(NamedTuple):
    """One training run of the sweep."""

    learning_rate: float
    seed: int
    workdir: str
    holdout: float  # 0: trained on everything, evaluated on the test set

    def configured(self, cfg: Config) -> Config:
        return config.replace(
            cfg,
            optim__learning_rate=self.learning_rate,
            data__holdout=self.holdout,
            seed=self.seed,
        )

    def command(self, arguments: Sequence[str]) -> list[str]:
        """``arguments`` are the --config... of the sweep; what comes later wins."""
        return [
            sys.executable,
            "-m",
            "vit_jax.main",
            *arguments,
            f"--config.optim.learning_rate={self.learning_rate!r}",
            f"--config.data.holdout={self.holdout!r}",
            f"--config.seed={self.seed}",
            f"--workdir={self.workdir}",
        ]


def selection_runs(cfg: Config, workdir: str) -> list[Run]:
    """One run per learning rate of the grid; a grid of one needs no selection."""
    if len(cfg.sweep.learning_rates) == 1:
        return []
    return [
        Run(lr, cfg.seed, f"{workdir}/select/lr_{lr!r}", cfg.sweep.holdout)
        for lr in cfg.sweep.learning_rates
    ]


def final_runs(cfg: Config, workdir: str, learning_rate: float) -> list[Run]:
    """One run per seed, on the whole training set."""
    return [
        Run(
            learning_rate,
            seed,
            f"{workdir}/final/lr_{learning_rate!r}_seed_{seed}",
            0.0,
        )
        for seed in range(cfg.seed, cfg.seed + cfg.sweep.seeds)
    ]


def result(cfg: Config, run: Run) -> float | None:
    """The metric at the last step of a run; None: it is not finished."""
    if not (epath.Path(run.workdir) / "metrics.jsonl").exists():
        return None
    lines = [m for m in read_metrics(run.workdir) if m["step"] == cfg.steps]
    found = [m[cfg.sweep.metric] for m in lines if cfg.sweep.metric in m]
    if any(map(is_evaluation, lines)) and not found:
        names = sorted({key for m in lines for key in m} - {"step"})
        raise UserError(
            f"config.sweep.metric={cfg.sweep.metric!r} is not among the metrics of "
            f"{run.workdir}: choose one of {names}"
        )
    if found:
        _check_same_run(cfg, run)
    return found[-1] if found else None


def _check_same_run(cfg: Config, run: Run) -> None:
    """UserError if the result of a run is one of another config."""
    stored = epath.Path(run.workdir) / "config.json"
    if not stored.exists():
        return
    wanted = run.configured(cfg)
    given = config.difference(wanted, Config())
    other = [
        f"{k}: {old!r} -> {new!r}"
        for k, (old, new) in config.difference(config.read(stored), wanted).items()
        if not may_change(k) or k.startswith(_DECIDES)
        # What the config leaves to the data and the checkpoint is filled in.
        if k in given or not k.startswith("model.")
        if (k, new) != ("data.image_size", 0)
        if not (k == "model.name" and cfg.pretrained)
    ]
    if other:
        raise UserError(
            f"{run.workdir} holds a finished run with another config "
            f"({'; '.join(other)}): give the same values, or another --workdir"
        )


def best(results: dict[float, float], metric: str) -> float:
    """The learning rate with the best value of a metric; of equals, the smallest."""
    sign = -1 if evaluators.lower_is_better(metric) else 1
    return max(sorted(results), key=lambda lr: _rank(sign * results[lr]))


def summary(
    learning_rate: float, grid: dict[float, float], final: Sequence[float]
) -> dict[str, Any]:
    """What ``sweep.json`` holds; null stands for a rate that diverged, and for the
    deviation of a single run."""
    finite = lambda value: value if math.isfinite(value) else None
    return {
        "selection": {repr(lr): finite(value) for lr, value in grid.items()},
        "learning_rate": learning_rate,
        "final": [finite(value) for value in final],
        "mean": finite(statistics.fmean(final)),
        "std": finite(statistics.stdev(final)) if len(final) > 1 else None,
    }


def check(cfg: Config, workdir: str) -> None:
    """Refuses a sweep that could select nothing."""
    if not workdir:
        raise UserError(
            "--workdir is missing: give the folder that the sweep writes to"
        )
    check_place("--workdir", workdir)
    if not cfg.sweep.learning_rates:
        raise UserError("config.sweep.learning_rates=() is empty: give one or more")
    if len(set(cfg.sweep.learning_rates)) < len(cfg.sweep.learning_rates):
        raise UserError(
            f"config.sweep.learning_rates={cfg.sweep.learning_rates} has the same twice"
        )
    evaluators.check(cfg)
    groups = ["train", *map(evaluators.prefix, cfg.eval.evaluators)]
    if not cfg.sweep.metric.startswith(tuple(f"{g}/" for g in groups)):
        raise UserError(
            f"config.sweep.metric={cfg.sweep.metric!r}: the metrics of these runs "
            f"begin with {' or '.join(f'{g}/' for g in groups)}"
        )


def main(argv: list[str]) -> int:
    cli.only_flags(argv, "--workdir=DIR")
    # A shell leaves the ~ of --workdir=~/run as it is.
    cfg = cli.read_config()
    workdir = os.path.expanduser(flags.FLAGS.workdir).rstrip("/")
    check(cfg, workdir)
    selection = selection_runs(cfg, workdir)
    if flags.FLAGS.list:
        _list(cfg, workdir, selection)
        return 0
    grid = {}
    for i, run in enumerate(selection):
        try:
            value = _finish(cfg, run, f"selection, run {i + 1} of {len(selection)}")
        except Diverged as e:  # a learning rate that is too high must not end the sweep
            say(f"sweep        lr {run.learning_rate!r}: {e}")
            value = math.nan
        if value is None:
            return PREEMPTED
        grid[run.learning_rate] = value
    if grid and all(math.isnan(v) for v in grid.values()):
        raise UserError(f"none of the {len(grid)} runs of the grid finished: see above")
    chosen = best(grid, cfg.sweep.metric) if grid else cfg.sweep.learning_rates[0]
    final = []
    for i, run in enumerate(final_runs(cfg, workdir, chosen)):
        value = _finish(cfg, run, f"final, run {i + 1} of {cfg.sweep.seeds}")
        if value is None:
            return PREEMPTED
        final.append(value)
    found = summary(chosen, grid, final)
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    (epath.Path(workdir) / "sweep.json").write_text(text)
    _report(cfg, workdir, found)
    return 0


def config_arguments(argv: Sequence[str]) -> list[str]:
    """The ``--config...`` arguments of a command line, to be handed on."""
    kept, take = [], False
    for argument in argv:
        name, equals, _ = argument.lstrip("-").partition("=")
        is_flag = argument.startswith("-")
        if is_flag:
            take = name == "config" or name.startswith("config.")
        if take:
            kept.append(argument)
            take = is_flag and not equals
    return kept


def _list(cfg: Config, workdir: str, selection: list[Run]) -> None:
    grid = {r.learning_rate: result(cfg, r) for r in selection}
    runs = [r for r in selection if grid[r.learning_rate] is None]
    if not runs:
        known = {lr: value for lr, value in grid.items() if value is not None}
        chosen = best(known, cfg.sweep.metric) if known else cfg.sweep.learning_rates[0]
        runs = final_runs(cfg, workdir, chosen)
        runs = [r for r in runs if result(cfg, r) is None]
    for run in runs:
        print(shlex.join(run.command(config_arguments(sys.argv[1:]))))


def _finish(cfg: Config, run: Run, part: str) -> float | None:
    """Trains or continues a run unless it is finished: its metric; None: it was asked to
    stop.

    Raises:
      Diverged: its loss stayed non-finite.
    """
    name = f"{part}: lr {run.learning_rate!r} seed {run.seed}"
    if result(cfg, run) is None:
        say(f"sweep        {name}")
        if train.train(run.configured(cfg), run.workdir).preempted:
            return None
    value = result(cfg, run)
    if value is None:
        raise UserError(f"{run.workdir} has no {cfg.sweep.metric} of its last step")
    say(f"sweep        {name}: {cfg.sweep.metric} {value:.4f}")
    return value


def _report(cfg: Config, workdir: str, found: dict[str, Any]) -> None:
    for lr, value in found["selection"].items():
        mark = "  <- best" if float(lr) == found["learning_rate"] else ""
        say(f"lr {lr:<9} held-out {cfg.sweep.metric} {_text(value)}{mark}")
    seeds = len(found["final"])
    spread = f" +- {_text(found['std'])} over {seeds} seeds" if seeds > 1 else ""
    say(f"{cfg.sweep.metric} {_text(found['mean'])}{spread}; {workdir}/sweep.json")


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _rank(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _define_flags() -> None:
    flags.DEFINE_string(
        "workdir", "", "Folder of the sweep; started again, it continues."
    )
    flags.DEFINE_boolean(
        "list", False, "Only print the commands that are still to run."
    )
    cli.define_config_flag()


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
