# SPDX-License-Identifier: Apache-2.0
"""A workdir that training wrote, made once for all tests that need one."""

import functools
import tempfile

from tiny import TINY

from vit_jax import config, train


@functools.cache
def trained_workdir() -> str:
    """Four steps of the smallest run; the data has 128 test images of 5 classes."""
    folder = tempfile.mkdtemp(prefix="vit_jax_test_")
    cfg = config.replace(
        TINY, steps=4, log_every=2, eval__every=2, checkpoint__every=4, batch=64
    )
    train.train(cfg, folder)
    return folder
