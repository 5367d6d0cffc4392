# SPDX-License-Identifier: Apache-2.0
"""What the rows of a study cost, before any of them is trained."""

import dataclasses
from typing import Any

import jax

from vit_jax import config, hlo, models, plan, program, tpu
from vit_jax.config import Config
from vit_jax.scales import Row, Study


def flops(study: Study, row: Row) -> float:
    """Of the training of a row and of those that it follows."""
    before = flops(study, study.rows[row.after]) if row.after else 0.0
    return before + own_flops(row)


def own_flops(row: Row) -> float:
    if row.measure in ("features", "speed"):
        return 0.0
    cfg = row.cfg
    size = cfg.data.image_size
    model = dataclasses.replace(cfg.model, image_size=(size, size))
    return 6.0 * models.macs(model) * cfg.batch * cfg.steps


def check(study: Study) -> None:
    """Builds the program of every row without computing anything, and prints what it
    is.

    Raises:
      UserError: a row contradicts itself or its data.
    """
    width, built = max(map(len, study.rows)), {}
    print(f"{'row':<{width}}  {'parameters':>13}  {'steps':>9}  {'batch':>6}  FLOPs")
    for name, row in study.rows.items():
        if row.measure == "features":
            continue
        # Rows that differ in what they read, or start from, are one program.
        cfg = config.replace(row.cfg, pretrained="", data__subset=0.0)
        key = config.to_json(cfg)
        if key not in built:
            built[key] = program.build(cfg, jax.devices()[:1]).num_parameters
        steps = 0 if row.measure == "speed" else row.cfg.steps
        print(
            f"{name:<{width}}  {built[key]:>13,}  {steps:>9,}  {row.cfg.batch:>6,}  "
            f"{own_flops(row):.3g}",
            flush=True,
        )


def chip_hours(study: Study, target: tpu.Topology, seeds: int) -> None:
    """Compiles every row for a slice that is not there, and prints what it takes.

    A row that does not fit is compiled once more with sharded and recomputed layers.
    """
    width, total, without = max(map(len, study.rows)), 0.0, 0
    for name, row in study.rows.items():
        if row.measure == "features":
            continue
        if row.measure == "speed":
            print(f"{name:<{width}}  {inference(row.cfg, target)}", flush=True)
            continue
        found = _plan(row.cfg, target)
        if found["fits"]:
            total += found["chip_hours"]
            text = (
                f"{found['chip_hours']:>10,.0f} chip-hours, {found['hours']:,.1f} hours, "
                f"{found['step_ms']:.0f} ms a step, MFU {found['mfu']:.0%}"
            )
        else:
            without += 1
            need, have = found["peak_hbm_gib"], found["hbm_gib"]
            text = f"does not fit: {need:.1f} of {have:.1f} GiB"
        print(f"{name:<{width}}  {text}", flush=True)
    for count in sorted({1, seeds}) if total else ():
        seed = f"all rows, {count} seed{'s' * (count > 1)}"
        print(f"{seed:<{width}}  {count * total:>10,.0f} chip-hours on {target.name}")
    if without:
        print(f"without {without} rows that do not fit")
    print(f"trust: {plan.TRUST}")


def _plan(cfg: Config, target: tpu.Topology) -> dict[str, Any]:
    cfg = config.replace(cfg, pretrained="")
    found = plan.plan(cfg, target)
    if found["fits"]:
        return found
    smaller = {"sharding": "fsdp", "model__remat": "full"}
    if cfg.model.depth or "ViT" in cfg.model.name:
        smaller["model__layers"] = "scan"
    return plan.plan(config.replace(cfg, **smaller), target)


def inference(cfg: Config, target: tpu.Topology) -> str:
    """Images/s of the forward pass on one chip, by the compiler's own estimate."""
    kind, chip = target.name.split(":")[0], target.chip
    small = tpu.topology(f"{kind}:{chip.shapes[0]}")
    chips = len(small.devices)
    p = program.build(config.replace(cfg, batch=cfg.batch * chips), small.devices)
    with jax.set_mesh(p.mesh):
        lowered = p.forward.lower(p.state_shape.params, p.batch_shape["image"])
        compiled = tpu.compile(lowered, small)
    if compiled.problem:
        return f"does not fit with {cfg.batch} images"
    cost = hlo.cost(compiled.text, chips)
    kernels = plan.kernels(cost, chip, p.model.cfg)
    seconds = cost.cycles / chip.clock + kernels.seconds
    image = (compiled.arguments + compiled.temporaries) / cfg.batch
    return (
        f"{cfg.batch / seconds:>10,.0f} images/s on one chip, batch {cfg.batch}; "
        f"{image / 2**20:.2f} MiB per image, parameters included"
    )
