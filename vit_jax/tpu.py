# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler, on a machine without TPUs."""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.experimental import topologies

from vit_jax.config import nearest
from vit_jax.errors import UserError
from vit_jax.hardware import CHIPS, SLICES, Chip, slice_of


class Topology(NamedTuple):
    name: str
    chip: Chip
    devices: Sequence[jax.Device]


def topology(name: str, slices: int = 1) -> Topology:
    """The devices of ``name``, such as ``v5e:16x16``, as the compiler describes them.

    Raises:
      UserError: not a topology, or no TPU compiler.
    """
    valid = list(SLICES)
    if name not in valid:
        raise UserError(
            f"unknown --topology={name!r}: {nearest(name, valid)}choose one of {', '.join(valid)}"
        )
    if slices < 1:
        raise UserError(f"--slices={slices}: it must be at least 1")
    _require_compiler()
    chip = CHIPS[name.split(":")[0]]
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip.megacore else {}
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except jax.errors.JaxRuntimeError as e:
        if "lockfile" in str(e):
            raise UserError(
                "another process is using libtpu, which serves one at a time: wait for it or end it"
            ) from e
        raise UserError(f"--topology={name!r}: {str(e).splitlines()[0]}") from e
    return Topology(name, chip, described.devices)


def _require_compiler() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed: pip install 'vit_jax[plan]'"
        )
    # The compiler must not look for TPUs or for the metadata server of a cloud machine;
    # and since it touches no TPU, it may run while another process uses one.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program; sizes in bytes per device."""

    # The optimized program, as ``hlo`` reads it; "" if it did not fit.
    text: str
    # Seconds that the compiler took, also when the result comes from disk.
    seconds: float
    arguments: int = 0
    # Of what the step makes beside its arguments.
    temporaries: int = 0
    code: int = 0
    # What the compiler said where the program does not fit.
    problem: str = ""


def compile(lowered: jax.stages.Lowered, target: Topology) -> Compiled:
    """Compiles for ``target``, or takes what :func:`cached` has of an earlier time."""
    slices = len(set(map(slice_of, target.devices)))
    key = (target.name, str(slices), lowered.as_text())
    return Compiled(**cached(key, lambda: dataclasses.asdict(_compile(lowered))))


def cached(key: Sequence[str], find_out: Callable[[], Any]) -> Any:
    """What ``find_out`` returns, a JSON value; from disk if it ran before with the same
    key, compiler and options of the compiler.

    Kept beside JAX's own cache of compiled programs, if that is on and can be written;
    None is not kept.
    """
    root = jax.config.jax_compilation_cache_dir
    if not root or not jax.config.jax_enable_compilation_cache:
        return find_out()
    versions = [f"{n} {_version(n)}" for n in ("jax", "jaxlib", "libtpu")]
    options = [os.environ.get(f, "") for f in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    name = hashlib.sha256("\n".join([*key, *versions, *options]).encode()).hexdigest()
    path = epath.Path(root) / "plan" / f"{name}.json.gz"
    # Not there, or cut off: it is found out again.
    with contextlib.suppress(OSError, EOFError, ValueError):
        return json.loads(gzip.decompress(path.read_bytes()))
    found = find_out()
    if found is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(gzip.compress(json.dumps(found).encode()))
            partial.replace(path)
    return found


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "absent"


def _compile(lowered: jax.stages.Lowered) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if advice := beyond_vector_memory(str(e)):
            raise UserError(advice) from e
        if not needed_memory(str(e)):
            raise
        return Compiled("", time.perf_counter() - start, problem=str(e))
    sizes: Any = compiled.memory_analysis()
    made = sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return Compiled(
        text=compiled.as_text() or "",
        seconds=time.perf_counter() - start,
        arguments=sizes.argument_size_in_bytes,
        # Donated arguments are counted once.
        temporaries=made - sizes.alias_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )


def beyond_vector_memory(message: str) -> str:
    """What to do where a kernel asks for more vector memory than a core has; "" if the
    compiler's message is about something else."""
    if "RESOURCE_EXHAUSTED" not in message or "vmem" not in message.lower():
        return ""
    sizes = re.search(r"size (\S+) and limit (\S+)", message)
    numbers = f" ({sizes[1]} of {sizes[2]})" if sizes else ""
    return (
        f"a kernel asks for more vector memory than there is{numbers}: set "
        "config.model.attention=xla"
    )


def needed_memory(message: str) -> float:
    """Bytes that the compiler says the program needs, 0 if its message is about
    something else."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return 0.0
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(
        r"(?:Used|required for HLO temporaries \() ?([\d.]+)([KMGT])", message
    )
    return float(found[1]) * unit[found[2]] if found else 1.0
