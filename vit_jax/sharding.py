# SPDX-License-Identifier: Apache-2.0
"""Where every array of the program lives: one mesh, one table of strategies, outside
the model.

``config.mesh`` gives the number of devices per mesh axis:

    ()        chosen: the torus of a TPU slice, or a single axis elsewhere
    (n,)      data
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

Params = Any


class Strategy(NamedTuple):
    """How parameters are kept between steps, and when they are put together."""

    divided: tuple[
        str, ...
    ]  # mesh axes that divide parameters, optimizer state and average
    gather: (
        str  # "step": all parameters at once; "layer": those of a block where it runs
    )
    tensor: bool = (
        False  # heads and MLP units are divided among devices that see the same images
    )


SHARDINGS = {
    # Everything everywhere.
    "replicate": Strategy(divided=(), gather="step"),
    # Little more traffic than replicate. On two axes each row keeps one copy, and
    # gradients are reduce-scattered.
    "zero": Strategy(divided=("data", "column"), gather="step"),
    # The least memory: weights travel twice, for the forward and for the backward pass.
    "fsdp": Strategy(divided=("data", "column", "row"), gather="layer"),
    # For models of which one block is too large for a chip, or batches smaller than the
    # number of chips.
    "tensor": Strategy(divided=("data", "column", "row"), gather="layer", tensor=True),
}


class Rule(NamedTuple):
    """Axes of a parameter, counted from the end."""

    pattern: str
    tensor: int  # the one that the tensor axis divides
    state: tuple[
        int, ...
    ]  # those that the state is divided along, if they divide; else the largest that does


# Dividing along the first axis lets XLA gather a stack of layers in the layout that the
# loop reads; along the second it copies what it gathered. The loop reads query, key and
# value with D last, so for them heads count as the first.
RULES = (
    Rule(r".*(query|key|value)/kernel", -2, (-2, -3)),  # (D, heads, D_h)
    Rule(r".*(query|key|value)/bias", -2, ()),  # (heads, D_h)
    Rule(r".*out/kernel", -3, (-3, -1)),  # (heads, D_h, D)
    Rule(r".*Dense_0/kernel", -1, (-2, -1)),  # (D, M)
    Rule(r".*Dense_0/bias", -1, ()),  # (M,)
    Rule(r".*Dense_1/kernel", -2, (-2, -1)),  # (M, D)
)
# What dense layers cast to the dtype of the computation: cast before the gather, half
# the bytes travel.
CAST = r".*(query|key|value|out|Dense_[01])/kernel"
FLAT = 32  # up to this many chips XLA reduce-scatters over a flat axis
BLOCK = r".*encoderblock(_\d+)?/.*"  # parameters of a block
STACKED = r".*encoderblock/.*"  # of all blocks, along the first axis


def create_mesh(cfg: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of the config over all devices.

    Raises:
      UserError: unknown strategy, a mesh that is not as large as the number of devices,
        or a batch that does not divide.
    """
    strategy = choose("config.sharding", cfg.sharding, SHARDINGS)
    devices = sorted(devices or jax.devices(), key=_position)
    shape = cfg.mesh or _default_shape(cfg, devices)
    names = {1: ("data",), 2: ("row", "column"), 3: ("slice", "row", "column")}
    axes = names.get(len(shape) - strategy.tensor, ())
    if strategy.tensor:
        axes = (*axes, "tensor")
    if len(axes) != len(shape):
        few, many = 1 + strategy.tensor, 3 + strategy.tensor
        raise UserError(
            f"config.mesh={shape}: config.sharding={cfg.sharding} takes {few} to {many} numbers"
        )
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh={shape} is for {math.prod(shape)} devices, but there are {len(devices)}: "
            "the numbers must multiply to that"
        )
    mesh = Mesh(
        np.asarray(devices).reshape(shape),
        axes,
        axis_types=(AxisType.Auto,) * len(axes),
    )
    parts = math.prod(mesh.shape[a] for a in _batch_axes(mesh))
    if cfg.batch % (parts * cfg.accumulate):
        raise UserError(
            f"config.batch={cfg.batch} does not divide over {parts} devices x {cfg.accumulate} micro-batches "
            f"(config.accumulate): choose a multiple of {parts * cfg.accumulate}"
        )
    return mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are divided along their first axis; devices along ``tensor`` see the same
    images."""
    return NamedSharding(mesh, P(_batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole, on every device."""
    return NamedSharding(mesh, P())


def state_sharding(cfg: Config, mesh: Mesh, state_shape: Any) -> Any:
    """A sharding per array of the state: moments and averages lie where their parameter
    does.

    Raises:
      UserError: the tensor axis does not divide the heads or the MLP.
    """
    strategy = choose("config.sharding", cfg.sharding, SHARDINGS)
    return _map(
        lambda path, x: NamedSharding(mesh, stored(strategy, mesh, path, x.shape)),
        state_shape,
    )


