# SPDX-License-Identifier: Apache-2.0
"""Encoded image -> uint8 (H, W, 3), whatever the file holds, and resizing.

Grey, palette, alpha, CMYK and 16-bit images become 8-bit RGB (alpha is dropped, the
first frame of an animation is taken, EXIF rotation is applied). Tensorflow decodes JPEG
and PNG, Pillow the rest (see image_files.py). What cannot be decoded raises a
tensorflow error. For a JPEG that is damaged in the middle this depends on the crop, so
the pipeline tries it again at every position (``graph.torn``); any other file fails
whatever the crop.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from vit_jax.data import image_files
from vit_jax.data.tensorflow_cpu import tf

cv2.setNumThreads(1)  # tf.data keeps every core busy already

Image = Any  # tf.Tensor: string () or uint8 (H, W, 3)

_FILE = tf.TensorSpec((), tf.string)
_WINDOW = tf.TensorSpec((4,), tf.int32)
_HEADER = tf.TensorSpec((4,), tf.int32)  # see ``image_files.header``


def _rarely(*signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """For rare cases. Traced once per process, so that building a pipeline does not take
    seconds; not inlined, because the executor visits every operation of a branch that
    is not taken, and there are hundreds (a tenth of the time per image)."""
    return tf.function(
        autograph=False,
        input_signature=signature,
        experimental_attributes={"_noinline": True},
    )


def shape_of(image: Image) -> Any:
    """int32 (3,): height, width, channels; of a file from its header alone."""
    if image.dtype != tf.string:
        return tf.shape(image)
    return _upright_shape(_header(image))


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

    def fused(header: Any) -> Image:
        window = place(_upright_shape(header))
        is_turned = header[2] > 1
        window = tf.cond(
            is_turned, lambda: _stored_window(window, header), lambda: window
        )
        if not target:
            part = _decode_window(image, window, precision="INTEGER_ACCURATE")
        else:
            part = tf.cond(
                tf.reduce_all(window[2:] >= 2 * target),
                lambda: _decode_smaller(image, window, target),
                lambda: _decode_window(image, window),
            )
        return tf.cond(is_turned, lambda: _upright(part, header[2]), lambda: part)

    if image.dtype != tf.string:
        return _rgb(full())
    whole = _is_whole_jpeg(image)
    if target:
        return _rgb(tf.cond(whole, lambda: fused(_header(image)), full))
    header = _header(image)
    return _rgb(tf.cond(whole & (header[3] == 0), lambda: fused(header), full))


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
            images=image[None],
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
        made = _aligned((len(images), size, size, 3))
        for out, image, mirrored in zip(made, images, mirror, strict=True):
            cv2.resize(image, (size, size), dst=out)
            if mirrored:
                cv2.flip(out, 1, dst=out)
        return made

    made = tf.numpy_function(run, [mirror, *images], tf.uint8, stateful=False)
    return tf.ensure_shape(made, (len(images), size, size, 3))


def _aligned(shape: Sequence[int]) -> np.ndarray:
    """uint8; tensorflow copies arrays that do not begin at a multiple of 64 bytes."""
    count = math.prod(shape)
    made = np.empty(count + 64, np.uint8)
    start = -made.ctypes.data % 64
    return made[start : start + count].reshape(shape)


def _header(image: Image) -> Any:
    """int32 (4,), see ``_HEADER``. Python looks at those files only that may be rotated
    or too large."""

    def of_plain() -> Any:
        return tf.concat([tf.image.extract_jpeg_shape(image)[:2], [1, 0]], 0)

    found = tf.cond(_is_plain_jpeg(image), of_plain, lambda: tf.zeros([4], tf.int32))
    pixels = tf.reduce_prod(tf.cast(found[:2], tf.int64))
    return tf.cond(
        (pixels > 0) & (pixels <= image_files.SMALL),
        lambda: found,
        lambda: _any_header(image),
    )


@_rarely(_FILE)
def _any_header(image: Image) -> Any:
    return _in_python(
        lambda data: np.array(image_files.header(data), np.int32), image, (4,)
    )


@_rarely(_FILE)
def _decode_file(image: Image) -> Image:
    header = _header(image)

    def jpeg(ratio: int) -> Callable[[], Image]:
        return lambda: tf.io.decode_jpeg(
            image, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
        )

    def by_tensorflow() -> Image:
        pixels = tf.cond(
            is_jpeg(image),
            lambda: tf.switch_case(header[3], [jpeg(1), jpeg(2), jpeg(4), jpeg(8)]),
            lambda: tf.io.decode_png(image, channels=3),
        )
        return tf.cond(
            header[2] > 1, lambda: _upright(pixels, header[2]), lambda: pixels
        )

    with tf.control_dependencies([header]):  # which refuses what is too large
        return tf.cond(
            is_jpeg(image) | _is_png(image),
            by_tensorflow,
            lambda: _in_python(image_files.read, image, (None, None, 3)),
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


def _in_python(function: Callable[[bytes], Any], image: Image, shape: tuple) -> Any:
    """``function(bytes of the file)``; what it raises is an error of tensorflow."""
    dtype = tf.int32 if len(shape) == 1 else tf.uint8
    made = tf.numpy_function(function, [image], dtype, stateful=False)
    return tf.ensure_shape(made, shape)


def is_jpeg(image: Image) -> Any:
    """Whether the file starts as a JPEG does."""
    return tf.strings.substr(image, 0, 2) == b"\xff\xd8"


def _is_png(image: Image) -> Any:
    return tf.strings.substr(image, 0, 8) == b"\x89PNG\r\n\x1a\n"


def _is_whole_jpeg(image: Image) -> Any:
    """Whether a JPEG has its end. One cut short still decodes above the cut: it must
    fail as a whole, not only in those crops that reach down to it."""
    parts = tf.strings.substr(tf.reshape(image, [1]), [0, -2], [2, 2])
    return tf.reduce_all(tf.equal(parts, [b"\xff\xd8", b"\xff\xd9"]))


def _is_plain_jpeg(image: Image) -> Any:
    """Whether tables for decoding (DQT) come first, or right behind the JFIF header, and
    no EXIF soon after: so most files of data sets begin."""
    parts = tf.strings.substr(tf.reshape(image, [1]), [0, 2, 20], [2, 2, 2])
    soi, first, second = tf.unstack(parts, 3)
    dqt, jfif = b"\xff\xdb", b"\xff\xe0"
    starts = (soi == b"\xff\xd8") & ((first == dqt) | (first == jfif) & (second == dqt))
    head = tf.strings.substr(image, 0, 1024)
    return starts & ~tf.strings.regex_full_match(head, rb"\C*Exif\x00\x00\C*")


def _upright_shape(header: Any) -> Any:
    sides = tf.where(header[2] >= 5, header[1::-1], header[:2])
    return tf.concat([sides, [3]], 0)


@_rarely(_WINDOW, _HEADER)
def _stored_window(window: Any, header: Any) -> Any:
    """Where the window of an upright image lies in the pixels as they are stored."""
    transposed, rows, columns = _turns(header[2])
    begin, extent = window[:2], window[2:]
    ends = _upright_shape(header)[:2] - begin - extent
    begin = tf.where(tf.stack([rows, columns]), ends, begin)
    swapped = tf.concat([begin[::-1], extent[::-1]], 0)
    return tf.where(transposed, swapped, tf.concat([begin, extent], 0))


@_rarely(tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec((), tf.int32))
def _upright(pixels: Image, orientation: Any) -> Image:
    """Undoes the rotation or mirroring that EXIF orientation 1 to 8 records."""

    def run(pixels: np.ndarray, orientation: np.ndarray) -> np.ndarray:
        transposed, rows, columns = image_files.turns(int(orientation))
        height, width = pixels.shape[:2]
        made = _aligned((width, height, 3) if transposed else pixels.shape)
        if transposed:
            pixels = cv2.transpose(pixels, dst=made)
        if rows or columns:
            cv2.flip(pixels, -1 if rows and columns else int(columns), dst=made)
        return made

    made = tf.numpy_function(run, [pixels, orientation], tf.uint8, stateful=False)
    return _rgb(made)


def _turns(orientation: Any) -> list[Any]:
    """bool () each: transpose first, then reverse the rows, reverse the columns."""
    table = tf.constant([image_files.turns(i) for i in range(1, 9)])
    return tf.unstack(table[orientation - 1], 3)


def _rgb(image: Image) -> Image:
    return tf.ensure_shape(image, (None, None, 3))
