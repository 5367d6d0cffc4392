# SPDX-License-Identifier: Apache-2.0
"""Where every array of the program lives: one mesh, one table of strategies, outside
the model.

``config.mesh`` gives the number of devices per mesh axis:

    ()        chosen: the torus of a TPU slice, or a single axis elsewhere
    (n,)      column
    (n, m)    row, column
    (s, n, m) slice, row, column

and, for ``config.sharding=tensor``, one more at the end for heads and MLP units. The
batch is divided over every axis but ``tensor``; the axes that divide the state depend
on the strategy. ``slice`` is for the slow network between TPU slices. Two axes instead
of one matter on TPUs: over a flat axis of 64 or more chips XLA turns the reduce-scatter
of gradients into an all-reduce (seen in what it compiles), over one axis of the torus
it does not.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.config import Config, choose
from vit_jax.errors import UserError
from vit_jax.hardware import slice_of

Params = Any

# Mesh axes that divide the batch; a mesh of fewer numbers has the last of them.
BATCH_AXES = ("slice", "row", "column")


class Strategy(NamedTuple):
    """How parameters are kept between steps, and when they are put together."""

    # Mesh axes that divide parameters, optimizer state and average.
    divided: tuple[str, ...]
    # "step": all parameters are gathered at once; "layer": those of a block where it
    # runs.
    gather: str
    # Mesh axes, after those of the batch, whose devices see the same images and divide
    # heads and MLP units.
    model_axes: tuple[str, ...] = ()


SHARDINGS = {
    # Everything everywhere.
    "replicate": Strategy(divided=(), gather="step"),
    # Little more traffic than replicate. On two axes each row keeps one copy, and
    # gradients are reduce-scattered.
    "zero": Strategy(divided=("column",), gather="step"),
    # The least memory: weights are communicated twice, for the forward and for the
    # backward pass.
    "fsdp": Strategy(divided=("column", "row"), gather="layer"),
    # For models of which one block is too large for a chip, or batches smaller than the
    # number of chips.
    "tensor": Strategy(("column", "row"), gather="layer", model_axes=("tensor",)),
}


class Rule(NamedTuple):
    """Axes of a parameter, counted from the end."""

    # A regular expression of the parameter's whole path.
    pattern: str
    # The one that the model axes divide.
    model: int
    # Those that the other axes divide in the state, the first that fits; if none does,
    # the largest axis that fits.
    state: tuple[int, ...]


# Dividing along the first axis lets XLA gather a stack of layers in the layout that the
# loop reads; along the second it copies what it gathered. The loop reads query, key and
# value with D last, so for them heads count as the first.
RULES = (
    # (D, heads, D_h) and (heads, D_h)
    Rule(r".*(query|key|value)/kernel", -2, (-2, -3)),
    Rule(r".*(query|key|value)/bias", -2, ()),
    # (heads, D_h, D)
    Rule(r".*out/kernel", -3, (-3, -1)),
    # (D, M), (M,) and (M, D)
    Rule(r".*(Dense_0|gate)/kernel", -1, (-2, -1)),
    Rule(r".*(Dense_0|gate)/bias", -1, ()),
    Rule(r".*Dense_1/kernel", -2, (-2, -1)),
)
NO_RULE = Rule("", 0, ())
# Kernels that a layer casts to the dtype of the computation anyway: casting before the
# gather halves the traffic.
CAST = r".*(query|key|value|out|Dense_[01]|gate)/kernel"
# Up to this many chips XLA reduce-scatters over a flat axis.
FLAT = 32
# Parameters of a block, and of all blocks stacked along the first axis.
BLOCK = r".*encoderblock(_\d+)?/.*"
STACKED = r".*encoderblock/.*"


def create_mesh(cfg: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the config over all devices.

    Raises:
      UserError: unknown strategy, a mesh that is not as large as the number of devices,
        or a batch that does not divide.
    """
    strategy = _strategy(cfg)
    devices = sorted(devices or jax.devices(), key=_position)
    shape = mesh_shape(cfg, devices)
    inner = len(strategy.model_axes)
    if not 0 < len(shape) - inner <= len(BATCH_AXES):
        raise UserError(
            f"config.mesh={shape}: config.sharding={cfg.sharding} takes {1 + inner} to "
            f"{len(BATCH_AXES) + inner} numbers"
        )
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh={shape} is for {math.prod(shape)} devices, but there are {len(devices)}: "
            "the numbers must multiply to that"
        )
    axes = (*BATCH_AXES[inner - len(shape) :], *strategy.model_axes)
    mesh = Mesh(
        np.asarray(devices).reshape(shape),
        axes,
        axis_types=(AxisType.Auto,) * len(axes),
    )
    parts = batch_parts(mesh)
    if cfg.batch % (parts * cfg.accumulate):
        raise UserError(
            f"config.batch={cfg.batch} does not divide over {parts} devices x {cfg.accumulate} micro-batches "
            f"(config.accumulate): choose a multiple of {parts * cfg.accumulate}"
        )
    return mesh


