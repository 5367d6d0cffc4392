# SPDX-License-Identifier: Apache-2.0
"""The whole architecture: what the file states, its arrays show, the caller wants and is
assumed meet in :class:`Facts`."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.weights.contents import Array, count_up
from vit_jax.weights.layout import POSITIONS
from vit_jax.weights.report import Report

_LARGEST = 1 << 15  # side of an image that a file may state
_BLOCK = "Transformer/encoderblock_0"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_1"
_MLP = f"{_BLOCK}/MlpBlock_3"
_POOL = "MAPHead_0/MultiHeadDotProductAttention_0/query/kernel"


# What the caller may say where the file does not: it changes no array.
ASKABLE = (
    "heads",
    "map_heads",
    "head",
    "positions",
    "position_at",
    "gelu",
    "layer_norm_eps",
    "image_mean",
    "image_std",
    "rope",
    "rope_theta",
    "rope_grid",
    "rope_offset",
)
# Where 0 means that the value follows from others.
_DERIVED = ("map_heads", "map_mlp_dim", "rope_theta", "rope_grid", "image_size")


class Facts:
    """Fields of ``ModelConfig`` by who says so, in the order of trust.

    Args:
      stated: by the config file or the metadata that travel with the weights.
      asked: by the caller.
      assumed: what the family usually is, where nobody says.
      report: told of each contradiction, and of what was assumed.
      wanted: (height, width) of the caller's images, where nothing shows those of the
        file; (0, 0): none.
    """

    def __init__(
        self,
        stated: Mapping[str, Any],
        asked: Mapping[str, Any],
        assumed: Mapping[str, Any],
        report: Report,
        wanted: tuple[int, int] = (0, 0),
    ):
        self.stated = {k: v for k, v in stated.items() if v or k not in _DERIVED}
        self.asked = {k: v for k, v in asked.items() if v or k not in _DERIVED}
        self.assumed = assumed
        self.report, self.wanted = report, wanted
        self.settled: dict[str, Any] = {}
        self.known: set[str] = set()  # stated or shown, not only asked for or assumed

    def settle(self, field: str, shown: Any = None, default: Any = None) -> Any:
        """The value of a field: stated, or shown by the arrays (None: they do not), or
        asked for, or assumed.

        ``default`` is assumed where the family says nothing; None: what the config has.
        """
        said = [
            (who, tuple(value) if isinstance(value, list) else value)
            for who, value in (
                ("the file's config says", self.stated.get(field)),
                ("the arrays show", shown),
                ("the caller wants", self.asked.get(field)),
            )
            if value is not None
        ]
        for who, value in said[1:]:
            if value != said[0][1]:
                self.report.problem(
                    f"model.{field}: {said[0][0]} {said[0][1]!r}, {who} {value!r}"
                )
        if shown is not None or field in self.stated:
            self.known.add(field)
        if said:
            value = said[0][1]
        else:
            usual = getattr(ModelConfig, field)
            value = self.assumed.get(field, usual if default is None else default)
            if self.assumed and (field in self.assumed or default is not None):
                self.report.assume(field, value)
        self.settled[field] = value
        return value


def guess_heads(
    width: int, mlp_dim: int, known: Mapping[int, int], head_width: int, where: str
) -> int:
    """The heads of a torch file that nothing states: a published size's, or the family's.

    Raises:
      UserError: no published size fits.
    """
    if width in known:
        return known[width]
    for size in variants.SIZES.values():
        if head_width == 64 and (size.width, size.mlp_dim) == (width, mlp_dim):
            return size.heads
    if width % head_width == 0 and width // head_width in (3, 4, 6, 8, 12, 16, 24):
        return width // head_width
    raise UserError(
        f"{where}: no array of a torch file shows the number of attention heads, and width "
        f"{width} is no published model's: pass heads= (FILE:heads=12 to a command), or keep "
        "config.json beside it"
    )


def infer(arrays: dict[str, Array], facts: Facts) -> ModelConfig:
    """The ModelConfig that ``arrays``, under the released names, were trained with."""
    report = facts.report
    shown = _resnet(arrays, report)
    stem = arrays.get("conv_root/kernel") or arrays.get("embedding/kernel")
    if stem is None or len(stem.shape) != 4:
        what = f"{stem.name} has shape {stem.shape}" if stem else "no embedding/kernel"
        raise UserError(f"{report.where} is no Vision Transformer: {what}")
    shown["channels"] = stem.shape[2]
    head = arrays.get("head/kernel")
    shown["num_classes"] = head.shape[-1] if head and head.shape else 0
    if "embedding/kernel" in arrays:
        # One half of an axial block is a block as any other has it.
        blocks = {name.replace("/rows/", "/"): x for name, x in arrays.items()}
        shown |= _transformer(blocks, report) | _switches(blocks)
        shown["axial"] = f"{_BLOCK}/rows/LayerNorm_0/scale" in arrays
    elif not shown.get("resnet"):
        raise UserError(f"{report.where} has a ResNet root but nothing that follows it")
    else:
        shown["patch"] = 1
    if shown.get("mlp") == "swiglu" and facts.stated.get("mlp") == "geglu":
        shown["mlp"] = "geglu"  # of the same arrays
    for field, value in shown.items():
        facts.settle(field, value)
    if "depth" in shown:
        _head(arrays, facts)
        _positions(arrays, facts)
    for field in ModelConfig.__dataclass_fields__:
        if field not in ("name", "image_size", *facts.settled):
            facts.settle(field)
    cfg = ModelConfig(**{**_normal(facts.settled), "name": ""})
    size = _image_size(cfg, arrays, facts)
    if max(size) > _LARGEST:
        raise UserError(f"{report.where} states image_size={size}: at most {_LARGEST}")
    cfg = dataclasses.replace(cfg, image_size=size)
    return dataclasses.replace(cfg, name=name_of(cfg))


def _normal(fields: dict[str, Any]) -> dict[str, Any]:
    """Equal models have equal configs: what a default says anyway is left to it."""
    fields = dict(fields)
    if all(x == 0.5 for x in (*fields["image_mean"], *fields["image_std"])):
        fields |= {"image_mean": (), "image_std": ()}
    if fields["map_heads"] == fields["heads"] or fields["head"] != "map":
        fields["map_heads"] = 0
    if fields["map_mlp_dim"] == fields["mlp_dim"]:
        fields["map_mlp_dim"] = 0
    if fields["rope"] == "none" or fields["rope_theta"] == (
        100 if fields["rope"] == "dinov3" else 10_000
    ):
        fields["rope_theta"] = 0.0
    if fields["mlp"] == "swiglu" and fields["head"] != "map":
        fields["gelu"] = ModelConfig.gelu  # nothing is left for it to do
    return fields


def positioned_tokens(cfg: ModelConfig) -> int:
    """How many of the tokens before the patches have a row in the position table."""
    return variants.prefix_tokens(cfg) - cfg.registers


def extra_rows(cfg: ModelConfig, arrays: dict[str, Array]) -> int:
    """Rows in front of the stored position table that are not of patches."""
    if POSITIONS not in arrays:
        return positioned_tokens(cfg)
    rows, columns = variants.token_grid(cfg, cfg.image_size)
    return arrays[POSITIONS].shape[1] - rows * columns


def name_of(cfg: ModelConfig) -> str:
    """The name in ``models/variants.py`` with these sizes, or "" if none has them."""
    if not cfg.depth:
        names = [f"{n}x{cfg.resnet_width}" for n in variants.RESNETS]
    else:
        row = (cfg.depth, cfg.width, cfg.mlp_dim, cfg.heads)
        sizes = [n for n, size in variants.SIZES.items() if tuple(size) == row]
        names = [f"ViT-{n}/{cfg.patch}" for n in sizes]
        if cfg.resnet_width:
            factor = f"x{cfg.resnet_width}" if cfg.resnet_width > 1 else ""
            names = [
                f"{stem}{factor}+ViT-{n}/{p}"
                for stem, p in variants.STEMS
                for n in sizes
            ]
    shown = ("resnet", "resnet_width", "depth", "width", "mlp_dim", "heads", "patch")
    for name in names:
        full = variants.resolve(ModelConfig(name=name))
        if all(
            getattr(full, f) == getattr(cfg, f)
            for f in shown
            if f != "width" or cfg.depth
        ):
            return name
    return ""


def _resnet(arrays: dict[str, Array], report: Report) -> dict[str, Any]:
    root = arrays.get("conv_root/kernel")
    if root is None:
        return {}
    stages: dict[int, set[int]] = {}
    for name in arrays:
        if match := re.match(r"block(\d{1,9})/unit(\d{1,9})/", name):
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    where = f"{report.where}: block"
    blocks = range(1, 1 + count_up(stages, 1, where))
    resnet = tuple(count_up(stages[i], 1, f"{where}{i}/unit") for i in blocks)
    width = root.shape[-1]
    if width % 64:
        report.problem(f"{root.name} has {width} channels, not a multiple of 64")
    return {
        "resnet": resnet,
        "resnet_width": max(1, width // 64),
    }


def _transformer(arrays: dict[str, Array], report: Report) -> dict[str, Any]:
    embedding = arrays["embedding/kernel"]
    if len(embedding.shape) != 4 or embedding.shape[0] != embedding.shape[1]:
        raise UserError(
            f"{report.where}: {embedding.name} has shape {embedding.shape}: it must be "
            "(P, P, channels, width) with square patches"
        )
    block = re.compile(r"Transformer/encoderblock_(\d{1,9})/")
    numbers = (int(m[1]) for name in arrays if (m := block.match(name)))
    depth = count_up(numbers, 0, f"{report.where}: Transformer/encoderblock_")
    query, mlp = f"{_ATTENTION}/query/kernel", f"{_MLP}/Dense_0/kernel"
    for name in (query, mlp):
        if name not in arrays:
            raise UserError(
                f"{report.where} holds no Vision Transformer that this code knows: "
                f"{name} is missing; the first of its {len(arrays)} arrays are "
                f"{sorted(arrays)[:6]}"
            )
    shapes = arrays[query].shape, arrays[mlp].shape
    if (len(shapes[0]), len(shapes[1])) != (3, 2):
        raise UserError(
            f"{report.where}: {arrays[query].name} has shape {shapes[0]} and {mlp} has "
            f"shape {shapes[1]}: they must be (width, heads, width / heads) and (width, "
            "mlp_dim)"
        )
    return {
        "width": embedding.shape[3],
        "depth": depth,
        "mlp_dim": shapes[1][1],
        "heads": shapes[0][1],
        "patch": embedding.shape[0],
    }


def _switches(arrays: dict[str, Array]) -> dict[str, Any]:
    """What the presence of an array tells."""
    has = lambda name: name in arrays
    registers = arrays.get("registers")
    norms = {name.rsplit("/", 1)[0] for name in arrays if name.endswith("/scale")}
    norms |= {name.rsplit("/", 1)[0] for name in arrays if name.endswith("norm/bias")}
    norm = "tokens" if "Transformer/encoder_norm" in norms else "none"
    biases = any(name.endswith("LayerNorm_0/bias") for name in arrays)
    distilled = "head" if has("head_dist/kernel") else "token"
    shown = {
        "pre_logits": has("pre_logits/kernel"),
        "distillation": distilled if has("dist") else "none",
        "registers": registers.shape[1]
        if registers and len(registers.shape) == 3
        else 0,
        "patch_norm": has("embedding_norm/scale"),
        "norm_pre": has("Transformer/norm_pre/scale"),
        "norm": "layer" if biases else "rms",
        "final_norm": "pooled" if "fc_norm" in norms and norm == "none" else norm,
        "qk_norm": has(f"{_ATTENTION}/query_norm/scale"),
        "attention_norm": has(f"{_ATTENTION}/norm/scale"),
        "relative_bias": has(f"{_ATTENTION}/posembed_bias/pos_embedding"),
        "parallel": not has(f"{_BLOCK}/LayerNorm_2/scale"),
        "mlp": "swiglu" if has(f"{_MLP}/gate/kernel") else "gelu",
        "mlp_norm": has(f"{_MLP}/norm/scale"),
    }
    if has("MAPHead_0/MlpBlock_0/Dense_0/kernel"):
        shown["map_mlp_dim"] = arrays["MAPHead_0/MlpBlock_0/Dense_0/kernel"].shape[-1]
    if has(_POOL) and len(arrays[_POOL].shape) == 3:
        shown["map_heads"] = arrays[_POOL].shape[1]
    return shown


def _head(arrays: dict[str, Array], facts: Facts) -> None:
    """What reads the tokens, among the heads that these arrays may be of."""
    kernel = arrays.get("head/kernel")
    inputs = kernel.shape[0] if kernel and kernel.shape else 0
    if "MAPHead_0/probe" in arrays:
        possible: tuple[str, ...] = ("map",)
    elif "cls" not in arrays:
        possible = ("gap", "none")
    elif inputs and inputs == 2 * facts.settled["width"]:
        possible = ("token_gap",)
    elif "mask_token" in arrays:
        possible = ("masked_patch", "token")
    elif not facts.assumed and not facts.stated.get("class_token"):
        possible = ("token",)  # a released file, whose other heads have no such token
    elif facts.settled["final_norm"] == "pooled":
        possible = ("gap", "token")
    else:
        possible = ("token", "gap", "none", "token_gap")
    for said in (facts.stated.get("head"), facts.asked.get("head")):
        if said is not None and said not in possible:
            token = "with" if "cls" in arrays else "without"
            facts.report.problem(
                f"model.head is stated as {said!r}, but the arrays {token} a class token "
                f"are those of {possible[0]!r}"
            )
    head = facts.settle(
        "head", possible[0] if len(possible) == 1 else None, possible[0]
    )
    if head in ("gap", "none", "map"):
        facts.settle("class_token", "cls" in arrays)
    else:  # it has the token, whatever the switch says
        facts.settled["class_token"] = False


def _positions(arrays: dict[str, Array], facts: Facts) -> None:
    names = "\n".join(arrays)
    every = f"{_BLOCK}/posembed_input/"
    at = "every" if any(name.startswith(every) for name in arrays) else None
    facts.settle("position_at", at)
    if re.search(r"posembed_input/pos_embedding$", names, re.MULTILINE):
        facts.settle("positions", "learned")
    elif "posembed_input/pos_embedding_x" in names:
        facts.settle("positions", "learned2d")
    elif re.search(
        r"MultiHead\w+/posembed_relative/pos_embedding$", names, re.MULTILINE
    ):
        facts.settle("positions", "relative")
    elif facts.settled["relative_bias"] or facts.settle("rope") != "none":
        facts.settle("positions", "none")
    else:
        stated = {**facts.asked, **facts.stated}.get("positions")
        waves = arrays["embedding/kernel"].shape[3] % 4 == 0
        value = stated if stated in ("sincos2d", "none") else None
        value = value or ("sincos2d" if waves else "none")
        facts.settled["positions"] = value
        if stated is None:
            facts.report.warn(
                f"assumed: the file has no position table, so positions={value!r}"
                + (
                    " (fixed waves, as in the published files without a table); if it was "
                    "trained without any, pass positions='none'"
                    if waves
                    else ""
                )
            )


def _image_size(
    cfg: ModelConfig, arrays: dict[str, Array], facts: Facts
) -> tuple[int, int]:
    """(height, width) that the stored tables were made for."""
    report, wanted, unit = facts.report, facts.wanted, variants.token_stride(cfg)
    stated = tuple(
        facts.stated.get("image_size") or facts.asked.get("image_size") or ()
    )
    for table in (POSITIONS, f"{_BLOCK}/posembed_input/pos_embedding"):
        y, x = arrays.get(f"{table}_y"), arrays.get(f"{table}_x")
        if y and x and len(y.shape) == len(x.shape) == 3:
            return y.shape[0] * unit, x.shape[1] * unit
    name, grids = _table(cfg, arrays, report)
    if not name:
        size = stated or (wanted if wanted != (0, 0) else ())
        if not size and cfg.depth:
            report.warn(
                "assumed: no array shows the image size, so image_size=224; pass "
                "image_size= for another"
            )
        return (size[0], size[1]) if size else (224, 224)
    if stated and stated != (0, 0):
        grid = variants.token_grid(cfg, (stated[0], stated[1]))
        if grid in grids(*grid):
            return stated[0], stated[1]
        report.problem(
            f"model.image_size: the file's config says {stated}, which is {grid[0]} x "
            f"{grid[1]} patches, but {name} has shape {arrays[name].shape}"
        )
        return (unit, unit)
    # Square wins, because the released files are: the images that the caller wants may
    # have as many patches by chance (24 x 24 and 18 x 32).
    for rows, columns in grids(0, 0):
        return rows * unit, columns * unit
    if wanted != (0, 0):
        grid = variants.token_grid(cfg, wanted)
        if grid in grids(*grid):
            return wanted
    report.problem(
        f"{arrays[name].name} of shape {arrays[name].shape} is made for no square grid of "
        "patches: pass image_size=(height, width) of the images that the file was trained "
        "on"
    )
    return (unit, unit)


def _table(
    cfg: ModelConfig, arrays: dict[str, Array], report: Report
) -> tuple[str, Any]:
    """The name of the array that shows the grid of patches, and which grids of so many
    rows and columns it may be of; (0, 0): square ones."""
    relative = rf"{_BLOCK}/MultiHead\w+/posembed_relative/pos_embedding"
    names = [POSITIONS, f"{_BLOCK}/posembed_input/pos_embedding"]
    names += [name for name in arrays if re.fullmatch(relative, name)]
    name = next((name for name in names if name in arrays), "")
    bias = f"{_ATTENTION}/posembed_bias/pos_embedding"
    if not name and bias in arrays and len(arrays[bias].shape) == 2:
        entries = arrays[bias].shape[0] - 3
        side = (int(max(entries, 0) ** 0.5) + 1) // 2

        def of_bias(rows: int, columns: int) -> list[tuple[int, int]]:
            rows, columns = rows or side, columns or side
            fits = (2 * rows - 1) * (2 * columns - 1) == entries
            return [(rows, columns)] if fits and rows else []

        return bias, of_bias
    if not name:
        return "", None
    shape = arrays[name].shape
    if cfg.positions == "relative" and len(shape) == 2:
        shape = (1, (shape[0] + 1) // 2, shape[1])  # from offsets -(n - 1) to n - 1
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 1:
        report.problem(
            f"{arrays[name].name} has shape {shape}: it must be (1, n, width)"
        )
        return "", None
    first = positioned_tokens(cfg)
    extras = sorted({0, 1, first}, key=lambda e: (e != first, e))

    def of_rows(rows: int, columns: int) -> list[tuple[int, int]]:
        found = []
        # Rows of registers are too rare to be looked for without a size.
        for extra in [*extras, *[first + cfg.registers] * bool(rows)]:
            patches = shape[1] - extra
            side = int(max(patches, 0) ** 0.5)
            grid = (rows, columns) if rows else (side, side)
            if patches > 0 and grid[0] * grid[1] == patches:
                found.append(grid)
        return found

    return name, of_rows
