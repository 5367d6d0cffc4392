# SPDX-License-Identifier: Apache-2.0
"""Vision Transformers in JAX: "An Image is Worth 16x16 Words", arXiv 2010.11929.

>>> model = vit_jax.create_model("ViT-B/16", num_classes=1000, image_size=224)
>>> params = model.init(jax.random.key(0), images)["params"]
>>> logits = model.apply({"params": params}, images)  # images in [-1, 1]
>>> model, params = vit_jax.load("ViT-B_16.npz")

Everything is imported where it is used: importing this package is fast and never
imports tensorflow.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_jax.models import ResNet, ViT

__all__ = ["create_model", "load", "load_for_finetune"]


def create_model(name: str, **fields: Any) -> "ViT | ResNet":
    """The model of that name as a Flax module, without parameters.

    Args:
      name: such as "ViT-B/16", "R50+ViT-L/32" or "R152x2"; "" if every size is given.
      **fields: of ``vit_jax.config.ModelConfig``; ``image_size`` is a number or
        (height, width).

    Raises:
      UserError: unknown name or field, or sizes that contradict each other.
    """
    from vit_jax import config, models

    if isinstance(fields.get("image_size"), int):
        fields["image_size"] = (fields["image_size"],) * 2
    return models.create(config.from_dict({"model": {"name": name, **fields}}).model)


def load(source: Any, *args: Any, **options: Any) -> Any:
    """(model, params) as ``source`` holds them; see ``vit_jax.weights.load``."""
    from vit_jax import weights

    return weights.load(source, *args, **options)


def load_for_finetune(source: Any, *args: Any, **options: Any) -> Any:
    """(model, params) with a new head; see ``vit_jax.weights.load_for_finetune``."""
    from vit_jax import weights

    return weights.load_for_finetune(source, *args, **options)


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("vit_jax")
    raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")
