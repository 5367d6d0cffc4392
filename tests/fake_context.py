# SPDX-License-Identifier: Apache-2.0
"""A Context over arrays: the "images" are the features, the "model" is a matrix."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.config import Config, DataConfig
from vit_jax.evaluators.context import Context
from vit_jax.inference import Predictor


@dataclass(frozen=True)
class Info:
    """The fields of ``data.DataInfo``."""

    num_classes: int
    class_names: tuple[str, ...]
    num_train: int
    num_test: int
    multilabel: bool = False


def context(
    splits: dict,
    weights: np.ndarray,
    *,
    cfg: Config | None = None,
    batch: int = 16,
    devices: int = 8,
    out: str = "",
    class_names: tuple[str, ...] = (),
) -> Context:
    """``splits[split] = (features (N, D), labels (N,) or (N, K))``; logits are features
    @ weights.

    A key ``(name, split)`` is used for data configs with that ``name``.
    """
    mesh = Mesh(
        np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,)
    )
    rows = NamedSharding(mesh, P("data"))

    @jax.jit
    def forward(params, images):
        x = images.reshape(len(images), -1)
        return {"logits": x @ params, "pre_logits": x}

    class Fake(Predictor):
        def batches(self, cfg: DataConfig, split: str, batch: int):
            return batches(cfg, split)

    def batches(data: DataConfig, split: str):
        x, y = splits.get((data.name, split), splits.get(split))
        for start in range(0, len(x), batch):
            image = np.asarray(x[start : start + batch], np.float32)
            label = np.asarray(y[start : start + batch])
            label = label.astype(np.int32 if label.ndim == 1 else np.float32)
            n = len(image)
            pad = lambda a, n=n: np.pad(a, [(0, batch - n)] + [(0, 0)] * (a.ndim - 1))
            arrays = {
                "image": pad(image[:, None, None]),
                "label": pad(label),
                "mask": pad(np.ones(n, np.float32)),
            }
            yield {k: jax.device_put(v, rows) for k, v in arrays.items()}

    num_classes = weights.shape[1]
    names = class_names or tuple(f"class{i}" for i in range(num_classes))
    n = {s: len(splits[s][0]) if s in splits else 0 for s in ("train", "test")}
    return Context(
        cfg=cfg or Config(),
        predictor=Fake(
            jax.device_put(jnp.asarray(weights, jnp.float32), NamedSharding(mesh, P())),
            forward,
            mesh,
        ),
        info=Info(num_classes, names, n["train"], n["test"]),  # pyright: ignore
        out=out,
    )
