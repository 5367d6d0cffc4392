# SPDX-License-Identifier: Apache-2.0
"""Every knob, its default and one line of meaning. This file is the manual.

A config file (``configs/*.py``) returns a :class:`Config`;
``--config.data.path=photos/`` overrides one field. Inside the program the config is
these frozen dataclasses: an unknown key or a value of the wrong type is refused by
name. A field whose default is ``0``, ``""`` or ``()`` and says "0: ..." is decided
elsewhere; there is no ``None``, which the command line could not override.
"""

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections import ConfigDict

from vit_jax.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Zeros are filled in from the row of ``models/variants.py`` that
    ``name`` selects."""

    name: str = "ViT-B/16"  # a row of models/variants.py with a patch size; "" if every size below is given
    num_classes: int = 0  # outputs of the head; 0: as many as the data set has classes
    image_size: tuple[int, int] = (
        0,
        0,
    )  # (height, width) in pixels; (0, 0): data.image_size, square
    channels: int = 3  # of the input images

    width: int = 0  # D, size of a token
    depth: int = 0  # L, encoder blocks
    mlp_dim: int = 0  # M, hidden size of the MLP
    heads: int = 0  # k, attention heads
    patch: int = 0  # P, side of a patch in pixels (of the feature map, for hybrids)
    resnet: tuple[
        int, ...
    ] = ()  # residual units per stage of the ResNet stem, (): none (unless the name has one)
    resnet_width: int = (
        0  # width factor of the ResNet stem or baseline; 0: the variant's
    )

    head: Literal["token", "gap", "map", "none", "masked_patch"] = (
        "token"  # what reads the encoded tokens
    )
    pre_logits: bool = (
        False  # tanh layer of width D before the head (pre-training, section 3.1)
    )
    head_bias: float = 0.0  # initial bias of the head: -10 for 21k classes and -6.9 for 1k with sigmoid loss
    positions: Literal["learned", "learned2d", "relative", "sincos2d", "none"] = (
        "learned"  # Table 8
    )
    position_at: Literal["stem", "every", "shared"] = (
        "stem"  # added once, in every layer, or shared by every layer
    )

    dropout: float = 0.0  # after E_pos and every dense layer but qkv (Appendix B.1)
    attention_dropout: float = (
        0.0  # on the attention weights; 0 in every released model
    )
    stochastic_depth: float = (
        0.0  # drop rate of the last block; grows linearly from 0 at the first
    )
    gelu: Literal["tanh", "exact"] = (
        "tanh"  # exact (erf) is what torch checkpoints were trained with
    )
    layer_norm_eps: float = 1e-6  # Hugging Face checkpoints use 1e-12
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the computation; parameters stay float32
    )
    layers: Literal["loop", "scan"] = (
        "loop"  # scan compiles one block once: faster to compile, stacked parameters
    )
    remat: Literal["none", "full", "dots"] = (
        "none"  # recompute activations in the backward pass to save memory
    )


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what happens to them on the way to the device."""

    source: Literal["digits", "folder", "tfds", "records", "synthetic"] = "tfds"
    name: str = ""  # tfds: data set name, for example "cifar10"; vtab tasks: "vtab/dtd"
    path: str = ""  # folder, records: where the images are; tfds: data_dir
    image_size: int = 224  # side of the square images that reach the model, in pixels
    train_split: str = "train"  # tfds split expression, or sub-folder; see sources.py
    test_split: str = (
        "test"  # falls back to "validation"/"val", then to the held-out share below
    )
    test_share: float = 0.2  # share of the examples held out for testing where the source has no test split
    holdout: float = 0.0  # share of the training set kept for selection: evaluated instead of test, not trained on
    subset: float = (
        0.0  # use only this share (< 1) or number (>= 1) of training examples; 0: all
    )
    subset_balanced: bool = True  # the subset has as many examples of every class as it can; False: at random
    train_transforms: tuple[
        dict[str, Any], ...
    ] = ()  # ({"op": "inception_crop"}, {"op": "flip"}); (): just these
    eval_transforms: tuple[
        dict[str, Any], ...
    ] = ()  # ({"op": "resize"},) is what () means
    num_classes: int = 0  # synthetic: how many; multi-label records: width of the label vector; 0: found in the data
    cache_gib: float = 1.0  # a decoded data set up to this size is kept in memory
    decode: Literal["fast", "exact"] = (
        "fast"  # of training images; fast: coarser JPEG decoding and resizing
    )
    access: Literal["auto", "random", "sequential"] = (
        "auto"  # records: auto reads in sequence only remote shards
    )
    shuffle_buffer: int = (
        0  # examples shuffled at a time where the source is read in sequence; 0: 8192
    )
    max_bad: float = 0.01  # share of unreadable examples above which the run stops


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. Weight decay is decoupled: p <- p - lr (update +
    weight_decay p)."""

    name: Literal["adam", "sgd", "adafactor"] = "adam"
    learning_rate: float = 1e-3  # base learning rate, reached at the end of warm-up
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    end_learning_rate: float = 0.0  # where the linear schedule ends
    warmup: float = 0.0  # steps of linear warm-up; below 1: this share of the steps
    cooldown: int = 0  # steps of linear decay to 0 at the end of rsqrt
    timescale: int = 10_000  # steps after which rsqrt has fallen to 1/sqrt(2)
    weight_decay: float = 0.0  # on the parameters whose path matches an entry of decay
    decay: tuple[tuple[str, float], ...] = (
        (r".*/kernel", 1.0),
    )  # ((path regular expression, factor), ...), first match
    clip: float = 0.0  # global gradient norm is clipped to this; 0: not clipped
    b1: float = 0.9  # Adam's first moment; momentum of SGD
    b2: float = 0.999  # Adam's second moment
    eps: float = 1e-8
    momentum_dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of Adam's first moment and SGD's accumulator
    )
    polyak: float = 0.0  # factor of the averaged copy of the weights that is evaluated and saved; 0: none
    freeze: tuple[
        str, ...
    ] = ()  # regular expressions of parameter paths that stay as they are
    multipliers: tuple[
        tuple[str, float], ...
    ] = ()  # ((path regular expression, learning-rate factor), ...)


@dataclass(frozen=True)
class EvalConfig:
    """What is measured during training, and how often."""

    every: int = 1_000  # steps between evaluations; 0: only at the end
    batch: int = 0  # images per evaluation step over all devices; 0: batch
    evaluators: tuple[dict[str, Any], ...] = (
        {"type": "accuracy"},
    )  # see evaluators/; each may override its data


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved. A checkpoint holds parameters, optimizer state, step and averaged
    parameters."""

    every: int = (
        1_000  # steps between checkpoints; 0: only at the end and on preemption
    )
    keep: int = 2  # how many of the newest stay
    keep_best: str = ""  # metric, such as "test/accuracy", whose best checkpoint stays as well; "": none


