# SPDX-License-Identifier: Apache-2.0
"""Every knob, its default and one line of meaning. This file is the manual.

A config file (``configs/*.py``) returns a :class:`Config`;
``--config.data.path=photos/`` overrides one field. Inside the program the config is
these frozen dataclasses: an unknown key or a value of the wrong type is refused by
name. A field whose default is ``0``, ``""`` or ``()`` and says "0: ..." is decided
elsewhere; there is no ``None``, which the command line could not override.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.fields import (
    Above0,
    Amount,
    Count,
    Decay,
    Named,
    Positive,
    Range,
    Share,
    arguments,
    build,
    choose,
    nearest,
)

__all__ = [
    "Above0", "Amount", "CheckpointConfig", "Config", "Count", "DataConfig", "Decay",
    "EvalConfig", "ModelConfig", "OptimConfig", "Positive", "Range", "Share",
    "SweepConfig", "arguments", "checked", "choose", "config_dict", "difference",
    "from_dict", "nearest", "read", "replace", "to_dict", "to_json",
]  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Zeros are filled in from the row of ``models/variants.py`` that
    ``name`` selects."""

    # A size and a patch, or what timm or Hugging Face call it (models/published.py): says
    # what is left at its default below; "": every size is given.
    name: str = "ViT-B/16"
    num_classes: Count = 0  # outputs of the head; 0: as many as the data has classes
    # (height, width) in pixels; (0, 0): data.image_size, square
    image_size: tuple[Count, Count] = (0, 0)
    channels: Positive = 3  # of the input images

    width: Count = 0  # D, size of a token
    depth: Count = 0  # L, encoder blocks
    mlp_dim: Count = 0  # M, hidden size of the MLP
    heads: Count = 0  # k, attention heads
    patch: Count = 0  # P, side of a patch in pixels (of the feature map, for hybrids)
    # Residual units per stage of the ResNet stem; (): none, unless the name has one.
    resnet: tuple[Positive, ...] = ()
    resnet_width: Count = 0  # width factor of that stem or of a baseline; 0: the name's

    # What the model was trained with, per channel and of pixels / 255; (): 0.5. Images
    # are [-1, 1] whatever it is: the model computes (pixels / 255 - mean) / std itself.
    image_mean: tuple[float, ...] = ()
    image_std: tuple[Above0, ...] = ()

    # Tokens before those of the patches: class, distillation, registers.
    class_token: bool = False  # also where the head does not read it
    # DeiT's second token: "token": no head reads it; "head": a head of its own reads
    # it, and the logits are the mean of both heads.
    distillation: Literal["none", "token", "head"] = "none"
    registers: Count = 0  # learned tokens without a position (2309.16588)

    # What reads the tokens: the class token, the mean of the patches, both one after
    # the other, attention pooling, nothing, or one prediction per patch.
    head: Literal["token", "gap", "token_gap", "map", "none", "masked_patch"] = "token"
    map_heads: Count = 0  # attention heads of the head "map"; 0: heads
    map_mlp_dim: Count = 0  # hidden size of the MLP of the head "map"; 0: mlp_dim
    # A tanh layer of width D before the head (pre-training, section 3.1).
    pre_logits: bool = False
    # Initial bias of the head; with the sigmoid loss -10 for 21k classes, -6.9 for 1k.
    head_bias: float = 0.0

    # Position embeddings (Table 8), and where they are added: once, in every layer, or
    # in every layer the same ones.
    positions: Literal["learned", "learned2d", "relative", "sincos2d", "none"] = (
        "learned"
    )
    position_at: Literal["stem", "every", "shared"] = "stem"
    # A learned attention logit per head, layer and 2-D offset, with three more for the
    # class token (BEiT).
    relative_bias: bool = False
    # Rotates queries and keys of patches by their row and column (RoPE). "dinov3": rows
    # and columns from -1 to 1; "eva02": counted, in interleaved pairs; "pe": like it,
    # columns first.
    rope: Literal["none", "dinov3", "eva02", "pe"] = "none"
    rope_theta: Amount = 0.0  # base of the wavelengths; 0: 100 of "dinov3", else 10000
    # (rows, columns) that "eva02" and "pe" stretch every grid to; (0, 0): its own.
    rope_grid: tuple[Count, Count] = (0, 0)
    rope_offset: float = 0.0  # number of the first row and column in "eva02" and "pe"

    # Parts of the blocks and around them; "rms" divides by the root mean square only.
    norm: Literal["layer", "rms"] = "layer"
    layer_norm_eps: Above0 = 1e-6  # Hugging Face checkpoints use 1e-12
    patch_norm: bool = False  # a norm of the patch embeddings, before positions (AIMv2)
    norm_pre: bool = False  # a norm of z_0, before the first block (CLIP)
    # The norm of equation 4 applies to every token, to what the head has pooled (timm's
    # fc_norm), or is absent.
    final_norm: Literal["tokens", "pooled", "none"] = "tokens"
    qk_norm: bool = False  # a norm of every query and key, over the size of a head
    attention_norm: bool = False  # a norm before the output projection (EVA CLIP)
    parallel: bool = False  # z + MSA(LN(z)) + MLP(LN(z)) with one LN (2302.05442)
    # Each block becomes two: patches attend along rows, then along columns (Section D.6).
    axial: bool = False
    # "swiglu": silu(gate) times value, "geglu": GELU(gate) times value, so three
    # projections (2002.05202).
    mlp: Literal["gelu", "swiglu", "geglu"] = "gelu"
    mlp_norm: bool = False  # a norm before the second projection of the MLP (EVA-02)
    # "exact" (erf) is what most torch checkpoints were trained with; "quick" is
    # x sigmoid(1.702 x) (OpenAI's CLIP).
    gelu: Literal["tanh", "exact", "quick"] = "tanh"

    dropout: Share = 0.0  # after E_pos and every dense layer but qkv (Appendix B.1)
    attention_dropout: Share = 0.0  # on the attention weights; 0 in all released models
    # Drop rate of the last block; grows linearly from 0 at the first.
    stochastic_depth: Share = 0.0
    # What computes attention: einsums; a kernel for TPUs; cuDNN's for GPUs. "auto": the
    # kernel where it proves right and faster at the start of a run (docs/kernel.md).
    attention: Literal["auto", "xla", "pallas", "cudnn"] = "auto"
    # Of the computation; parameters stay float32.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # "scan" compiles one block once: faster to compile, stacked parameters.
    layers: Literal["loop", "scan"] = "loop"
    # What is computed again in the backward pass, to save memory.
    remat: Literal["none", "full", "dots"] = "none"


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what happens to them on the way to the device."""

    source: Literal[
        "digits", "folder", "tfds", "records", "parquet", "tar", "synthetic"
    ] = "tfds"
    # tfds: data set name, for example "cifar10"; vtab tasks: "vtab/dtd"; parquet: a
    # configuration of the data set.
    name: str = ""
    # folder: class folders (layouts in data/folders.py) or a .csv or .jsonl table (columns
    # in data/manifest.py); records: folder of the shards; parquet, tar: a folder of
    # files, or one; parquet also hf://OWNER/NAME; tfds: data_dir.
    path: str = ""
    # Side of the square images that reach the model, in pixels; 0: as the checkpoint that
    # config.pretrained names has it.
    image_size: Count = 224
    # A sub-folder, a value of the column "split", or a split expression of tfds. Sub-folders
    # are also found as Train/ or imagenet_train/, values as Train or training.
    train_split: str = "train"
    # "test" falls back to "val" or "validation", then to the held-out share below; "": that
    # share. folder: also a text file of lines "image label", such as "val.txt".
    test_split: str = "test"
    # Share of the examples held out for testing where the source has no test split; 1:
    # all of them, to evaluate on.
    test_share: Share = 0.2
    # Share of the training set kept for selection: evaluated instead of the test set,
    # not trained on.
    holdout: Share = 0.0
    # Only this share (< 1) or number (>= 1) of the training examples; 0: all.
    subset: Amount = 0.0
    # The subset has as many examples of every class as it can; False: at random.
    subset_balanced: bool = True
    # For example ({"op": "inception_crop"}, {"op": "flip"}); (): just these.
    train_transforms: Annotated[tuple[dict[str, Any], ...], Named("op")] = ()
    # (): ({"op": "resize"},), which does not anti-alias: see data/transforms.py.
    eval_transforms: Annotated[tuple[dict[str, Any], ...], Named("op")] = ()
    # synthetic: how many; multi-label records: width of the label vector; 0: found in
    # the data.
    num_classes: Count = 0
    # Decoded splits are kept in memory up to this size together; 0: none. It counts like
    # a seed: what is kept is decoded exactly and, where it is damaged, left out as a
    # whole.
    cache_gib: Amount = 1.0
    # Of training images; "fast": coarser JPEG decoding and resizing.
    decode: Literal["fast", "exact"] = "fast"
    # Of shards; "auto" reads in sequence only remote ones, and Parquet files that memory
    # cannot hold, of which none are chosen by subset, holdout or test_share.
    access: Literal["auto", "random", "sequential"] = "auto"
    # Examples shuffled at a time where the source is read in sequence; 0: those of 16
    # batches, and at least 8192.
    shuffle_buffer: Count = 0
    # Folder on a local disk that keeps what is read of remote shards, up to so many GiB;
    # processes of a host may share it; "": nothing is kept.
    disk_cache: str = ""
    disk_cache_gib: Amount = 100.0
    # Share of unreadable examples above which the run stops; one is always allowed unless
    # it is 0. An image of more than 134 megapixels (2**27) counts as unreadable, and one
    # of a few bytes that claims to need more than 200 MiB. JPEGs of more than some 26
    # megapixels are decoded at a half or less: see data/image_files.py.
    max_bad: Share = 0.01


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. Weight decay is decoupled: p <- p - lr (update +
    weight_decay p)."""

    # "muon": for kernels of the blocks, and Adam for the rest (matrices.py).
    name: Literal["adam", "sgd", "adafactor", "muon"] = "adam"
    learning_rate: Amount = 1e-3  # base learning rate, reached at the end of warm-up
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    end_learning_rate: Amount = 0.0  # where the linear schedule ends
    warmup: Amount = 0.0  # steps of linear warm-up; below 1: this share of the steps
    cooldown: Count = 0  # steps of linear decay to 0 at the end of rsqrt
    timescale: Positive = 10_000  # steps after which rsqrt has fallen to 1/sqrt(2)
    weight_decay: Amount = 0.0  # on the parameters whose path matches an entry of decay
    # ((path regular expression, factor), ...); the first that matches counts.
    decay: tuple[tuple[str, Amount], ...] = ((r".*/kernel", 1.0),)
    clip: Amount = 0.0  # global gradient norm is clipped to this; 0: not clipped
    b1: Decay = 0.9  # Adam's first moment; momentum of SGD
    b2: Decay = 0.999  # Adam's second moment
    eps: Above0 = 1e-8
    # Of Adam's first moment and SGD's accumulator.
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"
    # Factor of the averaged copy of the weights that is evaluated and saved; 0: none.
    polyak: Decay = 0.0
    # Regular expressions of parameter paths that stay as they are; "backbone": all but
    # the head.
    freeze: tuple[str, ...] = ()
    # Rank by which the kernels of the blocks may move (LoRA, 2106.09685); all else but the
    # head is frozen. Saved parameters are merged ones. 0: no limit.
    lora: Count = 0
    # ((path regular expression, learning-rate factor), ...)
    multipliers: tuple[tuple[str, Amount], ...] = ()
    # Factor between the learning rates of a block and of the one before it; 1: none.
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0


