# SPDX-License-Identifier: Apache-2.0
"""A run that is killed again and again ends with the same bits as one that is left
alone.

    python tests/soak.py --kills=200 --limit=7200

Each life of the run is ended by SIGKILL or SIGTERM while it starts, compiles, trains,
evaluates or saves; after ``--limit`` seconds it is left alone. Exit status 0 if nothing
was lost: equal parameters, every step recorded once with the same loss, every evaluation
made once with the same result, and a newest checkpoint that never went back.
"""

import argparse
import collections
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# A life must not spend its time on compiling what the one before has compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from tiny import TINY  # noqa: E402

from vit_jax import config, train  # noqa: E402
from vit_jax.checkpoint import load_params  # noqa: E402
from vit_jax.errors import PREEMPTED  # noqa: E402
from vit_jax.workdir import read_metrics  # noqa: E402

EVALUATE, SAVE = 16, 10  # steps between them
PHASES = ("start", "compile", "train", "evaluate", "save")


def live(cfg: config.Config, workdir: Path, log: Path) -> None:
    """One life of the run, in a process of its own."""
    with open(log, "a", buffering=1) as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    try:
        status = PREEMPTED if train.train(cfg, str(workdir)).preempted else 0
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


class Run:
    """One command, started as often as it takes.

    Its processes are forked from this one, which has imported everything and touched no
    device, so that a life costs a second or two.
    """

    def __init__(self, workdir: Path, steps: int):
        self.workdir, self.steps = workdir, steps
        self.log = workdir.with_suffix(".log")
        self.cfg = config.replace(
            TINY, steps=steps, log_every=1, eval__every=EVALUATE,
            checkpoint__every=SAVE, optim__polyak=0.9,
        )  # fmt: skip

    def start(self) -> None:
        self.printed = self.log.stat().st_size if self.log.exists() else 0
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(
            target=live, args=(self.cfg, self.workdir, self.log)
        )
        self.process.start()

    def wait(self, seconds: float | None = None) -> int:
        """Exit status, or minus the signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.output()
        return self.process.exitcode

    def output(self) -> str:
        """What this life printed."""
        with open(self.log) as f:
            f.seek(self.printed)
            return f.read()

    def trained(self) -> list[dict]:
        return [m for m in read_metrics(str(self.workdir)) if "train/loss" in m]

    def evaluated(self) -> list[tuple]:
        rows = [m for m in read_metrics(str(self.workdir)) if "test/loss" in m]
        return [(m["step"], m["test/accuracy"], m["test/loss"]) for m in rows]

    def saved(self) -> int:
        """The newest complete checkpoint."""
        folder = self.workdir / "checkpoints"
        names = [p.name for p in folder.iterdir()] if folder.exists() else []
        return max((int(n) for n in names if n.isdigit()), default=0)

    def saving(self) -> bool:
        folder = self.workdir / "checkpoints"
        return folder.exists() and any("tmp" in p.name for p in folder.iterdir())

    def wait_for(self, phase: str, rng: random.Random) -> bool:
        """Returns inside the phase; False if the run ended before."""
        if phase == "start":
            return self._sleep(rng.uniform(0.0, 2.0))
        if phase == "compile":
            begun = lambda: any(x in self.output() for x in ("initialize ", "restore "))
            return self._until(begun) and self._sleep(rng.uniform(0.0, 0.5))
        if not self._until(lambda: "first batch " in self.output()):
            return False
        first = len(self.trained())
        if phase == "train":
            wanted = first + rng.randint(1, EVALUATE)
            return self._until(lambda: len(self.trained()) >= wanted)
        if phase == "evaluate":
            return self._until(
                lambda: (n := len(self.trained())) > first and n % EVALUATE == 0
            )
        return self._until(self.saving)

    def _sleep(self, seconds: float) -> bool:
        time.sleep(seconds)
        return self.process.is_alive()

    def _until(self, condition) -> bool:
        deadline = time.monotonic() + 300
        while self.process.is_alive() and not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"the run stood still for 300 s:\n{self.output()}")
            time.sleep(0.004)
        return self.process.is_alive()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--limit", type=float, default=7200, help="seconds after which it kills no more"
    )
    args = parser.parse_args()
    rng, begun = random.Random(args.seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    straight, killed = (
        Run(folder / "straight", args.steps),
        Run(folder / "killed", args.steps),
    )
    straight.start()
    if straight.wait():
        raise SystemExit(straight.output())
    print(
        f"undisturbed run: {args.steps} steps in {time.monotonic() - begun:.0f} s",
        flush=True,
    )

    ends, problems = collections.Counter(), []
    kills = lost = 0
    while True:
        before = killed.saved()
        killed.start()
        if kills >= args.kills or time.monotonic() - begun > args.limit:
            status = killed.wait()
            break
        phase, sent = (
            PHASES[kills % len(PHASES)],
            rng.choice([signal.SIGKILL, signal.SIGTERM]),
        )
        if not killed.wait_for(phase, rng):
            status = killed.wait()
            break
        os.kill(int(killed.process.pid or 0), sent)
        status = killed.wait(120)
        kills += 1
        ends[phase, sent.name, status] += 1
        trained, after = len(killed.trained()), killed.saved()
        lost += max(trained - after, 0)
        print(
            f"{kills:3} {phase:<9} {sent.name} -> {status:4}  trained to {trained}, saved to {after}",
            flush=True,
        )
        if after < before:
            problems.append(f"the newest checkpoint went from {before} back to {after}")
        if status not in (75, -sent):
            problems.append(
                f"{sent.name} while it was to {phase} ended with {status}: {killed.output()[-500:]}"
            )
        if "asked to stop: saving" in killed.output() and trained != after:
            problems.append(f"told to stop after step {trained}, it saved {after}")
    if status:
        problems.append(f"the last life ended with {status}: {killed.output()[-2000:]}")
    if kills < args.kills and time.monotonic() - begun < args.limit:
        problems.append(f"it was done after {kills} kills: give more --steps")

    expected, found = straight.trained(), killed.trained()
    if [m["step"] for m in found] != list(range(1, args.steps + 1)):
        problems.append("some step is recorded twice or not at all")
    if [m["train/loss"] for m in found] != [m["train/loss"] for m in expected]:
        problems.append("some step has another loss")
    if killed.evaluated() != straight.evaluated():
        problems.append(f"evaluations differ: {killed.evaluated()}")
    equal = jax.tree.map(
        np.array_equal,
        load_params(str(straight.workdir)),
        load_params(str(killed.workdir)),
    )
    if not all(jax.tree.leaves(equal)):
        problems.append("parameters differ")
    for (phase, name, status), n in sorted(ends.items()):
        print(f"{n:3} x {name} during {phase:<9} exit status {status}")
    print(
        f"{kills} kills in {time.monotonic() - begun:.0f} s, {lost} steps trained again; ",
        end="",
    )
    print(
        "\n".join(["FAILED", *problems])
        if problems
        else f"same parameters, losses and {len(killed.evaluated())} evaluations, bit for bit"
    )
    if not problems:
        shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
