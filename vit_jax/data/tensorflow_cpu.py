# SPDX-License-Identifier: Apache-2.0
"""The one place where tensorflow is imported: it must never take an accelerator.

TensorFlow allocates nearly all memory of every GPU it sees, and JAX then dies of
out-of-memory; a TPU can belong to only one of the two. So the devices are hidden in the
same breath as the import, before any op can run.
"""

import logging
import os
from typing import Any

# Warnings about missing CPU instructions and the log lines per undecodable image (which
# we count and name ourselves) say nothing a user can act on. "1" is what importing jax
# sets where the user has set nothing.
if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# oneDNN logs at import, whatever the level, on processors with AVX-512, and its numbers
# are others there than elsewhere.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def _without_keras() -> Any:
    """tensorflow, which would import all of Keras too, for a second and 0.1 GiB, were it
    not asked for the old one, which is hardly ever there. ``tf.keras`` works later."""
    name = "TF_USE_LEGACY_KERAS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    import tensorflow

    os.environ.pop(name)
    if before is not None:
        os.environ[name] = before
    return tensorflow


tf: Any = _without_keras()  # the type stubs lack much of it

for _kind in ("GPU", "TPU"):
    try:
        tf.config.set_visible_devices([], _kind)
    except RuntimeError:  # the caller's own tensorflow code ran before us
        if tf.config.get_visible_devices(_kind):
            logging.getLogger(__name__).warning(
                "tensorflow was used before vit_jax.data was imported and holds a "
                "%s that jax may need",
                _kind,
            )

__all__ = ["tf"]
