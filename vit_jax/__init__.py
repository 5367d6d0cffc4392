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
    from pathlib import Path

    from vit_jax.models import ResNet, ViT
    from vit_jax.weights import Size

__all__ = ["create_model", "list_models", "load", "load_for_finetune"]


def create_model(name: str, **fields: Any) -> "ViT | ResNet":
    """The model of that name as a Flax module, without parameters.

    Args:
      name: such as "ViT-B/16", "R50+ViT-L/32" or "R152x2"; what timm and Hugging Face
        call it, such as "vit_base_patch16_224" or "facebook/dinov2-base"; "" if every
        size is given.
      **fields: of ``vit_jax.config.ModelConfig``; ``image_size`` is a number or
        (height, width), and by default what the name of timm or Hugging Face says.

    Raises:
      UserError: unknown name or field, or sizes that contradict each other.
    """
    from vit_jax import config, models

    known = models.published.fields_of(name)
    fields = {"name": "" if known else name, **known, **fields}
    if not hasattr(fields.get("image_size", ()), "__iter__"):
        fields["image_size"] = (fields["image_size"],) * 2
    return models.create(config.from_dict({"model": fields}).model)


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names that ``create_model`` takes; ``pretrained``: ids that ``load`` takes.

    Args:
      pattern: as in a shell, "*b*16*", "ViT-S/*"; capitals do not count.
      pretrained: the published checkpoints of the catalogue instead.
    """
    import fnmatch

    if pretrained:
        from vit_jax.weights import catalogue

        return [p.id for p in catalogue.matching(pattern)]
    from vit_jax import models

    names = models.names()
    return [n for n in names if fnmatch.fnmatchcase(n.lower(), pattern.lower())]


def load(
    source: "str | Path", image_size: "Size" = None, **overrides: Any
) -> "tuple[ViT | ResNet, dict[str, Any]]":
    """(model, params) exactly as ``source`` holds them, the head included.

    Args:
      source: a file or folder, local or remote (gs://, https://, hf://), or an id of
        ``list_models(pretrained=True)``; see ``vit_jax.weights.load``.
      image_size: side, or (height, width), to resize the position embeddings to.
      **overrides: fields of ``ModelConfig`` that change no array, such as ``dtype``, or
        that the file does not state, such as ``heads``.

    Returns:
      ``model.apply({"params": params}, images)`` gives logits (B, K) of images
      (B, H, W, 3) in [-1, 1].

    Raises:
      UserError: naming everything that is wrong with the file.
    """
    from vit_jax import weights

    return weights.load(source, image_size, **overrides)


def load_for_finetune(
    source: "str | Path",
    num_classes: int,
    image_size: "Size" = None,
    **overrides: Any,
) -> "tuple[ViT | ResNet, dict[str, Any]]":
    """(model, params) with a new head of zeros and without ``pre_logits``.

    Args:
      source: as for ``load``.
      num_classes: outputs of the new head; 0: none, the model returns features.
      image_size: side, or (height, width), to resize the position embeddings to.
      **overrides: fields of ``ModelConfig``; see ``vit_jax.weights.load_for_finetune``.

    Raises:
      UserError: naming everything that is wrong with the file.
    """
    from vit_jax import weights

    return weights.load_for_finetune(source, num_classes, image_size, **overrides)


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("vit_jax")
    raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")
