# SPDX-License-Identifier: Apache-2.0
"""Exported programs, run without this project: by jax alone, tensorflow, LiteRT and
onnxruntime."""

import functools
import importlib.util
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import apply, init
from PIL import Image

from vit_jax import export, models, pixels, predict, weights
from vit_jax.config import ModelConfig
from vit_jax.errors import UserError
from vit_jax.weights import preprocessing
from vit_jax.weights.contents import Metadata

pytestmark = pytest.mark.heavy

BASE = dict(
    name="", num_classes=5, image_size=(32, 32), width=32, depth=2, mlp_dim=64, heads=2, patch=8,
)  # fmt: skip
MODELS = {
    "token": {},
    "map": {"head": "map"},
    "registers": {"registers": 3, "gelu": "exact"},
    "axial": {"axial": True, "head": "gap"},
    "hybrid": {"resnet": (1, 1), "resnet_width": 1, "patch": 1, "image_size": (64, 64)},
}
TRANSFORMS = (
    {"op": "resize_small", "size": 40, "method": "bicubic", "antialias": True},
    {"op": "central_crop", "size": 32},
)
# Of float32: a program is compiled anew, so sums are in another order.
TOLERANCE = 1e-5


@functools.cache
def random_model(**fields):
    """(model, params)."""
    model = models.create(models.resolve(ModelConfig(**BASE | fields)))
    params = init(model)
    random = np.random.default_rng(0)
    # The heads and tokens begin as zeros, which would hide them.
    params = jax.tree.map(
        lambda p: p + 0.1 * random.standard_normal(p.shape).astype(np.float32), params
    )
    return model, params


def checkpoint(folder, **fields):
    """A random model in a file, and (model, params)."""
    model, params = random_model(**fields)
    names = tuple(f"class {i}" for i in range(5))
    about = Metadata(class_names=names, transforms=TRANSFORMS)
    weights.save(folder / "model.npz", model.cfg, params, about)
    return str(folder / "model.npz"), model, params


def images_of(model, count):
    random = np.random.default_rng(1)
    size = (count, *model.cfg.image_size, 3)
    return random.uniform(-1, 1, size).astype(np.float32)


def stablehlo(path):
    return jax.export.deserialize(bytearray(path.read_bytes())).call


def saved_model(path):
    tf = pytest.importorskip("tensorflow")
    module = tf.saved_model.load(str(path))
    return lambda x: module.f(x).numpy()  # which needs the variables of the module


def tflite(path):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    interpreter = litert.Interpreter(model_path=str(path))
    interpreter.allocate_tensors()

    def run(x):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


def onnx(path):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


READERS = {
    "x.stablehlo": stablehlo, "saved": saved_model, "x.tflite": tflite, "x.onnx": onnx,
}  # fmt: skip


# Every kind of model through jax, and through the other formats what differs most.
CASES = [("x.stablehlo", kind) for kind in MODELS]
CASES += [(name, "token") for name in READERS][1:]
CASES += [(name, "hybrid") for name in ("x.tflite", "x.onnx")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_program_gives_the_logits_of_the_model(kind, name, tmp_path):
    if name == "x.onnx" and not importlib.util.find_spec("jax2onnx"):
        pytest.skip("needs jax2onnx, whose pins exclude the locked orbax-checkpoint")
    source, model, params = checkpoint(tmp_path, **MODELS[kind])
    export.export(source, str(tmp_path / name), batch=8)
    run = READERS[name](tmp_path / name)
    x = images_of(model, 8)
    want = np.asarray(apply(model, params, x))
    for count in (3, 8) if name != "x.tflite" else (8,):
        got = np.asarray(run(x[:count]))
        assert np.abs(got - want[:count]).max() < TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("size", [5, 6])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 1), (3, 3)])
def test_pooling_without_a_window_over_four_dimensions(size, window, stride, padding):
    """As ONNX gets it: exactly what XLA's pooling gives."""
    x = np.random.default_rng(0).normal(size=(2, size, size + 1, 3))
    dimensions, strides = (1, window, window, 1), (1, stride, stride, 1)
    pads = jax.lax.padtype_to_pads(x.shape, dimensions, strides, padding)
    np.testing.assert_array_equal(
        export.max_pool(jnp.asarray(x), dimensions, strides, pads),
        jax.lax.reduce_window(
            jnp.asarray(x), -jnp.inf, jax.lax.max, dimensions, strides, pads
        ),
    )


@pytest.mark.parametrize(
    ("outputs", "shape"),
    [("probabilities", (2, 5)), ("features", (2, 32)), ("tokens", (2, 17, 32))],
)
def test_other_outputs(outputs, shape, tmp_path):
    source, model, params = checkpoint(tmp_path)
    export.export(source, str(tmp_path / "x.stablehlo"), outputs=outputs)
    x = images_of(model, 2)
    got = np.asarray(stablehlo(tmp_path / "x.stablehlo")(x))
    logits, out = apply(model, params, x, method="forward")
    want = {
        "probabilities": jax.nn.softmax(logits),
        "features": out["pre_logits"],
        "tokens": out["tokens"],
    }[outputs]
    assert got.shape == shape
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)


