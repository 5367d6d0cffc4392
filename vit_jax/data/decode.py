# SPDX-License-Identifier: Apache-2.0
"""Encoded image -> uint8 (H, W, 3), whatever the file holds, and resizing.

Grey, palette, alpha, CMYK and 16-bit images become 8-bit RGB (alpha is dropped, the
first frame of an animation is taken, EXIF rotation is applied). What cannot be decoded
raises a tensorflow error. For a JPEG that is damaged in the middle this depends on the
crop, so the pipeline tries it again at every position (``graph.torn``); any other file
fails whatever the crop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from vit_jax.data.tensorflow_cpu import tf

cv2.setNumThreads(1)  # tf.data keeps every core busy already

# More would take over a gigabyte per image and thread; a header may claim anything.
MAX_PIXELS = 2**28

Image = Any  # tf.Tensor: string () or uint8 (H, W, 3)

_FILE = tf.TensorSpec((), tf.string)
_WINDOW = tf.TensorSpec((4,), tf.int32)


def _rarely(*signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """For what few images need. Traced once per process, so that building a pipeline
    does not take seconds; not inlined, because the executor visits every operation of a
    branch that is not taken, and there are hundreds (a tenth of the time per image)."""
    return tf.function(
        autograph=False,
        input_signature=signature,
        experimental_attributes={"_noinline": True},
    )


def shape_of(image: Image) -> Any:
    """int32 (3,): height, width, channels; from the header alone for JPEG."""
    if image.dtype != tf.string:
        return tf.shape(image)

    def of_jpeg() -> Any:
        shape = tf.image.extract_jpeg_shape(image)
        return tf.cond(
            _orientation(image) >= 5,  # these swap the sides
            lambda: tf.gather(shape, [1, 0, 2]),
            lambda: shape,
        )

    return tf.cond(is_jpeg(image), of_jpeg, lambda: tf.shape(_decode_other(image)))


def decode(image: Image) -> Image:
    """The pixels; an image that is decoded already passes through."""
    if image.dtype != tf.string:
        return image
    return _rgb(_decode_file(image))


def decode_crop(image: Image, place: Callable[[Any], Any], *, target: int) -> Image:
    """The part ``place(shape)`` (top, left, height, width; int32) of the image.

    A JPEG is decoded only there. ``target`` > 0 allows a quicker way that is not exact:
    a less precise transform, and where both sides of the window are at least 2, 4 or 8
    times ``target``, decoding at that fraction of the size, in the DCT domain.
    """

    def full() -> Image:
        pixels = decode(image)
        window = place(tf.shape(pixels))
        begin = tf.concat([window[:2], [0]], 0)
        return tf.slice(pixels, begin, tf.concat([window[2:], [3]], 0))

    def fused() -> Image:
        window = place(tf.image.extract_jpeg_shape(image))
        if not target:
            return _decode_window(image, window, precision="INTEGER_ACCURATE")
        return tf.cond(
            tf.reduce_all(window[2:] >= 2 * target),
            lambda: _decode_smaller(image, window, target),
            lambda: _decode_window(image, window),
        )

    if image.dtype != tf.string:
        return _rgb(full())
    return _rgb(tf.cond(_is_plain_jpeg(image), fused, full))


def resize_to(
    image: Image,
    size: Any,
    *,
    method: str = "bilinear",
    antialias: bool = False,
) -> Image:
    """uint8 (H, W, 3) -> uint8 (size, size, 3); ``size`` may be (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    if method == "bilinear" and not antialias:
        resized = tf.raw_ops.ResizeBilinear(
            images=tf.cast(image[None], tf.float32),  # a fifth faster than from uint8
            size=[height, width],
            half_pixel_centers=True,
        )[0]
        result = tf.cast(resized + 0.5, tf.uint8)
    else:
        resized = tf.image.resize(image, [height, width], method, antialias=antialias)
        resized = tf.cast(resized, tf.float32)  # it is uint8 after "nearest"
        result = tf.cast(tf.clip_by_value(resized + 0.5, 0, 255), tf.uint8)
    if isinstance(size, int):
        return tf.ensure_shape(result, (size, size, 3))
    return _rgb(result)


def resize_many(images: Sequence[Image], mirror: Any, size: int) -> Image:
    """Images of any size (k times uint8 (H, W, 3)) -> uint8 (k, size, size, 3),
    mirrored left to right where ``mirror``, bool (k,), says so.

    Bilinear as in ``resize_to``, but in whole numbers (the difference is at most 1) and
    in half the time. It is Python, once for k images; OpenCV runs without Python's
    lock.
    """

    def run(mirror: np.ndarray, *images: np.ndarray) -> np.ndarray:
        count = len(images) * size * size * 3
        made = np.empty(count + _ALIGNMENT, np.uint8)
        start = -made.ctypes.data % _ALIGNMENT
        made = made[start : start + count].reshape(-1, size, size, 3)
        for out, image, mirrored in zip(made, images, mirror, strict=True):
            cv2.resize(image, (size, size), dst=out)
            if mirrored:
                cv2.flip(out, 1, dst=out)
        return made

    made = tf.numpy_function(run, [mirror, *images], tf.uint8, stateful=False)
    return tf.ensure_shape(made, (len(images), size, size, 3))


_ALIGNMENT = 64  # tensorflow copies arrays that begin elsewhere


def is_jpeg(image: Image) -> Any:
    """Whether the file starts as a JPEG does."""
    return tf.strings.substr(image, 0, 2) == b"\xff\xd8"


@_rarely(_FILE)
def _decode_file(image: Image) -> Image:
    return tf.cond(
        is_jpeg(image), lambda: _decode_jpeg(image), lambda: _decode_other(image)
    )


def _decode_jpeg(image: Image) -> Image:
    with tf.control_dependencies([_not_huge(tf.image.extract_jpeg_shape(image))]):
        pixels = tf.io.decode_jpeg(image, channels=3, dct_method="INTEGER_ACCURATE")
    return tf.cond(
        _has_exif(image),
        lambda: _orient(pixels, _orientation(image)),
        lambda: pixels,
    )


def _decode_window(
    image: Image, window: Any, ratio: int = 1, precision: str = "INTEGER_FAST"
) -> Image:
    return tf.raw_ops.DecodeAndCropJpeg(
        contents=image,
        crop_window=window,
        channels=3,
        ratio=ratio,
        dct_method=precision,
    )


@_rarely(_FILE, _WINDOW, tf.TensorSpec((), tf.int32))
def _decode_smaller(image: Image, window: Any, target: Any) -> Image:
    """At a half, a quarter or an eighth: the smallest that is not below ``target``."""
    times = tf.reduce_min(window[2:]) // target
    power = tf.cast(times >= 4, tf.int32) + tf.cast(times >= 8, tf.int32)

    def at(ratio: int) -> Callable[[], Image]:
        return lambda: _decode_window(
            image, tf.maximum(window // ratio, [0, 0, 1, 1]), ratio
        )

    return tf.switch_case(power, [at(2), at(4), at(8)])


@_rarely(_FILE)
def _decode_other(image: Image) -> Image:
    is_png = tf.strings.substr(image, 1, 3) == b"PNG"

    def png_sides() -> Any:
        # Bytes 16 to 23 hold the width and the height, most significant byte first.
        header = tf.io.decode_raw(tf.strings.substr(image, 16, 8), tf.uint8)
        parts = tf.reshape(tf.cast(header, tf.int64), (2, 4))
        return tf.reduce_sum(parts * [[2**24, 2**16, 2**8, 1]], axis=1)

    sides = tf.cond(is_png, png_sides, lambda: tf.zeros([2], tf.int64))
    with tf.control_dependencies([_not_huge(sides)]):
        decoded = tf.io.decode_image(image, channels=3, expand_animations=False)
    return _rgb(decoded)


def _not_huge(shape: Any) -> Any:
    pixels = tf.reduce_prod(tf.cast(shape[:2], tf.int64))
    return tf.debugging.Assert(
        pixels <= MAX_PIXELS, [f"more than {MAX_PIXELS} pixels:", shape]
    )


def _is_plain_jpeg(image: Image) -> Any:
    """Whether a JPEG needs nothing but decoding: complete, and never rotated.

    One cut short still decodes above the cut: it must fail as a whole, not only in
    those crops that reach down to it.
    """
    at, size = [0, -2, *_EXIF_AT], [2, 2, *(len(_EXIF) for _ in _EXIF_AT)]
    parts = tf.strings.substr(tf.reshape(image, [1]), at, size)
    found = tf.equal(parts, [b"\xff\xd8", b"\xff\xd9", *(_EXIF for _ in _EXIF_AT)])
    return tf.reduce_all(tf.equal(found, [True, True, *(False for _ in _EXIF_AT)]))


_EXIF = b"Exif\x00\x00"
_EXIF_AT = (6, 24)  # it comes first (APP1) or right behind the JFIF header (APP0)
_HEADER = 4096  # bytes searched for the orientation; cameras write it near the start


def _has_exif(image: Image) -> Any:
    found = [tf.strings.substr(image, at, len(_EXIF)) == _EXIF for at in _EXIF_AT]
    return tf.reduce_any(tf.stack(found))


@_rarely(_FILE)
def _orientation(image: Image) -> Any:
    """EXIF orientation, int32 in [1, 8]; 1 where there is none.

    The entry is tag 0x0112, type 3 (short), count 1, value, in either byte order.
    """

    def search() -> Any:
        # Not all files are that long: the padding keeps substr in range.
        head = tf.strings.substr(image, 0, _HEADER)
        head = tf.cast(tf.io.decode_raw(head, tf.uint8), tf.int32)
        length = tf.size(head) - 9

        def find(pattern: list[int], at: int) -> Any:
            hit = tf.reduce_all(
                tf.stack([head[i : i + length] == b for i, b in enumerate(pattern)]), 0
            )
            value = tf.boolean_mask(head[at : at + length], hit)
            return tf.concat([value, [1]], 0)[0]

        big = find([0x01, 0x12, 0, 3, 0, 0, 0, 1, 0], 9)
        little = find([0x12, 0x01, 3, 0, 1, 0, 0, 0], 8)
        value = tf.maximum(big, little)
        return tf.where(value > 8, 1, value)

    return tf.cond(_has_exif(image), search, lambda: tf.constant(1))


def _orient(pixels: Image, orientation: Any) -> Image:
    """Undoes the rotation or mirroring that EXIF orientation 1 to 8 records."""
    # 5 to 8 are 1 to 4 of the transposed image; 2 mirrors, 4 turns upside down, 3 both.
    axes = tf.where(orientation >= 5, [1, 0, 2], [0, 1, 2])
    turn = (orientation - 1) % 4
    dims = tf.stack([turn >= 2, (turn == 1) | (turn == 2), tf.constant(False)])
    return tf.raw_ops.Reverse(tensor=tf.transpose(pixels, axes), dims=dims)


def _rgb(image: Image) -> Image:
    return tf.ensure_shape(image, (None, None, 3))