def mesh_shape(cfg: Config, devices: Sequence[jax.Device]) -> tuple[int, ...]:
    """``config.mesh``, or what is chosen where it is ()."""
    strategy, n = _strategy(cfg), len(devices)
    if cfg.mesh:
        return cfg.mesh
    if strategy.model_axes:
        raise UserError(
            f"config.sharding={cfg.sharding} needs config.mesh, for example --config.mesh='({max(n // 2, 1)}, {min(n, 2)})': "
            "devices for the batch, devices for heads and MLP units"
        )
    slices = len({_position(d)[0] for d in devices})
    on_torus = hasattr(devices[0], "coords")
    rows = len({_position(d)[1] for d in devices}) if on_torus else 1
    grid = (rows, n // slices // rows)
    if cfg.sharding != "replicate" and slices > 1:
        return (slices, *grid)
    return grid if cfg.sharding != "replicate" and rows > 1 and n > FLAT else (n,)


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the batch is divided; along model axes devices share one."""
    return math.prod(mesh.shape[a] for a in _batch_axes(mesh))


def batch_text(batch: int, per_device: int, accumulate: int) -> str:
    """Such as "batch 4096 = 64 per device, in 2 micro-batches of 32"."""
    text = f"batch {batch}"
    if per_device < batch:
        text += f" = {per_device} per device"
    if accumulate > 1:
        text += f", in {accumulate} micro-batches of {per_device // accumulate}"
    return text


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are divided along their first axis."""
    return NamedSharding(mesh, P(_batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole, on every device."""
    return NamedSharding(mesh, P())


def state_sharding(cfg: Config, mesh: Mesh, state_shape: Any) -> Any:
    """A sharding per array of the state (a ``checkpoint.State`` of shapes).

    Whatever has the shape of its parameter, such as a moment, lies where that does;
    other arrays of the optimizer, such as factored moments, are whole.

    Raises:
      UserError: the tensor axis does not divide the heads or the MLP.
    """
    strategy = _strategy(cfg)
    specs = {
        path: (x.shape, storage_spec(strategy, mesh, _name(path), x.shape))
        for path, x in jax.tree_util.tree_leaves_with_path(state_shape.params)
    }

    def place(path: Any, x: Any) -> NamedSharding:
        # optax puts the path of the parameter behind its own.
        ends = (path[i:] for i in range(len(path)))
        shape, spec = next((specs[end] for end in ends if end in specs), (None, P()))
        return NamedSharding(mesh, spec if x.shape == shape else P())

    return jax.tree_util.tree_map_with_path(place, state_shape)


def storage_spec(
    strategy: Strategy,
    mesh: Mesh,
    path: str,
    shape: tuple[int, ...],
    axes: Sequence[str] | None = None,
) -> P:
    """How a parameter is kept between steps, or divided over some ``axes`` only of
    those of the strategy.

    Vectors and biases are whole: they are small and would cost one message each.
    """
    spec = compute_spec(strategy, mesh, path, shape)
    parts: list[tuple[Any, ...]] = [
        (a,) if a else () for a in (*spec, *[None] * (len(shape) - len(spec)))
    ]
    first = 1 if re.fullmatch(STACKED, path) else 0
    if sum(n > 1 for n in shape[first:]) < 2 or path.endswith("/bias"):
        return P(*(p or None for p in parts))
    preferred = [len(shape) + i for i in _rule(path).state]
    for axis in _state_axes(strategy, mesh) if axes is None else axes:
        left = [
            n // math.prod(mesh.shape[a] for a in p)
            for n, p in zip(shape, parts, strict=True)
        ]
        largest = sorted(range(first, len(shape)), key=lambda i: -left[i])
        fits = [i for i in (*preferred, *largest) if left[i] % mesh.shape[axis] == 0]
        if fits:
            parts[fits[0]] += (axis,)
    return P(*(p or None for p in parts))


def compute_spec(
    strategy: Strategy, mesh: Mesh, path: str, shape: tuple[int, ...]
) -> P:
    """How a parameter lies during computation: whole but for the model axes."""
    axis = _rule(path).model
    if not strategy.model_axes or not axis:
        return P()
    (name,) = strategy.model_axes
    if shape[axis] % mesh.shape[name]:
        raise UserError(
            f"config.mesh: the last number, {mesh.shape[name]}, must divide the {shape[axis]} heads or MLP "
            f"units of {path}"
        )
    return P(*(name if i == len(shape) + axis else None for i in range(len(shape))))


def to_compute(cfg: Config, mesh: Mesh, params: Params) -> Params:
    """Parameters as the model takes them: whole, in the dtype of the computation;
    gradients come back in parts.

    Those of the blocks stay in parts where the strategy gathers them layer by layer:
    see :func:`block_hook`.
    """
    strategy = _strategy(cfg)

    def place(path: Any, x: jax.Array) -> jax.Array:
        if strategy.gather == "layer" and re.fullmatch(BLOCK, _name(path)):
            return x
        return _gather(cfg, strategy, mesh, _name(path), x)

    return jax.tree_util.tree_map_with_path(place, params)


def block_hook(cfg: Config, mesh: Mesh) -> Callable[[Params], Params]:
    """What the model does to the parameters of each block where it runs, inside scan
    and remat.

    A strategy that gathers by layer gathers them there. The others only divide their
    gradient there: if the stacked gradient were divided after the loop, XLA would
    all-reduce it inside.
    """
    strategy = _strategy(cfg)

    def place(path: Any, x: jax.Array) -> jax.Array:
        if strategy.gather == "layer":
            return _gather(cfg, strategy, mesh, _name(path), x)
        stages = _gradient_stages(strategy, mesh, _name(path), x)
        return _constrain(x, x.dtype, replicated(mesh), stages)

    return partial(jax.tree_util.tree_map_with_path, place)


def _gather(
    cfg: Config, strategy: Strategy, mesh: Mesh, path: str, x: jax.Array
) -> jax.Array:
    dtype = jnp.dtype(cfg.model.dtype) if re.fullmatch(CAST, path) else x.dtype
    whole = NamedSharding(mesh, compute_spec(strategy, mesh, path, x.shape))
    return _constrain(x, dtype, whole, _gradient_stages(strategy, mesh, path, x))


def _gradient_stages(
    strategy: Strategy, mesh: Mesh, path: str, x: jax.Array
) -> list[NamedSharding]:
    """Divided over one mesh axis after the other, so that each is a reduce-scatter
    along one axis of the torus."""
    axes = _state_axes(strategy, mesh)
    return [
        NamedSharding(mesh, storage_spec(strategy, mesh, path, x.shape, axes[:n]))
        for n in range(min(len(axes), 1), len(axes) + 1)
    ]


def _constrain(
    x: jax.Array, dtype: Any, value: NamedSharding, gradient: Sequence[NamedSharding]
) -> jax.Array:
    """``x`` in ``dtype`` placed like ``value``, its gradient like each of ``gradient``
    in turn.

    A plain with_sharding_constraint would give the gradient the sharding of the value.
    """

    @jax.custom_vjp
    def place(x):
        return jax.lax.with_sharding_constraint(x.astype(dtype), value)

    def backward(_, g):
        for sharding in gradient:
            g = jax.lax.with_sharding_constraint(g, sharding)
        return (g.astype(x.dtype),)

    place.defvjp(lambda x: (place(x), None), backward)
    return place(x)


def _strategy(cfg: Config) -> Strategy:
    return choose("config.sharding", cfg.sharding, SHARDINGS)


def _rule(path: str) -> Rule:
    return next((r for r in RULES if re.fullmatch(r.pattern, path)), NO_RULE)


def _state_axes(strategy: Strategy, mesh: Mesh) -> tuple[str, ...]:
    return tuple(a for a in strategy.divided if a in mesh.shape)


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(a for a in mesh.axis_names if a in BATCH_AXES)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _position(device: jax.Device) -> tuple[Any, ...]:
    """Sorts neighbours on the torus of a TPU, or in a process, together."""
    place = getattr(device, "coords", None) or (device.process_index,)
    return (slice_of(device), *place, device.id)
