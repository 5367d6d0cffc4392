# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules as plain optax chains.

One step, in this order: clip the global norm, turn the gradient into an update (Adam,
SGD, Adafactor or Muon), add the decoupled weight decay, apply the learning-rate multipliers,
times -lr(t):

    p <- p - lr(t) * multiplier * (update + weight_decay * p)

``t`` is the number of steps done, so the first update sees ``lr(0)``, which is 0 with
warm-up (as in all official code). Frozen parameters are outside of the chain: they have
no optimizer state and do not count in the norm. Paths are written
``Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel``, and
``Transformer/encoderblock/...`` where blocks are stacked along a first axis; patterns
must match a whole path.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax import matrices
from vit_jax.config import OptimConfig, choose
from vit_jax.errors import UserError
from vit_jax.matrices import path_name

Schedule = Callable[[Any], jax.Array]


# The path of a parameter of a block, with its number; of a stack of blocks, without.
_BLOCK = re.compile(r".*encoderblock(?:_(\d+))?/.*")
# What follows the blocks: the last norm and the heads.
_TOP = re.compile(r"(Transformer/encoder_norm|fc_norm|pre_logits|head|MAPHead)")
# Entries of ``freeze`` that stand for a pattern.
FREEZE = {"backbone": r"(?!head(_dist)?/).*"}


