# SPDX-License-Identifier: Apache-2.0
"""Reads what XLA compiled for a TPU: cycles, FLOPs and network traffic of
``compiled.as_text()``.

``compiled.cost_analysis()`` counts the body of a loop once however often it runs, and
collectives as local memory traffic. The text has what is needed to do better: the
backend's own estimate of the cycles of each fusion (``estimated_cycles``: arithmetic
and memory, no network), the trip counts of loops and the groups of each collective.
Everything here is per device and step.
"""

import dataclasses
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from vit_jax.errors import UserError

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip


class Instruction(NamedTuple):
    name: str
    # "f32[8,128]{1,0}" or a tuple of such.
    type: str
    op: str
    # op(operands), attributes
    rest: str


@dataclasses.dataclass
class Collective:
    """All collectives of one kind and element type."""

    count: int = 0
    # Of the whole array, per device that takes part.
    bytes: float = 0
    # What each device sends, in a ring.
    wire_bytes: float = 0.0
    # Of these, within groups smaller than the mesh.
    part_bytes: float = 0.0

    def add(
        self, count: int, size: float, wire_bytes: float, part_bytes: float
    ) -> None:
        self.count += count
        self.bytes += size
        self.wire_bytes += wire_bytes
        self.part_bytes += part_bytes


class KernelCall(NamedTuple):
    """A call of a kernel (Pallas), of which the compiler has no estimate."""

    name: str
    # Of its first operand.
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass
class Cost:
    """Of one step on one device."""

    cycles: int = 0
    # Of the fusions that contain a matrix product.
    matmul_cycles: int = 0
    # Of matrix products and convolutions, recomputation included.
    flops: int = 0
    # How often kernels are called.
    kernels: dict[KernelCall, int] = dataclasses.field(
        default_factory=lambda: defaultdict(int)
    )
    collectives: dict[str, Collective] = dataclasses.field(
        default_factory=lambda: defaultdict(Collective)
    )
    # (cycles, where in the program)
    fusions: list[tuple[int, str]] = dataclasses.field(default_factory=list)


def cost(text: str, num_devices: int) -> Cost:
    """Walks the program from its entry, loop bodies times their trip counts.

    Raises:
      UserError: collectives of an element type of which the size is not known.
    """
    computations, entry = parse(text)
    walk = _Walk(computations, num_devices)
    walk.add(entry, 1)
    walk.total.collectives = dict(walk.total.collectives)
    walk.total.kernels = dict(walk.total.kernels)
    return walk.total


class _Walk:
    """Adds up what the computations of a program cost."""

    def __init__(self, computations: dict[str, list[Instruction]], num_devices: int):
        self.computations, self.num_devices = computations, num_devices
        self.total = Cost()
        self._flops: dict[str, int] = {}
        # Asynchronous fusions repeat their collective, with its channel, in several
        # places.
        self._seen: set[tuple[str, str]] = set()

    def add(self, name: str, trips: int) -> None:
        """Everything that runs where computation ``name`` runs ``trips`` times."""
        self._communicate(name, trips)
        types = {i.name: i.type for i in self.computations[name]}
        for i in self.computations[name]:
            if i.op == "while":
                (body,), (condition,) = called(i, "body"), called(i, "condition")
                self.add(body, trips * trip_count(i, self.computations, condition))
                continue
            inner = {"conditional": "branch_computations", "call": "to_apply"}.get(i.op)
            for other in called(i, inner) if inner else ():
                self.add(other, trips)
            flops = convolution_flops(i, types) if i.op == "convolution" else 0
            flops += sum(map(self._flops_of, called(i, "calls")))
            self.total.flops += flops * trips
            if match := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
                cycles = int(match[1]) * trips
                self.total.cycles += cycles
                self.total.matmul_cycles += cycles if flops else 0
                where = re.search(r'op_name="([^"]*)"', i.rest)
                line = f"{i.name} {i.type[:60]} {where[1] if where else ''}"
                self.total.fusions.append((cycles, line))
            elif i.op == "custom-call" and "tpu_custom_call" in i.rest:
                self.total.kernels[_kernel(i, types)] += trips

    def _flops_of(self, name: str) -> int:
        if name not in self._flops:
            types = {i.name: i.type for i in self.computations[name]}
            self._flops[name] = sum(
                convolution_flops(i, types)
                if i.op in ("convolution", "dot")
                else sum(map(self._flops_of, called(i, "calls")))
                for i in self.computations[name]
            )
        return self._flops[name]

    def _communicate(self, name: str, trips: int) -> None:
        for i in self.computations[name]:
            kind = i.op.removesuffix("-start")
            if kind in COLLECTIVES:
                self._collective(name, i, kind, trips)
            # To other slices.
            elif i.op == "send" and "is_host_transfer=true" in i.rest:
                size = sizes(i.type)[0] * trips
                self.total.collectives["send"].add(trips, size, size, 0.0)
            if i.op == "fusion" or i.op.endswith("-start"):
                for other in called(i, "calls"):
                    self._communicate(other, trips)

    def _collective(self, name: str, i: Instruction, kind: str, trips: int) -> None:
        where = ""
        # A reduce-scatter is a fusion around an all-reduce of the whole array. Those
        # that were combined, one per layer, all have channel 1.
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind, where = "reduce-scatter", name.split(".clone")[0]
        if channel := re.search(r"channel_id=(\d+)", i.rest):
            if (channel[1], where) in self._seen:
                return
            self._seen.add((channel[1], where))
        n = group_size(i.rest, self.num_devices)
        arrays = sizes(i.type)
        size = sum(arrays)
        if i.op in ("all-gather-start", "collective-permute-start"):
            # The type holds the operand too.
            size = max(arrays)
        elif i.op == "reduce-scatter":
            size *= n
        ring = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}
        sent = size * trips * ring.get(kind, (n - 1) / n)
        part = sent if n < self.num_devices else 0.0
        self.total.collectives[kind].add(trips, size * trips, sent, part)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions per computation, and the name of the entry computation.

    Raises:
      ValueError: no entry computation, so this is not HLO text.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if body is None:
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                body = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            body = None
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line):
            type_, rest = _split_type(match[2])
            body.append(Instruction(match[1], type_, rest.split("(", 1)[0], rest))
    if not entry:
        raise ValueError("the text holds no ENTRY computation")
    return computations, entry


