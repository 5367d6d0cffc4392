# SPDX-License-Identifier: Apache-2.0
"""Plain functions on one image; a pipeline is a list of them in the config.

    train_transforms=({"op": "inception_crop", "area": (0.2, 1.0)}, {"op": "flip"})

An image is a scalar string (an encoded file, not decoded yet) or uint8 (H, W, 3). Crops
that come first are fused with decoding: pixels outside the crop are never computed.
Every random choice follows from ``seed``, int64 (2,), and nothing else. To add one,
write a function ``name(image, seed, *, options)`` and add it to ``TRANSFORMS``; the
annotations of its options are what they are checked against. An option called ``size``
defaults to ``data.image_size`` and one called ``exact`` to the config's choice.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from vit_jax.config import Above0, Count, Positive, Range, Share, arguments, choose
from vit_jax.data import randaugment as ra
from vit_jax.data.decode import Image, decode, decode_crop, resize_many, resize_to
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

Seed = Any  # tf.Tensor: int64 (2,)
# Of tf.image.resize.
Method = Literal[
    "area", "bicubic", "bilinear", "gaussian", "lanczos3", "lanczos5", "mitchellcubic",
    "nearest",
]  # fmt: skip
Shares = tuple[Annotated[float, Range(0, 1, above=True)], Share]  # (lowest, highest)
Ratios = tuple[Above0, Above0]  # (lowest, highest) width / height

_LARGEST = 2**25  # pixels, which take half a gigabyte

DEFAULT_TRAIN = ({"op": "inception_crop"}, {"op": "flip"})
DEFAULT_EVAL = ({"op": "resize"},)


def inception_crop(
    image: Image,
    seed: Seed,
    *,
    size: Positive,
    area: Shares = (0.05, 1.0),
    ratio: Ratios = (0.75, 1.33),
    exact: bool = False,
) -> Image:
    """A random part of the image, resized to a square without anti-aliasing.

    TensorFlow's own sampler, whose distribution is not torchvision's: the ratio is
    uniform, then the height is uniform among those that fit, so small crops are common.
    """
    cut = _inception_cut(image, seed, size, area, ratio, exact)
    return resize_to(cut, size) if exact else resize_many([cut], [False], size)[0]


def _inception_cut(
    image: Image,
    seed: Seed,
    size: int,
    area: Shares,
    ratio: Ratios,
    exact: bool,
) -> Image:
    def place(shape: Any) -> Any:
        return inception_window(shape, seed, area=area, ratio=ratio)

    return decode_crop(image, place, target=0 if exact else size)


def inception_window(
    shape: Any,
    seed: Seed,
    *,
    area: Shares = (0.05, 1.0),
    ratio: Ratios = (0.75, 1.33),
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
    size: Positive,
    method: Method = "bilinear",
    antialias: bool = False,
) -> Image:
    """The whole image as a square; the aspect ratio is not kept.

    Without ``antialias`` as the paper's code: grey levels differ from those of Pillow's
    and timm's bilinear resize (by 4 on average when photographs shrink), which numbers
    that are compared with theirs should not.
    """
    del seed
    return resize_to(decode(image), size, method=method, antialias=antialias)


def resize_small(
    image: Image,
    seed: Seed,
    *,
    size: Positive,
    method: Method = "area",
    antialias: bool = False,
) -> Image:
    """Resized so that the shorter side has ``size`` pixels; aspect ratio kept. An image
    so narrow that it would get more than ``_LARGEST`` pixels counts as unreadable."""
    del seed
    image = decode(image)
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    factor = tf.cast(size, tf.float32) / tf.cast(tf.minimum(height, width), tf.float32)

    def scaled(side: Any) -> Any:
        return tf.maximum(
            size, tf.cast(tf.round(tf.cast(side, tf.float32) * factor), tf.int32)
        )

    sides = scaled(height), scaled(width)
    few = tf.reduce_prod(tf.cast(sides, tf.int64)) <= _LARGEST
    check = tf.debugging.Assert(few, ["resize_small: too narrow, it would get", *sides])
    with tf.control_dependencies([check]):
        return resize_to(image, sides, method=method, antialias=antialias)


def random_crop(image: Image, seed: Seed, *, size: Positive) -> Image:
    """A square of ``size`` pixels from anywhere in the image."""

    def offset(free: Any) -> Any:
        draw = tf.raw_ops.StatelessRandomUniform(shape=[2], seed=seed)
        drawn = tf.cast(draw * tf.cast(free + 1, tf.float32), tf.int32)
        return tf.minimum(drawn, free)  # draw * n may round up to n

    return _square(image, offset, size, "random_crop")


def central_crop(image: Image, seed: Seed, *, size: Positive) -> Image:
    """The square of ``size`` pixels in the middle."""
    del seed
    return _square(image, lambda free: free // 2, size, "central_crop")


def flip(image: Image, seed: Seed, *, p: Share = 0.5) -> Image:
    """Mirrored left to right with probability ``p``."""
    image = decode(image)
    return tf.cond(_is_mirrored(seed, p), lambda: tf.reverse(image, [1]), lambda: image)


def _is_mirrored(seed: Seed, p: float) -> Any:
    return tf.raw_ops.StatelessRandomUniform(shape=[], seed=seed) < p


def value_range(
    image: Image, seed: Seed, *, low: float = -1.0, high: float = 1.0
) -> Image:
    """float32 in [low, high]. Only where the device should get floats: without this
    op uint8 goes to the device, a quarter of the bytes, and becomes [-1, 1] there."""
    del seed
    return tf.cast(decode(image), tf.float32) * ((high - low) / 255.0) + low


def randaugment(
    image: Image,
    seed: Seed,
    *,
    n: Count = 2,
    m: Annotated[float, Range(0, ra.HIGHEST)] = 10.0,
    corrected: bool = False,
) -> Image:
    """``n`` of 16 random operations at magnitude ``m``, some of them in pixels and made
    for images of 224; see randaugment.py."""
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
) -> "Pipeline":
    """The list of operations as one function.

    Raises:
      UserError: unknown operation or option, or a value that is not allowed. The
        function, when traced, raises one for images that do not all end up with the
        side ``size``.
    """
    steps = []
    for position, op in enumerate(ops):
        options, where = dict(op), f"{knob}[{position}]"
        name = options.pop("op", None)
        if not isinstance(name, str):
            raise UserError(
                f"{where} is {dict(op)!r}: it needs the key 'op', one of "
                f"{sorted(TRANSFORMS)}"
            )
        function = choose(f"transform in {knob}", name, TRANSFORMS)
        if function is value_range and position + 1 < len(ops):
            raise UserError(
                f"{where} is {name}, which makes floats of the pixels: it must come last"
            )
        parameters = inspect.signature(function).parameters
        decided = {"size": size, "exact": exact}
        options = {k: v for k, v in decided.items() if k in parameters} | options
        options = arguments(function, options, f"{where} ({name})")
        for pair in ("area", "ratio"):
            low, high = options.get(pair, (0, 0))
            if low > high:
                raise UserError(
                    f"{where} ({name}).{pair} is {options[pair]}: it must be "
                    "(lowest, highest)"
                )
        defaults = {
            k: p.default for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY
        }
        steps.append((function, defaults | options))
    return Pipeline(tuple(steps), size, knob)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Operations in a row: ``pipeline(image, seed)`` -> image (size, size, 3).

    The same in two parts, for many images: ``alone`` on each, then ``together`` on all.
    A fast ``inception_crop`` at the start, and a ``flip`` behind it, are resized and
    mirrored together, which takes half the time; the bits are the same.
    """

    steps: tuple[tuple[Callable[..., Image], dict[str, Any]], ...]
    size: int
    knob: str

    def __call__(self, image: Image, seed: Seed) -> Image:
        alone = self.alone(image, seed)
        return self.together({k: [v] for k, v in alone.items()}, seed[None])[0]

    def alone(self, image: Image, seed: Seed) -> dict[str, Any]:
        """What has to be done to one image before ``together``."""
        if not self._merged:
            return {"image": self._apply(0, image, seed)}
        cut = _inception_cut(image, _stream(seed, 0), **self.steps[0][1])
        mirror = tf.constant(False)
        if self._merged == 2:
            mirror = _is_mirrored(_stream(seed, 1), **self.steps[1][1])
        return {"cut": cut, "mirror": mirror}

    def together(self, alone: Mapping[str, Sequence[Any]], seeds: Any) -> Image:
        """The results of ``alone`` on k images, and their seeds (k, 2), -> k images."""
        if not self._merged:
            return tf.stack(alone["image"])
        size = self.steps[0][1]["size"]
        images = resize_many(alone["cut"], tf.stack(alone["mirror"]), size)
        if self._merged == len(self.steps):
            self._check(images[0])
            return images
        rest = tf.function(
            lambda one: self._apply(self._merged, *one),
            input_signature=[(tf.TensorSpec((size, size, 3), tf.uint8), _SEED)],
            autograph=False,
        )
        made = rest.get_concrete_function().structured_outputs
        spec = tf.TensorSpec(made.shape, made.dtype)
        return tf.map_fn(rest, (images, seeds), fn_output_signature=spec)

    @property
    def _merged(self) -> int:
        """How many operations at the start are done together."""
        functions = [function for function, _ in self.steps]
        if functions[:1] != [inception_crop] or self.steps[0][1]["exact"]:
            return 0
        return 2 if functions[1:2] == [flip] else 1

    def _apply(self, first: int, image: Image, seed: Seed) -> Image:
        for position, (function, options) in enumerate(self.steps):
            if position >= first:
                image = function(image, _stream(seed, position), **options)
        image = decode(image)
        self._check(image)
        return image

    def _check(self, image: Image) -> None:
        if image.shape[:2] != (self.size, self.size):
            raise UserError(
                f"{self.knob} ends with images of {_sides(image)} pixels, but "
                f"config.data.image_size is {self.size}: end with a crop or a resize to that size"
            )


