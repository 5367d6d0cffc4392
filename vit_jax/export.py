# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint as a program that runs without this project.

    python -m vit_jax.export SOURCE DEST [--inputs=pixels] [--outputs=probabilities]

DEST says which kind: ``x.stablehlo`` (read by ``jax.export.deserialize``, on CPU, CUDA
and TPU), ``x.onnx``, ``x.tflite``, or a folder, which becomes a SavedModel. What the
program takes and gives, class names, preprocessing and source go into the file where
its format has a place for them, and beside it as ``DEST.json``
otherwise.
"""

import dataclasses
import functools
import json
import logging
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from absl import flags

from vit_jax import cli, models, pixels, weights
from vit_jax.config import choose
from vit_jax.errors import UserError, writing

INPUTS = {
    "images": "float32 (batch, height, width, channels) in [-1, 1], of the model's size",
    "pixels": "uint8 (batch, height, width, channels), of any size, as decoded",
}
OUTPUTS = {
    "logits": "float32 (batch, classes)",
    "probabilities": "float32 (batch, classes)",
    "features": "float32 (batch, width), what the head reads",
    "tokens": "float32 (batch, tokens, width), encoded",
}


# Of the dialect; what tensorflow 2.21 reads.
STABLEHLO = "1.13.0"


class Program(NamedTuple):
    """What is exported."""

    function: Callable[[Any, jax.Array], jax.Array]  # (params, x) -> one of OUTPUTS
    params: Any
    dtype: Any  # of x
    shape: tuple[int, int, int]  # (height, width, channels) of x; 0: any
    about: dict[str, Any]


def define_flags() -> None:
    flags.DEFINE_enum("inputs", "images", list(INPUTS), "What the program takes.")
    flags.DEFINE_enum("outputs", "logits", list(OUTPUTS), "What it gives.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of its arithmetic.")
    flags.DEFINE_integer(
        "batch", 1, "Images at a time, where a format fixes it: .tflite.", lower_bound=1
    )
    cli.define_image_size_flag()


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise UserError(
            f"give SOURCE and DEST, not {len(arguments)} arguments: python -m "
            "vit_jax.export SOURCE DEST, where DEST is x.stablehlo, x.onnx, x.tflite or "
            "a folder"
        )
    f = flags.FLAGS
    for line in export(
        *arguments, inputs=f.inputs, outputs=f.outputs, dtype=f.dtype,
        image_size=f.image_size, batch=f.batch,
    ):  # fmt: skip
        print(line, file=sys.stderr)
    print(f"wrote {arguments[1]}")
    return 0


def export(
    source: str,
    dest: str,
    *,
    inputs: str = "images",
    outputs: str = "logits",
    dtype: str = "float32",
    image_size: int = 0,
    batch: int = 1,
) -> list[str]:
    """Writes ``source`` as the program ``dest``; returns what happened on the way.

    Args:
      source: anything that ``vit_jax.load`` takes.
      dest: its suffix chooses the format.
      inputs: a key of ``INPUTS``.
      outputs: a key of ``OUTPUTS``.
      dtype: of the computation; with bfloat16 the kernels are stored in it too.
      image_size: to resize the position embeddings to; 0: as in ``source``.
      batch: images at a time of a ``.tflite``; the other formats take any number.

    Raises:
      UserError: ``dest`` exists or has an unknown suffix, or the format, the model or
        its preprocessing does not allow what was asked for.
    """
    path = Path(dest)
    writer = choose(f"suffix of {dest}, for the format", path.suffix, WRITERS)
    if path.exists():
        raise UserError(f"{dest} exists: remove it, or choose another DEST")
    if not path.resolve().parent.is_dir():
        raise UserError(
            f"{path.parent} is not a folder: create it, or choose another DEST"
        )
    found = weights.read(source, image_size or None)
    program = describe(found, source, inputs, outputs, dtype)
    with _complete_or_absent(path) as unfinished:
        writer(program, unfinished, batch)
    return found.report.changes


def describe(
    found: weights.Checkpoint, source: str, inputs: str, outputs: str, dtype: Any
) -> Program:
    """The program of a checkpoint; see :func:`export`."""
    cfg = found.cfg
    if outputs in ("logits", "probabilities") and not cfg.num_classes:
        raise UserError(
            f"--outputs={outputs}, but {source} has no classes: take features or tokens"
        )
    if outputs == "tokens" and models.is_resnet(cfg):
        raise UserError(f"--outputs=tokens, but {cfg.name} is a ResNet, without tokens")
    model = models.create(dataclasses.replace(cfg, dtype=dtype, remat="none"))
    transforms = found.metadata.transforms or ({"op": "resize"},)
    size = cfg.image_size

    def function(params: Any, x: jax.Array) -> jax.Array:
        if inputs == "pixels":
            x = pixels.prepare(x, transforms, size)
        logits, out = model.apply({"params": params}, x, method="forward")
        if outputs == "probabilities":
            softmax = jax.nn.sigmoid if found.metadata.multilabel else jax.nn.softmax
            return softmax(logits)
        if outputs == "logits":
            return logits
        return out[{"features": "pre_logits"}.get(outputs, outputs)].astype(jnp.float32)

    params = jax.tree.map(
        lambda p: (
            p.astype(jnp.bfloat16 if p.ndim > 1 else p.dtype)
            if dtype == "bfloat16"
            else p
        ),
        found.params,
    )
    height, width = size if inputs == "images" else (0, 0)
    about = {
        "source": source,
        "model": cfg.name or "ViT",
        "inputs": INPUTS[inputs],
        "outputs": OUTPUTS[outputs],
        "image_size": list(size),
        "dtype": dtype,
        "preprocessing": list(transforms) if inputs == "images" else [],
        "class_names": list(found.metadata.class_names),
    }
    return Program(
        function, params, jnp.uint8 if inputs == "pixels" else jnp.float32,
        (height, width, cfg.channels), about,
    )  # fmt: skip


def _stablehlo(program: Program, path: Path, batch: int) -> None:
    """Needs nothing but jax to be read; ``x.stablehlo.json`` says what it is."""
    call = jax.jit(lambda x: program.function(program.params, x))
    x = jax.ShapeDtypeStruct(_symbolic(program), program.dtype)
    exported = jax.export.export(call, platforms=("cpu", "cuda", "tpu"))(x)
    path.write_bytes(exported.serialize())
    _write_beside(program, path)


def _saved_model(program: Program, path: Path, batch: int) -> None:
    """A SavedModel of tensorflow, with ``about.json`` among its assets."""
    from vit_jax.data.tensorflow_cpu import tf

    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), program.params
    )
    x = jax.ShapeDtypeStruct(_symbolic(program), program.dtype)
    call = _in_tensorflow(tf, program.function, ("cpu", "cuda", "tpu"), shapes, x)
    module = tf.Module()
    module.params = tf.nest.map_structure(tf.Variable, _plain(program.params))
    spec = tf.TensorSpec([None, *(n or None for n in program.shape)], _dtype(program))
    module.f = tf.function(
        lambda x: call(module.params, x), autograph=False, input_signature=[spec]
    )
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "about.json")
        note.write_text(_json(program))
        module.about = tf.saved_model.Asset(str(note))
        try:
            tf.saved_model.save(module, str(path), signatures=module.f)
        except tf.errors.OpError as e:  # of the file system
            raise OSError(e.message) from e


def _tflite(program: Program, path: Path, batch: int) -> None:
    """``x.tflite``, with ``about.json`` and ``labels.txt`` attached to the file."""
    if 0 in program.shape:
        raise UserError(
            "a .tflite has images of one size: export with --inputs=images, or choose "
            ".stablehlo, .onnx or a folder for --inputs=pixels"
        )
    from vit_jax.data.tensorflow_cpu import tf

    function = lambda x: program.function(program.params, x)
    x = jax.ShapeDtypeStruct((batch, *program.shape), program.dtype)
    call = _in_tensorflow(tf, function, ("cpu",), x)
    spec = tf.TensorSpec([batch, *program.shape], _dtype(program))
    f = tf.function(call, autograph=False, input_signature=[spec])
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [f.get_concrete_function()], tf.Module()
    )
    path.write_bytes(converter.convert())
    with zipfile.ZipFile(path, "a") as attached:
        attached.writestr("about.json", _json(program))
        attached.writestr("labels.txt", "\n".join(program.about["class_names"]))


def _onnx(program: Program, path: Path, batch: int) -> None:
    """``x.onnx``, with the description among its metadata."""
    import jax2onnx  # pyright: ignore[reportMissingImports]

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    x = jax.ShapeDtypeStruct(_symbolic(program), program.dtype)
    function = _without_platforms(lambda x: program.function(program.params, x), x)
    converted = jax2onnx.to_onnx(function, [x], model_name=program.about["model"])
    for key, value in program.about.items():
        entry = converted.metadata_props.add()
        entry.key = key
        entry.value = value if isinstance(value, str) else json.dumps(value)
    path.write_bytes(converted.SerializeToString())


def max_pool(
    x: jax.Array,
    window_dimensions: Sequence[int],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **_: Any,
) -> jax.Array:
    """As the largest of shifted arrays: the converter makes a pool over batch and
    channels as well of it, which has more dimensions than onnxruntime takes."""
    windows = zip(window_dimensions, window_strides, padding, strict=True)
    for axis, (size, stride, (low, high)) in enumerate(windows):
        if size == 1:
            continue
        part = functools.partial(jax.lax.slice_in_dim, axis=axis)
        # What repeats the edge of a window does not change its largest number.
        first, last = part(x, 0, 1), part(x, -1, None)
        x = jnp.concatenate([*[first] * low, x, *[last] * high], axis)
        end = x.shape[axis] - size + 1
        shifted = [part(x, i, end + i, stride) for i in range(size)]
        x = functools.reduce(jnp.maximum, shifted)
    return x


def _without_platforms(function: Callable, x: jax.ShapeDtypeStruct) -> Callable:
    """The function with the default in place of what differs between platforms, and
    without the calls around it: formats that know no platforms cannot say either."""
    closed = jax.make_jaxpr(function)(x)

    def run(jaxpr: Any, constants: Any, *arguments: Any) -> list[Any]:
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))
        read = lambda v: values[v] if isinstance(v, jax.extend.core.Var) else v.val
        for eqn in jaxpr.eqns:
            name, given = eqn.primitive.name, [read(v) for v in eqn.invars]
            inner = eqn.params.get("jaxpr" if name in ("jit", "pjit") else "call_jaxpr")
            if name == "cond" and isinstance(given[0], int):
                inner, given = eqn.params["branches"][given[0]], given[1:]
            if name == "platform_index":
                result = [eqn.params["platforms"].index(None)]
            elif isinstance(inner, jax.extend.core.ClosedJaxpr):
                result = run(inner.jaxpr, inner.consts, *given)
            elif name == "reduce_window_max":
                result = [max_pool(*given, **eqn.params)]
            else:
                result = eqn.primitive.bind(*given, **eqn.params)
                result = result if eqn.primitive.multiple_results else [result]
            values |= dict(zip(eqn.outvars, result, strict=True))
        return [read(v) for v in jaxpr.outvars]

    return lambda x: run(closed.jaxpr, closed.consts, x)[0]


WRITERS: dict[str, Callable[[Program, Path, int], None]] = {
    ".stablehlo": _stablehlo,
    ".tflite": _tflite,
    ".onnx": _onnx,
    "": _saved_model,
}


def _symbolic(program: Program) -> Any:
    """(batch, height, width, channels) of the input, with letters for what is free."""
    sides = [str(n or "hw"[i]) for i, n in enumerate(program.shape)]
    return jax.export.symbolic_shape(", ".join(["b", *sides]))


def _in_tensorflow(
    tf: Any, function: Callable, platforms: tuple[str, ...], *specs: Any
) -> Callable:
    """A function of jax as one operation of tensorflow.

    ``jax2tf`` does the same in the dialect of the jax that is installed, which may be
    too new for the tensorflow beside it.
    """
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import stablehlo
    from tensorflow.compiler.tf2xla.python.xla import call_module

    exported = jax.export.export(jax.jit(function), platforms=platforms)(*specs)
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = stablehlo.deserialize_portable_artifact(
            context, exported.mlir_module_serialized
        )
        portable = stablehlo.serialize_portable_artifact(module, STABLEHLO)
    (out,) = exported.out_avals

    def call(*args: Any) -> Any:
        leaves = tf.nest.flatten(args)
        results: Any = call_module(
            [leaves[i] for i in exported.module_kept_var_idx],
            version=exported.calling_convention_version,
            module=portable,
            Sout=[[n if isinstance(n, int) else None for n in out.shape]],
            Tout=[tf.as_dtype(out.dtype)],
            platforms=[name.upper() for name in exported.platforms],
        )
        return results[0]

    return call


def _dtype(program: Program) -> Any:
    return np.dtype(program.dtype)


def _plain(tree: Any) -> Any:
    """Nested dicts of numpy arrays."""
    return jax.tree.map(np.asarray, tree)


def _json(program: Program) -> str:
    return json.dumps(program.about, indent=2, ensure_ascii=False) + "\n"


def _write_beside(program: Program, path: Path) -> None:
    path.with_name(f"{path.name}.json").write_text(_json(program))


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """A place to write ``path``, and what stands beside it, from where both are moved
    once they are complete."""
    where = path.resolve().parent
    with (
        writing(str(path)),
        tempfile.TemporaryDirectory(dir=where, prefix=".export") as folder,
    ):
        yield Path(folder, path.name)
        for made in Path(folder).iterdir():
            os.replace(made, path.parent / made.name)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
