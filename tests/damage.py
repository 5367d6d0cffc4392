# SPDX-License-Identifier: Apache-2.0
"""Damages every file of a checkpoint in five ways, and continues the run.

    python tests/damage.py

A byte is flipped at a random place or in the middle, the file is cut in two, emptied or
deleted. Then the run is restored and trained to its end, and its parameters are loaded
for prediction. Either the damage hit nothing that is read, or it is named in one line
and the checkpoint before is used; the bits at the end are those of the undisturbed run
in both cases. Exit status 0 if there was no traceback and no silent difference.
"""

import collections
import contextlib
import logging
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from tiny import TINY  # noqa: E402

from vit_jax import config, data, train  # noqa: E402
from vit_jax.checkpoint import Checkpointer, load_params  # noqa: E402
from vit_jax.errors import UserError  # noqa: E402
from vit_jax.feed import put  # noqa: E402
from vit_jax.program import build  # noqa: E402

CFG = config.replace(TINY, optim__polyak=0.9, model__width=48)
OLD, NEW, LAST = 10, 20, 23


def at(where):
    def flip(path, rng):
        content = bytearray(path.read_bytes())
        if content:
            i = rng.randrange(len(content)) if where == "random" else len(content) // 2
            content[i] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return flip


WAYS = {
    "flip": at("random"),
    "flip in the middle": at("middle"),
    "truncate": lambda p, _: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "empty": lambda p, _: p.write_bytes(b""),
    "delete": lambda p, _: p.unlink(),
}


class Lines(logging.Handler):
    """What was said to the user."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


class Run:
    """The program in this process, so that a case costs no new one."""

    def __init__(self):
        self.program = build(CFG)
        source = data.train_batches(
            self.program.cfg.data, batch=CFG.batch, seed=CFG.seed, start=OLD
        )
        self.batches = {
            step: put(next(source), self.program.batch_sharding)
            for step in range(OLD, LAST)
        }

    def restore(self, workdir):
        checkpoints = Checkpointer(str(workdir), CFG.checkpoint)
        with contextlib.closing(checkpoints):
            return checkpoints.restore(self.program.state_shape)

    def finish(self, state):
        for step in range(int(state.step), LAST):
            state, _ = self.program.train_step(state, self.batches[step])
        return jax.device_get(state)


def outcome(run, workdir, saved, end, said):
    """What a damaged workdir leads to; starts with a capital letter if that is wrong."""
    said.lines.clear()
    loaded = load_params(str(workdir))
    about_load = list(said.lines)
    said.lines.clear()
    state = run.restore(workdir)
    step = int(state.step)
    named = [line for line in said.lines if f"/{NEW} is damaged" in line]
    if step != NEW and len(named) != 1:
        return f"Not named: {said.lines}"
    if not same(run.finish(state), end):
        return f"SILENT DIFFERENCE after a restore of step {step}"
    expected = OLD if any("is damaged" in line for line in about_load) else NEW
    if not same(loaded, saved[expected]):
        return "SILENT DIFFERENCE of the parameters that are loaded"
    return f"continued from step {step}"


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="damage"))
    workdir = folder / "run"
    with contextlib.redirect_stdout(sys.stderr):
        train.train(CFG, str(workdir))
    checkpoints = workdir / "checkpoints"
    saved = {s: load_params(str(checkpoints / str(s))) for s in (OLD, NEW)}
    run = Run()
    end = run.finish(run.restore(workdir))
    said = Lines()
    logging.getLogger("vit_jax").addHandler(said)
    logging.getLogger("vit_jax").propagate = False
    rng, tally, wrong = random.Random(0), collections.Counter(), []
    files = sorted(p for p in (checkpoints / str(NEW)).rglob("*") if p.is_file())
    for file in files:
        name = file.relative_to(checkpoints / str(NEW))
        for way, damage in WAYS.items():
            case = folder / "case"
            shutil.copytree(workdir, case)
            damage(case / file.relative_to(workdir), rng)
            try:
                found = outcome(run, case, saved, end, said)
            except UserError as e:
                found = f"Refused: {e}"
            except Exception as e:  # what a user would see as a traceback
                found = f"TRACEBACK {type(e).__name__}: {e}"
            shutil.rmtree(case)
            tally[way, found if found[0].islower() else found.split(":")[0]] += 1
            if not found[0].islower():
                wrong.append(f"{name}, {way}: {found}")
    print(f"{len(files)} files x {len(WAYS)} ways = {sum(tally.values())} cases")
    for (way, found), n in sorted(tally.items()):
        print(f"{n:4} x {way:<18} {found}")
    print(
        "\n".join(["FAILED", *wrong]) if wrong else "no traceback, no silent difference"
    )
    shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
