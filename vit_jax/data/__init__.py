# SPDX-License-Identifier: Apache-2.0
"""Images and labels, from files to arrays on the host.

``describe`` says what a data set holds, ``train_batches`` and ``eval_batches`` deliver
it. To add a data set, add a module to ``sources.SOURCES``; to add an augmentation,
add one to ``transforms.TRANSFORMS``. Nothing here imports tensorflow until a source
that needs it is read.
"""

from vit_jax.data.examples import DataInfo
from vit_jax.data.pipeline import (
    bad_examples,
    describe,
    eval_batches,
    train_batches,
)

__all__ = [
    "DataInfo",
    "bad_examples",
    "describe",
    "eval_batches",
    "train_batches",
]