def _stream(seed: Seed, position: int) -> Seed:
    """The seed of one operation: each draws from a stream of its own, so that adding or
    removing one leaves the choices of those before it as they are."""
    return seed + ((_STREAM * position + 2**63) % 2**64 - 2**63)  # wraps as int64 does


_SEED = tf.TensorSpec((2,), tf.int64)
_STREAM = 0x632BE59BD9B4E019  # an odd constant: distinct seeds for every position


def _square(image: Image, offset: Callable[[Any], Any], size: int, name: str) -> Image:
    """A square at ``offset(free)``, where ``free`` says how far it could move."""

    if image.dtype != tf.string and any(s and s < size for s in image.shape[:2]):
        raise UserError(
            f"{name}: the images have {_sides(image)} pixels when it is their turn, and "
            f"its size is {size}: resize them to more before it"
        )

    def place(shape: Any) -> Any:
        free = shape[:2] - size
        problem = f"{name}: the image is smaller than {size} pixels:"
        check = tf.debugging.Assert(tf.reduce_all(free >= 0), [problem, shape[:2]])
        with tf.control_dependencies([check]):
            return tf.concat([offset(free), [size, size]], 0)

    return tf.ensure_shape(decode_crop(image, place, target=0), (size, size, 3))


def _sides(image: Image) -> str:
    return " x ".join("?" if s is None else str(s) for s in image.shape[:2])
