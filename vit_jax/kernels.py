# SPDX-License-Identifier: Apache-2.0
"""Which program computes attention in the blocks, ``config.model.attention``: einsums
(models/attention.py), a kernel for TPUs (models/attention_tpu.py) or cuDNN's for GPUs.

With "auto", a kernel has to prove itself on the device at hand, once for each shape:
outputs and gradients must be those of the einsums, and come faster.
"""

import dataclasses
import functools
import inspect
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vit_jax import models, sharding, tpu
from vit_jax.config import Config, ModelConfig
from vit_jax.errors import UserError
from vit_jax.hardware import chip_of
from vit_jax.models import attention_tpu
from vit_jax.models.attention_tpu import Kernel

# By the platforms of JAX.
KERNELS = {"tpu": "pallas", "gpu": "cudnn", "cuda": "cudnn"}
# By how much outputs and gradients may differ from those of the einsums, in the
# Euclidean norm: both round to bfloat16 in several places, each by 4e-3 (products of
# float32 too, on TPUs).
TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True)
class Attend:
    """A ``models.Attend`` for arrays that are divided over ``mesh``."""

    # "pallas", "cudnn", or "einsum" to compare them with.
    kind: str
    mesh: Mesh | None = None
    # Bytes of vector memory of a TPU core.
    vmem: int = 0
    interpret: bool = False

    def __call__(
        self,
        tokens: jax.Array,
        kernels: Sequence[jax.Array],
        biases: Sequence[jax.Array],
    ) -> jax.Array:
        """(B, S, D), three (D, k, D_h) and three (k, D_h) -> (B, S, k D_h)."""
        _, heads, head_dim = kernels[0].shape
        flat = [w.reshape(len(w), -1).astype(tokens.dtype) for w in kernels]
        added = [b.reshape(-1) for b in biases]
        parts = sharding.batch_parts(self.mesh) if self.mesh else 1
        if self.kind != "pallas":
            qkv = _plus(tokens @ jnp.concatenate(flat, 1), jnp.concatenate(added))
            return WHOLE[self.kind](qkv, heads)
        along = self.mesh.shape.get("tensor", 1) if self.mesh else 1
        kernel = attention_tpu.kernel(
            images=len(tokens) // parts,
            tokens=tokens.shape[1],
            heads=heads // along,
            head_dim=head_dim,
            itemsize=tokens.dtype.itemsize,
            vmem=self.vmem,
            interpret=self.interpret,
        )
        if kernel is None or len(tokens) % parts:
            return dataclasses.replace(self, kind="einsum")(tokens, kernels, biases)
        if along == 1:
            bias = jnp.concatenate(added)
            return _attention(self, kernel, tokens @ jnp.concatenate(flat, 1), bias)
        # Each device joins the queries, keys and values of its own heads.
        assert self.mesh
        alone, own = dataclasses.replace(self, mesh=None), kernel.width
        spec = P(*sharding.batch_sharding(self.mesh).spec, None, "tensor")

        def local(*qkv: jax.Array) -> jax.Array:
            joined = jnp.concatenate(qkv, -1)
            return _attention(alone, kernel, joined, jnp.zeros(3 * own, joined.dtype))

        over = jax.shard_map(
            local, mesh=self.mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
        )
        return over(*(_plus(tokens @ w, b) for w, b in zip(flat, added, strict=True)))

    @property
    def compiler_options(self) -> dict[str, Any]:
        """For the program around the kernel: where there is plenty of vector memory,
        what is fused may use 48 MiB of it, which XLA does not dare by itself (L/16 on
        v5e: 8 % fewer cycles; docs/kernel.md compares sizes)."""
        plenty = self.kind == "pallas" and self.vmem >= 128 * 2**20
        plenty = plenty and not self.interpret
        return {"xla_tpu_scoped_vmem_limit_kib": "49152"} if plenty else {}

    def per_device(self, f: Any, operands: int, results: Any) -> Any:
        """``f`` of what each device has of arrays that are divided by images."""
        if self.mesh is None or self.mesh.size == 1:
            return f
        rows = sharding.batch_sharding(self.mesh).spec
        return jax.shard_map(
            f,
            mesh=self.mesh,
            in_specs=(rows,) * operands,
            out_specs=jax.tree.map(lambda _: rows, results),
            check_vma=False,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    attend: Attend, kernel: Kernel, qkv: jax.Array, bias: jax.Array
) -> jax.Array:
    """Attention (B, S, W) of ``qkv`` (B, S, 3 W) and a ``bias`` (3 W) to be added."""
    return _remember(attend, kernel, qkv, bias)[0]


