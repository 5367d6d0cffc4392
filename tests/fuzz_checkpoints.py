# SPDX-License-Identifier: Apache-2.0
"""Thousands of damaged checkpoints: each loads, or is refused in one line, within
bounds.

    python tests/fuzz_checkpoints.py --count=5000 [--start=0]

Case i depends on i alone, so that a failure is repeated with --start=i --count=1, and a
run that was stopped continues. A case fails if it raises anything but a UserError, takes
over 30 s, or its peak memory exceeds three times the file plus 200 MiB. Exit
status 1: some failed. Not collected by pytest; ``test_weights_fuzz.py`` runs a few.
"""

import argparse
import collections
import json
import logging
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import absl.logging
import numpy as np
from flax import serialization
from safetensors import numpy as safetensors
from weights_files import save_npz, save_torch, small_model, timm_arrays

from vit_jax import checkpoint, weights
from vit_jax.config import CheckpointConfig
from vit_jax.errors import UserError
from vit_jax.program import State
from vit_jax.weights import fit

SECONDS = 30
MEMORY = 200 << 20
# Out of 20 cases; workdirs are slow.
KINDS = ["npz"] * 5 + ["hf"] * 5 + ["msgpack"] * 4 + ["pth"] * 4 + ["workdir"] * 2
HUGE = (0, 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
ODD = (
    -1,
    0,
    0.5,
    1e308,
    10**18,
    10**400,
    True,
    None,
    "",
    "x" * 5000,
    "\x1b[2J",
    [],
    {},
)


def originals(folder: Path) -> dict[str, Path]:
    """One good checkpoint of each kind."""
    model, flat, arrays = timm_arrays(folder)
    params = fit.unflatten(flat)
    save_npz(folder / "x.npz", flat)
    weights.save(folder / "x.npz", model.cfg, params)
    weights.save(folder / "hf", model.cfg, params)
    stored = safetensors.load_file(folder / "hf/model.safetensors")
    names = dict.fromkeys(stored, "model.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (folder / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "x.msgpack").write_bytes(
        serialization.msgpack_serialize({"target": params, "state": {"step": 3}})
    )
    save_torch(folder / "x.pth", {"model": arrays, "epoch": 3})
    saver = checkpoint.Checkpointer(str(folder / "run"), CheckpointConfig())
    saver.save(State(params, {}, np.int32(3), {}), 3)
    saver.wait()
    saver.close()
    names = {"npz": "x.npz", "hf": "hf", "msgpack": "x.msgpack", "pth": "x.pth"}
    return {k: folder / v for k, v in {**names, "workdir": "run"}.items()}


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats, and numbers of every width that are far too large."""
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        # Half of the damage goes where the structure is: near the ends.
        edge = rng.random() < 0.5
        at = rng.randrange(max(1, min(len(data), 600) if edge else len(data)))
        at = len(data) - 1 - at if edge and rng.random() < 0.5 else at
        at, width = max(at, 0), rng.choice((1, 2, 4, 8))
        value = (rng.choice(HUGE) % 2 ** (8 * width)).to_bytes(
            width, rng.choice(("little", "big"))
        )
        data = rng.choice(
            (
                data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
                data[:at] + value + data[at + width :],
                data[:at],
                data[:at] + data[at + rng.randrange(1, 300) :],
                data[:at] + data[at : at + rng.randrange(1, 300)] * 2 + data[at:],
                data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:],
            )
        )
    return data


def mutate_text(text: str, rng: random.Random) -> str:
    """Another number or word in a JSON text, or in the table of a safetensors file."""
    found = list(re.finditer(r'-?\d+(\.\d+)?(e-?\d+)?|"[^"]*"|true|null', text))
    for match in rng.sample(found, min(len(found), rng.choice((1, 1, 2, 4)))):
        # Of the same length where it can be, so that later matches stay in place.
        value = json.dumps(rng.choice(ODD))
        if rng.random() < 0.3 and match[0].isdigit():
            value = "9" * len(match[0])
        text = text[: match.start()] + value + text[match.end() :]
        if len(value) != len(match[0]):
            break
    return text


def mutate_file(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        file.write_text(mutate_text(data.decode(errors="replace"), rng))
    elif file.suffix == ".safetensors" and rng.random() < 0.5:
        end = 8 + int.from_bytes(data[:8], "little")
        table = mutate_text(data[8:end].decode(), rng).encode()
        file.write_bytes(len(table).to_bytes(8, "little") + table + data[end:])
    elif rng.random() < 0.05:
        file.unlink()
    else:
        file.write_bytes(mutate_bytes(data, rng))


def mutated(original: Path, folder: Path, rng: random.Random) -> Path:
    """A damaged copy of a file or folder."""
    copy = folder / original.name
    if original.is_dir():
        shutil.copytree(original, copy)
    else:
        for file in original.parent.glob(f"{original.stem}.*"):
            if file == original or (
                file.suffix == ".json" and original.suffix == ".npz"
            ):
                shutil.copy(file, folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2)))):
        mutate_file(file, rng)
    return copy


def peak_memory() -> int:
    """The most bytes that this process had at once since :func:`reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def _too_slow(*_):
    raise TimeoutError(f"over {SECONDS} s")


def attempt(source: Path, size: int) -> tuple[str, str]:
    """("loaded" or "refused" or "FAILED", what was said)."""
    before = reset_peak()
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        # No array of a torch file shows the heads; in folders the config does.
        weights.read(source, **({"heads": 2} if source.suffix == ".pth" else {}))
        result = "loaded", ""
    except UserError as e:
        lines = str(e).splitlines()
        result = ("refused" if all(map(str.isprintable, lines)) else "FAILED"), repr(e)
    except BaseException:
        result = "FAILED", traceback.format_exc()
    finally:
        signal.alarm(0)
    grown = peak_memory() - before
    if grown > 3 * size + MEMORY:
        return "FAILED", f"{grown / 2**20:.0f} MiB for {size} bytes; {result}"
    return result


def quiet() -> None:
    """What Orbax logs about damage, the commands do not show either."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda report: None


def run(cases: range) -> tuple[collections.Counter, list[str]]:
    """(tally by kind and end, what failed)."""
    tally: collections.Counter = collections.Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        good = originals(Path(root))
        for kind in good:  # whatever is imported or allocated once
            weights.read(good[kind], heads=small_model()[0].cfg.heads)
        for i in cases:
            rng, kind = random.Random(i), KINDS[i % len(KINDS)]
            folder = Path(root, "case")
            folder.mkdir()
            source = mutated(good[kind], folder, rng)
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            end, said = attempt(source, size)
            tally[f"{kind} {end}"] += 1
            if end == "FAILED":
                failures.append(f"case {i} ({kind}): {said}")
            shutil.rmtree(folder)
    return tally, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0)
    flags = parser.parse_args()
    quiet()
    begun = time.monotonic()
    tally, failures = run(range(flags.start, flags.start + flags.count))
    for failure in failures:
        print(failure)
    for name, count in sorted(tally.items()):
        print(f"{name:<18} {count:>6}")
    seconds = time.monotonic() - begun
    print(f"{flags.count} cases in {seconds:.0f} s, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