def stored(
    strategy: Strategy,
    mesh: Mesh,
    path: str,
    shape: tuple[int, ...],
    axes: int | None = None,
) -> P:
    """How an array is kept between steps, or divided over the first ``axes`` of the
    strategy only.

    Vectors and biases are whole: they are small and would cost one message each.
    """
    spec = used(strategy, mesh, path, shape)
    parts: list[tuple[Any, ...]] = [
        (a,) if a else () for a in (*spec, *[None] * (len(shape) - len(spec)))
    ]
    first = 1 if re.fullmatch(STACKED, path) else 0
    if sum(n > 1 for n in shape[first:]) < 2 or path.endswith("/bias"):
        return P(*(p or None for p in parts))
    rule = next((r for r in RULES if re.fullmatch(r.pattern, path)), None)
    preferred = [len(shape) + i for i in rule.state if len(shape) >= -i] if rule else []
    for axis in [a for a in strategy.divided if a in mesh.shape][:axes]:
        left = [
            n // math.prod(mesh.shape[a] for a in p)
            for n, p in zip(shape, parts, strict=True)
        ]
        largest = sorted(range(first, len(shape)), key=lambda i: -left[i])
        fits = [i for i in (*preferred, *largest) if left[i] % mesh.shape[axis] == 0]
        if fits:
            parts[fits[0]] += (axis,)
    return P(*(p or None for p in parts))


def used(strategy: Strategy, mesh: Mesh, path: str, shape: tuple[int, ...]) -> P:
    """How a parameter lies where it is multiplied with: whole but for the tensor axis."""
    rule = next((r for r in RULES if re.fullmatch(r.pattern, path)), None)
    # Factored moments have the path of a parameter but fewer axes.
    if not strategy.tensor or not rule or len(shape) < -rule.tensor:
        return P()
    if shape[rule.tensor] % mesh.shape["tensor"]:
        raise UserError(
            f"config.mesh: the last number, {mesh.shape['tensor']}, must divide the {shape[rule.tensor]} heads or MLP "
            f"units of {path}"
        )
    return P(
        *(
            "tensor" if i == len(shape) + rule.tensor else None
            for i in range(len(shape))
        )
    )


def gather(cfg: Config, mesh: Mesh, params: Params) -> Params:
    """Parameters as the model takes them: whole, in the dtype of the computation;
    gradients come back in parts.

    Those of the blocks stay in parts where the strategy gathers them layer by layer:
    see :func:`gather_block`.
    """
    strategy = choose("config.sharding", cfg.sharding, SHARDINGS)

    def place(path, x):
        if strategy.gather == "layer" and re.fullmatch(BLOCK, path):
            return x
        return _gather(cfg, strategy, mesh, path, x)

    return _map(place, params)


def gather_block(cfg: Config, mesh: Mesh) -> Callable[[Params], Params]:
    """What the model does to the parameters of each block where it runs, inside of scan
    and remat.

    Either gathers them, or only makes their gradient divided right there: were the
    stacked gradient divided after the loop, XLA would all-reduce it inside.
    """
    strategy = choose("config.sharding", cfg.sharding, SHARDINGS)

    def place(path, x):
        if strategy.gather == "layer":
            return _gather(cfg, strategy, mesh, path, x)
        return _constrain(
            x, x.dtype, replicated(mesh), _stages(strategy, mesh, path, x)
        )

    return partial(_map, place)


def _gather(
    cfg: Config, strategy: Strategy, mesh: Mesh, path: str, x: jax.Array
) -> jax.Array:
    dtype = jnp.dtype(cfg.model.dtype) if re.fullmatch(CAST, path) else x.dtype
    whole = NamedSharding(mesh, used(strategy, mesh, path, x.shape))
    return _constrain(x, dtype, whole, _stages(strategy, mesh, path, x))


def _stages(
    strategy: Strategy, mesh: Mesh, path: str, x: jax.Array
) -> list[NamedSharding]:
    """Divided over one mesh axis after the other, so that each is a reduce-scatter
    along one axis of the torus."""
    n = sum(a in mesh.shape for a in strategy.divided)
    return [
        NamedSharding(mesh, stored(strategy, mesh, path, x.shape, axes))
        for axes in range(min(n, 1), n + 1)
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


def _map(f: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: f(jax.tree_util.keystr(path, simple=True, separator="/"), x),
        tree,
    )


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(a for a in mesh.axis_names if a != "tensor")


def _position(device: jax.Device) -> tuple[Any, ...]:
    """Sorts neighbours on the torus of a TPU, or in a process, together."""
    place = getattr(device, "coords", None) or (device.process_index,)
    return (getattr(device, "slice_index", 0) or 0, *place, device.id)


def _default_shape(cfg: Config, devices: Sequence[jax.Device]) -> tuple[int, ...]:
    n = len(devices)
    if cfg.sharding == "tensor":
        raise UserError(
            f"config.sharding=tensor needs config.mesh, for example --config.mesh='({max(n // 2, 1)}, {min(n, 2)})': "
            "devices for the batch, devices for heads and MLP units"
        )
    slices = len({_position(d)[0] for d in devices})
    rows = (
        len({_position(d)[1] for d in devices}) if hasattr(devices[0], "coords") else 1
    )
    grid = (rows, n // slices // rows)
    if cfg.sharding != "replicate" and slices > 1:
        return (slices, *grid)
    return grid if cfg.sharding != "replicate" and rows > 1 and n > FLAT else (n,)
