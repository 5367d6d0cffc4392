# SPDX-License-Identifier: Apache-2.0
"""Whose file is it? The family of a torch checkpoint, and its arrays under our names."""

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import NamedTuple

from vit_jax.errors import UserError
from vit_jax.weights import roles
from vit_jax.weights.contents import Array, count_up, in_memory
from vit_jax.weights.families import FAMILIES, Family
from vit_jax.weights.report import Report

# Which of several encoders in one file is the model, by a part of their path.
_PREFERRED = (
    "teacher",
    "base_encoder",
    "model_ema",
    "encoder",
    "vision_model",
    "visual",
)

# What may be in a file and belongs to no image encoder.
_UNUSED = {
    r"(^|\.)decoder": "the decoder of pre-training",
    r"(^|\.)(dino_head|ibot_head|predictor|projectors)\.": "the head of pre-training",
    r"(^|\.)head\.(mlp|last_layer)\.": "the head of pre-training",
    r"(^|\.)lm_head\.": "the head of masked image modelling",
    r"base_encoder\.head\.\d": "the head of pre-training",
    r"(^|\.)local_cls_norm\.": "the norm of local crops in pre-training",
    r"(^|\.)(text_model|text|transformer|token_embedding|ln_final|text_projection)\b": (
        "the text encoder"
    ),
    r"(^|\.)positional_embedding$": "the text encoder",
    r"(^|\.)logit_(scale|bias)$": "the loss of image and text",
    r"(input_resolution|context_length|vocab_size)$": "the text encoder",
    r"relative_position_index$|position_ids$|num_batches_tracked$": "counters",
    r"rope\.freqs_(cos|sin)$|rope_embed\.(periods|inv_freq)$": (
        "rotary positions, which are computed"
    ),
}

# What other networks' files contain, and none of a family that is known here: the first
# array that a pattern finds is named as the part that is unknown.
_LOOKS_LIKE = {
    r"layers\.\d+\.blocks\.\d+\.": "a Swin Transformer",
    r"stages\.\d+\.(blocks\.\d+\.)?conv_dw|dwconv": "a ConvNeXt",
    r"patch_embed\.(proj\.1|backbone\.bn1)\.": "a hybrid with another stem",
    r"(^|\.)layer1\.0\.conv1": "a ResNet",
    r"^(stages|blocks|network)\.\d+\.(\d+|blocks)\.": "a network of several stages",
    r"\.rel_pos_[hw]$|^neck\.": "a Segment Anything model",
    r"encoder\.layers?\.\d+\.attention\.self\.": "a text model such as BERT",
    r"model\.layers\.\d+\.(self_attn|mlp)\.": "a language model",
    r"patch_generator|radio_model": "C-RADIO",
    r"beit3\.": "BEiT-3",
    r"temporal|video": "a video model",
    r"\.attns\.\d+\.": "a ViT with branches side by side",
    r"\.lambda_[qk]\d$": "a ViT with differential attention",
    r"(^|\.)rope\.freqs$": "a ViT with mixed rotary positions",
    r"rel_pos\.mlp\.": "a ViT with relative positions that an MLP computes",
    r"\.attn\.proj_[lw]\.": "a CaiT",
    r"(^|\.)blocks\.\d+\.(proj|attn\.(pool|norm)_[qkv])\.": "a Hiera or MViT",
    r"mlp_(tokens|channels)\.": "an MLP-Mixer",
}


class Found(NamedTuple):
    """The encoder in a file."""

    family: Family
    prefix: str  # of all its names
    names: roles.Names  # one spelling per role that is there, without the prefix
    packed: bool  # gate and value are one array
    depth: int
    width: int
    mlp_dim: int


def recognise(arrays: dict[str, Array], timm: bool, where: str) -> Found:
    """The family of a torch file; ``timm``: its config.json is one of timm's.

    Raises:
      UserError: it is none of ours, or there are several.
    """
    for family in FAMILIES:
        if timm and not family.timm:
            continue
        if not re.search(family.called, PurePath(where).name.lower()):
            continue
        fits = []
        for prefix in _prefixes(arrays, family):
            names = _spelled(arrays, family, prefix)
            there = set(names)
            if there.issuperset(family.has) and not there.intersection(family.lacks):
                fits.append((prefix, names))
        if len({_rank(prefix) for prefix, _ in fits}) < min(len(fits), 2):
            raise UserError(
                f"{where} holds several encoders, under {sorted(p for p, _ in fits)}: save "
                "the one that you want on its own"
            )
        if fits:
            prefix, names = fits[0]
            if message := _looks_like(arrays, prefix, where):
                raise UserError(message)
            return _measured(arrays, family, prefix, names, where)
    raise UserError(_looks_like(arrays, "", where) or _refusal(arrays, where))


