# SPDX-License-Identifier: Apache-2.0
"""timm and Hugging Face safetensors, in both directions, without PyTorch.

One table of :class:`Pair` says which torch arrays hold which of ours and how the axes
differ (spec 3.7); reading and writing both follow it, so they are inverse by
construction.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.weights.contents import Array, count_up
from vit_jax.weights.layout import POSITIONS

_ATTENTION = "MultiHeadDotProductAttention"


class Pair(NamedTuple):
    """One torch array and the arrays of ours that it holds, joined along its axis 0."""

    torch: str
    ours: tuple[str, ...]
    kind: str  # key of _KINDS


class _Kind(NamedTuple):
    """How axes differ. D: width of the input; k: heads."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray, int], np.ndarray]  # also takes k
    shape: Callable[[tuple[int, ...], int], tuple[int, ...]]  # of torch -> ours


def _heads_in(shape: tuple[int, ...], k: int) -> tuple[int, ...]:
    return (shape[1], k, shape[0] // k)


def _heads_out(shape: tuple[int, ...], k: int) -> tuple[int, ...]:
    return (k, shape[1] // k, shape[0])


_KINDS = {
    "same": _Kind(lambda x: x, lambda x, k: x, lambda s, k: s),
    "dense": _Kind(lambda x: x.T, lambda x, k: x.T, lambda s, k: s[::-1]),
    "conv": _Kind(
        lambda x: x.transpose(3, 2, 0, 1),
        lambda x, k: x.transpose(2, 3, 1, 0),
        lambda s, k: (s[2], s[3], s[1], s[0]),
    ),
    "heads_in": _Kind(  # (D, k, D_h) <-> (k D_h, D)
        lambda x: x.reshape(x.shape[0], -1).T,
        lambda x, k: x.T.reshape(_heads_in(x.shape, k)),
        _heads_in,
    ),
    "heads_bias": _Kind(  # (k, D_h) <-> (k D_h,)
        lambda x: x.reshape(-1),
        lambda x, k: x.reshape(k, -1),
        lambda s, k: (k, s[0] // k),
    ),
    "heads_out": _Kind(  # (k, D_h, D) <-> (D, k D_h)
        lambda x: x.reshape(-1, x.shape[-1]).T,
        lambda x, k: x.T.reshape(_heads_out(x.shape, k)),
        _heads_out,
    ),
}
_RANKS = {"dense": 2, "conv": 4, "heads_in": 2, "heads_bias": 1, "heads_out": 2}


# --- names ------------------------------------------------------------------------------


def timm_pairs(depth: int, stages: Iterable[int] | None) -> Iterator[Pair]:
    """``timm.models.vision_transformer``; ``stages``: units of the ResNet stem."""
    yield Pair("cls_token", ("cls",), "same")
    yield Pair("pos_embed", (POSITIONS,), "same")
    yield from _layer("patch_embed.proj", "embedding", "conv")
    if stages is not None:
        yield from _timm_resnet(list(stages))
    for i in range(depth):
        torch, ours = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        yield from _norm(f"{torch}.norm1", f"{ours}/LayerNorm_0")
        qkv = tuple(f"{ours}/{_ATTENTION}_1/{x}" for x in ("query", "key", "value"))
        yield from _attention(f"{torch}.attn", "qkv", qkv, f"{ours}/{_ATTENTION}_1")
        yield from _norm(f"{torch}.norm2", f"{ours}/LayerNorm_2")
        yield from _layer(f"{torch}.mlp.fc1", f"{ours}/MlpBlock_3/Dense_0", "dense")
        yield from _layer(f"{torch}.mlp.fc2", f"{ours}/MlpBlock_3/Dense_1", "dense")
    yield from _norm("norm", "Transformer/encoder_norm")
    pool = f"MAPHead_0/{_ATTENTION}_0"
    yield Pair("attn_pool.latent", ("MAPHead_0/probe",), "same")
    yield Pair("attn_pool.q.weight", (f"{pool}/query/kernel",), "heads_in")
    yield Pair("attn_pool.q.bias", (f"{pool}/query/bias",), "heads_bias")
    yield from _attention("attn_pool", "kv", (f"{pool}/key", f"{pool}/value"), pool)
    yield from _norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
    yield from _layer("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0", "dense")
    yield from _layer("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1", "dense")
    yield from _layer("pre_logits.fc", "pre_logits", "dense")
    yield from _layer("head", "head", "dense")


def hf_pairs(depth: int, prefix: str = "vit.") -> Iterator[Pair]:
    """``transformers.ViTForImageClassification``; prefix "" is a bare ``ViTModel``."""
    embeddings = f"{prefix}embeddings"
    yield Pair(f"{embeddings}.cls_token", ("cls",), "same")
    yield Pair(f"{embeddings}.position_embeddings", (POSITIONS,), "same")
    yield from _layer(f"{embeddings}.patch_embeddings.projection", "embedding", "conv")
    for i in range(depth):
        torch, ours = f"{prefix}encoder.layer.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{ours}/{_ATTENTION}_1"
        yield from _norm(f"{torch}.layernorm_before", f"{ours}/LayerNorm_0")
        for x in ("query", "key", "value"):
            name = f"{torch}.attention.attention.{x}"
            yield Pair(f"{name}.weight", (f"{attention}/{x}/kernel",), "heads_in")
            yield Pair(f"{name}.bias", (f"{attention}/{x}/bias",), "heads_bias")
        out = f"{torch}.attention.output.dense"
        yield Pair(f"{out}.weight", (f"{attention}/out/kernel",), "heads_out")
        yield Pair(f"{out}.bias", (f"{attention}/out/bias",), "same")
        yield from _norm(f"{torch}.layernorm_after", f"{ours}/LayerNorm_2")
        mlp = f"{ours}/MlpBlock_3"
        yield from _layer(f"{torch}.intermediate.dense", f"{mlp}/Dense_0", "dense")
        yield from _layer(f"{torch}.output.dense", f"{mlp}/Dense_1", "dense")
    yield from _norm(f"{prefix}layernorm", "Transformer/encoder_norm")
    # A dense layer and tanh on the class token, which is what pre_logits is; read by a
    # bare ViTModel only.
    yield from _layer(f"{prefix}pooler.dense", "pre_logits", "dense")
    yield from _layer("classifier", "head", "dense")


def _layer(torch: str, ours: str, kind: str) -> Iterator[Pair]:
    yield Pair(f"{torch}.weight", (f"{ours}/kernel",), kind)
    yield Pair(f"{torch}.bias", (f"{ours}/bias",), "same")


def _norm(torch: str, ours: str) -> Iterator[Pair]:
    yield Pair(f"{torch}.weight", (f"{ours}/scale",), "same")
    yield Pair(f"{torch}.bias", (f"{ours}/bias",), "same")


def _attention(
    torch: str, joined: str, ours: tuple[str, ...], parent: str
) -> Iterator[Pair]:
    kernels = tuple(f"{x}/kernel" for x in ours)
    yield Pair(f"{torch}.{joined}.weight", kernels, "heads_in")
    yield Pair(f"{torch}.{joined}.bias", tuple(f"{x}/bias" for x in ours), "heads_bias")
    yield Pair(f"{torch}.proj.weight", (f"{parent}/out/kernel",), "heads_out")
    yield Pair(f"{torch}.proj.bias", (f"{parent}/out/bias",), "same")


def _timm_resnet(stages: list[int]) -> Iterator[Pair]:
    backbone = "patch_embed.backbone"
    root = f"{backbone}.stem" if stages else backbone  # timm's root-only stem is flat
    yield Pair(f"{root}.conv.weight", ("conv_root/kernel",), "conv")
    yield from _norm(f"{root}.norm", "gn_root")
    for i, units in enumerate(stages):
        for j in range(units):
            torch, ours = (
                f"{backbone}.stages.{i}.blocks.{j}",
                f"block{i + 1}/unit{j + 1}",
            )
            parts = {"conv1": "conv1", "conv2": "conv2", "conv3": "conv3"}
            norms = {"norm1": "gn1", "norm2": "gn2", "norm3": "gn3"}
            if j == 0:
                parts["downsample.conv"] = "conv_proj"
                norms["downsample.norm"] = "gn_proj"
            for theirs, name in parts.items():
                yield Pair(
                    f"{torch}.{theirs}.weight", (f"{ours}/{name}/kernel",), "conv"
                )
            for theirs, name in norms.items():
                yield from _norm(f"{torch}.{theirs}", f"{ours}/{name}")


# --- reading ----------------------------------------------------------------------------

_UNSUPPORTED = {
    r"(^|\.)dist_token$|distillation": "a distillation token (DeiT)",
    r"(^|\.)reg_token$|register_tokens": "register tokens",
    r"(^|\.)fc_norm\.": "a LayerNorm after the mean over tokens (fc_norm)",
    r"\.[qk]_norm\.": "normalised queries and keys",
    r"relative_position_bias|rel_pos": "relative position biases (BEiT)",
    r"(^|\.)norm_pre\.|pre_layrnorm|ln_pre": "a LayerNorm before the blocks (CLIP)",
    r"\.(mlp|attn)\.norm\.": "extra norms inside the blocks",
    r"\.w12\.|\.fc1_g\.": "a gated MLP (SwiGLU)",
}


def from_torch(
    arrays: dict[str, Array], facts: dict[str, Any], where: str
) -> tuple[dict[str, Array], dict[str, Any], str, list[str]]:
    """Arrays under our names; fields of ModelConfig; "timm" or "hf"; notes.

    ``facts`` are fields that are known already, above all ``heads``, which no array
    shows.

    Raises:
      UserError: neither layout, or a part that this code's models do not have.
    """
    for prefix in ("", "module.", "model.", "_orig_mod."):
        if f"{prefix}patch_embed.proj.weight" in arrays:
            layout, vit = "timm", ""
            break
        for vit in ("vit.", ""):
            name = f"{prefix}{vit}embeddings.patch_embeddings.projection.weight"
            if name in arrays:
                break
        else:
            continue
        layout = "hf"
        break
    else:
        raise UserError(
            f"{where} holds neither a ViT of timm (patch_embed.proj.weight) nor one of "
            "Hugging Face (embeddings.patch_embeddings.projection.weight): its "
            f"{len(arrays)} arrays begin with {sorted(arrays)[:4]}"
        )
    arrays = {k.removeprefix(prefix): v for k, v in arrays.items()}
    for pattern, what in _UNSUPPORTED.items():
        if found := [k for k in arrays if re.search(pattern, k)]:
            raise UserError(
                f"{where} has {what}, which the models here do not: {found[0]}"
            )
    notes: list[str] = []
    block = re.compile(
        r"blocks\.(\d{1,9})\."
        if layout == "timm"
        else rf"{vit}encoder\.layer\.(\d{{1,9}})\."
    )
    numbers = (int(m[1]) for k in arrays if (m := block.match(k)))
    depth = count_up(numbers, 0, f"{where}: block ")
    if layout == "timm":
        arrays = _fold_layer_scale(arrays, notes, where)
        pairs = timm_pairs(depth, _timm_stages(arrays, where))
    else:
        pairs = hf_pairs(depth, vit)
        unused = {f"{vit}embeddings.mask_token": "masked image modelling only"}
        if "classifier.weight" in arrays:
            for part in ("weight", "bias"):
                unused[f"{vit}pooler.dense.{part}"] = "the classifier does not read it"
        for name, why in unused.items():
            if arrays.pop(name, None):
                notes.append(f"ignored: {name} ({why})")
    # The published defaults: both use exact GELU; epsilon is timm's, or BERT's for hf.
    eps = {"timm": 1e-6, "hf": 1e-12}[layout]
    fields = {"gelu": "exact", "layer_norm_eps": eps, **facts}
    heads = fields.get("heads") or _guess_heads(
        arrays, layout, vit, depth, where, notes
    )
    fields["heads"] = heads
    result = {}
    for pair in pairs:
        if pair.torch in arrays:
            result |= _split(arrays.pop(pair.torch), pair, heads, where)
    return result | arrays, fields, layout, notes


def _split(array: Array, pair: Pair, heads: int, where: str) -> dict[str, Array]:
    """The arrays of ours that one torch array holds."""
    kind, count = _KINDS[pair.kind], len(pair.ours)
    rank = _RANKS.get(pair.kind, len(array.shape))
    width = array.shape[0] // count if array.shape else 0
    through_heads = array.shape[-1] if pair.kind == "heads_out" else width
    bad = not array.shape or len(array.shape) != rank or array.shape[0] % count
    if bad or (pair.kind.startswith("heads") and through_heads % heads):
        raise UserError(
            f"{where}: {array.name} has shape {array.shape}, which {count * rank} axes "
            f"and heads={heads} do not explain"
            if bad
            else f"{where}: heads={heads} does not divide {array.name} {array.shape}"
        )
    shape = kind.shape((width, *array.shape[1:]), heads)

    def part(x: np.ndarray, i: int) -> np.ndarray:
        # A copy in our order of axes: later use would pay for the strides again and
        # again.
        rows = x[i * width : (i + 1) * width] if count > 1 else x
        return np.ascontiguousarray(kind.from_torch(rows, heads))

    return {
        name: array.map(shape, lambda x, i=i: part(x, i))
        for i, name in enumerate(pair.ours)
    }


def _timm_stages(arrays: dict[str, Array], where: str) -> list[int] | None:
    units: dict[int, set[int]] = {}
    backbone = r"patch_embed\.backbone\."
    for name in arrays:
        pattern = backbone + r"stages\.(\d{1,9})\.blocks\.(\d{1,9})\."
        if match := re.match(pattern, name):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    if any(re.match(backbone, name) for name in arrays):
        stages = range(count_up(units, 0, f"{where}: stage "))
        return [count_up(units[i], 0, f"{where}: stage {i}, unit ") for i in stages]
    return None


def _fold_layer_scale(
    arrays: dict[str, Array], notes: list[str], where: str
) -> dict[str, Array]:
    """Layer scale multiplies a branch's output: fold it into the branch's last layer."""
    scales = {k: v for k, v in arrays.items() if re.search(r"\.ls[12]\.gamma$", k)}
    result = {k: v for k, v in arrays.items() if k not in scales}
    for name, gamma in scales.items():
        block, last = (
            name.rsplit(".", 2)[0],
            "attn.proj" if ".ls1." in name else "mlp.fc2",
        )
        for part in ("weight", "bias"):
            full = f"{block}.{last}.{part}"
            if full in result:
                old = result[full]
                if gamma.shape != old.shape[:1]:
                    raise UserError(
                        f"{where}: {name} has shape {gamma.shape}, not {old.shape[:1]}"
                    )

                def scaled(x: np.ndarray, gamma: Array = gamma) -> np.ndarray:
                    return x * gamma.read().reshape(-1, *(1,) * (x.ndim - 1))

                result[full] = old.map(old.shape, scaled)
        notes.append(f"folded: {name} into {block}.{last}")
    return result


def _guess_heads(
    arrays: dict[str, Array],
    layout: str,
    vit: str,
    depth: int,
    where: str,
    notes: list[str],
) -> int:
    """Heads of a file without config: a published variant's, else heads of 64."""
    norm = "norm.weight" if layout == "timm" else f"{vit}layernorm.weight"
    fc1 = (
        "blocks.0.mlp.fc1"
        if layout == "timm"
        else f"{vit}encoder.layer.0.intermediate.dense"
    )
    if norm not in arrays or f"{fc1}.weight" not in arrays:
        raise UserError(f"{where} is incomplete: {norm} or {fc1}.weight is missing")
    rows = lambda name: math.prod(arrays[name].shape[:1])
    width, mlp_dim = rows(norm), rows(f"{fc1}.weight")
    for name, size in variants.SIZES.items():
        if (size.depth, size.width, size.mlp_dim) == (depth, width, mlp_dim):
            notes.append(
                f"assumed: heads={size.heads}, as in ViT-{name}; no array shows it"
            )
            return size.heads
    if width % 64 == 0:
        notes.append(
            f"assumed: heads={width // 64} of size 64, because no array shows their "
            "number; pass heads= if it is another"
        )
        return width // 64
    raise UserError(
        f"{where}: no array of a torch file shows the number of attention heads, and width "
        f"{width} is no published variant's: pass heads=, or keep config.json beside it"
    )


# --- writing ----------------------------------------------------------------------------


def to_torch(
    flat: dict[str, np.ndarray], pairs: Iterable[Pair]
) -> list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(torch name, shape, values) of each array; values are made when asked for."""
    left = set(flat)
    result = []
    for pair in pairs:
        if not set(pair.ours) <= flat.keys():
            continue
        left -= set(pair.ours)
        kind = _KINDS[pair.kind]

        def values(pair: Pair = pair, kind: _Kind = kind) -> np.ndarray:
            parts = [kind.to_torch(np.asarray(flat[name])) for name in pair.ours]
            return np.concatenate(parts) if len(parts) > 1 else parts[0]

        first = np.broadcast_to(np.float32(0), flat[pair.ours[0]].shape)
        rows, *rest = kind.to_torch(first).shape
        result.append((pair.torch, (rows * len(pair.ours), *rest), values))
    if left:
        raise UserError(
            f"this layout has no place for {len(left)} arrays, such as {sorted(left)[:3]}"
        )
    return result


def exportable(cfg: ModelConfig, layout: str) -> None:
    """Raises: UserError: ``layout`` ("timm" or "hf") has no model like ``cfg``."""
    reason = ""
    if not cfg.depth:
        reason = "the ResNet baselines are no ViT there"
    elif cfg.positions == "relative" or cfg.position_at != "stem":
        reason = (
            f"model.positions={cfg.positions!r} at {cfg.position_at!r} is no table that is "
            "added once"
        )
    elif cfg.head in ("masked_patch", "none"):
        reason = f"model.head is {cfg.head!r}"
    elif layout == "hf" and cfg.resnet_width:
        reason = (
            "its hybrid uses another ResNet; timm has this one: name DEST *.safetensors"
        )
    elif layout == "hf" and cfg.head != "token":
        reason = f"it reads the class token only, and model.head is {cfg.head!r}"
    elif layout == "hf" and cfg.pre_logits and cfg.num_classes:
        reason = "its classifier has no hidden layer (model.pre_logits); fine-tuning drops it"
    if reason:
        raise UserError(f"cannot be written in the {layout} layout: {reason}")
