# SPDX-License-Identifier: Apache-2.0
"""RandAugment as the released models were trained with, and a corrected form.

EfficientNet's heritage, not torchvision's: ``n`` times one of 16 operations is drawn
uniformly and applied at magnitude ``m`` (10 is "full", 20 allowed). It has quirks that
published numbers depend on, so they are the default: the mean of Contrast is
height * width / 256, Solarize compares with the threshold modulo 256, Posterize keeps
*more* bits as m grows, blend factors start at 0.1, and m = 0 is not the identity.
``corrected=True``: the operations that have a magnitude leave the image as it is at m =
0 and change it more and more from there; the mean of Contrast is the mean.

Translate and Cutout are in pixels, 10 m and a square of 8 m, whatever the size of the
image: made for 224 pixels, at 32 pixels and m = 10 they leave one colour of a third of
the images.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

from vit_jax.data.tensorflow_cpu import tf

GREY = 128  # fills what a geometric operation uncovers
MAX_LEVEL = 10.0
HIGHEST = 20.0  # the magnitude up to which the operations are defined

_TRANSLATE = 100.0  # pixels at level 1

log = logging.getLogger(__name__)

Image = Any  # tf.Tensor: uint8 (H, W, 3)


def randaugment(
    image: Image, seed: Any, *, n: int, m: float, corrected: bool = False
) -> Image:
    """``n`` random operations at magnitude ``m`` on a uint8 image."""
    shape = image.shape
    side = min((s for s in shape[:2] if s), default=0)
    if n and 0 < side <= _TRANSLATE * m / MAX_LEVEL:
        log.warning(
            "randaugment at magnitude %g moves images by up to %g pixels, and these have "
            "%d: many become one colour; enlarge them before it, or lower m",
            m,
            _TRANSLATE * m / MAX_LEVEL,
            side,
        )
    for layer in range(n):
        # One stream of draws per layer: operation, sign, and where Cutout cuts.
        draw = tf.raw_ops.StatelessRandomUniform(shape=[4], seed=seed + layer + 1)
        which = tf.minimum(tf.cast(draw[0] * len(OPERATIONS), tf.int32), 15)
        sign = tf.where(draw[1] < 0.5, -1.0, 1.0)
        at = (m / MAX_LEVEL, sign, draw[2:], corrected)
        branches = [functools.partial(f, image, *at) for f in OPERATIONS.values()]
        image = tf.ensure_shape(tf.switch_case(which, branches), shape)
    return image


def auto_contrast(image: Image) -> Image:
    """Stretches every channel to 0..255."""
    x = tf.cast(image, tf.float32)
    low = tf.reduce_min(x, [0, 1])
    high = tf.reduce_max(x, [0, 1])
    scale = 255.0 / tf.maximum(high - low, 1.0)
    stretched = tf.cast(tf.clip_by_value(x * scale - low * scale, 0, 255), tf.uint8)
    return tf.where(high > low, stretched, image)


def equalize(image: Image) -> Image:
    """Flattens the histogram of every channel, as PIL does."""

    def channel(x: Any) -> Any:
        histogram = tf.math.bincount(tf.reshape(x, [-1]), minlength=256)
        last = tf.boolean_mask(histogram, histogram > 0)[-1]
        step = (tf.reduce_sum(histogram) - last) // 255
        table = (tf.cumsum(histogram, exclusive=True) + step // 2) // tf.maximum(
            step, 1
        )
        mapped = tf.gather(tf.clip_by_value(table, 0, 255), x)
        return tf.where(step == 0, x, mapped)

    x = tf.cast(image, tf.int32)
    return tf.cast(tf.stack([channel(x[..., c]) for c in range(3)], -1), tf.uint8)


def invert(image: Image) -> Image:
    """255 - p."""
    return 255 - image


def rotate(image: Image, degrees: Any) -> Image:
    """Around the centre."""
    angle = degrees * (math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    h = tf.cast(tf.shape(image)[0] - 1, tf.float32)
    w = tf.cast(tf.shape(image)[1] - 1, tf.float32)
    x = (w - (cos * w - sin * h)) / 2
    y = (h - (sin * w + cos * h)) / 2
    return _warp(image, [cos, -sin, x, sin, cos, y])


def posterize(image: Image, bits: int) -> Image:
    """Keeps the highest ``bits`` of every value; of none, tensorflow keeps one."""
    shift = tf.constant(min(max(8 - bits, 0), 7), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)


def solarize(image: Image, threshold: int) -> Image:
    """255 - p where p >= threshold."""
    return tf.where(tf.cast(image, tf.int32) < threshold, image, 255 - image)


def solarize_add(image: Image, addition: int, threshold: int = 128) -> Image:
    """p + addition where p < threshold, clipped."""
    added = tf.clip_by_value(tf.cast(image, tf.int32) + addition, 0, 255)
    return tf.where(image < threshold, tf.cast(added, tf.uint8), image)


def color(image: Image, factor: float) -> Image:
    """0: grey, 1: unchanged."""
    return blend(tf.tile(tf.image.rgb_to_grayscale(image), [1, 1, 3]), image, factor)


def contrast(image: Image, factor: float, corrected: bool = False) -> Image:
    """0: evenly grey, 1: unchanged. The "mean" grey really is H * W / 256."""
    if corrected:
        grey = tf.image.rgb_to_grayscale(image)
        mean = tf.round(tf.reduce_mean(tf.cast(grey, tf.float32)))
    else:
        mean = tf.cast(tf.size(image) // 3, tf.float32) / 256.0
    mean = tf.cast(tf.clip_by_value(mean, 0.0, 255.0), tf.uint8)
    return blend(tf.fill(tf.shape(image), mean), image, factor)


def brightness(image: Image, factor: float) -> Image:
    """0: black, 1: unchanged."""
    return blend(tf.zeros_like(image), image, factor)


def sharpness(image: Image, factor: float) -> Image:
    """0: smoothed, 1: unchanged, more: sharpened; the border stays."""
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32) / 13.0
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    smooth = tf.nn.depthwise_conv2d(
        tf.cast(image, tf.float32)[None], kernel, [1, 1, 1, 1], "VALID"
    )[0]
    smooth = tf.cast(tf.clip_by_value(smooth, 0, 255), tf.uint8)
    inside = tf.pad(tf.ones_like(smooth), [[1, 1], [1, 1], [0, 0]])
    smooth = tf.pad(smooth, [[1, 1], [1, 1], [0, 0]])
    return blend(tf.where(inside == 1, smooth, image), image, factor)


def shear_x(image: Image, level: Any) -> Image:
    """Rows are moved in proportion to their height."""
    return _warp(image, [1.0, level, 0.0, 0.0, 1.0, 0.0])


def shear_y(image: Image, level: Any) -> Image:
    """Columns are moved in proportion to their position."""
    return _warp(image, [1.0, 0.0, 0.0, level, 1.0, 0.0])


def translate_x(image: Image, pixels: Any) -> Image:
    """To the left by ``pixels``."""
    return _warp(image, [1.0, 0.0, pixels, 0.0, 1.0, 0.0])


def translate_y(image: Image, pixels: Any) -> Image:
    """Upwards by ``pixels``."""
    return _warp(image, [1.0, 0.0, 0.0, 0.0, 1.0, pixels])


def cutout(image: Image, half: int, centre: Any) -> Image:
    """A grey square of side ``2 * half``; ``centre``: two numbers in [0, 1)."""
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    y = tf.cast(centre[0] * tf.cast(height, tf.float32), tf.int32)
    x = tf.cast(centre[1] * tf.cast(width, tf.float32), tf.int32)
    rows = tf.range(height)[:, None, None] - y
    columns = tf.range(width)[None, :, None] - x
    inside = (rows >= -half) & (rows < half) & (columns >= -half) & (columns < half)
    return tf.where(inside, tf.constant(GREY, tf.uint8), image)


def blend(zero: Image, one: Image, factor: float) -> Image:
    """``zero`` at factor 0, ``one`` at 1, linear in between and beyond, truncated."""
    if factor == 0.0:
        return zero
    if factor == 1.0:
        return one
    a, b = tf.cast(zero, tf.float32), tf.cast(one, tf.float32)
    return tf.cast(tf.clip_by_value(a + factor * (b - a), 0.0, 255.0), tf.uint8)


# ------------------------------------------------ level in [0, 2], and the 16 operations


def factor(level: float, corrected: bool) -> float:
    """Of a blend: 0.1 to 1.9 as the level goes from 0 to 1; corrected: up from 1."""
    return 1.0 + level * 0.9 if corrected else level * 1.8 + 0.1


def posterize_bits(level: float, corrected: bool) -> int:
    """Bits that Posterize keeps."""
    return 8 - int(level * 4) if corrected else int(level * 4)


def solarize_threshold(level: float, corrected: bool) -> int:
    """Compared with a uint8 in the original, hence modulo 256."""
    threshold = int(level * 256)
    return max(256 - threshold, 0) if corrected else threshold % 256


def _plain(function: Callable[[Image], Image]) -> Callable[..., Image]:
    return lambda image, level, sign, draw, corrected: function(image)


def _signed(function: Callable[..., Image], scale: float) -> Callable[..., Image]:
    return lambda image, level, sign, draw, corrected: function(
        image, sign * (level * scale)
    )


def _blended(function: Callable[..., Image]) -> Callable[..., Image]:
    return lambda image, level, sign, draw, corrected: function(
        image, factor(level, corrected)
    )


OPERATIONS: dict[str, Callable[..., Image]] = {
    "AutoContrast": _plain(auto_contrast),
    "Equalize": _plain(equalize),
    "Invert": _plain(invert),
    "Rotate": _signed(rotate, 30.0),
    "Posterize": lambda image, level, sign, draw, corrected: posterize(
        image, posterize_bits(level, corrected)
    ),
    "Solarize": lambda image, level, sign, draw, corrected: solarize(
        image, solarize_threshold(level, corrected)
    ),
    "Color": _blended(color),
    "Contrast": lambda image, level, sign, draw, corrected: contrast(
        image, factor(level, corrected), corrected
    ),
    "Brightness": _blended(brightness),
    "Sharpness": _blended(sharpness),
    "ShearX": _signed(shear_x, 0.3),
    "ShearY": _signed(shear_y, 0.3),
    "TranslateX": _signed(translate_x, _TRANSLATE),
    "TranslateY": _signed(translate_y, _TRANSLATE),
    "Cutout": lambda image, level, sign, draw, corrected: cutout(
        image, int(level * 40), draw
    ),
    "SolarizeAdd": lambda image, level, sign, draw, corrected: solarize_add(
        image, int(level * 110)
    ),
}


def _warp(image: Image, matrix: list[Any]) -> Image:
    """Nearest neighbour; ``matrix`` (2, 3) takes output (x, y) to input (x, y)."""
    entries = [tf.cast(v, tf.float32) for v in (*matrix, 0.0, 0.0)]
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.stack(entries)[None],
        output_shape=tf.shape(image)[:2],
        fill_value=float(GREY),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]
