# SPDX-License-Identifier: Apache-2.0
"""Chips: what they compute and hold, from their vendors' public figures."""

import math
import re
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Everything per chip. Only TPUs that ``plan`` compiles for have more than a kind
    and FLOP/s."""

    # Pattern of words in jax's ``device_kind``.
    kind: str
    # bfloat16 matrix products, per second.
    flops: float
    # What the compiler lets a program use.
    hbm_gib: float = 0.0
    # Bytes per second between memory and chip.
    hbm: float = 0.0
    # Bytes per second to the other chips of a slice, one direction, over all links.
    ici: float = 0.0
    # Of a core: what kernels work in.
    vmem_mib: float = 0.0
    # Hz; the one at which the compiler's FLOPs per cycle make the peak.
    clock: float = 0.0
    # Slices that can be had.
    shapes: tuple[str, ...] = ()
    # Two cores per chip, which the compiler is told to treat as one device.
    megacore: bool = False

    @property
    def torus_axes(self) -> int:
        return len(self.shapes[0].split("x"))


# Bytes per second and chip between slices, over the data centre's network, 25 Gbit/s:
# the order of magnitude.
DCN = 3.1e9

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
    "8x16x16",
)  # fmt: skip
# The first whose kind is found counts.
CHIPS = {
    "v3": Chip("TPU v3", 123e12),
    "v4": Chip(
        "TPU v4", 275e12, 30.75, 1228e9, 300e9, 16, 1.05e9, _CUBE, megacore=True
    ),
    "v5e": Chip("TPU v5 lite", 197e12, 15.75, 819e9, 200e9, 128, 1.5e9, _FLAT),
    "v5p": Chip("TPU v5p?", 459e12, 95.74, 2765e9, 600e9, 64, 1.75e9, _CUBE),
    "v6e": Chip("TPU v6 lite", 918e12, 31.25, 1640e9, 400e9, 128, 1.75e9, _FLAT),
    "T4": Chip("T4", 65e12),
    "L4": Chip("L4", 121e12),
    "A100": Chip("A100", 312e12),
    "H100": Chip("H100", 989e12),
    "H200": Chip("H200", 989e12),
}
# Number of chips of every slice that can be planned for.
SLICES = {
    f"{name}:{shape}": math.prod(map(int, shape.split("x")))
    for name, chip in CHIPS.items()
    for shape in chip.shapes
}


def slice_of(device: Any) -> int:
    """Number of the slice of TPUs that a device is in; 0 where there is but one."""
    return getattr(device, "slice_index", 0) or 0


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls ``device_kind``; None where it is not in the table."""
    named = lambda chip: re.search(rf"\b{chip.kind}\b", device_kind)
    return next(filter(named, CHIPS.values()), None)
