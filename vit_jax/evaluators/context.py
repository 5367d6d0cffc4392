# SPDX-License-Identifier: Apache-2.0
"""What every evaluator is given, and how it sums over a data set without leaving the
device.

Dimension letters: B batch (global, padded), K classes, D width.
"""

import functools
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax import config
from vit_jax import data as datasets
from vit_jax.config import Amount, Config, DataConfig, Positive
from vit_jax.data import DataInfo
from vit_jax.errors import UserError, writing
from vit_jax.inference import Batch, Predictor


class _Filled:
    """A constraint: the list is not empty."""

    def __contains__(self, value: Any) -> bool:
        return len(value) > 0

    def __str__(self) -> str:
        return "a list with at least one entry"


# (output of the model (B, ...), labels (B,) or (B, K), mask (B,)) -> what is summed
Step = Callable[[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]
Counts = Annotated[Sequence[Positive], _Filled()]
Amounts = Annotated[Sequence[Amount], _Filled()]

# Fields that another data set inherits from the run.
_READING = ("image_size", "eval_transforms", "cache_gib", "max_bad")


@dataclass(frozen=True)
class Context:
    """A model with its parameters, and the way to the data.

    Arrays of a batch are global: with several processes each one holds its rows, and
    every evaluator runs on every process and returns the same numbers there.
    """

    cfg: Config
    predictor: Predictor
    info: DataInfo  # of cfg.data
    # Names of the model's outputs; (): those of the data.
    classes: tuple[str, ...] = ()
    # Folder for the arrays behind a number, such as a confusion matrix; "": none are
    # written.
    out: str = ""

    def data(self, override: Mapping[str, Any] | None) -> DataConfig:
        """``cfg.data`` with some fields changed."""
        return changed(self.cfg.data, override)

    def other_data(self, fields: Mapping[str, Any]) -> DataConfig:
        """Another data set than the run's, by default of tfds.

        Of ``cfg.data`` it has what says how images are read. Splits, subsets and the
        hold-out share are of the run's own set and would cut this one short.
        """
        own = self.cfg.data
        kept = {k: getattr(own, k) for k in _READING}
        values = {"source": "tfds"} | kept | dict(fields)
        if values["source"] == own.source == "tfds":
            values = {"path": own.path} | values  # tfds' data_dir
        return config.from_dict({"data": values}).data

    def describe(self, data: DataConfig) -> DataInfo:
        """What ``data`` holds, which need not be the data of the run."""
        return self.info if data == self.cfg.data else datasets.describe(data)

    def outputs(
        self, data: DataConfig, split: str
    ) -> Iterator[tuple[Mapping[str, jax.Array], Batch]]:
        """Outputs of the model and the batch they belong to, in the order of the data."""
        size = self.cfg.eval.batch or self.cfg.batch
        for batch in self.predictor.batches(data, split, size):
            yield self.predictor(batch["image"]), batch

    def sum(
        self,
        step: Step,
        data: DataConfig,
        split: str,
        *,
        output: str = "logits",
        finite: bool = True,
    ) -> dict[str, Any]:
        """Sums ``step(output, label, mask)`` over a data set; fetches once, at the end.

        Integers are summed exactly, floats with a compensated sum, so that 10,000
        batches do not lose digits.

        Args:
          step: what is summed.
          data: the data set.
          split: of it.
          output: which of the model's the step reads.
          finite: refuse outputs that are not; False where the numbers themselves become
            nan, for then a run in training may go on.

        Raises:
          UserError: no examples, or outputs that are not finite.
        """
        total: Any = None
        for outputs, batch in self.outputs(data, split):
            part = step(outputs[output], batch["label"], batch["mask"])
            if finite:
                part["broken"] = _broken(outputs, batch["mask"])
            before = total
            total = _start(part) if before is None else _add(before, part)
            # Dispatch runs ahead of the device; without this line whole data sets of
            # images would queue up in its memory.
            if before is not None:
                jax.block_until_ready(before)
        if total is None:
            raise UserError(
                f"the split {split!r} of {name_of(data)!r} has no examples to evaluate"
            )
        sums = fetch(total[0])
        check_finite(int(sums.pop("broken", 0)), data, split)
        return sums

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the outputs of the model mean."""
        return self.classes or self.info.class_names

    def put(self, x: np.ndarray, *spec: Any) -> jax.Array:
        """The same host array of every process as one global array; ``spec`` names mesh
        axes per dimension."""
        sharding = NamedSharding(self.predictor.mesh, P(*spec))
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    def save(self, name: str, **arrays: Any) -> None:
        """Writes the arrays behind a number to ``out/name.npz``; see ``write``."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        self.write(f"{name}.npz", buffer.getvalue())

    def write(self, name: str, content: bytes) -> None:
        """Writes ``out/name`` from process 0; nothing without ``out``.

        Raises:
          UserError: the folder cannot be written.
        """
        if not self.out or jax.process_index():
            return
        with writing(f"--out={self.out}"):
            os.makedirs(self.out, exist_ok=True)
            Path(self.out, name).write_bytes(content)


def changed(data: DataConfig, fields: Mapping[str, Any] | None) -> DataConfig:
    """``data`` with some fields changed.

    Raises:
      UserError: an unknown field, or a wrong value.
    """
    if not fields:
        return data
    values = config.to_dict(data) | dict(fields)
    return config.from_dict({"data": values}).data


def check_finite(broken: int, data: DataConfig, split: str) -> None:
    """Refuses features that are not finite, of which every comparison is false and the
    largest is the first: the numbers would look plausible.

    Raises:
      UserError: there are any.
    """
    if broken:
        raise UserError(
            f"the model gives outputs that are not finite for {broken} images of the split "
            f"{split!r} of {name_of(data)!r}: the checkpoint or its preprocessing is broken"
        )


def name_of(data: DataConfig) -> str:
    """What a message calls a data set."""
    return data.name or data.path or data.source


def fetch(tree: Any) -> Any:
    """Global arrays as numpy arrays, complete on every process."""
    return jax.device_get(jax.tree.map(replicate, tree))


def replicate(x: jax.Array) -> jax.Array:
    """The same array, complete on every device that holds a part of it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return x
    assert isinstance(x.sharding, NamedSharding)
    return _replicator(NamedSharding(x.sharding.mesh, P()))(x)


@functools.cache
def _replicator(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


@jax.jit
def _broken(outputs: Mapping[str, jax.Array], mask: jax.Array) -> jax.Array:
    """How many images of a batch have an output that is not finite."""
    bad = [
        ~jnp.isfinite(x.reshape(len(x), -1)).all(1) for x in jax.tree.leaves(outputs)
    ]
    return jnp.sum(jnp.any(jnp.stack(bad), 0) & (mask > 0), dtype=jnp.int32)


@jax.jit
def _start(part: Any) -> Any:
    return part, jax.tree.map(jnp.zeros_like, part)


@jax.jit
def _add(total: Any, part: Any) -> Any:
    """Kahan's sum: the second tree carries what the first could not represent."""
    value, lost = total
    y = jax.tree.map(lambda p, c: p - c, part, lost)
    new = jax.tree.map(lambda v, y: v + y, value, y)
    lost = jax.tree.map(lambda n, v, y: (n - v) - y, new, value, y)
    return new, lost
