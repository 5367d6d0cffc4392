# SPDX-License-Identifier: Apache-2.0
"""What a run would need on TPUs that are not there.

    python -m vit_jax.plan --config=... --topology=v5e:16x16 [--json]

Compiles the training step of :func:`vit_jax.program.build` with the real TPU compiler, on
this CPU, and reads the result: memory per chip, whether it fits, arithmetic, network
traffic, an estimate of the time of a step and of the whole run. ``--search`` compiles
it for several strategies, meshes, remat policies and micro-batches and shows the best
that fit.
"""

import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies

from vit_jax import cli, config, data, hlo, models, objectives
from vit_jax.config import Config, DataConfig, choose, nearest
from vit_jax.errors import UserError
from vit_jax.program import build

GIB = 2**30


class Chip(NamedTuple):
    """Per chip. Memory is what the compiler lets a program use; speeds are the vendor's
    public figures."""

    hbm_gib: float
    flops: float  # bfloat16, per second
    hbm: float  # bytes per second
    ici: float  # bytes per second to the other chips of a slice, one direction, over all links
    clock: float  # Hz; the one at which the compiler's FLOPs per cycle make the peak
    shapes: tuple[str, ...]
    cores_as_one: bool = (
        False  # two cores per chip, which the compiler is told to treat as one device
    )


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
)
CHIPS = {
    "v4": Chip(30.75, 275e12, 1228e9, 300e9, 1.05e9, _CUBE, cores_as_one=True),
    "v5e": Chip(15.75, 197e12, 819e9, 200e9, 1.5e9, _FLAT),
    "v5p": Chip(95.74, 459e12, 2765e9, 600e9, 1.75e9, _CUBE),
    "v6e": Chip(31.25, 918e12, 1640e9, 400e9, 1.75e9, _FLAT),
}
DCN = (
    3.1e9  # bytes per second and chip between slices, 25 Gbit/s: the order of magnitude
)

TRUST = (
    "compute is the compiler's own estimate (its level was within 10 % of the one public run it was compared with); "
    "network is bytes over nominal bandwidth, added as if nothing overlapped; the input pipeline, evaluation, saving "
    "and start-up are not counted"
)


class Topology(NamedTuple):
    name: str
    chip: Chip
    devices: Sequence[jax.Device]


def topology(name: str, slices: int = 1) -> Topology:
    """The devices of ``name``, such as ``v5e:16x16``, as the compiler describes them.

    Raises:
      UserError: not a topology, or no TPU compiler.
    """
    valid = [f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes]
    if name not in valid:
        raise UserError(
            f"unknown --topology={name!r}: {nearest(name, valid)}choose one of {', '.join(valid)}"
        )
    if slices < 1:
        raise UserError(f"--slices={slices}: it must be at least 1")
    _require_compiler()
    chip = CHIPS[name.split(":")[0]]
    options: dict[str, Any] = (
        {"chip_config_name": "megacore"} if chip.cores_as_one else {}
    )
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except jax.errors.JaxRuntimeError as e:
        if "lockfile" in str(e):
            raise UserError(
                "another process is using libtpu, which serves one at a time: wait for it or end it"
            ) from e
        raise UserError(f"--topology={name!r}: {str(e).splitlines()[0]}") from e
    return Topology(name, chip, described.devices)


def _require_compiler() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed: pip install 'vit_jax[tpu]'")
    # The compiler must not look for TPUs or for the metadata server of a cloud machine;
    # and since it touches no TPU, it may run while another process uses one.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")