def create(
    cfg: OptimConfig, steps: int, params: Any, seed: int = 0
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """The whole update rule, and the learning rate as a function of the step.

    ``update(grads, state, params, step=t)`` of the rule applies the rate of step t.

    Args:
      cfg: what to build.
      steps: length T of the run, which is where the schedule ends.
      params: parameters or their shapes; only paths and shapes are read.
      seed: of the factors of LoRA.

    Raises:
      UserError: a schedule longer than the run, or a pattern that matches no parameter.
    """
    check(cfg, steps, params)
    schedule = create_schedule(cfg, steps)
    parts = []
    if cfg.clip:
        parts.append(optax.clip_by_global_norm(cfg.clip))
    parts.append(choose("config.optim.name", cfg.name, OPTIMIZERS)(cfg, params))
    if cfg.weight_decay:
        parts.append(_decay(cfg.weight_decay, cfg.decay))
    if cfg.multipliers:
        parts.append(_multiply(cfg.multipliers))
    if cfg.layer_decay < 1:
        parts.append(_decay_by_layer(cfg.layer_decay, params))
    parts.append(_scale_by_rate(schedule))
    tx = optax.chain(*parts)
    if cfg.lora:
        tx = matrices.lora(tx, cfg.lora, seed)
    if cfg.freeze or cfg.lora:
        labels = jax.tree.map(
            lambda t: "train" if t else "freeze", trainable(cfg, params)
        )
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
    return optax.with_extra_args_support(tx), schedule


def trainable(cfg: OptimConfig, params: Any) -> Any:
    """A tree like ``params`` of booleans: False where ``cfg.freeze`` matches, and with
    LoRA of all but matrices and the head."""

    patterns = [FREEZE.get(p, p) for p in cfg.freeze]

    def trained(path: Any, _: Any) -> bool:
        name = path_name(path)
        frozen = any(re.fullmatch(p, name) for p in patterns)
        if cfg.lora and not matrices.axes(name):
            frozen |= bool(re.fullmatch(FREEZE["backbone"], name))
        return not frozen

    return jax.tree_util.tree_map_with_path(trained, params)


def create_schedule(cfg: OptimConfig, steps: int) -> Schedule:
    """Learning rate at step t: the decay clock starts when the linear warm-up ends."""
    shape = choose("config.optim.schedule", cfg.schedule, SCHEDULES)
    # As floats: JAX takes no int that an int32 cannot hold.
    warmup, end = float(warmup_steps(cfg, steps)), float(steps)

    def schedule(step: Any) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        past = jnp.maximum(t - warmup, 0.0)
        lr = shape(cfg, past, jnp.clip(past / max(end - warmup, 1.0), 0.0, 1.0))
        if warmup:
            lr = lr * jnp.minimum(1.0, t / warmup)
        if cfg.cooldown:
            lr = lr * jnp.clip((end - t) / float(cfg.cooldown), 0.0, 1.0)
        return lr

    return schedule


def warmup_steps(cfg: OptimConfig, steps: int) -> int:
    """Length of the warm-up, which the config may give as a share of the steps."""
    return round(cfg.warmup * steps if cfg.warmup < 1 else cfg.warmup)


def check(cfg: OptimConfig, steps: int, params: Any) -> None:
    """Refuses what would silently do something else than asked for."""
    warmup = warmup_steps(cfg, steps)
    if warmup and warmup >= steps:
        raise UserError(
            f"config.optim.warmup={warmup}, but the run has config.steps={steps}: "
            "the warm-up must be shorter than the run"
        )
    if cfg.cooldown > steps - warmup:
        raise UserError(
            f"config.optim.cooldown={cfg.cooldown}, but only {steps - warmup} steps are "
            f"left after the warm-up (config.steps={steps}, config.optim.warmup={warmup})"
        )
    if cfg.cooldown and cfg.schedule not in ("rsqrt", "constant"):
        raise UserError(
            f"config.optim.cooldown={cfg.cooldown}, but config.optim.schedule={cfg.schedule!r} "
            "decays by itself: use cooldown with 'rsqrt' or 'constant', or set it to 0"
        )
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    patterns = [("freeze", FREEZE.get(p, p)) for p in cfg.freeze]
    patterns += [("multipliers", p) for p, _ in cfg.multipliers]
    patterns += [("decay", p) for p, _ in cfg.decay if cfg.weight_decay]
    for knob, pattern in patterns:
        try:
            matches = [n for n in names if re.fullmatch(pattern, n)]
        except re.error as e:
            raise UserError(
                f"config.optim.{knob}: {pattern!r} is not a regular expression: {e}"
            ) from e
        if not matches:
            raise UserError(
                f"config.optim.{knob}: {pattern!r} matches no parameter. A pattern must match the "
                f"whole path; some paths are {_examples(names)}"
            )
    if not any(jax.tree.leaves(trainable(cfg, params))):
        raise UserError(
            f"config.optim.freeze={cfg.freeze} leaves no parameter to train"
        )
    if cfg.lora:
        _check_lora(cfg, params)


def _check_lora(cfg: OptimConfig, params: Any) -> None:
    if cfg.name == "muon":
        raise UserError(
            f"config.optim.lora={cfg.lora}, but config.optim.name='muon' needs whole "
            f"matrices: choose one of {sorted(set(OPTIMIZERS) - {'muon'})}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {path_name(path): x.shape for path, x in leaves}
    trained = jax.tree.leaves(trainable(cfg, params))
    sides = {
        name: min(matrices.matrix_shape(name, shape)[-2:])
        for (name, shape), t in zip(names.items(), trained, strict=True)
        if t and matrices.axes(name)
    }
    if not sides:
        raise UserError(
            f"config.optim.lora={cfg.lora} adapts kernels of the blocks, of which "
            f"config.optim.freeze={cfg.freeze} leaves none"
        )
    name = min(sides, key=lambda name: sides[name])
    if cfg.lora >= sides[name]:
        raise UserError(
            f"config.optim.lora={cfg.lora}: a rank must be below {sides[name]}, the "
            f"smaller side of {name}"
        )


# Rates after the warm-up: of the steps since its end and of their share of the rest.


def _linear(cfg: OptimConfig, past: jax.Array, share: jax.Array) -> jax.Array:
    start, end = cfg.learning_rate, cfg.end_learning_rate
    return end + (start - end) * (1 - share)


def _cosine(cfg: OptimConfig, past: jax.Array, share: jax.Array) -> jax.Array:
    return cfg.learning_rate * (1 + jnp.cos(jnp.pi * share)) / 2


def _rsqrt(cfg: OptimConfig, past: jax.Array, share: jax.Array) -> jax.Array:
    return cfg.learning_rate / jnp.sqrt(1 + past / float(cfg.timescale))


def _constant(cfg: OptimConfig, past: jax.Array, share: jax.Array) -> jax.Array:
    return jnp.full_like(past, cfg.learning_rate)


SCHEDULES = {
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,
    "constant": _constant,
}


def _adam(cfg: OptimConfig, params: Any) -> optax.GradientTransformation:
    # The second moment stays float32: bfloat16 loses small gradients.
    return optax.scale_by_adam(
        b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=jnp.dtype(cfg.momentum_dtype)
    )


def _sgd(cfg: OptimConfig, params: Any) -> optax.GradientTransformation:
    """m <- b1 m + g, no Nesterov."""
    return optax.trace(decay=cfg.b1, accumulator_dtype=jnp.dtype(cfg.momentum_dtype))


def _adafactor(cfg: OptimConfig, params: Any) -> optax.GradientTransformation:
    """The variant ViT-g and G were trained with ("Scaling Vision Transformers").

    Factored second moment where two dimensions are at least 32 long, without update
    clipping or relative step size, then a first moment without bias correction. The
    layers of a stack are factored one by one, as if they were not stacked.
    """

    def b2(count: Any, exponent: Any) -> jax.Array:
        t = jnp.asarray(count, jnp.float32) + 1.0
        return jnp.minimum(cfg.b2, 1.0 - t ** (-exponent))

    second = optax.scale_by_factored_rms(
        decay_rate=0.8, min_dim_size_to_factor=32, epsilon=1e-30, decay_rate_fn=b2
    )
    stacked = jax.tree_util.tree_map_with_path(
        lambda path, _: _layer(path) == "stacked", params
    )
    if any(jax.tree.leaves(stacked)):
        each = optax.GradientTransformation(
            jax.vmap(second.init), jax.vmap(second.update)
        )
        labels = jax.tree.map(lambda s: "stacked" if s else "single", stacked)
        second = optax.partition({"single": second, "stacked": each}, labels)
    first = optax.ema(
        cfg.b1, debias=False, accumulator_dtype=jnp.dtype(cfg.momentum_dtype)
    )
    return optax.chain(second, first)


def _muon(cfg: OptimConfig, params: Any) -> optax.GradientTransformation:
    return matrices.muon(_adam(cfg, params), jnp.dtype(cfg.momentum_dtype))


OPTIMIZERS = {"adam": _adam, "sgd": _sgd, "adafactor": _adafactor, "muon": _muon}


def _decay(
    weight_decay: float, factors: Sequence[tuple[str, float]]
) -> optax.GradientTransformation:
    def add(path: Any, u: jax.Array, p: jax.Array) -> jax.Array:
        factor = _first_match(factors, path_name(path), 0.0)
        return u + weight_decay * factor * p if factor else u

    def update(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(add, updates, params)

    return optax.stateless(update)


def _multiply(factors: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    def scale(path: Any, u: jax.Array) -> jax.Array:
        return u * _first_match(factors, path_name(path), 1.0)

    def update(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(scale, updates)

    return optax.stateless(update)


def _decay_by_layer(decay: float, params: Any) -> optax.GradientTransformation:
    """Times decay^(L + 1 - l) for layer l of L blocks (BEiT, arXiv 2106.08254): the
    stem is layer 0, the first block 1, and what follows the blocks L + 1."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    stacks = [x.shape[0] for path, x in leaves if _layer(path) == "stacked"]
    numbers = [_layer(path) for path, _ in leaves]
    depth = max([*stacks, *(n for n in numbers if isinstance(n, int))], default=0)

    def scale(path: Any, u: jax.Array) -> jax.Array:
        layer = _layer(path)
        if layer == "stacked":
            powers = decay ** jnp.arange(depth, 0, -1, dtype=u.dtype)
            return u * powers.reshape(-1, *(1,) * (u.ndim - 1))
        return u * decay ** (depth + 1 - (depth + 1 if layer == "top" else layer))

    def update(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(scale, updates)

    return optax.stateless(update)


def _layer(path: Any) -> Any:
    """Where a parameter stands: 0 of the stem, i of block i of L, "top" of what follows
    them, "stacked" of all blocks together."""
    name = path_name(path)
    if block := _BLOCK.fullmatch(name):
        return int(block[1]) + 1 if block[1] else "stacked"
    return "top" if _TOP.match(name) else 0


def _scale_by_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Times -lr(step). The count of its state is that of optax's own transformation,
    which skipped steps would not advance; it is kept so that checkpoints stay the same.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        step = extra["step"]
        rate = -schedule(step)
        updates = jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, updates)
        return updates, optax.ScaleByScheduleState(jnp.asarray(step + 1, jnp.int32))

    return optax.GradientTransformationExtraArgs(init, update)


def _first_match(
    factors: Sequence[tuple[str, float]], name: str, default: float
) -> float:
    return next((f for p, f in factors if re.fullmatch(p, name)), default)


def _examples(names: list[str]) -> str:
    """A few paths that differ: one per top-level group first, then whatever comes."""
    first = {name.split("/")[0]: name for name in reversed(names)}
    return ", ".join(list(first.values())[:6])
