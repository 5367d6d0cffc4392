# SPDX-License-Identifier: Apache-2.0
"""What a run would need on TPUs that are not there.

    python -m vit_jax.plan --config=... --topology=v5e:16x16 [--json]

Compiles the training step of :func:`vit_jax.program.build` with the real TPU compiler,
on this CPU, and reads the result: memory per chip, whether it fits, arithmetic, network
traffic, an estimate of the time of a step and of the whole run. ``--search`` looks for
the strategy, mesh, remat policy and micro-batches that take the least time.
"""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from vit_jax import (
    cli,
    data,
    hardware,
    hlo,
    kernel_schedule,
    models,
    objectives,
    search,
    sharding,
    tpu,
    train,
    vtab_tasks,
)  # fmt: skip
from vit_jax.config import Config, DataConfig, ModelConfig, choose
from vit_jax.errors import UserError
from vit_jax.hardware import Chip
from vit_jax.program import Program, build
from vit_jax.tpu import Topology

GIB = 2**30
TRUST = (
    "compute is the compiler's own estimate (its level was within 10 % of the one public run it was compared with); "
    "network is bytes over nominal bandwidth, added as if nothing overlapped; the input pipeline, evaluation, saving "
    "and start-up are not counted"
)


def plan(cfg: Config, target: Topology) -> dict[str, Any]:
    """Compiles the training step of ``cfg`` for ``target``; the values of ``--json``.

    Raises:
      UserError: a config that contradicts itself or the topology, or whose number of
        classes cannot be found out.
    """
    program = build(cfg, target.devices, _describe(cfg))
    cfg, chips = program.cfg, len(target.devices)
    state = memory_of_state(program.state_shape)
    model_flops = 6 * models.macs(program.model.cfg) * cfg.batch / chips
    result: dict[str, Any] = {
        "topology": target.name,
        "slices": len(set(map(hardware.slice_of, target.devices))),
        "chips": chips,
        "hosts": hosts(target.devices),
        "model": cfg.model.name,
        "parameters": program.num_parameters,
        "sharding": cfg.sharding,
        "mesh": dict(program.mesh.shape),
        "layers": cfg.model.layers,
        "remat": cfg.model.remat,
        "batch": cfg.batch,
        "images_per_chip": cfg.batch // sharding.batch_parts(program.mesh),
        "accumulate": cfg.accumulate,
        "hints": program.hints,
        "attention": program.attention or cfg.model.attention,
        "hbm_gib": target.chip.hbm_gib,
        "model_tflops_per_chip": model_flops / 1e12,
    }
    with jax.set_mesh(program.mesh):
        lowered = program.train_step.lower(program.state_shape, program.batch_shape)
        compiled = tpu.compile(lowered, target)
    result["compile_seconds"] = compiled.seconds
    memory: dict[str, Any]
    if compiled.problem:
        memory, times = _too_large(compiled, state, target.chip)
    else:
        memory, times = _measured(program, compiled, state, target, model_flops)
    result |= times
    result["memory_gib"] = {k: v / GIB for k, v in memory.items()}
    result["peak_hbm_gib"] = sum(result["memory_gib"].values())
    fits = not compiled.problem and result["peak_hbm_gib"] <= target.chip.hbm_gib
    result["fits"] = fits
    return result | ({} if fits else {"advice": advice(cfg, target, result)})


def _too_large(
    compiled: tpu.Compiled, state: dict[str, int], chip: Chip
) -> tuple[dict[str, float], dict[str, Any]]:
    """Like :func:`_measured`, of a program that the compiler gave up on."""
    needed = tpu.needed_memory(compiled.problem)
    # Then the message leaves the arguments out.
    if "HLO temporaries" in compiled.problem:
        needed += sum(state.values())
    peak = max(needed, chip.hbm_gib * GIB)
    unknown = (
        "step_ms", "compute_ms", "images_per_second", "images_per_second_per_host",
    )  # fmt: skip
    memory = state | {"activations": peak - sum(state.values())}
    return memory, dict.fromkeys(unknown) | {"collectives": {}}