def plan(cfg: Config, target: Topology) -> dict[str, Any]:
    """Compiles the training step of ``cfg`` for ``target``; the values of ``--json``.

    Raises:
      UserError: a config that contradicts itself or the topology, or whose number of
        classes cannot be found out.
    """
    program = build(cfg, target.devices, _describe(cfg))
    cfg, chips = program.cfg, len(target.devices)
    state = memory_of_state(program.state_shape)
    images = cfg.batch
    slices = len({getattr(d, "slice_index", 0) or 0 for d in target.devices})
    model_flops = 6 * models.macs(program.model.cfg) * images / chips
    result: dict[str, Any] = {
        "topology": target.name,
        "slices": slices,
        "chips": chips,
        "model": cfg.model.name,
        "parameters": sum(
            math.prod(x.shape) for x in jax.tree.leaves(program.state_shape.params)
        ),
        "sharding": cfg.sharding,
        "mesh": dict(program.mesh.shape),
        "layers": cfg.model.layers,
        "remat": cfg.model.remat,
        "batch": images,
        "images_per_chip": images // chips // cfg.accumulate,
        "accumulate": cfg.accumulate,
        "hbm_gib": target.chip.hbm_gib,
        "model_tflops_per_chip": model_flops / 1e12,
    }
    print(
        f"compiling for {chips} chips, which takes one to three minutes",
        file=sys.stderr,
        flush=True,
    )
    start = time.perf_counter()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.train_step.lower(
                program.state_shape, program.batch_shape
            ).compile()
    except jax.errors.JaxRuntimeError as e:
        needed = needed_memory(str(e))
        if not needed:
            raise
        if "HLO temporaries" in str(e):  # then the message leaves the arguments out
            needed += sum(state.values())
        peak = max(needed / GIB, target.chip.hbm_gib)
        memory = {k: v / GIB for k, v in state.items()}
        result |= {
            "fits": False,
            "peak_hbm_gib": peak,
            "memory_gib": memory | {"activations": peak - sum(memory.values())},
            "step_ms": None,
            "images_per_second": None,
            "collectives": {},
            "compile_seconds": time.perf_counter() - start,
        }
        return result | {"advice": advice(cfg, target, result)}
    seconds = time.perf_counter() - start
    sizes: Any = compiled.memory_analysis()
    arguments = sizes.argument_size_in_bytes
    memory = state | {
        "batch": arguments - sum(state.values()),
        "activations": sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes,
    }
    memory = {k: v / GIB for k, v in memory.items()}
    peak = sum(memory.values())
    cost = hlo.cost(compiled.as_text() or "", chips)
    result |= {
        "fits": peak <= target.chip.hbm_gib,
        "peak_hbm_gib": peak,
        "memory_gib": memory,
        "program_gib": sizes.generated_code_size_in_bytes / GIB,
        "compiled_tflops_per_chip": cost.flops / 1e12,
        "compile_seconds": seconds,
    }
    result |= speed(cost, target.chip, model_flops, images, cfg.steps, chips)
    if not result["fits"]:
        result["advice"] = advice(cfg, target, result)
    return result


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
    from vit_jax.data import tfds_source, vtab  # imports tensorflow

    if cfg.name.startswith("vtab/"):
        task = cfg.name.removeprefix("vtab/")
        return choose("VTAB task in data.name", task, vtab.TASKS).classes
    names = tfds_source.class_names(tfds_source.unprepared(cfg.name, cfg.path))
    if not names:
        raise UserError(f"tfds set {cfg.name!r} has no class names")
    return max(len(names), cfg.num_classes)


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


