# SPDX-License-Identifier: Apache-2.0
"""Exported programs at full size, run without this project; too long for the tests.

    python tests/check_exports.py [--onnx=PYTHON] [--only=ViT-B/16] [--formats=.tflite]

PYTHON is an interpreter with jax2onnx, onnxruntime and this project's core. Prints a line
per model and format: the largest difference of the logits of 1, 3 and 8 images from
``model.apply``, relative to the largest logit; and, for programs that take pixels, that
of the probabilities of two photographs from those of ``predict``. The exit status is 1 if
one is above 1e-5 or 1e-4.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import vit_jax
from vit_jax import predict, weights

MODELS = {
    "ViT-B/16": {"name": "ViT-B/16", "image_size": 224},
    "R50+ViT-B/16": {"name": "R50+ViT-B/16", "image_size": 224},
    "SigLIP B/16 (MAP head)": {"name": "ViT-B/16", "image_size": 224, "head": "map"},
    "DINOv2 S/14 (registers)": {"name": "vit_small_patch14_reg4_dinov2", "image_size": 224},
}  # fmt: skip
FORMATS = {".stablehlo": "x.stablehlo", "SavedModel": "saved", ".tflite": "x.tflite",
           ".onnx": "x.onnx"}  # fmt: skip
BATCHES = (1, 3, 8)
# Run by an interpreter in a folder where this project is not: what gives an array.
READERS = {
    ".stablehlo": "import jax; run = jax.export.deserialize(bytearray(open(path, 'rb').read())).call",
    "SavedModel": "import tensorflow as tf; m = tf.saved_model.load(path); run = m.f",
    ".tflite": """
from ai_edge_litert.interpreter import Interpreter
i = Interpreter(model_path=path)
i.allocate_tensors()
def run(x):
    i.set_tensor(i.get_input_details()[0]["index"], x)
    i.invoke()
    return i.get_tensor(i.get_output_details()[0]["index"])
""",
    ".onnx": """
import onnxruntime
s = onnxruntime.InferenceSession(path)
run = lambda x: s.run(None, {s.get_inputs()[0].name: x})[0]
""",
}
RUN = """
import sys
import numpy as np
path, given, out = sys.argv[1:]
{reader}
given = np.load(given)
np.savez(out, **{{k: np.asarray(run(x)) for k, x in given.items()}})
assert not any(m.split(".")[0] == "vit_jax" for m in sys.modules)
"""


def checkpoint(fields: dict, folder: Path) -> tuple:
    """(file, model, params): as initialised, and random where that is zero."""
    model = vit_jax.create_model(num_classes=1000, **fields)
    x = np.zeros((1, *model.cfg.image_size, 3), np.float32)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), x)["params"])
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p if p.any() else 0.05 * random.standard_normal(p.shape, np.float32),
        params,
    )
    weights.save(folder / "model.npz", model.cfg, params)
    return str(folder / "model.npz"), model, params


def outputs(kind, python, source, folder, given, flags) -> dict:
    """What the exported program gives for each of the named arrays."""
    dest = folder / FORMATS[kind]
    export = [python, "-m", "vit_jax.export", source, dest, *flags]
    quiet = subprocess.DEVNULL
    here = {**os.environ, "PYTHONPATH": str(Path(vit_jax.__file__).parent.parent)}
    subprocess.run(list(map(str, export)), check=True, stdout=quiet, env=here)
    np.savez(folder / "given.npz", **given)
    code = RUN.format(reader=READERS[kind])
    command = [python, "-c", code, dest, folder / "given.npz", folder / "out.npz"]
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = dict(check=True, cwd=folder, env=elsewhere)
    subprocess.run(list(map(str, command)), **run)
    with np.load(folder / "out.npz") as out:
        return dict(out)


def logits_differ(kind, python, source, model, params) -> float:
    random = np.random.default_rng(1)
    x = random.uniform(-1, 1, (8, *model.cfg.image_size, 3)).astype(np.float32)
    apply = jax.jit(lambda p, x: model.apply({"params": p}, x))
    want = {str(n): np.asarray(apply(params, x[:n])) for n in BATCHES}
    got = {}
    # The number of images is part of a .tflite.
    for batches in [(n,) for n in BATCHES] if kind == ".tflite" else [BATCHES]:
        with tempfile.TemporaryDirectory() as folder:
            given = {str(n): x[:n] for n in batches}
            flags = [f"--batch={batches[0]}"] if kind == ".tflite" else []
            got |= outputs(kind, python, source, Path(folder), given, flags)
    return max(np.abs(got[n] - want[n]).max() / np.abs(want[n]).max() for n in want)


def probabilities_differ(kind, python, source) -> float:
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{i}.png" for i in range(len(photos))]
        for file, photo in zip(files, photos, strict=True):
            Image.fromarray(photo).save(file)
        given = {str(i): p[None] for i, p in enumerate(photos)}
        flags = ["--inputs=pixels", "--outputs=probabilities"]
        got = outputs(kind, python, source, Path(folder), given, flags)
        worst = 0.0
        for i, said in enumerate(predict.predict(source, files, top=1000)):
            for entry in said["top"]:
                ours = got[str(i)][0, int(entry["class"])]
                worst = max(worst, abs(ours - entry["probability"]))
    return float(worst)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--onnx", default="")
    parser.add_argument("--only", default=",".join(MODELS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args()
    bad = False
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            source, model, params = checkpoint(MODELS[name], Path(folder))
            for kind in options.formats.split(","):
                python = options.onnx if kind == ".onnx" else sys.executable
                if not python:
                    continue
                found = {"logits": logits_differ(kind, python, source, model, params)}
                if kind != ".tflite":  # which has no images of any size
                    found["pixels"] = probabilities_differ(kind, python, source)
                bad |= found["logits"] > 1e-5 or found.get("pixels", 0) > 1e-4
                numbers = json.dumps({k: f"{v:.1e}" for k, v in found.items()})
                print(name, kind, numbers, flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