@dataclass(frozen=True)
class EvalConfig:
    """What is measured during training, and how often."""

    every: Count = 1_000  # steps between evaluations; 0: only at the end
    batch: Count = 0  # images per evaluation step over all devices; 0: batch
    # See evaluators/; each may override its data. On the command line names will do:
    # --config.eval.evaluators=accuracy,knn
    evaluators: Annotated[tuple[dict[str, Any], ...], Named("type")] = (
        {"type": "accuracy"},
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved. A checkpoint holds parameters, optimizer state, step and averaged
    parameters."""

    # Steps between checkpoints; 0: only at the end and on preemption.
    every: Count = 1_000
    keep: Positive = 2  # how many of the newest stay
    # Metric, such as "test/accuracy", whose best checkpoint stays as well, so that every
    # evaluation saves one; "": none.
    keep_best: str = ""


@dataclass(frozen=True)
class SweepConfig:
    """How ``python -m vit_jax.sweep`` selects a learning rate (Appendix B.1.1).

    A single run ignores it."""

    learning_rates: tuple[Above0, ...] = (0.001, 0.003, 0.01, 0.03)  # the grid
    # Share of the training set that the runs of the grid are compared on.
    holdout: Annotated[float, Range(0, 1, above=True, below=True)] = 0.1
    # Final runs on the whole training set, with seed, seed + 1, ...
    seeds: Positive = 3
    # What is compared, at the end of a run; the best wins.
    metric: str = "test/accuracy"


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    steps: Positive = 10_000  # optimizer steps of the run
    # Images per optimizer step, over all hosts, devices and micro-batches.
    batch: Positive = 512
    accumulate: Positive = 1  # micro-batches per step: less memory, same result
    seed: Count = 0  # of initialisation, data order, augmentation and dropout
    loss: Literal["softmax", "sigmoid", "masked_patch"] = "softmax"
    # What masked_patch predicts (Appendix B.1.2), and of which share of the patches.
    masked_target: Literal["mean", "downsampled", "pixels"] = "mean"
    masked_share: Annotated[float, Range(0, 1, above=True)] = 0.5
    label_smoothing: Share = 0.0  # softmax: share of the target spread over all classes
    mixup: Amount = 0.0  # alpha of the Beta distribution; 0: off
    pretrained: str = ""  # anything vit_jax.load takes; starts from it with a new head
    sharding: Literal["replicate", "zero", "fsdp", "tensor"] = "replicate"
    # Devices per mesh axis, see sharding.py; (): one axis over all devices.
    mesh: tuple[Positive, ...] = ()
    # Non-finite steps in a row after which the run stops; each is skipped and counted.
    max_bad_steps: Positive = 10
    log_every: Count = 50  # steps between lines of metrics.jsonl; 0: only at the end
    # Which trackers get the metrics as well, see trackers.py; each needs its extra.
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    # "100:110" writes a profiler trace of these steps into the workdir.
    profile: str = ""


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds a Config from nested mappings, such as ``config.json`` or an
    ``ml_collections.ConfigDict``.

    Raises:
      UserError: unknown key (with the nearest valid one), wrong type, or a value that
        is not among the choices.
    """
    return build(Config, values, "config")


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain dicts of a config or a part of one."""
    return dataclasses.asdict(cfg)


def checked(cfg: Config) -> Config:
    """The same config. ``from_dict`` has refused what is wrong in one from outside; in
    one that was built in Python nothing has been looked at yet.

    Raises:
      UserError: wrong type, or a value that is not allowed.
    """
    return from_dict(to_dict(cfg))


def read(path: Any) -> Config:
    """The config that a run has left in ``config.json``.

    Raises:
      UserError: it is missing, not JSON, or has keys or values that are unknown.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as a config: {e}") from e
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not {values!r:.80}")
    return from_dict(values)


def config_dict(cfg: Config) -> ConfigDict:
    """What a config file returns: the form in which the command line can override it."""
    # A whole number in a field of fractions would make its flag refuse a fraction.
    return ConfigDict(to_dict(checked(cfg)))


def to_json(cfg: Any) -> str:
    """The form stored as ``config.json`` in a workdir."""
    return json.dumps(to_dict(cfg), indent=2) + "\n"


def difference(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Key -> (old, new) of every field in which two configs differ."""
    a, b = _flat(to_dict(old)), _flat(to_dict(new))
    return {k: (a[k], b[k]) for k in a if a[k] != b[k]}


def replace(cfg: Config, **changes: Any) -> Config:
    """A copy with some fields changed; ``replace(cfg, data__image_size=32)`` reaches
    into a part."""
    parts: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            parts.setdefault(part, {})[name] = value
        else:
            top[key] = value
    for part, values in parts.items():
        top[part] = dataclasses.replace(getattr(cfg, part), **values)
    return dataclasses.replace(cfg, **top)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