def _prefixes(arrays: dict[str, Array], family: Family) -> list[str]:
    """Paths under which the family's patch embedding is, the likeliest first."""
    anchors = [f"{name}.weight" for name in family.names["patch"].split("|")]
    rank = roles.KINDS[family.kinds.get("patch", "conv")].rank
    found = [
        name.removesuffix(anchor)
        for anchor in anchors
        for name, array in arrays.items()
        if re.search(rf"(^|\.){re.escape(anchor)}$", name) and len(array.shape) == rank
    ]
    if family.inside:
        found = [p for p in found if family.inside in p.split(".")]
    return sorted(found, key=lambda p: (_rank(p), len(p)))


def _rank(prefix: str) -> int:
    ranks = [i for i, word in enumerate(_PREFERRED) if word in prefix.split(".")]
    return min(ranks, default=len(_PREFERRED))


def _spelled(arrays: dict[str, Array], family: Family, prefix: str) -> roles.Names:
    """The one spelling of each role that is in the file."""
    names = {}
    for role, spellings in family.names.items():
        for name in spellings.split("|"):
            for place in _places(prefix) if name.startswith("/") else [prefix]:
                full = place + name.removeprefix("/").replace("{i}", "0")
                tails = ("", ".weight", "weight") if not full.endswith(".") else ("",)
                if any(full + tail in arrays for tail in tails):
                    names.setdefault(role, place + name.removeprefix("/"))
    return names


def _places(prefix: str) -> Iterator[str]:
    """ "a.b." -> "a.b.", "a.", "": where something outside the tower may be."""
    parts = prefix.split(".")[:-1]
    for end in range(len(parts), -1, -1):
        yield "".join(f"{part}." for part in parts[:end])


def _measured(
    arrays: dict[str, Array],
    family: Family,
    prefix: str,
    names: roles.Names,
    where: str,
) -> Found:
    block = names.get("norm1", "").partition("{i}")[0]
    pattern = re.compile(rf"{re.escape(block)}(\d{{1,9}})\.")
    numbers = (int(m[1]) for name in arrays if block and (m := pattern.match(name)))
    depth = count_up(numbers, 0, f"{where}: block ")
    shape = lambda role: shape_of(arrays, names, role)
    up, down = shape("up"), shape("down")
    packed = "gate" not in names and len(down) == 2 and up[:1] == (2 * down[1],)
    if packed:
        names = {{"up": "gate_up"}.get(k, k): v for k, v in names.items()}
    return Found(
        family,
        prefix,
        names,
        packed,
        depth,
        width=(shape("patch") or (0,))[0],
        mlp_dim=down[1] if len(down) == 2 else 0,
    )


def shape_of(
    arrays: dict[str, Array], names: roles.Names, role: str
) -> tuple[int, ...]:
    """Of the first array of a role, in the first block; (): it is not there."""
    name = names.get(role, "").replace("{i}", "0")
    array = arrays.get(f"{name}.weight") or arrays.get(name)
    return array.shape if array else ()