def _measured(
    program: Program,
    compiled: tpu.Compiled,
    state: dict[str, int],
    target: Topology,
    model_flops: float,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Bytes per chip by kind, given those of the ``state``, and times."""
    batch = compiled.arguments - sum(state.values())
    cost = hlo.cost(compiled.text, len(target.devices))
    found = kernels(cost, target.chip, program.model.cfg)
    memory = state | {"batch": batch, "activations": compiled.temporaries}
    return memory, {
        "program_gib": compiled.code / GIB,
        "compiled_tflops_per_chip": (cost.flops + found.flops) / 1e12,
        **speed(cost, found, target.chip, model_flops, program.cfg, target.devices),
    }


def _describe(cfg: Config) -> data.DataInfo | None:
    """What the data say about the program; nothing is read where the config says it
    all, and nothing is downloaded."""
    if cfg.model.num_classes or not objectives.of(cfg).reads_labels:
        return None
    try:
        if cfg.data.source == "tfds":
            return data.DataInfo(_tfds_classes(cfg.data), (), 0, 0, False)
        return data.describe(cfg.data)
    except (UserError, ImportError, OSError) as e:
        raise UserError(
            f"config.model.num_classes is 0 and the data, which would tell, cannot be read here ({e}): "
            "give --config.model.num_classes=N"
        ) from e


def _tfds_classes(cfg: DataConfig) -> int:
    """Known before a set is downloaded, unlike its size."""
    if cfg.name.startswith("vtab/"):
        task = cfg.name.removeprefix("vtab/")
        return choose("VTAB task in config.data.name", task, vtab_tasks.TASKS).classes
    from vit_jax.data import tfds_source  # imports tensorflow

    names = tfds_source.class_names(tfds_source.unprepared(cfg.name, cfg.path))
    if not names:
        raise UserError(f"tfds set {cfg.name!r} has no class names")
    return max(len(names), cfg.num_classes)


def hosts(devices: Sequence[Any]) -> int:
    """How many feed these devices: each decodes its share of the images."""
    return len({(hardware.slice_of(d), d.process_index) for d in devices})


def memory_of_state(state_shape: Any) -> dict[str, int]:
    """Bytes per device of the state, by kind."""

    def total(tree: Any) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
            for x in jax.tree.leaves(tree)
        )

    parts = {
        "parameters": total(state_shape.params),
        "optimizer": total(state_shape.opt_state),
    }
    return parts | (
        {"average": total(state_shape.ema)} if jax.tree.leaves(state_shape.ema) else {}
    )


class Kernels(NamedTuple):
    """What all calls of kernels cost, and how many of them are not counted."""

    seconds: float
    flops: int
    unknown: int


def kernels(cost: hlo.Cost, chip: Chip, model: ModelConfig) -> Kernels:
    head_dim = model.width // max(model.heads, 1)
    seconds, flops, unknown = 0.0, 0, 0
    for call, trips in cost.kernels.items():
        if found := kernel_schedule.cost(call, chip, head_dim):
            seconds += trips * found.seconds
            flops += trips * found.flops
        else:
            unknown += trips
    return Kernels(seconds, flops, unknown)


def speed(
    cost: hlo.Cost,
    in_kernels: Kernels,
    chip: Chip,
    model_flops: float,
    cfg: Config,
    devices: Sequence[Any],
) -> dict[str, Any]:
    """Times of a step and of the run; ``model_flops`` per chip and step."""
    compute = cost.cycles / chip.clock + in_kernels.seconds
    collectives = {}
    for kind, c in sorted(cost.collectives.items()):
        # A group along one axis of the torus has only the links of that axis.
        seconds = (c.wire_bytes + (chip.torus_axes - 1) * c.part_bytes) / chip.ici
        collectives[kind] = {
            "count": c.count,
            "gib": c.bytes / GIB,
            "wire_gib": c.wire_bytes / GIB,
            "ms": 1e3 * (c.wire_bytes / hardware.DCN if kind == "send" else seconds),
        }
    network = sum(c["ms"] for c in collectives.values()) / 1e3
    step = compute + network
    return {
        "step_ms": 1e3 * step,
        "step_parts_ms": {
            "matrix products": 1e3 * cost.matmul_cycles / chip.clock,
            "other compute and memory": 1e3
            * (cost.cycles - cost.matmul_cycles)
            / chip.clock,
            "network": 1e3 * network,
        }
        | ({"attention kernel": 1e3 * in_kernels.seconds} if cost.kernels else {}),
        "compute_ms": 1e3 * compute,
        "kernels_not_counted": in_kernels.unknown,
        "mfu": model_flops / step / chip.flops,
        "mfu_without_network": model_flops / compute / chip.flops,
        "images_per_second": cfg.batch / step,
        "images_per_second_per_host": cfg.batch / step / hosts(devices),
        "hours": cfg.steps * step / 3600,
        "chip_hours": cfg.steps * step * len(devices) / 3600,
        "steps": cfg.steps,
        "collectives": collectives,
        "trust": TRUST,
    }


def advice(cfg: Config, target: Topology, result: dict[str, Any]) -> list[str]:
    """Flags under which a config that does not fit may; ``--search`` finds out."""
    chips, kind = len(target.devices), target.name.split(":")[0]
    found = []
    if cfg.model.remat != "full":
        found.append("--config.model.remat=full")
    if cfg.sharding in ("replicate", "zero") and chips > 1:
        found.append("--config.sharding=fsdp")
    memory = result["memory_gib"]
    left = target.chip.hbm_gib - (result["peak_hbm_gib"] - memory["activations"])
    most = result["images_per_chip"]
    for n in range(cfg.accumulate + 1, most + 1):
        if most % n == 0 and memory["activations"] * cfg.accumulate / n < left:
            found.append(f"--config.accumulate={n}")
            break
    larger = [
        name
        for name, n in hardware.SLICES.items()
        if name.startswith(f"{kind}:") and n > chips and cfg.batch % n == 0
    ]
    roomier = [
        name
        for name, n in hardware.SLICES.items()
        if n == chips
        and hardware.CHIPS[name.split(":")[0]].hbm_gib > result["peak_hbm_gib"]
    ]
    return found + [f"--topology={name}" for name in larger[:1] + roomier]


def report(p: dict[str, Any]) -> str:
    """The plan as lines for people."""
    mesh = " x ".join(f"{k} {v}" for k, v in p["mesh"].items())
    memory = ", ".join(f"{k} {v:.2f}" for k, v in p["memory_gib"].items())
    lines = [
        f"model        {p['model'] or 'ViT'}, {p['parameters']:,} parameters",
        f"hardware     {p['slices']} x {p['topology']}, {p['chips']} chips; sharding {p['sharding']} over {mesh}",
        f"images       {sharding.batch_text(p['batch'], p['images_per_chip'], p['accumulate'])}",
        f"attention    {p['attention']}",
        f"memory       {p['peak_hbm_gib']:.2f} of {p['hbm_gib']:.2f} GiB per chip: {memory}",
    ]
    if p["fits"]:
        parts = ", ".join(f"{k} {v:.1f}" for k, v in p["step_parts_ms"].items())
        traffic = [
            f"{v['count']} {k} {v['gib']:.2f} GiB" for k, v in p["collectives"].items()
        ]
        lines += [
            f"fits         yes, {p['hbm_gib'] - p['peak_hbm_gib']:.2f} GiB are left",
            f"arithmetic   {p['model_tflops_per_chip']:.2f} TFLOP per chip and step of the model, "
            f"{p['compiled_tflops_per_chip']:.2f} compiled (with recomputation)",
            f"network      {'; '.join(traffic) or 'none'}",
            f"step         {p['step_ms']:.1f} ms: {parts}",
            f"speed        {p['images_per_second']:,.0f} images/s, MFU {100 * p['mfu']:.0f} %",
            f"input        {p['images_per_second_per_host']:,.0f} images/s per host, of which there are {p['hosts']}; "
            "vit-jax benchmark --what=data says what a core delivers",
            f"whole run    {p['steps']:,} steps: {p['hours']:,.1f} hours, {p['chip_hours']:,.0f} chip-hours",
            f"trust        {p['trust']}",
        ]
        if p["kernels_not_counted"]:
            lines.append(
                f"             {p['kernels_not_counted']} calls of kernels count as 0 ms: they are not the attention kernel's, "
                "or this libtpu wrote no schedule of it"
            )
    else:
        over = p["peak_hbm_gib"] - p["hbm_gib"]
        lines.append(
            f"fits         no: {over:.2f} GiB too much per chip. What may help:"
        )
        lines += [f"             {a}" for a in p["advice"]]
    return "\n".join([*lines, f"compiled     in {p['compile_seconds']:.0f} s"])


def define_flags() -> None:
    flags.DEFINE_string("topology", "", "TPU type and shape, such as v5e:16x16.")
    flags.DEFINE_integer(
        "slices", 1, "How many such slices, connected by the data centre's network."
    )
    flags.DEFINE_bool(
        "search",
        False,
        "Find the fastest strategy, mesh, remat and number of micro-batches.",
    )
    flags.DEFINE_integer(
        "search_limit", 12, "How many of them at most; each one is compiled."
    )
    flags.DEFINE_float(
        "search_minutes", 60, "No candidate is begun after so many minutes."
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")
    cli.define_config_flag()


def main(argv: list[str]) -> None:
    cli.only_flags(argv, "--topology=v5e:16x16")
    f = flags.FLAGS
    cfg = cli.read_config()
    tell = functools.partial(print, file=sys.stderr, flush=True)
    target = tpu.topology(f.topology, f.slices)
    with cli.only_json(f.json):
        cfg = train.adopted(cfg)
        if f.search:
            best, *others = _search(cfg, target, tell)
            best |= {"tried": others}
        else:
            tell(f"compiling for {len(target.devices)} chips, which takes minutes")
            best = plan(cfg, target)
        for hint in best["hints"]:
            print(f"hint         {hint}")
        print(report(best))
    if f.json:
        cli.print_json(best)


def _search(cfg: Config, target: Topology, tell: Any) -> list[dict[str, Any]]:
    f = flags.FLAGS
    plans = search.search(
        cfg,
        target.devices,
        lambda candidate: plan(candidate, target),
        limit=f.search_limit,
        minutes=f.search_minutes,
        tell=tell,
    )
    print("best first")
    for candidate, p in plans:
        print(f"{search.text(candidate)}  {search.result(p)}")
    return [p for _, p in plans]


if __name__ == "__main__":
    define_flags()
    cli.run(main)
