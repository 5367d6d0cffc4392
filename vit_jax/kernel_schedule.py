# SPDX-License-Identifier: Apache-2.0
"""How long the attention kernel takes, by the TPU compiler's own schedule.

XLA has no estimate for a kernel. But the compiler can write down the instructions that
it made of one: a straight list of bundles, one a cycle, for one step of the grid. What
the list leaves out is waiting for memory, which is bounded by bytes over bandwidth, and
the start of a step (some 0.3 us).
"""

import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax import hardware, tpu
from vit_jax.hardware import Chip
from vit_jax.hlo import KernelCall
from vit_jax.models import attention_tpu
from vit_jax.models.attention_tpu import Kernel


class KernelCost(NamedTuple):
    """Of one call on one device."""

    seconds: float
    flops: int


def cost(call: KernelCall, chip: Chip, head_dim: int) -> KernelCost | None:
    """What a call of the attention kernel costs; None if it is another kernel, or if
    the compiler does not tell."""
    if call.name not in (attention_tpu.FORWARD, attention_tpu.BACKWARD):
        return None
    images, tokens, lanes = call.shape
    itemsize = jnp.dtype(_DTYPES[call.dtype]).itemsize
    kernel = attention_tpu.kernel(
        images=images,
        tokens=tokens,
        heads=lanes // 3 // head_dim,
        head_dim=head_dim,
        itemsize=itemsize,
        vmem=int(chip.vmem_mib * 2**20),
    )
    kind = next(k for k, c in hardware.CHIPS.items() if c is chip)
    found = bundles(kind, call.name, kernel, tokens, call.dtype) if kernel else None
    if not kernel or found is None:
        return None
    backward = call.name == attention_tpu.BACKWARD
    # The backward pass reads what the forward pass does and its gradient, and writes
    # one; products are s and o, or s, dp, dq, dk and dv.
    moved = images * tokens * lanes * itemsize * (7 if backward else 4) // 3
    products = 5 if backward else 2
    flops = 2 * products * images * tokens**2 * lanes // 3
    steps = int(np.prod(kernel.grid(images, tokens)))
    cores = 2 if chip.megacore else 1
    return KernelCost(max(steps * found / cores / chip.clock, moved / chip.hbm), flops)


def bundles(
    kind: str, name: str, kernel: Kernel, tokens: int, dtype: str
) -> int | None:
    """Bundles of one step, from a process of its own, because libtpu reads its options
    once; kept on disk."""
    spec = json.dumps([kind, name, kernel.__dict__, tokens, dtype])
    source = Path(attention_tpu.__file__).read_text()

    def find_out() -> int | None:
        with tempfile.TemporaryDirectory() as folder:
            options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            given = os.environ.get("LIBTPU_INIT_ARGS", "")
            done = subprocess.run(
                [sys.executable, "-m", "vit_jax.kernel_schedule", spec],
                env=os.environ | {"LIBTPU_INIT_ARGS": f"{given} {options}".strip()},
                capture_output=True,
            )
            return None if done.returncode else read(folder, name)

    return tpu.cached(("bundles", spec, source), find_out)


def read(folder: str, name: str) -> int | None:
    """What the dump of a kernel says; None where there is none."""
    pattern = f"{folder}/*{name}*schedule-analysis_final_bundles.txt"
    for path in glob.glob(pattern):
        if found := re.search(
            r"total scheduled bundles: *(\d+)", Path(path).read_text()
        ):
            return int(found[1])
    return None


_DTYPES = {"bf16": "bfloat16", "f32": "float32"}


def main(spec: str) -> None:
    """Compiles a kernel; the options of libtpu say where its schedule goes."""
    kind, name, fields, tokens, dtype = json.loads(spec)
    kernel = Kernel(**fields)
    target = tpu.topology(f"{kind}:{hardware.CHIPS[kind].shapes[0]}")
    place = NamedSharding(Mesh(np.array(target.devices[:1]), ("all",)), P())

    def array(lanes: int) -> Any:
        shape = (2 * kernel.block_images, tokens, lanes)
        return jax.ShapeDtypeStruct(shape, _DTYPES[dtype], sharding=place)

    forward = name == attention_tpu.FORWARD
    args = (array(3 * kernel.width),) if forward else (array(3 * kernel.width), array(kernel.width))  # fmt: skip
    jax.jit(kernel.forward if forward else kernel.backward).lower(*args).compile()


if __name__ == "__main__":
    main(sys.argv[1])