@dataclass(frozen=True)
class SweepConfig:
    """How ``python -m vit_jax.sweep`` selects a learning rate (Appendix B.1.1).

    A single run ignores it."""

    learning_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)  # the grid
    holdout: float = (
        0.1  # share of the training set that the runs of the grid are compared on
    )
    seeds: int = 3  # final runs on the whole training set, with seed, seed + 1, ...
    metric: str = (
        "test/accuracy"  # what is compared, at the end of a run; the best wins
    )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    steps: int = 10_000  # optimizer steps of the run
    batch: int = (
        512  # images per optimizer step, over all hosts, devices and micro-batches
    )
    accumulate: int = 1  # micro-batches per step: less memory, same result
    seed: int = 0  # of initialisation, data order, augmentation and dropout
    loss: Literal["softmax", "sigmoid", "masked_patch"] = "softmax"
    masked_target: Literal["mean", "downsampled", "pixels"] = (
        "mean"  # what masked_patch predicts (Appendix B.1.2)
    )
    masked_share: float = (
        0.5  # share of the patches that masked_patch chooses and predicts
    )
    label_smoothing: float = 0.0  # softmax: share of the target spread over all classes
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    pretrained: str = ""  # anything vit_jax.load takes; starts from it with a new head
    sharding: Literal["replicate", "zero", "fsdp", "tensor"] = "replicate"
    mesh: tuple[
        int, ...
    ] = ()  # devices per mesh axis, see sharding.py; (): one axis over all devices
    max_bad_steps: int = 10  # non-finite steps in a row after which the run stops; each one is skipped and counted
    log_every: int = 50  # steps between lines of metrics.jsonl
    profile: str = (
        ""  # "100:110" writes a profiler trace of these steps into the workdir
    )


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds a Config from nested mappings, such as ``config.json`` or an
    ``ml_collections.ConfigDict``.

    Raises:
      UserError: unknown key (with the nearest valid one), wrong type, or a value that
        is not among the choices.
    """
    return _build(Config, values, "config")


def to_dict(cfg: Any) -> dict[str, Any]:
    """Nested plain dicts of a config or a part of one."""
    return dataclasses.asdict(cfg)


def config_dict(cfg: Config) -> ConfigDict:
    """What a config file returns: the form in which the command line can override it."""
    return ConfigDict(to_dict(cfg))


def to_json(cfg: Any) -> str:
    """The form stored as ``config.json`` in a workdir."""
    return json.dumps(to_dict(cfg), indent=2) + "\n"


def difference(old: Any, new: Any) -> list[str]:
    """One line ``key: old -> new`` per field of two configs that differs."""
    a, b = _flat(to_dict(old)), _flat(to_dict(new))
    return [f"{k}: {a[k]!r} -> {b[k]!r}" for k in a if a[k] != b[k]]


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


def nearest(value: str, allowed: typing.Iterable[str]) -> str:
    """``did you mean 'x'? `` where something is close, else nothing; for error messages."""
    close = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def choose(what: str, value: str, allowed: Mapping[str, Any]) -> Any:
    """``allowed[value]``, or a UserError that names the knob, the value and the choices."""
    if value not in allowed:
        raise UserError(
            f"unknown {what} {value!r}: {nearest(value, allowed)}choose one of {sorted(allowed)}"
        )
    return allowed[value]


def smaller_is_better(metric: str) -> bool:
    """Whether the best value of a metric, such as ``test/loss``, is the smallest."""
    return metric.endswith(("loss", "error", "ece", "mce", "brier"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(
                f"unknown key {path}.{key}: {nearest(str(key), hints)}"
                f"{path} has {sorted(hints)}"
            )
    return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the field's type; JSON and ConfigDict turn tuples into lists, which
    is undone here."""
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not hasattr(value, "items"):
            raise UserError(f"{path} is {value!r}: it must be a group of keys")
        return _build(hint, dict(value.items()), path)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            near = nearest(str(value), allowed)
            raise UserError(
                f"{path} is {value!r}: {near}choose one of {sorted(allowed)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path} is {value!r}: it must be a list")
        args = typing.get_args(hint)
        if args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise UserError(f"{path} is {value!r}: it must have {len(args)} entries")
        return tuple(
            _convert(a, v, f"{path}[{i}]")
            for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin is dict:
        if not hasattr(value, "items"):
            raise UserError(f"{path} is {value!r}: it must be a group of keys")
        return {k: _plain(v) for k, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(
            f"{path} is {value!r} of type {type(value).__name__}: "
            f"it must be of type {hint.__name__}"
        )
    return value


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {k: _plain(v) for k, v in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
