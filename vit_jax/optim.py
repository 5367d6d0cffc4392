# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules as plain optax chains.

One step, in this order: clip the global norm, turn the gradient into an update (Adam,
SGD or Adafactor), add the decoupled weight decay, apply the learning-rate multipliers,
times -lr(t):

    p <- p - lr(t) * multiplier * (update + weight_decay * p)

``t`` counts the updates done so far, so the first update sees ``lr(0)``, which is 0
with warm-up (as in all official code). Frozen parameters are outside of the chain: they
have no optimizer state and do not count in the norm. Paths are written
``Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel``; patterns must match a whole
path.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.config import OptimConfig, choose
from vit_jax.errors import UserError

Schedule = Callable[[Any], jax.Array]


def create(
    cfg: OptimConfig, steps: int, params: Any
) -> tuple[optax.GradientTransformation, Schedule]:
    """The whole update rule, and the learning rate as a function of the step.

    Args:
      cfg: what to build.
      steps: length T of the run, which is where the schedule ends.
      params: parameters or their shapes; only the paths are read.

    Raises:
      UserError: a schedule longer than the run, or a pattern that matches no parameter.
    """
    cfg = _with_warmup_in_steps(cfg, steps)
    check(cfg, steps, params)
    schedule = create_schedule(cfg, steps)
    parts = []
    if cfg.clip:
        parts.append(optax.clip_by_global_norm(cfg.clip))
    parts.append(choose("optim.name", cfg.name, OPTIMIZERS)(cfg))
    if cfg.weight_decay:
        parts.append(_decay(cfg.weight_decay, cfg.decay))
    if cfg.multipliers:
        parts.append(_multiply(cfg.multipliers))
    parts.append(optax.scale_by_learning_rate(schedule))
    tx = optax.chain(*parts)
    if cfg.freeze:
        labels = jax.tree.map(
            lambda t: "train" if t else "freeze", trainable(cfg, params)
        )
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
    return tx, schedule


def trainable(cfg: OptimConfig, params: Any) -> Any:
    """A tree like ``params`` of booleans: False where ``cfg.freeze`` matches."""

    def trained(path: Any, _: Any) -> bool:
        return not any(re.fullmatch(p, _name(path)) for p in cfg.freeze)

    return jax.tree_util.tree_map_with_path(trained, params)


def create_schedule(cfg: OptimConfig, steps: int) -> Schedule:
    """Learning rate at step t: the decay clock starts when the linear warm-up ends."""
    shape = choose("optim.schedule", cfg.schedule, SCHEDULES)

    def schedule(step: Any) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        lr = shape(cfg, steps, t)
        if cfg.warmup:
            lr = lr * jnp.minimum(1.0, t / cfg.warmup)
        if cfg.cooldown:
            lr = lr * jnp.clip((steps - t) / cfg.cooldown, 0.0, 1.0)
        return lr

    return schedule


def check(cfg: OptimConfig, steps: int, params: Any) -> None:
    """Refuses what would silently do something else than asked for."""
    if cfg.warmup and cfg.warmup >= steps:
        raise UserError(
            f"optim.warmup is {cfg.warmup} but the run has steps={steps}: "
            "the warm-up must be shorter than the run"
        )
    if cfg.cooldown > steps - cfg.warmup:
        raise UserError(
            f"optim.cooldown is {cfg.cooldown} but only {steps - cfg.warmup} steps are "
            f"left after the warm-up (steps={steps}, optim.warmup={cfg.warmup})"
        )
    if cfg.cooldown and cfg.schedule not in ("rsqrt", "constant"):
        raise UserError(
            f"optim.cooldown is {cfg.cooldown} but optim.schedule {cfg.schedule!r} "
            "decays by itself: use cooldown with 'rsqrt' or 'constant', or set it to 0"
        )
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    patterns = [("optim.freeze", p) for p in cfg.freeze]
    patterns += [("optim.multipliers", p) for p, _ in cfg.multipliers]
    patterns += [("optim.decay", p) for p, _ in cfg.decay if cfg.weight_decay]
    for knob, pattern in patterns:
        try:
            matches = [n for n in names if re.fullmatch(pattern, n)]
        except re.error as e:
            raise UserError(f"{knob}: {pattern!r} is no regular expression: {e}") from e
        if not matches:
            raise UserError(
                f"{knob}: {pattern!r} matches no parameter. A pattern must match the "
                f"whole path; some paths are {_examples(names)}"
            )
    if not any(jax.tree.leaves(trainable(cfg, params))):
        raise UserError(f"optim.freeze {cfg.freeze} leaves no parameter to train")


