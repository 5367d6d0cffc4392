# SPDX-License-Identifier: Apache-2.0
"""A run that is killed again and again ends with the same bits as one that is left
alone.

    python tests/soak.py --kills=30

Each life of the run is ended by SIGKILL or SIGTERM while it starts, compiles, trains,
evaluates or saves. Exit status 0 if nothing was lost: equal parameters, every step
recorded once with the same loss, and a newest checkpoint that never went back.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from vit_jax.checkpoint import load_params  # noqa: E402
from vit_jax.workdir import read_metrics  # noqa: E402

EVALUATE, SAVE = 40, 25  # steps between them
PHASES = ("start", "compile", "train", "evaluate", "save")


class Run:
    """One command, started as often as it takes."""

    def __init__(self, workdir: Path, steps: int):
        self.workdir, self.steps = workdir, steps
        self.log = workdir.with_suffix(".log")
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "vit_jax.main", "--config=tests/tiny.py", f"--workdir={self.workdir}",
            f"--config.steps={self.steps}", "--config.log_every=1", f"--config.eval.every={EVALUATE}",
            f"--config.checkpoint.every={SAVE}", "--config.model.width=48", "--config.optim.polyak=0.9",
        ]  # fmt: skip
        with open(self.log, "a") as f:
            self.printed = f.tell()
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=f)

    def output(self) -> str:
        """What this life printed."""
        with open(self.log) as f:
            f.seek(self.printed)
            return f.read()

    def trained(self) -> list[dict]:
        return [m for m in read_metrics(str(self.workdir)) if "train/loss" in m]

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
            return self._until(lambda: "first batch" in self.output()) and self._sleep(
                rng.uniform(0.0, 0.5)
            )
        if not self._until(lambda: "compile " in self.output()):
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
        return self.process.poll() is None

    def _until(self, condition) -> bool:
        deadline = time.monotonic() + 300
        while self.process.poll() is None and not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"the run stood still for 300 s:\n{self.output()}")
            time.sleep(0.004)
        return self.process.poll() is None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--limit", type=float, default=3000, help="seconds after which it gives up"
    )
    args = parser.parse_args()
    rng, begun = random.Random(args.seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    straight, killed = (
        Run(folder / "straight", args.steps),
        Run(folder / "killed", args.steps),
    )
    straight.start()
    if straight.process.wait():
        raise SystemExit(straight.output())
    print(
        f"undisturbed run: {args.steps} steps in {time.monotonic() - begun:.0f} s",
        flush=True,
    )

    ends, problems = collections.Counter(), []
    kills = lost = 0
    while True:
        if time.monotonic() - begun > args.limit:
            raise SystemExit(
                f"gave up after {kills} kills and {args.limit:.0f} s, at step {killed.saved()}"
            )
        before = killed.saved()
        killed.start()
        if kills >= args.kills:
            status = killed.process.wait()
            break
        phase, sent = (
            PHASES[kills % len(PHASES)],
            rng.choice([signal.SIGKILL, signal.SIGTERM]),
        )
        if not killed.wait_for(phase, rng):
            status = killed.process.wait()
            break
        killed.process.send_signal(sent)
        status = killed.process.wait(timeout=120)
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
        if status == 75 and trained != after:
            problems.append(f"told to stop after step {trained}, it saved {after}")
    if status:
        problems.append(f"the last life ended with {status}: {killed.output()[-2000:]}")
    if kills < args.kills:
        problems.append(f"it was done after {kills} kills: give more --steps")

    expected, found = straight.trained(), killed.trained()
    if [m["step"] for m in found] != list(range(1, args.steps + 1)):
        problems.append("some step is recorded twice or not at all")
    if [m["train/loss"] for m in found] != [m["train/loss"] for m in expected]:
        problems.append("some step has another loss")
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
        else "same parameters and losses, bit for bit"
    )
    if not problems:
        shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
