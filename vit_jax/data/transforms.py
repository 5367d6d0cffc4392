# SPDX-License-Identifier: Apache-2.0
"""Plain functions on one image; a pipeline is a list of them in the config.

    train_transforms=({"op": "inception_crop", "area": (0.2, 1.0)}, {"op": "flip"})

An image is a scalar string (an encoded file, not decoded yet) or uint8 (H, W, 3). Crops
that come first are fused with decoding: pixels outside the crop are never computed. Every
random choice follows from ``seed``, int64 (2,), and nothing else. To add one, write a
function ``name(image, seed, *, options)`` and add it to ``TRANSFORMS``; an option called
``size`` defaults to ``data.image_size`` and one called ``exact`` to the config's choice.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_jax.config import choose, nearest
from vit_jax.data import randaugment as ra
from vit_jax.data.decode import Image, decode, decode_crop, resize_to
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

Seed = Any  # tf.Tensor: int64 (2,)

DEFAULT_TRAIN = ({"op": "inception_crop"}, {"op": "flip"})
DEFAULT_EVAL = ({"op": "resize"},)


def inception_crop(
    image: Image,
    seed: Seed,
    *,
    size: int,
    area: tuple[float, float] = (0.05, 1.0),
    ratio: tuple[float, float] = (0.75, 1.33),
    exact: bool = False,
) -> Image:
    """A random part of the image, resized to a square without anti-aliasing.

    TensorFlow's own sampler, whose distribution is not torchvision's: the ratio is
    uniform, then the height is uniform among those that fit, so small crops are common.
    """

    def place(shape: Any) -> Any:
        return inception_window(shape, seed, area=area, ratio=ratio)

    crop = decode_crop(image, place, target=0 if exact else size)
    return resize_to(crop, size)


def inception_window(
    shape: Any,
    seed: Seed,
    *,
    area: tuple[float, float] = (0.05, 1.0),
    ratio: tuple[float, float] = (0.75, 1.33),
) -> Any:
    """Where ``inception_crop`` cuts: (top, left, height, width), int32."""
    begin, extent, _ = tf.raw_ops.StatelessSampleDistortedBoundingBox(
        image_size=shape,
        bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed=seed,
        min_object_covered=0.0,
        aspect_ratio_range=list(ratio),
        area_range=list(area),
        max_attempts=100,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], extent[:2]], 0)


def resize(
    image: Image,
    seed: Seed,
    *,
    size: int,
    method: str = "bilinear",
    antialias: bool = False,
) -> Image:
    """The whole image as a square; the aspect ratio is not kept."""
    del seed
    return resize_to(decode(image), size, method=method, antialias=antialias)


def resize_small(
    image: Image,
    seed: Seed,
    *,
    size: int,
    method: str = "area",
    antialias: bool = False,
) -> Image:
    """Resized so that the shorter side has ``size`` pixels; aspect ratio kept."""
    del seed
    image = decode(image)
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    factor = tf.cast(size, tf.float32) / tf.cast(tf.minimum(height, width), tf.float32)

    def scaled(side: Any) -> Any:
        return tf.maximum(
            size, tf.cast(tf.round(tf.cast(side, tf.float32) * factor), tf.int32)
        )

    return resize_to(
        image, (scaled(height), scaled(width)), method=method, antialias=antialias
    )


def random_crop(image: Image, seed: Seed, *, size: int) -> Image:
    """A square of ``size`` pixels from anywhere in the image."""

    def offset(free: Any) -> Any:
        draw = tf.raw_ops.StatelessRandomUniform(shape=[2], seed=seed)
        drawn = tf.cast(draw * tf.cast(free + 1, tf.float32), tf.int32)
        return tf.minimum(drawn, free)  # draw * n may round up to n

    return _square(image, offset, size, "random_crop")


def central_crop(image: Image, seed: Seed, *, size: int) -> Image:
    """The square of ``size`` pixels in the middle."""
    del seed
    return _square(image, lambda free: free // 2, size, "central_crop")


def flip(image: Image, seed: Seed, *, p: float = 0.5) -> Image:
    """Mirrored left to right with probability ``p``."""
    image = decode(image)
    draw = tf.raw_ops.StatelessRandomUniform(shape=[], seed=seed)
    return tf.cond(draw < p, lambda: tf.reverse(image, [1]), lambda: image)


def value_range(
    image: Image, seed: Seed, *, low: float = -1.0, high: float = 1.0
) -> Image:
    """float32 in [low, high]. Only where the device should get floats: without this
    op uint8 goes to the device, a quarter of the bytes, and becomes [-1, 1] there."""
    del seed
    return tf.cast(decode(image), tf.float32) * ((high - low) / 255.0) + low


def randaugment(
    image: Image, seed: Seed, *, n: int = 2, m: float = 10.0, corrected: bool = False
) -> Image:
    """``n`` of 16 random operations at magnitude ``m``; see randaugment.py."""
    return ra.randaugment(decode(image), seed, n=n, m=m, corrected=corrected)


TRANSFORMS: dict[str, Callable[..., Image]] = {
    "central_crop": central_crop,
    "flip": flip,
    "inception_crop": inception_crop,
    "randaugment": randaugment,
    "random_crop": random_crop,
    "resize": resize,
    "resize_small": resize_small,
    "value_range": value_range,
}


def compose(
    ops: Sequence[Mapping[str, Any]], *, size: int, exact: bool, knob: str
) -> Callable[[Image, Seed], Image]:
    """The list of operations as one function ``(image, seed) -> image``.

    Raises:
      UserError: unknown operation or option, or a pipeline whose images do not all end
        up with the side ``size``.
    """
    steps = []
    for position, op in enumerate(ops):
        options = dict(op)
        name = options.pop("op", None)
        if name is None:
            raise UserError(
                f"{knob}[{position}] is {dict(op)!r}: it needs the key 'op', one of "
                f"{sorted(TRANSFORMS)}"
            )
        function = choose(f"transform in {knob}", name, TRANSFORMS)
        allowed = [p for p in inspect.signature(function).parameters][2:]
        for option in options:
            if option not in allowed:
                raise UserError(
                    f"unknown option {option!r} of transform {name!r} in {knob}: "
                    f"{nearest(option, allowed)}it takes {sorted(allowed)}"
                )
        if "size" in allowed:
            options.setdefault("size", size)
        if "exact" in allowed:
            options.setdefault("exact", exact)
        steps.append((function, options))

    def run(image: Image, seed: Seed) -> Image:
        for position, (function, options) in enumerate(steps):
            # Each operation draws from a stream of its own: adding or removing one
            # leaves the choices of those before it as they are.
            stream = (_STREAM * position + 2**63) % 2**64 - 2**63  # wraps as int64 does
            image = function(image, seed + stream, **options)
        image = decode(image)
        if image.shape[:2] != (size, size):
            raise UserError(
                f"{knob} ends with images of {_sides(image)} pixels, but "
                f"data.image_size is {size}: end with a crop or a resize to that size"
            )
        return image

    return run


_STREAM = 0x632BE59BD9B4E019  # an odd constant: distinct seeds for every position


def _square(image: Image, offset: Callable[[Any], Any], size: int, name: str) -> Image:
    """A square at ``offset(free)``, where ``free`` says how far it could move."""

    def place(shape: Any) -> Any:
        free = shape[:2] - size
        problem = f"{name}: the image is smaller than {size} pixels:"
        check = tf.debugging.Assert(tf.reduce_all(free >= 0), [problem, shape[:2]])
        with tf.control_dependencies([check]):
            return tf.concat([offset(free), [size, size]], 0)

    return tf.ensure_shape(decode_crop(image, place, target=0), (size, size, 3))


def _sides(image: Image) -> str:
    return " x ".join("?" if s is None else str(s) for s in image.shape[:2])