def needed_memory(message: str) -> float:
    """Bytes that the compiler says the program needs, 0 if its message is about
    something else."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return 0.0
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(
        r"(?:Used|required for HLO temporaries \() ?([\d.]+)([KMGT])", message
    )
    return float(found[1]) * unit[found[2]] if found else 1.0


def speed(
    cost: hlo.Cost, chip: Chip, model_flops: float, images: int, steps: int, chips: int
) -> dict[str, Any]:
    """Times of a step and of the run; ``model_flops`` per chip and step."""
    compute = cost.cycles / chip.clock
    collectives = {}
    axes = len(chip.shapes[0].split("x"))
    for kind, c in sorted(cost.collectives.items()):
        # A group along one axis of the torus has only the links of that axis.
        seconds = (c.wire_bytes + (axes - 1) * c.part_bytes) / chip.ici
        collectives[kind] = {
            "count": c.count,
            "gib": c.bytes / GIB,
            "wire_gib": c.wire_bytes / GIB,
            "ms": 1e3 * (c.wire_bytes / DCN if kind == "send" else seconds),
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
        },
        "compute_ms": 1e3 * compute,
        "kernels_not_counted": cost.unknown,
        "mfu": model_flops / step / chip.flops,
        "mfu_without_network": model_flops / compute / chip.flops,
        "images_per_second": images / step,
        "hours": steps * step / 3600,
        "chip_hours": steps * step * chips / 3600,
        "steps": steps,
        "collectives": collectives,
        "trust": TRUST,
    }


def advice(cfg: Config, target: Topology, result: dict[str, Any]) -> list[str]:
    """What would make a config fit that does not; sizes are estimates from what was
    compiled."""
    chips, hbm = len(target.devices), target.chip.hbm_gib
    memory = dict(result["memory_gib"])
    activations = memory.pop("activations")
    kept = sum(memory.values())
    found = []
    if cfg.model.remat != "full":
        found.append(
            f"--config.model.remat=full keeps one array per block of the {activations:.1f} GiB of activations"
        )
    if cfg.sharding in ("replicate", "zero") and chips > 1:
        left = kept if cfg.sharding == "zero" else kept / chips
        found.append(
            f"--config.sharding=fsdp: {left:.2f} instead of {kept:.2f} GiB for parameters and optimizer, and never all "
            "weights at once"
        )
    if kept < hbm:
        most = cfg.batch // chips
        wanted = 2 ** math.ceil(math.log2(max(activations / (0.9 * (hbm - kept)), 2)))
        for n in (cfg.accumulate * wanted, most):
            if n <= most and most % n == 0 and n > cfg.accumulate:
                found.append(
                    f"--config.accumulate={n}: about {activations * cfg.accumulate / n:.1f} GiB of activations"
                )
                break
    kind = target.name.split(":")[0]
    larger = [
        s
        for s in CHIPS[kind].shapes
        if math.prod(map(int, s.split("x"))) >= 2 * chips and cfg.batch % _count(s) == 0
    ]
    if larger:
        found.append(
            f"--topology={kind}:{larger[0]}: half the images and state per chip"
        )
    for other, chip in CHIPS.items():
        if chip.hbm_gib > max(hbm, result["peak_hbm_gib"]):
            same = [s for s in chip.shapes if _count(s) == chips]
            if same:
                found.append(
                    f"--topology={other}:{same[0]}: {chip.hbm_gib} GiB per chip"
                )
    return found


def _count(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def candidates(cfg: Config, chips: int) -> Iterator[Config]:
    """Configs that train the same in another way, the most promising first."""
    per_chip = max(cfg.batch // chips, 1)  # a batch too small is for plan() to refuse
    meshes: list[tuple[str, tuple[int, ...]]] = [
        ("replicate", ()),
        ("zero", ()),
        ("fsdp", ()),
    ]
    if chips > 8:
        meshes += [("zero", (chips,)), ("fsdp", (chips,))]
    for n in (1, 2, 4, 8, 16):
        for sharding, mesh in meshes:
            for remat in ("none", "dots", "full"):
                if n <= per_chip and per_chip % n == 0:
                    yield config.replace(
                        cfg,
                        sharding=sharding,
                        mesh=mesh,
                        accumulate=n,
                        model__remat=remat,
                    )


def search(cfg: Config, target: Topology, limit: int) -> list[dict[str, Any]]:
    """Plans of at most ``limit`` candidates, best first: those that fit by time, then
    the others by memory.

    A candidate is only tried with more micro-batches where it did not fit with fewer.

    Raises:
      UserError: as :func:`plan` does, or a limit below 1.
    """
    if limit < 1:
        raise UserError(f"--search_limit={limit}: it must be at least 1")
    plans: list[dict[str, Any]] = []
    fitting: set[tuple[Any, ...]] = set()
    for candidate in candidates(cfg, len(target.devices)):
        key = (candidate.sharding, candidate.mesh, candidate.model.remat)
        if key in fitting or len(plans) == limit:
            continue
        plans.append(plan(candidate, target))
        if plans[-1]["fits"]:
            fitting.add(key)
        print(_row(plans[-1]), file=sys.stderr, flush=True)
    return sorted(
        plans, key=lambda p: (not p["fits"], p["step_ms"] or 0, p["peak_hbm_gib"])
    )


def _row(p: dict[str, Any]) -> str:
    mesh = "x".join(map(str, p["mesh"].values()))
    time_ = f"{p['step_ms']:8.1f} ms" if p["fits"] else "does not fit"
    return (
        f"{p['sharding']:<10} mesh {mesh:<8} remat {p['remat']:<5} accumulate {p['accumulate']:<3} "
        f"{p['peak_hbm_gib']:7.2f} GiB  {time_}"
    )


def report(p: dict[str, Any]) -> str:
    """The plan as lines for people."""
    mesh = " x ".join(f"{k} {v}" for k, v in p["mesh"].items())
    memory = ", ".join(f"{k} {v:.2f}" for k, v in p["memory_gib"].items())
    lines = [
        f"model        {p['model'] or 'ViT'}, {p['parameters']:,} parameters",
        f"hardware     {p['slices']} x {p['topology']}, {p['chips']} chips; sharding {p['sharding']} over {mesh}",
        f"batch        {p['batch']}, {p['images_per_chip']} images per chip in {p['accumulate']} micro-batch(es)",
        f"memory       {p['peak_hbm_gib']:.2f} of {p['hbm_gib']:.2f} GiB per chip: {memory}",
    ]
    if p["fits"]:
        parts = ", ".join(f"{k} {v:.1f}" for k, v in p["step_parts_ms"].items())
        traffic = (
            "; ".join(
                f"{v['count']} {k} {v['gib']:.2f} GiB"
                for k, v in p["collectives"].items()
            )
            or "none"
        )
        lines += [
            f"fits         yes, {p['hbm_gib'] - p['peak_hbm_gib']:.2f} GiB are left",
            f"arithmetic   {p['model_tflops_per_chip']:.2f} TFLOP per chip and step of the model, "
            f"{p['compiled_tflops_per_chip']:.2f} compiled (with recomputation)",
            f"network      {traffic}",
            f"step         {p['step_ms']:.1f} ms: {parts}",
            f"speed        {p['images_per_second']:,.0f} images/s, MFU {100 * p['mfu']:.0f} %",
            f"whole run    {p['steps']:,} steps: {p['hours']:,.1f} hours, {p['chip_hours']:,.0f} chip-hours",
            f"trust        {p['trust']}",
        ]
        if p["kernels_not_counted"]:
            lines.append(
                f"             {p['kernels_not_counted']} custom kernels have no estimate and count as 0 ms"
            )
    else:
        over = p["peak_hbm_gib"] - p["hbm_gib"]
        lines.append(
            f"fits         no: {over:.2f} GiB too much per chip. What would help:"
        )
        lines += [f"             {a}" for a in p["advice"]]
    return "\n".join([*lines, f"compiled     in {p['compile_seconds']:.0f} s"])


def define_flags() -> None:
    flags.DEFINE_string("topology", "", "TPU type and shape, such as v5e:16x16.")
    flags.DEFINE_integer(
        "slices", 1, "How many such slices, connected by the data centre's network."
    )
    flags.DEFINE_bool(
        "search", False, "Try strategies, meshes, remat and micro-batches."
    )
    flags.DEFINE_integer(
        "search_limit", 12, "How many of them at most; each one is compiled."
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of lines.")
    cli.define_config_flag()


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(
            f"unexpected argument {argv[0]!r}: flags look like --topology=v5e:16x16"
        )
    f = flags.FLAGS
    cfg = cli.read_config()
    target = topology(f.topology, f.slices)
    if f.search:
        plans = search(cfg, target, f.search_limit)
        best = plans[0]
        if f.json:
            print(json.dumps(best | {"tried": plans[1:]}))
            return
        print("best first")
        print("\n".join(map(_row, plans)))
        print(report(best))
        return
    result = plan(cfg, target)
    print(json.dumps(result) if f.json else report(result))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