def _with_warmup_in_steps(cfg: OptimConfig, steps: int) -> OptimConfig:
    share = cfg.warmup if cfg.warmup < 1 else cfg.warmup / steps
    return dataclasses.replace(cfg, warmup=round(share * steps))


def _linear(cfg: OptimConfig, steps: int, t: jax.Array) -> jax.Array:
    p = _progress(cfg, steps, t)
    return cfg.end_learning_rate + (cfg.learning_rate - cfg.end_learning_rate) * (1 - p)


def _cosine(cfg: OptimConfig, steps: int, t: jax.Array) -> jax.Array:
    return cfg.learning_rate * (1 + jnp.cos(jnp.pi * _progress(cfg, steps, t))) / 2


def _rsqrt(cfg: OptimConfig, steps: int, t: jax.Array) -> jax.Array:
    past = jnp.maximum(t - cfg.warmup, 0.0)
    return cfg.learning_rate / jnp.sqrt(1 + past / cfg.timescale)


def _constant(cfg: OptimConfig, steps: int, t: jax.Array) -> jax.Array:
    return jnp.full_like(t, cfg.learning_rate)


SCHEDULES = {
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,
    "constant": _constant,
}


def _progress(cfg: OptimConfig, steps: int, t: jax.Array) -> jax.Array:
    return jnp.clip((t - cfg.warmup) / max(steps - cfg.warmup, 1), 0.0, 1.0)


def _adam(cfg: OptimConfig) -> optax.GradientTransformation:
    # The second moment stays float32: bfloat16 loses small gradients.
    return optax.scale_by_adam(
        b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=jnp.dtype(cfg.momentum_dtype)
    )


def _sgd(cfg: OptimConfig) -> optax.GradientTransformation:
    """m <- b1 m + g, no Nesterov."""
    return optax.trace(decay=cfg.b1, accumulator_dtype=jnp.dtype(cfg.momentum_dtype))


def _adafactor(cfg: OptimConfig) -> optax.GradientTransformation:
    """The variant ViT-g and G were trained with ("Scaling Vision Transformers").

    Factored second moment where two dimensions are at least 32 long, without update
    clipping or relative step size, then a first moment without bias correction.
    """

    def b2(count: Any, exponent: Any) -> jax.Array:
        t = jnp.asarray(count, jnp.float32) + 1.0
        return jnp.minimum(cfg.b2, 1.0 - t ** (-exponent))

    second = optax.scale_by_factored_rms(
        decay_rate=0.8, min_dim_size_to_factor=32, epsilon=1e-30, decay_rate_fn=b2
    )
    first = optax.ema(
        cfg.b1, debias=False, accumulator_dtype=jnp.dtype(cfg.momentum_dtype)
    )
    return optax.chain(second, first)


OPTIMIZERS = {"adam": _adam, "sgd": _sgd, "adafactor": _adafactor}


def _decay(
    weight_decay: float, factors: Sequence[tuple[str, float]]
) -> optax.GradientTransformation:
    def add(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
        factor = _first_match(factors, _name(path), 0.0)
        return u + weight_decay * factor * p if factor else u

    def update(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(add, updates, params)

    return optax.stateless(update)


def _multiply(factors: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    def scale(path: Any, u: jax.Array) -> jax.Array:
        return u * _first_match(factors, _name(path), 1.0)

    def update(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(scale, updates)

    return optax.stateless(update)


def _first_match(
    factors: Sequence[tuple[str, float]], name: str, default: float
) -> float:
    return next((f for p, f in factors if re.fullmatch(p, name)), default)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _examples(names: list[str]) -> str:
    """A few paths that differ: one per top-level group first, then whatever comes."""
    first = {name.split("/")[0]: name for name in reversed(names)}
    return ", ".join(list(first.values())[:6])