def test_pixels_of_any_size_give_what_predict_says(tmp_path):
    source, *_ = checkpoint(tmp_path)
    dest = tmp_path / "x.stablehlo"
    export.export(source, str(dest), inputs="pixels", outputs="probabilities")
    run = stablehlo(dest)
    for i, photo in enumerate(photos_of_two_sizes()):
        path = tmp_path / f"{i}.png"
        Image.fromarray(photo).save(path)
        (found,) = predict.predict(source, [str(path)], top=5)
        said = {x["class"]: x["probability"] for x in found["top"]}
        got = np.asarray(run(photo[None]))[0]
        for j, probability in enumerate(got):
            assert abs(said[f"class {j}"] - probability) < 1e-4


def photos_of_two_sizes():
    from sklearn.datasets import load_sample_images

    first, second = load_sample_images().images
    return first, second[:300, 10:201]


SHAPES = [(427, 640), (31, 77), (32, 32), (33, 1000)]
PREPARATIONS = [
    TRANSFORMS,
    ({"op": "resize"},),
    ({"op": "resize", "method": "nearest"},),
    ({"op": "resize_small", "size": 40}, {"op": "central_crop"}),
    (
        {"op": "resize", "size": 40, "method": "bilinear", "antialias": True},
        {"op": "central_crop"},
    ),
]


# Two shapes for each, every shape for two or three.
@pytest.mark.parametrize(
    ("transforms", "shape"),
    [(t, SHAPES[(i + j) % 4]) for i, t in enumerate(PREPARATIONS) for j in (0, 2)],
)
def test_preprocessing_in_the_program_is_that_of_the_host(transforms, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    want = preprocessing.prepare(image, transforms, (32, 32))
    got = jax.jit(lambda x: pixels.prepare(x, transforms, (32, 32)))(image[None])[0]
    # The same uint8 pixels, but for values half-way between two, where the order of the
    # sums decides: 32 rows enlarged to 40 have one in a hundred of them.
    levels = np.abs(np.rint((got - want) * 127.5))
    assert levels.max() <= 1
    assert levels.mean() < 0.01


def test_what_the_program_is_travels_along(tmp_path):
    source, *_ = checkpoint(tmp_path)
    export.export(source, str(tmp_path / "x.stablehlo"))
    about = json.loads((tmp_path / "x.stablehlo.json").read_text())
    assert about["class_names"] == [f"class {i}" for i in range(5)]
    assert about["preprocessing"][0]["op"] == "resize_small"
    assert about["source"] == source
    pytest.importorskip("tensorflow")
    export.export(source, str(tmp_path / "x.tflite"))
    with zipfile.ZipFile(tmp_path / "x.tflite") as attached:
        assert json.loads(attached.read("about.json"))["class_names"]
        assert attached.read("labels.txt").decode().splitlines()[1] == "class 1"


def test_bfloat16_halves_the_file(tmp_path):
    source, model, params = checkpoint(tmp_path)
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        dest = tmp_path / f"{dtype}.stablehlo"
        export.export(source, str(dest), dtype=dtype)
        sizes[dtype] = dest.stat().st_size
    x = images_of(model, 3)
    want = np.asarray(apply(model, params, x))
    got = np.asarray(stablehlo(tmp_path / "bfloat16.stablehlo")(x))
    assert got.dtype == np.float32
    # Eight bits of mantissa, through two blocks.
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    assert sizes["bfloat16"] < 0.7 * sizes["float32"]


@pytest.mark.parametrize(
    ("dest", "options", "words"),
    [
        ("x.pb", {}, ["x.pb", ".stablehlo", ".onnx"]),
        ("there.stablehlo", {}, ["exists"]),
        ("no/x.stablehlo", {}, ["not a folder"]),
        ("x.tflite", {"inputs": "pixels"}, [".tflite", "images"]),
        (
            "x.stablehlo",
            {"outputs": "logits", "classes": 0},
            ["no classes", "features"],
        ),
    ],
)
def test_what_cannot_be_is_one_line(dest, options, words, tmp_path):
    fields = {"num_classes": 0} if "classes" in options else {}
    options.pop("classes", None)
    source, *_ = checkpoint(tmp_path, **fields)
    (tmp_path / "there.stablehlo").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        export.export(source, str(tmp_path / dest), **options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.stablehlo").read_text() == "mine"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    source, *_ = checkpoint(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(program, path, batch):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export.WRITERS, ".stablehlo", full)
    with pytest.raises(UserError, match="No space left on device"):
        export.export(source, str(tmp_path / "x.stablehlo"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    source, *_ = checkpoint(tmp_path)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match="cannot be written: Permission"):
        export.export(source, str(tmp_path / "x.stablehlo"))


def test_tensorflow_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    source, *_ = checkpoint(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(*args, **options):
        raise tf.errors.ResourceExhaustedError(None, None, "x; No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        export.export(source, str(tmp_path / "saved"))
    assert sorted(tmp_path.iterdir()) == before
