# SPDX-License-Identifier: Apache-2.0
"""Measures what this machine does.

    python -m vit_jax.benchmark --config=... [--what=train,infer,data] [--json]

Every speed is a ratio to a baseline timed in the same run, in alternating rounds,
because machines are noisy:

* train: the training loop (data, logging, dispatch) against its compiled step called on
  one resident batch.
* infer: images/s of the forward pass over batch sizes.
* data:  the input pipeline against the obvious one and against decoding alone
  (``data/benchmark.py``).
* fewshot: the closed-form few-shot solver on 25 x 1000 examples of 768 features.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from vit_jax import cli, config, data, models
from vit_jax import train as training
from vit_jax.config import Config
from vit_jax.distributed import Preemption
from vit_jax.errors import UserError
from vit_jax.feed import put
from vit_jax.program import build
from vit_jax.workdir import read_metrics

flags.DEFINE_string("what", "train", "Comma-separated: train, infer, data.")
flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")
flags.DEFINE_integer("rounds", 5, "Alternating rounds; the median is reported.")
flags.DEFINE_integer("round_steps", 10, "Steps per round.")
cli.define_config_flag()

# Peak bf16 matrix FLOP/s of accelerators, from their vendors' data sheets; by a part of
# jax's device_kind.
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12,
    "TPU v3": 123e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12,
}  # fmt: skip


def train(cfg: Config, rounds: int, steps: int) -> dict[str, Any]:
    """The training loop against its compiled step on one resident batch, in alternating
    rounds of ``steps`` steps.

    ``loop_over_step`` is the ratio of their images/s: 1 means that data, logging and
    dispatch cost nothing.
    """
    cfg = config.replace(
        cfg,
        eval__every=0,
        eval__evaluators=(),
        steps=2 * steps,
        log_every=steps,
        pretrained="",
    )
    info = data.describe(cfg.data)
    program = build(cfg, info=info)
    start = time.perf_counter()
    compiled = program.train_step.lower(
        program.state_shape, program.batch_shape
    ).compile()
    compile_seconds = time.perf_counter() - start
    source = data.train_batches(program.cfg.data, batch=cfg.batch, seed=cfg.seed)
    resident = put(next(source), program.batch_sharding)
    bare, loop = [], []
    with jax.set_mesh(program.mesh):
        for _ in range(rounds):
            bare.append(
                cfg.batch * steps / _seconds(compiled, program.init(), resident, steps)
            )
            with tempfile.TemporaryDirectory() as workdir:
                run = training.Loop(
                    program, info, workdir, None, Preemption(), compiled
                )
                run.run(program.init())
                loop.append(
                    read_metrics(workdir)[-1]
                )  # the second interval: the first warms up
    speed = statistics.median(bare)
    flops = 6 * models.macs(program.cfg.model) * speed
    return {
        "images_per_second": speed,
        "step_ms": 1e3 * cfg.batch / speed,
        "loop_images_per_second": statistics.median(
            m["train/images_per_second"] for m in loop
        ),
        "loop_over_step": statistics.median(
            m["train/images_per_second"] / b for m, b in zip(loop, bare, strict=True)
        ),
        "data_wait": statistics.median(m["train/data_wait"] for m in loop),
        "compile_seconds": compile_seconds,
        **_memory(compiled),
        **_utilisation(flops),
    }


def infer(cfg: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Images/s of the forward pass, for batches of 1 up to config.batch (paper, section
    D.5 and Figure 12)."""
    program = build(cfg, info=data.describe(cfg.data))
    params = program.init().params
    source = data.train_batches(program.cfg.data, batch=cfg.batch, seed=cfg.seed)
    images = put(next(source), program.batch_sharding)["image"]
    speeds = {}
    batch = program.mesh.size
    while batch <= cfg.batch:
        part = jax.device_put(images[:batch], program.batch_sharding)
        jax.block_until_ready(program.forward(params, part))
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready([program.forward(params, part) for _ in range(steps)])
            times.append(time.perf_counter() - start)
        speeds[batch] = batch * steps / statistics.median(times)
        batch *= 4
    best = max(speeds.values())
    return {
        "images_per_second": best,
        "images_per_second_by_batch": speeds,
        **_utilisation(2 * models.macs(program.cfg.model) * best),
    }


def _data(cfg: Config, rounds: int, steps: int) -> dict[str, Any]:
    from vit_jax.data import benchmark  # imports tensorflow

    return benchmark.run(cfg.data, rounds=rounds, steps=steps)


WHAT = {"train": train, "infer": infer, "data": _data}


def _seconds(step: Callable[..., Any], state: Any, batch: Any, steps: int) -> float:
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start


def _memory(compiled: Any) -> dict[str, float]:
    """Peak GiB per device of a compiled step: donated arguments are counted once."""
    m = compiled.memory_analysis()
    if m is None:
        return {}
    size = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return {"peak_gib": (size - m.alias_size_in_bytes) / 2**30}


def _utilisation(flops: float) -> dict[str, float]:
    """Model FLOP/s, and their share of the peak where the device's peak is known (MFU)."""
    kind = jax.devices()[0].device_kind
    peak = next((v for k, v in PEAK_FLOPS.items() if k.lower() in kind.lower()), 0.0)
    found = {"tflops": flops / 1e12}
    return found | {"mfu": flops / (peak * len(jax.devices()))} if peak else found


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(
            f"unexpected argument {argv[0]!r}: flags look like --what=train"
        )
    f = flags.FLAGS
    cfg = cli.read_config()
    results: dict[str, Any] = {
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "model": cfg.model.name or "ViT",
        "batch": cfg.batch,
    }
    for what in f.what.split(","):
        run = config.choose("--what", what, WHAT)
        results[what] = run(cfg, f.rounds, f.round_steps)
    if f.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        if not isinstance(value, dict):
            print(f"{name:<34} {value}")
            continue
        for key, number in value.items():
            print(f"{name + '/' + key:<34} {_text(number)}")


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    cli.run(main)
