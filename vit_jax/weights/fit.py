# SPDX-License-Identifier: Apache-2.0
"""From the arrays of a file to the parameters of a model.

Everything is planned on shapes first, so that all that does not fit is reported at once
and before anything is read. An array that is missing or left over without a rule that
explains it is an error, never a silent default.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vit_jax import models
from vit_jax.config import ModelConfig
from vit_jax.models import variants
from vit_jax.weights import positions
from vit_jax.weights.contents import Array
from vit_jax.weights.infer import extra_rows, positioned_tokens
from vit_jax.weights.layout import POSITIONS, STACKED
from vit_jax.weights.report import Report

# What a file and a model may differ in when the head is new (spec 3.6), with the
# reason.
_REPLACEABLE = {
    "head/": "the head starts at zero",
    "pre_logits/": "the hidden layer of the pre-training head",
    "MAPHead_0/": "attention pooling belongs to the head",
    "cls": "the class token belongs to the head",
    "dist": "the distillation token belongs to the head",
    "fc_norm/": "model.final_norm is another",
    "Transformer/encoder_norm/": "model.final_norm is another",
    "mask_token": "masked patch prediction only",
    "Transformer/posembed_input/": "model.positions is another",
}
Params = dict[str, Any]


def fit(
    arrays: dict[str, Array],
    stored: ModelConfig,
    wanted: ModelConfig,
    report: Report,
    *,
    new_head: bool,
    resize: str,
    convert: Callable[[np.ndarray], Any] = lambda x: x,
) -> Params:
    """Parameters of ``wanted`` with the values of ``arrays``, which are a ``stored``.

    Args:
      arrays: under the released names.
      stored: the model that the file holds.
      wanted: the model to fill; it may differ from ``stored`` in the image size, the
        layout of the layers and what needs no arrays. With ``new_head`` in the head,
        positions and number of channels as well.
      new_head: the head starts at zero and what belongs to it is replaced.
      resize: rule for tables of positions, of ``positions.RULES``.
      convert: applied to every finished array, for example to put it on a device.

    Raises:
      UserError: naming everything that does not fit.
    """
    arrays = _registers_folded(arrays, stored, report)
    plan = _Plan(arrays, stored, wanted, report, new_head, resize)
    tree = flatten(_shapes(wanted))
    sources = {path: plan.source(path, spec.shape) for path, spec in tree.items()}
    plan.check_leftovers()
    report.check()
    fresh = _initial(wanted, [p for p, s in sources.items() if s is None or s.fresh])
    result = {}
    for path, source in sources.items():
        values = fresh[path] if source is None else source.values(fresh.get(path))
        if not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            report.problem(f"{path} has {bad} values that are not finite")
        if path == "head/kernel" and not new_head and not values.any():
            report.warn(
                "the head is all zeros: every image gets the same logits, as with the "
                "original ImageNet-21k files. Use vit_jax.load_for_finetune, or a "
                "fine-tuned file (python -m vit_jax.weights list)"
            )
        result[path] = convert(values)
    report.check()
    return unflatten(result)


def _registers_folded(
    arrays: dict[str, Array], stored: ModelConfig, report: Report
) -> dict[str, Array]:
    """Rows of the table of positions that belong to registers become part of these."""
    first, rows = positioned_tokens(stored), extra_rows(stored, arrays)
    if not stored.registers or rows != first + stored.registers:
        return arrays
    table, registers = arrays[POSITIONS], arrays["registers"]
    report.change(f"folded: {stored.registers} rows of {table.name} into the registers")
    kept = (1, table.shape[1] - stored.registers, table.shape[2])
    return arrays | {
        "registers": registers.map(
            registers.shape, lambda x: x + table.read()[:, first:rows]
        ),
        POSITIONS: table.map(kept, lambda x: np.delete(x, np.s_[first:rows], axis=1)),
    }


def initial(cfg: ModelConfig) -> Params:
    """The parameters of a new model, as numpy arrays."""
    return unflatten(_initial(cfg, list(flatten(_shapes(cfg)))))


class _Source:
    """Where one parameter of the model comes from."""

    def __init__(
        self,
        arrays: list[Array],
        combine: Callable[[list[Array], np.ndarray | None], np.ndarray],
        fresh: bool = False,
    ):
        self.arrays, self.combine, self.fresh = arrays, combine, fresh

    def values(self, initial: np.ndarray | None) -> np.ndarray:
        return self.combine(self.arrays, initial)


def _one(arrays: list[Array], _: np.ndarray | None) -> np.ndarray:
    return arrays[0].read()


class _Plan:
    """Finds a source for each parameter, and keeps track of the arrays used."""

    def __init__(
        self,
        arrays: dict[str, Array],
        stored: ModelConfig,
        wanted: ModelConfig,
        report: Report,
        new_head: bool,
        rule: str,
    ):
        self.arrays, self.stored, self.wanted = arrays, stored, wanted
        self.report, self.new_head, self.rule = report, new_head, rule
        self.used: set[str] = set()
        self.old = variants.token_grid(stored, stored.image_size)
        self.new = variants.token_grid(wanted, wanted.image_size)

    def source(self, path: str, shape: tuple[int, ...]) -> _Source | None:
        """None: the model's own initial values."""
        if path.startswith(STACKED):
            return self._stacked(path, shape)
        array = self.arrays.get(path)
        if self.new_head and path.startswith(("head/", "head_dist/")):
            return self._new_head(path, array)
        if array is None:
            reason = self._reason(path)
            if reason:
                self.report.change(f"re-initialised: {path} {shape} ({reason})")
            else:
                self.report.problem(f"missing {path} {shape}")
            return None
        self.used.add(path)
        if "posembed_input/" in path:
            return self._positions(path, array, shape)
        if path.endswith("posembed_bias/pos_embedding") and self.old != self.new:
            return self._relative_bias(array, shape)
        if array.shape != shape:
            return self._other_shape(path, array, shape)
        return _Source([array], _one)

    def check_leftovers(self) -> None:
        for path in sorted(self.arrays.keys() - self.used):
            array = self.arrays[path]
            reason = self._reason(path)
            if path == "mask_token" and not reason:
                reason = _REPLACEABLE["mask_token"]
            if reason:
                self.report.change(f"ignored: {array.name} {array.shape} ({reason})")
            else:
                self.report.problem(f"unexpected {array.name} {array.shape}")

    def _reason(self, path: str) -> str:
        """Why ``path`` may be on one side only; "": it may not."""
        if not self.new_head:
            return ""
        for prefix, reason in _REPLACEABLE.items():
            if path.startswith(prefix):
                field = re.match(r"model\.(\w+) is another", reason)
                same = field and getattr(self.stored, field[1]) == getattr(
                    self.wanted, field[1]
                )
                return "" if same else reason
        return ""

    def _new_head(self, path: str, array: Array | None) -> None:
        if path == "head/kernel":
            old = (
                f"{array.shape[-1]} classes in the file"
                if array
                else "none in the file"
            )
            self.report.change(
                f"re-initialised: head with {self.wanted.num_classes} classes, zero kernel "
                f"and bias {self.wanted.head_bias:g} ({old})"
            )
        if array is not None:
            self.used.add(path)

    def _stacked(self, path: str, shape: tuple[int, ...]) -> _Source:
        name = path.removeprefix(STACKED)
        layers = [
            self.source(f"Transformer/encoderblock_{i}/{name}", shape[1:])
            for i in range(shape[0])
        ]

        def stack(_: list[Array], initial: np.ndarray | None) -> np.ndarray:
            values = np.empty(shape, np.float32)
            for i, layer in enumerate(layers):
                if layer is None or layer.fresh:
                    assert initial is not None
                part = initial[i] if initial is not None else None
                values[i] = part if layer is None else layer.values(part)
            return values

        fresh = any(layer is None or layer.fresh for layer in layers)
        return _Source([], stack, fresh)

    def _other_shape(self, path: str, array: Array, shape: tuple[int, ...]) -> _Source:
        if (
            self.new_head
            and path
            == ("conv_root/kernel" if self.wanted.resnet_width else "embedding/kernel")
            and shape[2] == 1
            and array.shape == (*shape[:2], array.shape[2], shape[3])
        ):
            self.report.change(
                f"summed: {array.name} over its {array.shape[2]} input channels, because "
                "model.channels is 1"
            )
            return _Source([array], lambda a, _: a[0].read().sum(axis=2, keepdims=True))
        other_patch = self.wanted.patch != self.stored.patch
        if path == "embedding/kernel" and other_patch and array.shape[2:] == shape[2:]:
            return self._patches(array, shape)
        if self.new_head and path.startswith("pre_logits/"):
            self.report.change(f"re-initialised: {path} {shape} (another width)")
            return _Source([], lambda _, initial: _require(initial), fresh=True)
        return self._misfit(array, shape)

    def _positions(self, path: str, array: Array, shape: tuple[int, ...]) -> _Source:
        """A table of another grid, or with other rows in front of the patches."""
        axis = {"pos_embedding_y": 0, "pos_embedding_x": 1}.get(path.split("/")[-1])
        if axis is not None and len(array.shape) == 3 == len(shape):
            if array.shape == shape:
                return _Source([array], _one)
            if array.shape[2] != shape[2] or array.shape[axis] != self.old[axis]:
                return self._misfit(array, shape)
            self._note_resize(array, array.shape, shape)
            size = (shape[0], shape[1])
            return _Source(
                [array], lambda a, _: positions.resize(a[0].read(), size, self.rule)
            )
        if len(array.shape) != 3 or array.shape[2] != shape[-1] or array.shape[0] != 1:
            return self._misfit(array, shape)
        if path.endswith("pos_embedding_cls"):
            return _Source([array], _one)
        return self._table(path, array, shape)

    def _table(self, path: str, array: Array, shape: tuple[int, ...]) -> _Source:
        """(1, r + h w, D): r rows of the class and distillation token come first."""
        rows = extra_rows(self.stored, self.arrays)
        if path != POSITIONS:
            rows = array.shape[1] - self.old[0] * self.old[1]
        wanted = positioned_tokens(self.wanted)
        if rows not in (0, 1, positioned_tokens(self.stored)):
            return self._misfit(array, shape)
        if self.old == self.new and rows == wanted:
            return _Source([array], _one)
        if self.old != self.new:
            self._note_resize(array, self.old, self.new)
        if rows > wanted:
            self.report.change(
                f"ignored: row {wanted} of {array.name}, of a token that is not there"
            )
        # Without a class token in the file there is nothing to be folded into, so the
        # row is initialised with the token. With one, its position is part of the token.
        fresh = wanted > rows and "cls" not in self.arrays
        if wanted > rows:
            how = "initialised" if fresh else "zero: the file's tokens include it"
            self.report.change(f"re-initialised: row {rows} of {array.name} is {how}")

        def table(arrays: list[Array], initial: np.ndarray | None) -> np.ndarray:
            values = positions.resize_table(
                arrays[0].read(), self.old, self.new, self.rule
            )
            kept, patches = values[0, : min(rows, wanted)], values[0, rows:]
            added = np.zeros((max(wanted - rows, 0), shape[-1]), np.float32)
            if fresh:
                added = _require(initial)[0, rows:wanted]
            return np.concatenate([kept, added, patches])[None]

        return _Source([array], table, fresh)

    def _relative_bias(self, array: Array, shape: tuple[int, ...]) -> _Source:
        entries = (2 * self.old[0] - 1) * (2 * self.old[1] - 1)
        if array.shape[1:] != shape[1:] or not 0 <= array.shape[0] - entries <= 3:
            return self._misfit(array, shape)
        self._note_resize(array, self.old, self.new)
        rule = "bicubic" if self.rule == "corners" else self.rule
        return _Source(
            [array],
            lambda a, _: positions.resize_relative(
                a[0].read(), self.old, self.new, rule
            ),
        )

    def _patches(self, array: Array, shape: tuple[int, ...]) -> _Source:
        self.report.change(
            f"resized: {array.name} from patches of {array.shape[0]} to {shape[0]} pixels"
        )
        return _Source(
            [array],
            lambda a, _: positions.resize_kernel(a[0].read(), shape[0], self.rule),
        )

    def _note_resize(
        self, array: Array, old: tuple[int, ...], new: tuple[int, ...]
    ) -> None:
        a, b = (" x ".join(map(str, s[:2])) for s in (old, new))
        self.report.change(f"resized: {array.name} from {a} to {b} patches")

    def _misfit(self, array: Array, shape: tuple[int, ...]) -> _Source:
        self.report.problem(f"{array.name} has shape {array.shape}, not {shape}")
        return _Source([array], _one)


def _require(initial: np.ndarray | None) -> np.ndarray:
    assert initial is not None
    return initial


def _init(cfg: ModelConfig, key: jax.Array) -> Params:
    height, width = cfg.image_size if cfg.image_size != (0, 0) else (224, 224)
    images = jax.numpy.zeros((1, height, width, cfg.channels))
    variables: Any = models.create(cfg).init(key, images)
    return variables["params"]


def _shapes(cfg: ModelConfig) -> Params:
    return jax.eval_shape(lambda: _init(cfg, jax.random.key(0)))


def _initial(cfg: ModelConfig, paths: list[str]) -> dict[str, np.ndarray]:
    """Initial values of some parameters; XLA drops the computation of the others."""
    if not paths:
        return {}

    def some(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten(_init(cfg, key))
        return {path: flat[path] for path in paths}

    return {k: np.asarray(v) for k, v in jax.jit(some)(jax.random.key(0)).items()}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dict of parameters -> ``{"a/b/c": array}``."""
    flat = {}
    for key, value in tree.items():
        if hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: dict[str, Any]) -> Params:
    """``{"a/b/c": array}`` -> nested dict of parameters."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
