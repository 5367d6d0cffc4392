# SPDX-License-Identifier: Apache-2.0
"""The tensorflow side of the pipeline: decode, transform and batch, in parallel."""

import atexit
import contextlib
import os
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from vit_jax.config import DataConfig
from vit_jax.data import transforms
from vit_jax.data.decode import decode, decode_crop, shape_of
from vit_jax.data.examples import IGNORED, Dataset, Labels, Split
from vit_jax.data.tensorflow_cpu import tf

# tensorflow fails to report an error whose text quotes bytes of an image.
ERRORS = (tf.errors.OpError, UnicodeDecodeError)

Fed = dict[str, np.ndarray]
# Tensors of k examples, bytes and seeds in, images (and labels) out.
Group = Callable[[dict[str, Any]], dict[str, Any]]

# Decoding keeps a core busy. tf.data's own tuning takes minutes to find that out.
THREADS = os.cpu_count() or 1
_PREFETCH = 2  # finished batches that wait for the device
_GROUP = 16  # examples made in one go: what is done once per group costs little then


def group_function(
    cfg: DataConfig, split: Split, dataset: Dataset, *, training: bool
) -> Group:
    """What is done to some examples, by one thread and in one go."""
    if training:
        chosen = cfg.train_transforms or dataset.train_transforms
        chosen = chosen or transforms.DEFAULT_TRAIN
    else:
        chosen = cfg.eval_transforms or transforms.DEFAULT_EVAL
    pipeline = transforms.compose(
        chosen,
        size=cfg.image_size,
        # What is measured must not depend on a shortcut of training.
        exact=not training or cfg.decode == "exact",
        knob="data.train_transforms" if training else "data.eval_transforms",
    )

    def one(fed: dict[str, Any]) -> dict[str, Any]:
        image, labels = _open(fed, split, dataset)
        made = pipeline.alone(image, fed["seed"])
        if split.kind == "record":
            made["label"] = _target(labels, dataset)
        return made

    def one_or_empty(fed: dict[str, Any]) -> dict[str, Any]:
        return tf.cond(
            fed["use"],
            lambda: one(fed),
            lambda: {k: tf.zeros(s.shape, s.dtype) for k, s in specs.items()},
        )

    traced = tf.function(one, input_signature=[_SPECS], autograph=False)
    specs = traced.get_concrete_function().structured_outputs

    def group(fed: dict[str, Any]) -> dict[str, Any]:
        count = fed["seed"].shape[0]

        def row(i: Any) -> dict[str, Any]:
            fed_row = {k: v[i] for k, v in fed.items()}
            return one(fed_row) if training else one_or_empty(fed_row)

        made = _for_each(row, specs, count)
        labels = {"label": tf.stack(made.pop("label"))} if "label" in made else {}
        return {"image": pipeline.together(made, fed["seed"])} | labels

    return tf.function(group, autograph=False)  # traced once per size of a group


