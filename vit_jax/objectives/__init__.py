# SPDX-License-Identifier: Apache-2.0
"""What is minimised.

To add an objective: a record :class:`Objective` in a file here, and a line in
``OBJECTIVES``. ``config.loss`` chooses one.
"""

import dataclasses

from vit_jax.config import Config, choose
from vit_jax.errors import UserError
from vit_jax.objectives import classification, masked_patch
from vit_jax.objectives.classification import example_losses
from vit_jax.objectives.mixup import mixup_batch
from vit_jax.objectives.objective import Metrics, Objective, multi_hot

__all__ = [
    "OBJECTIVES", "Metrics", "Objective", "check", "example_losses", "mixup_batch",
    "multi_hot", "of",
]  # fmt: skip

OBJECTIVES = {
    "softmax": classification.SOFTMAX,
    "sigmoid": classification.SIGMOID,
    "masked_patch": masked_patch.MASKED_PATCH,
}


def of(cfg: Config) -> Objective:
    """The objective of a run."""
    return choose("config.loss", cfg.loss, OBJECTIVES)


def check(cfg: Config, multilabel: bool) -> list[str]:
    """Refuses combinations of loss, head and data that cannot be meant.

    Args:
      cfg: the run, with model.num_classes filled in.
      multilabel: whether the labels of the data are multi-hot.

    Returns:
      Hints for the log: allowed, but perhaps not wanted.

    Raises:
      UserError: names the knob.
    """
    objective = of(cfg)
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    for option in sorted({o for x in OBJECTIVES.values() for o in x.options}):
        value = getattr(cfg, option)
        if option not in objective.options and value != defaults[option]:
            readers = [k for k, x in OBJECTIVES.items() if option in x.options]
            raise UserError(
                f"config.{option}={value!r} means nothing to config.loss={cfg.loss!r}: "
                f"leave it at {defaults[option]!r}; it belongs to {' and '.join(readers)}"
            )
    return objective.check(cfg, multilabel)