def convert(
    found: Found, arrays: dict[str, Array], sizes: roles.Sizes, report: Report
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Our arrays, and the names that the file had, as :func:`roles.write` wants them.

    What is not explained stays under its own name, which is an error later on.
    """
    left = {name: array for name, array in arrays.items() if 0 not in array.shape}
    names = found.names
    if "head" in names and "pooler" in names.get("pre_logits", ""):
        name = names["pre_logits"]
        names = {role: n for role, n in names.items() if role != "pre_logits"}
        for leaf in ("weight", "bias"):
            if left.pop(f"{name}.{leaf}", None):
                report.change(
                    f"ignored: {name}.{leaf} (the classifier does not read it)"
                )
    result, present = roles.read(left, names, found.family.kinds, sizes, report.where)
    if "pool_k" in names:
        rest = roles.only_attention(sizes.width, sizes.pool_heads)
        result |= {name: in_memory(name, values) for name, values in rest.items()}
    if "mask" in names:
        report.change(f"ignored: {names['mask']} (masked image modelling only)")
    if folded := sorted(n for r, n in names.items() if r in roles.FOLDED):
        report.change(f"folded: {', '.join(folded)} into the layers that they scale")
    _ignore(found, left, report)
    if left:
        name, *more = sorted(left)
        other = _other_family(left, found)
        report.problem(
            f"{found.family.name} has nothing like {name} {left[name].shape}"
            + (f" and {len(more)} other arrays" if more else "")
            + (f" (as in a file of {other}: two models in one?)" if other else "")
        )
    _fill(result, sizes.depth, report)
    start = found.prefix
    inside = lambda n: n.removeprefix(start) if n.startswith(start) else f"/{n}"
    return result, tuple(map(inside, present))


def _ignore(found: Found, left: dict[str, Array], report: Report) -> None:
    """Takes out what the image encoder does not need, with one line per reason."""
    reasons: dict[str, list[str]] = {}
    tower = found.prefix or found.names.get("norm1", "").partition("{i}")[0]
    for name in list(left):
        inside = tower and name.startswith(tower)
        if (
            (not inside and _rank(name) < len(_PREFERRED))
            or "momentum_encoder." in name
            or ("student." in name and not inside)
        ):
            reasons.setdefault("another encoder", []).append(name)
        else:
            why = _unused(name)
            if why or not left[name].shape:
                why = why or "a number, no parameter"
                reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        for name in names:
            left.pop(name, None)
        report.change(f"ignored: {len(names)} arrays such as {names[0]} ({why})")


def _unused(name: str) -> str:
    """What an array is that belongs to no image encoder; "": perhaps it does."""
    return next((what for p, what in _UNUSED.items() if re.search(p, name)), "")


def _other_family(left: dict[str, Array], found: Found) -> str:
    try:
        other = recognise(left, False, "the rest").family
    except UserError:
        return ""
    return other.name if other is not found.family else ""


# Layers of ours that have a bias where files may have none.
_BIASED = re.compile(r"(.*(query|key|value|out|gate|Dense_\d|embedding|head))/kernel")


def _fill(arrays: dict[str, Array], depth: int, report: Report) -> None:
    """Zeros for the biases that a layer has in no block: the family has none there."""
    import numpy as np

    absent: dict[str, list[str]] = {}
    for name in list(arrays):
        match = _BIASED.fullmatch(name)
        if match and f"{match[1]}/bias" not in arrays:
            kind = re.sub(r"encoderblock_\d+", "encoderblock_{i}", match[1])
            absent.setdefault(kind, []).append(match[1])
    for kind, layers in absent.items():
        if len(layers) < (depth if "{i}" in kind else 1):
            continue  # some blocks have it: the others are incomplete
        for layer in layers:
            shape = arrays[f"{layer}/kernel"].shape
            inward = layer.endswith(("query", "key", "value"))
            size = shape[1:] if inward else shape[-1:]
            zeros = lambda size=size: np.zeros(size, np.float32)
            arrays[f"{layer}/bias"] = Array(f"{layer}/bias", size, zeros)
    if absent:
        layers = sorted({kind.split("/")[-1] for kind in absent})
        report.change(f"zeros: the biases of {', '.join(layers)}, which the file lacks")


def _looks_like(arrays: dict[str, Array], prefix: str, where: str) -> str:
    """Refuses what shows another network under ``prefix``; "": nothing does. What is
    beside an image encoder, such as BERT for the text, may be anything."""
    inside = [n for n in arrays if n.startswith(prefix) and not _unused(n)]
    for pattern, looks in _LOOKS_LIKE.items():
        if found := [n for n in inside if re.search(pattern, n.removeprefix(prefix))]:
            name = found[0]
            return (
                f"{where} looks like {looks}, which is none of the families known here: no "
                f"model here has anything like {name} {arrays[name].shape}"
            )
    return ""


def _refusal(arrays: dict[str, Array], where: str) -> str:
    partial = [f.name for f in FAMILIES if _prefixes(arrays, f)]
    like = f" looks like part of {partial[-1]}, which" if partial else ""
    known = "(patch_embed.proj, embeddings.patch_embeddings.projection, conv1, ...)"
    lacks = "none of its blocks" if partial else f"no patch embedding {known}"
    return (
        f"{where}{like} is none of the families known here: {lacks} is among its "
        f"{len(arrays)} arrays, which begin with {sorted(arrays)[:4]}"
    )
