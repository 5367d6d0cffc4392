# SPDX-License-Identifier: Apache-2.0
"""Looks for the fastest way to train the same: strategy, mesh, loop or scan, remat and
micro-batches.

Best first: the next candidate differs in one step from the best one so far. Where
nothing fits yet, the best is the one that needs the least memory.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vit_jax import config, sharding
from vit_jax.config import Config
from vit_jax.errors import UserError

Plan = dict[str, Any]

# (layers, remat), by what is to be expected of them: without a loop and without
# recomputation is the fastest, where memory allows it.
BLOCKS = (
    ("loop", "none"), ("loop", "full"), ("scan", "none"), ("scan", "full"),
    ("loop", "dots"), ("scan", "dots"),
)  # fmt: skip


def search(
    cfg: Config,
    devices: Sequence[Any],
    plan: Callable[[Config], Plan],
    *,
    limit: int,
    minutes: float,
    tell: Callable[[str], None],
) -> list[tuple[Config, Plan]]:
    """Plans of at most ``limit`` candidates, best first; none is begun after
    ``minutes``.

    Args:
      cfg: what is to be trained; its own way of doing so is the second candidate.
      devices: to plan for.
      plan: a plan, as ``plan.plan`` makes it, of a candidate.
      limit: how many candidates.
      minutes: for all of them.
      tell: is given a line before each candidate.

    Raises:
      UserError: what ``plan`` raises of the config as it is; a limit below 1; no time.
    """
    if limit < 1:
        raise UserError(f"--search_limit={limit}: it must be at least 1")
    if not minutes > 0:
        raise UserError(f"--search_minutes={minutes:g}: it must be above 0")
    start, plans = time.monotonic(), []
    queue = list(first(cfg, devices))
    own = key(queue[-1], devices)
    seen: set[tuple[Any, ...]] = set()
    while len(plans) < limit and time.monotonic() - start < 60 * minutes:
        plans.sort(key=lambda pair: rank(pair[1]))
        more = (c for best, p in plans for c in neighbours(best, p, devices))
        fresh = (c for c in [*queue, *more] if key(c, devices) not in seen)
        if (candidate := next(fresh, None)) is None:
            break
        seen.add(key(candidate, devices))
        spent = (time.monotonic() - start) / 60
        best = ""
        if plans:
            (fastest, p), *_ = plans
            best = f"; best so far {' '.join(text(fastest).split())}: {result(p)}"
        tell(f"[{len(plans) + 1}/{limit}, {spent:.0f} min] {text(candidate)}{best}")
        try:
            plans.append((candidate, plan(candidate)))
        except UserError as e:
            # Such as a pattern of config.optim that means a block of a loop.
            if key(candidate, devices) == own:
                raise
            tell(f"left out: {e}")
    return sorted(plans, key=lambda pair: rank(pair[1]))


def first(cfg: Config, devices: Sequence[Any]) -> Iterator[Config]:
    """What is quick to compile and likely to fit, then the config as it is."""
    likely = config.replace(
        cfg, sharding="zero", mesh=(), model__layers="scan", model__remat="full"
    )
    for c in (cfg if cfg.sharding == "tensor" else likely, cfg):
        yield config.replace(c, mesh=sharding.mesh_shape(c, devices))


def neighbours(cfg: Config, plan: Plan, devices: Sequence[Any]) -> Iterator[Config]:
    """Configs one step away: faster ones of what fits, smaller ones of what does not."""
    change = lambda **changes: config.replace(cfg, **changes)
    blocks = [change(model__layers=a, model__remat=b) for a, b in BLOCKS]
    others = [
        change(
            sharding=name,
            mesh=sharding.mesh_shape(change(sharding=name, mesh=()), devices),
        )
        for name in ("zero", "fsdp", "replicate")
        if cfg.sharding != "tensor"
    ]
    if plan["fits"]:
        if cfg.accumulate > 1:
            fewer = range(cfg.accumulate // 2, 0, -1)
            yield change(accumulate=next(n for n in fewer if cfg.accumulate % n == 0))
        yield blocks[0]
        yield from meshes(cfg)
        yield from others
        yield from blocks
        # Where no kernel is taken that is the same program.
        if plan["attention"].startswith("pallas"):
            yield change(model__attention="xla")
        return
    yield change(model__layers="scan", model__remat="full")
    yield from (c for c in others if c.sharding != "replicate")
    # As many micro-batches as what is too much asks for.
    times = 2 ** max(1, math.ceil(math.log2(plan["peak_hbm_gib"] / plan["hbm_gib"])))
    while times > 1 and plan["images_per_chip"] % (cfg.accumulate * times):
        times //= 2
    if times > 1:
        yield change(accumulate=cfg.accumulate * times)


def meshes(cfg: Config) -> Iterator[Config]:
    """The same strategy on twice and half as many rows."""
    if cfg.sharding not in ("zero", "fsdp"):
        return
    *slices, rows, columns = cfg.mesh if len(cfg.mesh) > 1 else (1, *cfg.mesh)
    for r, c in ((rows // 2, columns * 2), (rows * 2, columns // 2)):
        if r * c == rows * columns:
            flat = r == 1 and not slices
            yield config.replace(cfg, mesh=(c,) if flat else (*slices, r, c))


def key(cfg: Config, devices: Sequence[Any]) -> tuple[Any, ...]:
    """The same for configs that are the same program."""
    where = (cfg.sharding, cfg.mesh) if len(devices) > 1 else ()
    model = cfg.model
    return (*where, model.layers, model.remat, cfg.accumulate, model.attention)


def rank(plan: Plan) -> tuple[bool, float, float]:
    """Smaller is better: those that fit by time, then the others by memory."""
    fits = plan["fits"]
    return (not fits, plan["step_ms"] if fits else 0.0, plan["peak_hbm_gib"])


def text(cfg: Config) -> str:
    mesh = "x".join(map(str, cfg.mesh))
    return (
        f"{cfg.sharding:<9} mesh {mesh:<7} {cfg.model.layers} remat {cfg.model.remat:<4} "
        f"accumulate {cfg.accumulate:<2} attention {cfg.model.attention}"
    )


def result(plan: Plan) -> str:
    speed = f"{plan['step_ms']:.1f} ms" if plan["fits"] else "does not fit"
    return f"{speed}, {plan['peak_hbm_gib']:.2f} GiB"
