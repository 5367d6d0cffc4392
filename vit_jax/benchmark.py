# SPDX-License-Identifier: Apache-2.0
"""Measures what this machine does.

    python -m vit_jax.benchmark --config=... [--what=train,infer,data] [--json]

On several hosts run it on each, as ``main``; process 0 prints what the pod does.

Every speed is a ratio to a baseline timed in the same run, in alternating rounds,
because machines are noisy:

* train: the training loop (data, logging, dispatch) against its compiled step called on
  one resident batch.
* infer: images/s of the forward pass over batch sizes; and on one device (``latency.py``)
  one image alone and batches through the model op by op, jitted and exported, beside timm
  and transformers where they are installed.
* data:  the input pipeline against the obvious one and against decoding alone
  (``data/benchmark.py``).
"""

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from vit_jax import cli, config, data, hardware, latency, models, sharding
from vit_jax import train as training
from vit_jax.config import Config
from vit_jax.feed import put
from vit_jax.program import Program, build
from vit_jax.workdir import read_metrics

# Where --round_steps is 0, a round takes about as many seconds, so that the start of
# the loop does not count.
ROUND_SECONDS = 3.0


def train(cfg: Config, rounds: int, steps: int) -> dict[str, Any]:
    """The training loop against its compiled step on one resident batch, in alternating
    rounds of ``steps`` steps.

    ``loop_over_step`` is the ratio of their images/s: 1 means that data, logging and
    dispatch cost nothing.
    """
    cfg = config.replace(
        cfg, eval__every=0, eval__evaluators=(), pretrained="", profile=""
    )
    info = data.describe(cfg.data)
    program = build(cfg, info=info)
    start = time.perf_counter()
    compiled = program.train_step.lower(
        program.state_shape, program.batch_shape
    ).compile()
    compile_seconds = time.perf_counter() - start
    resident = _batch(program)
    bare, loop = [], []
    with jax.set_mesh(program.mesh):
        if not steps:
            seconds = _seconds(compiled, program.init(), resident, 3) / 3
            steps = max(10, math.ceil(ROUND_SECONDS / seconds))
            steps = int(multihost_utils.broadcast_one_to_all(steps))
        # The first interval of the loop warms up.
        cfg = config.replace(program.cfg, steps=2 * steps, log_every=steps)
        looped = dataclasses.replace(program, cfg=cfg)
        for _ in range(rounds):
            seconds = _seconds(compiled, program.init(), resident, steps)
            bare.append(cfg.batch * steps / seconds)
            with tempfile.TemporaryDirectory() as workdir:
                run = training.Loop(looped, info, workdir, None, None, compiled)
                run.run(program.init())
                loop += read_metrics(workdir)[-1:]
    if jax.process_index():
        return {}  # only process 0 has metrics
    speed = statistics.median(bare)
    flops = models.traced_flops(
        jax.make_jaxpr(program.train_step)(program.state_shape, program.batch_shape)
    )
    # Rematerialization adds to those of the model; frozen parameters take from them.
    needed = min(flops, 6 * models.macs(program.cfg.model) * cfg.batch)
    return {
        "images_per_second": speed,
        "step_ms": 1e3 * cfg.batch / speed,
        "loop_images_per_second": statistics.median(
            m["train/images_per_second"] for m in loop
        ),
        "loop_over_step": statistics.median(
            m["train/images_per_second"] / b for m, b in zip(loop, bare, strict=True)
        ),
        "attention": program.attention or cfg.model.attention,
        "data_wait": statistics.median(m["train/data_wait"] for m in loop),
        "compile_seconds": compile_seconds,
        "step_tflop": flops / 1e12,
        **memory(compiled),
        **utilisation(needed * speed / cfg.batch),
    }


