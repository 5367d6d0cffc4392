# SPDX-License-Identifier: Apache-2.0
"""The tensorflow side: functions that make pixels of images, traced once per process.

They are called from the threads of ``POOL``; tensorflow works without Python's lock.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import transforms
from vit_jax.data.decode import decode, decode_crop, shape_of
from vit_jax.data.examples import Dataset, Image, Kind
from vit_jax.data.tensorflow_cpu import tf

# tensorflow fails to report an error whose text quotes bytes of an image.
ERRORS = (tf.errors.OpError, UnicodeDecodeError)

THREADS = os.cpu_count() or 1
POOL = ThreadPoolExecutor(THREADS, "vit_jax decode")

_FILE = {"data": tf.TensorSpec((), tf.string)}
_PIXELS = _FILE | {"shape": tf.TensorSpec((3,), tf.int32)}


class Maker:
    """``group(images, seeds)``: n images, as the split has them, -> (n, H, W, 3).

    One that cannot be decoded fails the group. Then ``alone`` on each finds out which,
    and ``together`` makes the rest of what it returned.
    """

    def __init__(self, steps: transforms.Pipeline, kind: Kind, count: int):
        self._kind: Kind = kind
        one = (_PIXELS if kind == "pixels" else _FILE) | {
            "seed": tf.TensorSpec((2,), tf.int64)
        }

        def alone(fed: Mapping[str, Any]) -> dict[str, Any]:
            return steps.alone(_opened(fed, kind), fed["seed"])

        self._alone = _traced(alone, one)
        made: dict[str, Any] = self._alone.structured_outputs

        def group(fed: Mapping[str, Any]) -> Any:
            parts = _for_each(
                lambda i: self._alone({k: v[i] for k, v in fed.items()}), made, count
            )
            return steps.together(parts, fed["seed"])

        several = {k: tf.TensorSpec((count, *s.shape), s.dtype) for k, s in one.items()}
        self._group = _traced(group, several)
        self.shape = tuple(self._group.structured_outputs.shape[1:])
        self.dtype = self._group.structured_outputs.dtype.as_numpy_dtype
        lists = {k: [tf.TensorSpec(s.shape, s.dtype)] * count for k, s in made.items()}
        # Traced at the first bad example: most sets have none.
        self._together = functools.cache(
            lambda: _traced(steps.together, lists, several["seed"])
        )

    def group(self, images: Sequence[Image], seeds: np.ndarray) -> np.ndarray:
        fed = _fed(images, self._kind) | {"seed": tf.constant(seeds)}
        return np.asarray(self._group(fed))

    def alone(self, image: Image, seed: np.ndarray) -> dict[str, Any]:
        fed = {k: v[0] for k, v in _fed([image], self._kind).items()}
        return self._alone(fed | {"seed": tf.constant(seed)})

    def together(
        self, made: Sequence[Mapping[str, Any]], seeds: np.ndarray
    ) -> np.ndarray:
        """``made``: what ``alone`` returned for n images."""
        lists = {k: [one[k] for one in made] for k in made[0]}
        return np.asarray(self._together()(lists, tf.constant(seeds)))


def maker(
    cfg: DataConfig, dataset: Dataset, kind: Kind, count: int, *, training: bool
) -> Maker:
    """What makes ``count`` images at a time; remembered."""
    if training:
        ops = cfg.train_transforms or dataset.train_transforms
        ops = ops or transforms.DEFAULT_TRAIN
    else:
        ops = cfg.eval_transforms or transforms.DEFAULT_EVAL
    # What is measured must not depend on a shortcut of training.
    exact = not training or cfg.decode == "exact"
    knob = f"config.data.{'train' if training else 'eval'}_transforms"
    return _maker(json.dumps(ops), cfg.image_size, exact, knob, kind, count)


@functools.lru_cache(maxsize=32)
def _maker(
    ops: str, size: int, exact: bool, knob: str, kind: Kind, count: int
) -> Maker:
    steps = transforms.compose(json.loads(ops), size=size, exact=exact, knob=knob)
    return Maker(steps, kind, count)


def pixels(image: Image, kind: Kind) -> np.ndarray:
    """uint8 (H, W, 3): the whole image."""
    return np.asarray(_whole(kind)(**_fed_one(image, kind)))


def size_of(image: Image, kind: Kind) -> int:
    """Bytes of the decoded image; of a JPEG, from the header alone."""
    return int(_size(kind)(**_fed_one(image, kind)))


def is_torn(image: Image, kind: Kind) -> bool:
    """Whether only a part of an image cannot be decoded, so that it depends on the crop
    whether the example can be made: the pixel at the top left can, the whole cannot."""
    if kind == "pixels":
        return False
    try:
        _corner(kind)(**_fed_one(image, kind))
    except ERRORS:
        return False
    try:
        pixels(image, kind)
    except ERRORS:
        return True
    return False


def _of_one(function: Callable[[Any], Any]) -> Callable[[Kind], Any]:
    """A function of one opened image, traced once per kind when it is first needed."""

    @functools.cache
    def of(kind: Kind) -> Any:
        return tf.function(
            lambda **fed: function(_opened(fed, kind)),
            autograph=False,
            reduce_retracing=True,
        )

    return of


_whole = _of_one(decode)
_size = _of_one(
    lambda image: tf.reduce_prod(tf.cast(shape_of(image)[:2], tf.int64)) * 3
)
_corner = _of_one(
    lambda image: decode_crop(image, lambda _: tf.constant([0, 0, 1, 1]), target=0)
)


def reason(error: Exception) -> str:
    """What an error says, without what tensorflow wraps around it."""
    text = str(getattr(error, "message", error))
    if isinstance(error, UnicodeDecodeError):
        text = error.object.decode(errors="replace")
    if "assertion failed: [" in text:  # our own words, then values
        text = text.split("assertion failed: [", 1)[1].split("]\n")[0]
        text = text.split("] Op:")[0].replace("] [", " ")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_TRACE)]
    text = (lines or [type(error).__name__])[0]
    text = re.sub(r"\{\{.*?\}\} ", "", text)  # "{{function_node ...}} what happened"
    return text.removeprefix("ImageFileError: ").split(" [Op:")[0][:200]


_TRACE = ("Graph execution error", "Detected at node", "File ", "<stack", "node ", "[[")


def _fed(images: Sequence[Image], kind: Kind) -> dict[str, Any]:
    if kind != "pixels":
        return {"data": tf.constant(list(images), tf.string)}
    data = tf.constant([image.tobytes() for image in images], tf.string)
    return {"data": data, "shape": tf.constant([i.shape for i in images], tf.int32)}


def _fed_one(image: Image, kind: Kind) -> dict[str, Any]:
    return {k: v[0] for k, v in _fed([image], kind).items()}


def _opened(fed: Mapping[str, Any], kind: Kind) -> Any:
    """The file, string (), or its pixels, uint8 (H, W, 3), of one example."""
    if kind == "pixels":
        image = tf.reshape(tf.io.decode_raw(fed["data"], tf.uint8), fed["shape"])
        return tf.ensure_shape(image, (None, None, 3))
    image = tf.io.read_file(fed["data"]) if kind == "path" else fed["data"]
    size = tf.strings.length(image)
    # What is too short for the headers that decode.py looks at. The raw operation:
    # tf.debugging.Assert puts a branch around it.
    problem = ["not an image, size in bytes:", size]
    check = tf.raw_ops.Assert(condition=size >= 32, data=problem)
    with tf.control_dependencies([check] if check else []):
        return tf.identity(image)


def _traced(function: Callable[..., Any], *signature: Any) -> Any:
    # Not autograph: our functions say tf.cond themselves, and it would bury a UserError
    # raised in them under a trace of generated code.
    traced = tf.function(function, input_signature=signature, autograph=False)
    return traced.get_concrete_function()


def _for_each(
    function: Callable[[Any], dict[str, Any]], specs: Mapping[str, Any], count: int
) -> dict[str, list[Any]]:
    """``function(i)`` for i < count, whose results may differ in shape. A loop in the
    graph: that many copies of the function would take seconds to build."""
    names = list(specs)
    arrays = [
        tf.TensorArray(s.dtype, count, infer_shape=False, element_shape=s.shape)
        for s in specs.values()
    ]

    def body(i: Any, *arrays: Any) -> Any:
        made = function(i)
        return i + 1, *(a.write(i, made[k]) for k, a in zip(names, arrays, strict=True))

    _, *arrays = tf.while_loop(
        lambda i, *_: i < count, body, (0, *arrays), parallel_iterations=1
    )
    return {
        k: [a.read(i) for i in range(count)] for k, a in zip(names, arrays, strict=True)
    }