def _remember(attend: Attend, kernel: Kernel, qkv: jax.Array, bias: jax.Array) -> Any:
    # All that is kept for the backward pass is what the projection computed.
    qkv = _plus(qkv, bias)
    return attend.per_device(kernel.forward, 1, 0)(qkv), (qkv, bias[:0])


def _gradients(attend: Attend, kernel: Kernel, kept: Any, do: jax.Array) -> Any:
    qkv, bias = kept
    d, sums = attend.per_device(kernel.backward, 2, (0, 0))(qkv, do)
    return d, sums.sum((0, 1)).astype(bias.dtype)


_attention.defvjp(_remember, _gradients)


def _plus(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.astype(x.dtype).reshape(1, 1, -1)


def _split(qkv: jax.Array, heads: int) -> list[jax.Array]:
    """(B, S, 3 k D_h) -> queries, keys and values, (B, S, k, D_h) each."""
    shape = (*qkv.shape[:2], heads, -1)
    return [x.reshape(shape) for x in jnp.split(qkv, 3, -1)]


def _einsum(qkv: jax.Array, heads: int) -> jax.Array:
    """Equations 6 and 7, as models/attention.py has them."""
    q, k, v = _split(qkv, heads)
    q = q / q.shape[-1] ** 0.5
    logits = jnp.einsum("btkd,bskd->bkts", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bkts,bskd->btkd", weights, v).reshape(*qkv.shape[:2], -1)


def _cudnn(qkv: jax.Array, heads: int) -> jax.Array:
    q, k, v = _split(qkv, heads)
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return out.reshape(*qkv.shape[:2], -1)


WHOLE = {"einsum": _einsum, "cudnn": _cudnn}


def choose(cfg: Config, mesh: Mesh) -> tuple[Attend | None, str]:
    """What computes attention in a run on ``mesh``, None: einsums; and a line about it.

    Kernels are taken for granted on devices that are only described, and proved on
    others.

    Raises:
      UserError: config.model.attention asks for what cannot be had.
    """
    model, wanted = models.resolve(cfg.model), cfg.model.attention
    device = mesh.devices.flat[0]
    kind = KERNELS.get(device.platform, "xla")
    if wanted == "xla" or (wanted == "auto" and kind == "xla"):
        return None, ""
    images = cfg.batch // sharding.batch_parts(mesh) // cfg.accumulate
    attend = Attend(kind, mesh, vmem=_vmem(device))
    problem = _problem(attend, model, images)
    if wanted != "auto":
        if wanted != kind:
            fits = {"pallas": "TPUs", "cudnn": "GPUs"}[wanted]
            problem = f"it is for {fits}, and this is {device.device_kind}"
        if problem:
            raise UserError(
                f"config.model.attention={wanted}: {problem}; auto and xla always work"
            )
        return attend, f"{wanted}, as config.model.attention has it"
    if problem:
        return None, f"xla, because {problem}"
    if device not in jax.devices():
        return attend, f"{kind}, which a run checks first"
    proof = prove(attend, model, images)
    return (attend if proof.startswith(kind) else None), proof


def _vmem(device: Any) -> int:
    chip = chip_of(device.device_kind)
    return int(2**20 * chip.vmem_mib) if chip else 0


def _problem(attend: Attend, model: ModelConfig, images: int) -> str:
    """Why einsums are all that serves a model; "" if they are not."""
    if models.is_resnet(model):
        return "a ResNet has no attention"
    if knob := models.beyond_attend(model, train=True):
        return f"it does not know {knob}"
    tokens = _tokens(model)
    head_dim = model.width // model.heads
    along = attend.mesh.shape.get("tensor", 1) if attend.mesh else 1
    shape = f"{tokens} tokens, {model.heads} heads of {head_dim}"
    if attend.kind == "cudnn":
        small = model.dtype == "bfloat16" and head_dim % 8 == 0 and head_dim <= 128
        return "" if small else f"cuDNN's has no {model.dtype} with heads of {head_dim}"
    found = attention_tpu.kernel(
        images=images,
        tokens=tokens,
        heads=model.heads // along,
        head_dim=head_dim,
        itemsize=jnp.dtype(model.dtype).itemsize,
        vmem=attend.vmem,
    )
    return "" if found else f"{shape} do not fit the chip's vector memory"


def _tokens(model: ModelConfig) -> int:
    rows, columns = models.token_grid(model, model.image_size)
    return rows * columns + models.prefix_tokens(model)


def prove(attend: Attend, model: ModelConfig, images: int) -> str:
    """Compares a kernel with the einsums on this process' first device; the same line
    on every process, which begins with what is to be taken.

    Results are kept on disk by device, shape and versions; failures, which may pass,
    are not.
    """
    along = attend.mesh.shape.get("tensor", 1) if attend.mesh else 1
    model = dataclasses.replace(
        model, heads=model.heads // along, width=model.width // along
    )
    device, source = jax.local_devices()[0], inspect.getsource(attention_tpu)
    key = ("attend", device.device_kind, f"{attend.kind} {images}", repr(model), source)
    alone = dataclasses.replace(attend, mesh=None)
    speed, difference, problem = 0.0, np.inf, ""
    try:
        speed, difference = tpu.cached(key, lambda: _compare(alone, model, images))
    except Exception as e:
        # Whatever the compiler or the device says: there are einsums.
        problem = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    right, faster = difference <= TOLERANCE, speed > 1.0
    if jax.process_count() > 1:
        votes = multihost_utils.process_allgather(np.array([right, faster]))
        right, faster = np.asarray(votes).reshape(-1, 2).min(0).tolist()
    if problem:
        return f"xla, because {attend.kind} failed: {problem}"
    numbers = (
        f"{speed:.1f} x xla, differs by {difference:.0e} "
        f"(up to {TOLERANCE:.0e} is rounding)"
    )
    if right and faster:
        return f"{attend.kind} {numbers}"
    here = (
        " here, but not everywhere" if speed > 1.0 and difference <= TOLERANCE else ""
    )
    return f"xla, because {attend.kind} is {numbers}{here}"


def _compare(attend: Attend, model: ModelConfig, images: int) -> tuple[float, float]:
    """Speed over that of the einsums, and the largest difference of outputs and
    gradients.

    Raises:
      Exception: whatever the compiler or the device says.
    """
    dtype, shape = jnp.dtype(model.dtype), (model.heads, model.width // model.heads)
    draw = iter(jax.random.split(jax.random.key(0), 8))
    size = (images, _tokens(model), model.width)
    tokens = jax.random.normal(next(draw), size, dtype)
    do = jax.random.normal(next(draw), size, dtype)
    scale = model.width**-0.5
    kernels = [
        scale * jax.random.normal(next(draw), (model.width, *shape)) for _ in range(3)
    ]
    biases = [0.1 * jax.random.normal(next(draw), shape) for _ in range(3)]

    def run(how: Attend) -> tuple[list[np.ndarray], float]:
        # With the options of the step, which this compiler may not know.
        @functools.partial(jax.jit, compiler_options=how.compiler_options or None)
        def both(tokens, kernels, biases, do):
            out, vjp = jax.vjp(how, tokens, kernels, biases)
            d_tokens, d_kernels, d_biases = vjp(do)
            return [out, d_tokens, jnp.stack(d_kernels), jnp.stack(d_biases)]

        args = (tokens, kernels, biases, do)
        results = [np.asarray(x, np.float64) for x in both(*args)]
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready([both(*args) for _ in range(5)])
            seconds.append(time.perf_counter() - start)
        return results, statistics.median(seconds)

    kernel, seconds = run(attend)
    einsum, reference = run(Attend("einsum"))
    difference = max(
        float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for a, b in zip(kernel, einsum, strict=True)
    )
    return reference / seconds, difference