def called(i: Instruction, attribute: str) -> list[str]:
    """Computations named by ``attribute=%a`` or ``attribute={%a, %b}``."""
    match = re.search(attribute + r"=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)", i.rest)
    return [name.strip().lstrip("%") for name in match[1].split(",")] if match else []


def trip_count(
    loop: Instruction, computations: dict[str, list[Instruction]], condition: str
) -> int:
    """How often a loop runs: what XLA found out, else the largest number that its
    condition compares with."""
    if match := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
        return int(match[1])

    def constants(name: str) -> list[int]:
        found = []
        for i in computations[name]:
            if i.op == "constant" and (match := re.match(r"constant\((\d+)\)", i.rest)):
                found.append(int(match[1]))
            found += [n for other in called(i, "calls") for n in constants(other)]
        return found

    return max(constants(condition), default=1)


def sizes(type_: str) -> list[float]:
    """Bytes of each array in a type.

    Raises:
      UserError: an element type of which the size is not known.
    """
    return [
        _bits(dtype) / 8 * int(np.prod([int(n) for n in dims.split(",") if n]))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", type_)
    ]


def _bits(dtype: str) -> int:
    """The first number in the name: of bf16 16, of f8e4m3fn 8."""
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    if match := re.match(r"[a-z]+(\d+)", dtype):
        return int(match[1])
    raise UserError(
        f"the compiled program communicates elements of type {dtype!r}, of which the "
        "size is not known: its network traffic cannot be estimated"
    )


def group_size(rest: str, num_devices: int) -> int:
    """Devices that a collective connects; ``replica_groups`` has three spellings."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        axes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return int(np.prod([axes[name] for name in re.findall(r"'(\w+)'", match[2])]))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    return num_devices


def convolution_flops(i: Instruction, types: dict[str, str]) -> int:
    """FLOPs of a convolution, which is how XLA for TPUs writes matrix products, or of a
    dot.

    Batch axes of a product appear as spatial axes with dilation: only positions of the
    window that meet an input count.
    """
    operands = [
        _dims(types.get(name, ""))
        for name in re.findall(r"%([\w.\-]+)", _arguments(i.rest))
    ]
    out = _dims(i.type)
    if i.op == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        contracted = (
            [operands[0][int(n)] for n in match[1].split(",") if n] if match else []
        )
        return 2 * int(np.prod(out + contracted))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    if not labels or len(operands) < 2:
        return 0
    lhs_labels, rhs_labels, out_labels = labels.groups()
    window = dict(
        re.findall(
            r"(\w+)=(\S+)", (re.search(r"window=\{([^}]*)\}", i.rest) or ["", ""])[1]
        )
    )
    rank = len(out_labels) - 2

    def attribute(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * rank

    positions = 1
    for k in range(rank):
        size, stride = int(attribute("size", "1")[k]), int(attribute("stride", "1")[k])
        low = int(attribute("pad", "0_0")[k].split("_")[0])
        lhs_dilate = int(attribute("lhs_dilate", "1")[k])
        rhs_dilate = int(attribute("rhs_dilate", "1")[k])
        n_in = operands[0][lhs_labels.index(str(k))]
        n_out = out[out_labels.index(str(k))]
        at = np.arange(n_out)[:, None] * stride - low + np.arange(size) * rhs_dilate
        positions *= int(
            ((at >= 0) & (at % lhs_dilate == 0) & (at < n_in * lhs_dilate)).sum()
        )
    features = (
        out[out_labels.index("b")]
        * out[out_labels.index("f")]
        * operands[1][rhs_labels.index("i")]
    )
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    return 2 * features * positions // (int(groups[1]) if groups else 1)


def _kernel(i: Instruction, types: dict[str, str]) -> KernelCall:
    name = re.search(r'op_name="[^"]*?(\w+)/pallas_call', i.rest)
    operand = re.search(r"%([\w.\-]+)", _arguments(i.rest))
    type_ = types.get(operand[1], "") if operand else ""
    dtype = re.match(r"\w+", type_)
    return KernelCall(
        name[1] if name else i.name.split(".")[0],
        dtype[0] if dtype else "",
        tuple(_dims(type_)),
    )


def _split_type(text: str) -> tuple[str, str]:
    """``(a, b) op(...)`` -> ``(a, b)``, ``op(...)``."""
    if not text.startswith("("):
        type_, _, rest = text.partition(" ")
        return type_, rest
    depth = 0
    for n, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: n + 1], text[n + 2 :]
    return text, ""


def _arguments(rest: str) -> str:
    """What is between the parentheses of ``op(...)``."""
    start, depth = rest.find("(") + 1, 1
    for n in range(start, len(rest)):
        depth += (rest[n] == "(") - (rest[n] == ")")
        if not depth:
            return rest[start:n]
    return rest[start:]


def _dims(type_: str) -> list[int]:
    match = re.search(r"\w+\[([\d,]*)\]", type_)
    return [int(n) for n in match[1].split(",") if n] if match else []
