# SPDX-License-Identifier: Apache-2.0
"""The program of a run: one training step, placed on a mesh.

:func:`train_step` is the mathematics, :func:`build` says where it runs. The training
loop runs what ``build`` returns, ``plan`` compiles it, ``benchmark`` times it and the
config tests trace it, so none of them can drift from training.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped

from vit_jax import (
    config,
    data,
    evaluators,
    kernels,
    models,
    objectives,
    optim,
    sharding,
)
from vit_jax.config import Config
from vit_jax.errors import UserError
from vit_jax.inference import normalize, outputs

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """All that training changes."""

    params: Any  # nested dict of float32 arrays, named like the released files
    opt_state: Any
    step: Any  # () int32, optimizer steps done
    ema: Any  # Polyak average of params; {} if there is none


def train_step(
    state: State,
    batch: Batch,
    *,
    cfg: Config,
    loss_fn: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]],
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
) -> tuple[State, Metrics]:
    """One optimizer step on one global batch.

    ``batch["image"]`` is (B, H, W, C), uint8 or float in [-1, 1]. A step whose loss,
    gradient or update is not finite changes nothing but the step number, and says so in
    ``metrics["skipped"]``.
    """
    # Number 0 belongs to the initialisation.
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step + 1)
    batch = batch | {"image": normalize(batch["image"])}
    if cfg.mixup:
        batch = objectives.mixup_batch(cfg, jax.random.fold_in(key, 0), batch)
    loss, metrics, grads = _gradient(cfg, loss_fn, state.params, batch, key)
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, step=state.step
    )
    params = optax.apply_updates(state.params, updates)
    ema = (
        optax.incremental_update(params, state.ema, 1 - cfg.optim.polyak)
        if cfg.optim.polyak
        else state.ema
    )

    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    finite &= jnp.isfinite(optax.tree.norm(updates))
    new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(
        lambda a, b: jnp.where(finite, a, b), new, old
    )
    metrics = metrics | {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "skipped": 1.0 - finite.astype(jnp.float32),
    }
    return State(params, opt_state, state.step + 1, ema), metrics


def _gradient(cfg, loss_fn, params, batch, key):
    """Loss, metrics and gradient of the mean over the batch, in ``cfg.accumulate``
    micro-batches one after another."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    n = cfg.accumulate
    if n == 1:
        (loss, metrics), grads = value_and_grad(
            params, batch, jax.random.fold_in(key, 1)
        )
        return loss, metrics, grads
    count = jnp.maximum(objectives.of(cfg).num_counted(batch), 1.0)
    # Micro-batch i takes rows i, i + n, ...: every device keeps its own rows.
    micro = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, i_batch):
        i, part = i_batch
        (loss, metrics), grads = value_and_grad(
            params, part, jax.random.fold_in(key, 1 + i)
        )
        # Examples that do not count may lie anywhere: parts weigh what they count.
        share = objectives.of(cfg).num_counted(part) / count
        weighed = jax.tree.map(lambda x: share * x, (loss, metrics, grads))
        return jax.tree.map(jnp.add, total, weighed), None

    first = jax.tree.map(lambda x: x[0], micro)
    (loss, metrics), grads = jax.eval_shape(value_and_grad, params, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, metrics, grads))
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(n), micro))
    return total


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run computes, placed on a mesh. Shapes carry their shardings, so
    everything can be lowered as it is."""

    cfg: Config  # with model.num_classes and model.image_size filled in
    hints: tuple[str, ...]  # for the user: allowed, but perhaps not wanted
    # What computes attention, where that is a question, for the user.
    attention: str
    model: Any
    mesh: jax.sharding.Mesh
    state_shape: State
    batch_shape: dict[str, jax.ShapeDtypeStruct]
    # Jitted functions, which can be called or lowered:
    init: Wrapped  # () -> State
    start_from: Wrapped  # (params) -> State
    train_step: Wrapped  # (State, batch) -> (State, metrics); consumes the State
    forward: Wrapped  # (params, images) -> {"logits": (B, K), "pre_logits": (B, D)}

    @property
    def state_sharding(self) -> State:
        return jax.tree.map(lambda s: s.sharding, self.state_shape)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.state_shape.params))

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        return sharding.batch_sharding(self.mesh)


def build(
    cfg: Config,
    devices: Sequence[jax.Device] | None = None,
    info: data.DataInfo | None = None,
) -> Program:
    """The one definition of what a run computes, for devices that need not be there.

    Args:
      cfg: the run.
      devices: to place it on; all devices of all processes if not given.
      info: of the data; read where the config leaves the number of classes open.

    Raises:
      UserError: a config that contradicts itself, the data or the number of devices.
    """
    cfg, info = _complete(config.checked(cfg), info)
    hints = objectives.check(cfg, bool(info and info.multilabel))
    evaluators.check(cfg)
    mesh = sharding.create_mesh(cfg, devices)
    model = models.create(cfg.model)
    init_params = functools.partial(_init_params, model, cfg)
    params_shape = jax.eval_shape(init_params)
    tx, schedule = optim.create(cfg.optim, cfg.steps, params_shape, cfg.seed)

    def start_from(params):
        ema = jax.tree.map(jnp.copy, params) if cfg.optim.polyak else {}
        return State(params, tx.init(params), jnp.zeros((), jnp.int32), ema)

    state_shape = jax.eval_shape(lambda: start_from(init_params()))
    state_sharding = sharding.state_sharding(cfg, mesh, state_shape)
    batch_sharding = sharding.batch_sharding(mesh)
    # The same model, reading parameters in parts.
    attend, attention = kernels.choose(cfg, mesh)
    placed = models.create(cfg.model, sharding.block_hook(cfg, mesh), attend)
    loss_fn = _loss_fn(cfg, placed, mesh, optim.trainable(cfg.optim, params_shape))

    def forward(params, images):
        return outputs(placed, sharding.to_compute(cfg, mesh, params), images)

    return Program(
        cfg=cfg,
        hints=tuple(hints),
        attention=attention,
        model=model,
        mesh=mesh,
        state_shape=_with_sharding(state_shape, state_sharding),
        batch_shape=_batch_shape(cfg, info, batch_sharding),
        init=jax.jit(lambda: start_from(init_params()), out_shardings=state_sharding),
        start_from=jax.jit(start_from, out_shardings=state_sharding),
        train_step=jax.jit(
            functools.partial(
                train_step, cfg=cfg, loss_fn=loss_fn, tx=tx, schedule=schedule
            ),
            in_shardings=(state_sharding, batch_sharding),
            out_shardings=(state_sharding, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=(attend and attend.compiler_options) or None,
        ),
        forward=jax.jit(forward),
    )


def _init_params(model: Any, cfg: Config) -> Any:
    key = jax.random.fold_in(jax.random.key(cfg.seed), 0)
    images = jnp.zeros((1, *cfg.model.image_size, cfg.model.channels), jnp.float32)
    return model.init(key, images)["params"]


def _loss_fn(
    cfg: Config, model: Any, mesh: jax.sharding.Mesh, trainable: Any
) -> Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]:
    """The objective, of parameters as they are kept; ``trainable`` is a tree like them."""
    loss_of_whole = objectives.of(cfg).create(model, cfg)

    def loss_fn(params, batch, key):
        # What is frozen costs no backward pass and has no part in the norm.
        params = jax.tree.map(
            lambda p, trained: p if trained else jax.lax.stop_gradient(p),
            params,
            trainable,
        )
        return loss_of_whole(sharding.to_compute(cfg, mesh, params), batch, key)

    return loss_fn


def _complete(
    cfg: Config, info: data.DataInfo | None
) -> tuple[Config, data.DataInfo | None]:
    """Fills in what the data and the objective decide."""
    resolved = dataclasses.replace(cfg, model=models.resolve(cfg.model))
    classes = objectives.of(cfg).outputs(resolved)
    if not classes:
        if not cfg.model.num_classes:
            info = info or data.describe(cfg.data)
        known = info.num_classes if info else 0
        classes = cfg.model.num_classes or known
        if classes < known:
            raise UserError(
                f"config.model.num_classes={classes}, but the data has {known} classes: "
                "set it to 0 to take the number from the data"
            )
    size = cfg.model.image_size
    if not cfg.data.image_size:
        raise UserError(
            "config.data.image_size is 0, so that the checkpoint decides, but "
            "config.pretrained names none: set one of them"
        )
    if size == (0, 0):
        size = (cfg.data.image_size, cfg.data.image_size)
    return config.replace(cfg, model__num_classes=classes, model__image_size=size), info


def _batch_shape(
    cfg: Config, info: data.DataInfo | None, place: jax.sharding.NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    size = cfg.data.image_size
    label = shape((cfg.batch,), jnp.int32)
    if info and info.multilabel:
        label = shape((cfg.batch, cfg.model.num_classes), jnp.float32)
    image = shape((cfg.batch, size, size, cfg.model.channels), jnp.uint8)
    return {"image": image, "label": label}


def _with_sharding(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh),
        shapes,
        shardings,
    )