def infer(cfg: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Images/s of the forward pass, for batches of 1 up to config.batch (paper, section
    D.5 and Figure 12)."""
    program = build(cfg, info=data.describe(cfg.data))
    params = program.init().params
    images = _batch(program)["image"]
    speeds = {}
    for batch in batches(sharding.batch_parts(program.mesh), cfg.batch):
        part = jax.device_put(images[:batch], program.batch_sharding)
        jax.block_until_ready(program.forward(params, part))
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            out = [program.forward(params, part) for _ in range(steps or 10)]
            jax.block_until_ready(out)
            times.append(time.perf_counter() - start)
        speeds[batch] = batch * (steps or 10) / statistics.median(times)
    best = max(speeds.values())
    found = {
        "images_per_second": best,
        "images_per_second_by_batch": speeds,
        **utilisation(2 * models.macs(program.cfg.model) * best),
    }
    if jax.process_count() == 1:
        sizes = batches(1, max(cfg.batch // jax.device_count(), 1))
        model, params = program.cfg.model, jax.device_get(params)
        with tempfile.TemporaryDirectory() as folder:
            found |= latency.measure(model, params, sizes, rounds, steps, Path(folder))
    return found


def _batch(program: Program) -> dict[str, jax.Array]:
    """The first of the training set, on the devices."""
    source = data.train_batches(
        program.cfg.data,
        batch=program.cfg.batch,
        seed=program.cfg.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return put(next(source), program.batch_sharding)


def batches(smallest: int, largest: int) -> list[int]:
    """From ``smallest`` in steps of 4 to ``largest``, which is always one of them."""
    steps = int(math.log(max(largest // smallest, 1), 4))
    return sorted({smallest * 4**i for i in range(steps + 1)} | {largest})


def _data(cfg: Config, rounds: int, steps: int) -> dict[str, Any]:
    from vit_jax.data import benchmark  # imports tensorflow

    return benchmark.run(cfg.data, rounds=rounds, steps=steps or 10)


WHAT = {"train": train, "infer": infer, "data": _data}


def _seconds(step: Callable[..., Any], state: Any, batch: Any, steps: int) -> float:
    """Of ``steps`` steps, of which at most two are in flight, as in the loop."""
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(steps):
        previous = metrics
        state, metrics = step(state, batch)
        jax.block_until_ready(previous)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start


def memory(compiled: Any) -> dict[str, float]:
    """Peak GiB per device of a compiled program: donated arguments count once."""
    m = compiled.memory_analysis()
    if m is None:
        return {}
    size = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return {"peak_gib": (size - m.alias_size_in_bytes) / 2**30}


def utilisation(flops: float) -> dict[str, float]:
    """Model FLOP/s, and their share of the peak where the device's peak is known (MFU)."""
    chip = hardware.chip_of(jax.devices()[0].device_kind)
    found = {"tflops": flops / 1e12}
    return found | ({"mfu": flops / (chip.flops * jax.device_count())} if chip else {})


def define_flags() -> None:
    flags.DEFINE_string("what", "train", "Comma-separated: train, infer, data.")
    flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")
    flags.DEFINE_integer(
        "rounds", 5, "Alternating rounds; the median is reported.", lower_bound=1
    )
    flags.DEFINE_integer(
        "round_steps",
        0,
        "Steps per round; 0: as many as take seconds, at least 10.",
        lower_bound=0,
    )
    cli.define_config_flag()
    cli.define_process_flags()


def main(argv: list[str]) -> None:
    cli.only_flags(argv, "--what=train")
    f = flags.FLAGS
    cfg = cli.read_config()
    runs = {what: config.choose("--what", what, WHAT) for what in f.what.split(",")}
    with cli.only_json(f.json):
        cli.connect()
        cfg = training.adopted(cfg)
        results: dict[str, Any] = {
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "model": cfg.model.name or "ViT",
            "batch": cfg.batch,
        }
        for what, run in runs.items():
            results[what] = run(cfg, f.rounds, f.round_steps)
        if jax.process_index():
            return
        for name, value in _flat("", results):
            print(f"{name:<34} {_text(value)}")
    if f.json:
        cli.print_json(results)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Names joined by ``/``, and what they stand for."""
    if not isinstance(value, dict):
        yield name.removeprefix("/"), value
        return
    for key, inner in value.items():
        yield from _flat(f"{name}/{key}", inner)


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