def batches(
    steps: range, feed: Callable[[int], Fed], batch: int, group: Group
) -> Iterator[dict[str, np.ndarray]]:
    """One batch per step, made ahead of time in the background, in order."""
    size = max(k for k in range(1, _GROUP + 1) if batch % k == 0)

    def in_order(step: np.ndarray) -> list[np.ndarray]:
        fed = feed(int(step))
        return [fed[k].reshape(-1, size, *fed[k].shape[1:]) for k in _SPECS]

    def fetch(step: Any) -> dict[str, Any]:
        types = [spec.dtype for spec in _SPECS.values()]
        values = tf.numpy_function(in_order, [step], types)
        return {
            k: tf.ensure_shape(v, (batch // size, size, *spec.shape))
            for (k, spec), v in zip(_SPECS.items(), values, strict=True)
        }

    dataset = tf.data.Dataset.range(steps.start, steps.stop).map(_plain(fetch))
    dataset = dataset.prefetch(1).unbatch()
    dataset = dataset.map(_plain(group), num_parallel_calls=THREADS)
    dataset = dataset.batch(batch // size, drop_remainder=True).prefetch(_PREFETCH)
    made = dataset.with_options(_options()).as_numpy_iterator()
    whole = ({k: v.reshape(batch, *v.shape[2:]) for k, v in m.items()} for m in made)
    _running.add(whole)
    return whole


_running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    """Ends what still runs: a thread of tensorflow that calls Python while that is
    being taken down aborts the process."""
    for iterator in list(_running):
        with contextlib.suppress(ValueError):  # in use by a thread, which has to end it
            iterator.close()


def readable(fed: Fed, group: Group) -> dict[int, dict[str, np.ndarray]]:
    """What can be made of one step: row -> image (and label)."""
    dataset = tf.data.Dataset.from_tensor_slices(
        {k: _tensor(k, v) for k, v in fed.items()}
    )
    dataset = dataset.batch(1, drop_remainder=True).enumerate()
    numbered = _plain(lambda i, one: (i, group(one)))
    dataset = dataset.map(numbered, num_parallel_calls=THREADS)
    dataset = dataset.ignore_errors().with_options(_options())
    return {
        int(i): {k: v[0] for k, v in made.items()}
        for i, made in dataset.as_numpy_iterator()
    }


def stack(made: dict[int, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows 0, 1, ... as one batch."""
    rows = [made[i] for i in range(len(made))]
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


def reason(fed: Fed, row: int, group: Group) -> str:
    """Why one row cannot be made: the first line of what tensorflow says."""
    one = {k: _tensor(k, v[row : row + 1]) for k, v in fed.items()}
    try:
        group(one)
    except ERRORS as e:
        return _first_line(e)
    return "failed once and then did not"


def torn(fed: Fed, row: int, split: Split, dataset: Dataset) -> bool:
    """Whether only a part of an image cannot be decoded, so that it depends on the crop
    whether the example can be made: the pixel at the top left can, the whole cannot."""
    one = {k: _tensor(k, v[row]) for k, v in fed.items()}
    try:
        image, _ = _open(one, split, dataset)
        decode_crop(image, lambda _: tf.constant([0, 0, 1, 1]), target=0)
    except ERRORS:
        return False
    try:
        decode(image)
    except ERRORS:
        return True
    return False


def decoded_bytes(split: Split, dataset: Dataset, samples: int = 32) -> float:
    """Estimate of the memory all images take when decoded."""
    chosen = np.unique(np.linspace(0, len(split) - 1, samples).astype(np.int64))
    sizes = []
    for data in split.fetch(split.index(chosen)):
        try:
            image, _ = _open({"data": tf.constant(data)}, split, dataset)
            sizes.append(int(np.prod(shape_of(image).numpy()[:2])) * 3)
        except ERRORS:
            continue
    return float(np.mean(sizes)) * len(split) if sizes else np.inf


def decode_all(split: Split, dataset: Dataset) -> tuple[Split, dict[int, str]]:
    """The same examples decoded, and what could not be: position -> reason."""

    def make(i: Any, data: Any) -> dict[str, Any]:
        image, labels = _open({"data": data}, split, dataset)
        image = decode(image)
        made = {"i": i, "shape": tf.shape(image), "pixels": tf.reshape(image, [-1])}
        return made | ({} if labels is None else {"labels": labels})

    size = len(split)
    shapes = np.zeros((size, 3), np.int32)
    chunks, found, counts = [], [], []
    values: list[np.ndarray] = []
    for start in range(0, size, _CHUNK):
        index = np.arange(start, min(start + _CHUNK, size))
        data = split.fetch(split.index(index))
        images = tf.data.Dataset.from_tensor_slices((index, _tensor("data", data)))
        images = images.map(_plain(make), num_parallel_calls=THREADS)
        images = images.ignore_errors().ragged_batch(_CHUNK)
        batches: Any = images.with_options(_options())
        for made in batches:
            i = made["i"].numpy()
            found.append(i)
            shapes[i] = made["shape"].numpy().reshape(-1, 3)
            chunks.append(made["pixels"].flat_values.numpy())
            if "labels" in made:
                values.append(made["labels"].flat_values.numpy())
                counts.append(made["labels"].row_lengths().numpy())
    done = np.concatenate([np.zeros(0, np.int64), *found])
    starts = np.zeros(size, np.int64)
    lengths = shapes.astype(np.int64).prod(axis=1)
    starts[done] = np.cumsum(lengths[done]) - lengths[done]
    pixels = np.concatenate([np.zeros(0, np.uint8), *chunks])

    def fetch(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty(len(index), object)
        for row, (a, n) in enumerate(zip(starts[index], lengths[index], strict=True)):
            images[row] = pixels[a : a + n].tobytes()
        return images, shapes[index]

    bad = {}
    for i in np.setdiff1d(np.arange(size), done).tolist():
        try:
            tf.function(make, autograph=False)(
                i, tf.constant(split.fetch(split.index(np.array([i])))[0])
            )
        except ERRORS as e:
            bad[i] = _first_line(e)
    labels = split.labels
    if split.kind == "record":
        per_example: list[Any] = [()] * size
        edges = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))
        flat = np.concatenate([np.zeros(0, np.int64), *values])
        for i, a, b in zip(done, edges[:-1], edges[1:], strict=True):
            per_example[i] = flat[a:b]
        labels = Labels.several(per_example)
    elif labels is not None:
        labels = Labels.several(labels.of(split.index(np.arange(size))))

    def name(i: int) -> str:
        return split.name(int(split.index(np.array([i]))[0]))

    return Split(size, "pixels", fetch, name, labels), bad


_CHUNK = 1024  # examples decoded between two returns to Python

_SPECS = {
    "seed": tf.TensorSpec((2,), tf.int64),
    "use": tf.TensorSpec((), tf.bool),
    "data": tf.TensorSpec((), tf.string),
    "shape": tf.TensorSpec((3,), tf.int32),
}


def _open(fed: dict[str, Any], split: Split, dataset: Dataset) -> tuple[Any, Any]:
    """(image: string or uint8 (H, W, 3), labels) of one example; only a record has
    labels here, int64 (n,), and they are refused where they are out of range."""
    data = fed["data"]
    if split.kind == "path":
        return _long_enough(tf.io.read_file(data)), None
    if split.kind == "encoded":
        return _long_enough(data), None
    if split.kind == "record":
        assert split.parse is not None
        image, labels = split.parse(data)
        return _long_enough(image), _checked(labels, dataset)
    pixels = tf.reshape(tf.io.decode_raw(data, tf.uint8), fed["shape"])
    return tf.ensure_shape(pixels, (None, None, 3)), None


def _long_enough(image: Any) -> Any:
    """Refuses what is too short for the headers that decode.py looks at."""
    size = tf.strings.length(image)
    # The raw operation: tf.debugging.Assert puts a branch around it.
    problem = ["no image, size in bytes:", size]
    check = tf.raw_ops.Assert(condition=size >= 32, data=problem)
    with tf.control_dependencies([check] if check else []):
        return tf.identity(image)


def _checked(labels: Any, dataset: Dataset) -> Any:
    count = dataset.num_classes
    in_range = tf.reduce_all((labels >= IGNORED) & (labels < count))
    problem = f"a label is out of range: it must be in [0, {count - 1}], not"
    checks = [tf.debugging.Assert(in_range, [problem, labels])]
    if not dataset.multilabel:
        problem = "several labels in a single-label data set:"
        checks.append(tf.debugging.Assert(tf.size(labels) <= 1, [problem, labels]))
    with tf.control_dependencies(checks):
        return tf.identity(labels)


def _target(labels: Any, dataset: Dataset) -> Any:
    """Labels of a record as the batch has them: int32 () or float32 (K,)."""
    count, labels = dataset.num_classes, tf.cast(labels, tf.int32)
    if not dataset.multilabel:
        return tf.concat([labels, [IGNORED]], 0)[0]
    hot = tf.reduce_max(tf.one_hot(labels, count, dtype=tf.float32), axis=0)
    hot = tf.maximum(hot, 0.0)  # no label at all: the maximum over nothing is -inf
    return tf.where(tf.reduce_any(labels == IGNORED), tf.fill([count], -1.0), hot)


def _tensor(key: str, values: np.ndarray) -> Any:
    return tf.constant(values, _SPECS[key].dtype)


_TRACE = ("Graph execution error", "Detected at node", "File ", "<stack", "node ", "[[")


def _first_line(error: Exception) -> str:
    """What an error says, without what tensorflow wraps around it."""
    text = str(getattr(error, "message", error))
    if isinstance(error, UnicodeDecodeError):
        text = error.object.decode(errors="replace")
    if "assertion failed: [" in text:  # our own words, then values
        text = text.split("assertion failed: [", 1)[1].split("]\n")[0]
        text = text.replace("] [", " ")
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_TRACE)]
    text = (lines or [type(error).__name__])[0]
    text = text.split("}} ", 1)[-1]  # "{{function_node ...}} what happened"
    return text.split(" [Op:")[0][:200]


# Our functions say tf.cond themselves: rewriting their Python would only cost time and
# bury a UserError raised in them under a trace of generated code.
_plain = tf.autograph.experimental.do_not_convert


def _for_each(
    function: Callable[[Any], dict[str, Any]], specs: dict[str, Any], count: int
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


def _options() -> Any:
    options = tf.data.Options()
    options.deterministic = True
    return options
