# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from weights_files import small_model

from vit_jax import predict, weights
from vit_jax.errors import UserError
from vit_jax.weights import fit
from vit_jax.weights.contents import Metadata

NAMES = ("cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, flat = small_model()
    file = tmp_path_factory.mktemp("checkpoint") / "x.npz"
    weights.save(file, model.cfg, fit.unflatten(flat), Metadata(class_names=NAMES))
    return str(file), model, fit.unflatten(flat)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "b.png", "c.jpg"]):
        pixels = rng.integers(0, 256, (16 + 8 * i, 16 + 4 * i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_probabilities_and_names(checkpoint, images):
    """Against the model itself; a.png already has the model's size."""
    source, model, params = checkpoint
    (result,) = predict.predict(source, [str(images / "a.png")], top=5)
    pixels = np.asarray(Image.open(images / "a.png"), np.float32) / 127.5 - 1
    logits = np.asarray(model.apply({"params": params}, pixels[None]))[0]
    want = np.exp(logits - logits.max())
    want /= want.sum()
    assert [e["class"] for e in result["top"]] == [NAMES[i] for i in np.argsort(-want)]
    got = [e["probability"] for e in result["top"]]
    np.testing.assert_allclose(got, np.sort(want)[::-1], atol=1e-5)


def test_command(checkpoint, images):
    paths = [str(images / n) for n in ("a.png", "b.png", "c.jpg")]
    run = [sys.executable, "-m", "vit_jax.predict", checkpoint[0], *paths]
    done = subprocess.run(
        [*run, "--json", "--top=2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["image"] for r in results] == paths
    for result in results:
        assert [*result] == ["image", "top"]
        assert len(result["top"]) == 2
        assert {*result["top"][0]} == {"class", "probability"}
        assert result["top"][0]["probability"] >= result["top"][1]["probability"]


def test_bad_images_are_named_together(checkpoint, images, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    data = (images / "c.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    paths = [tmp_path / n for n in ("text.jpg", "empty.png", "none.png")] + [tmp_path]
    run = [sys.executable, "-m", "vit_jax.predict", checkpoint[0], *map(str, paths)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for part in ("no image", "is empty", "does not exist", "is a folder"):
        assert part in done.stderr
    with pytest.raises(UserError, match=r"cut.jpg.*truncated"):
        list(predict.predict(checkpoint[0], [str(tmp_path / "cut.jpg")]))


def test_preprocessing_comes_from_the_checkpoint(checkpoint, images, tmp_path):
    _, model, params = checkpoint
    about = Metadata(
        transforms=(
            {"op": "central_crop"},
            {"op": "normalize", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
        )
    )
    weights.save(tmp_path / "x.npz", model.cfg, params, about)
    (result,) = predict.predict(str(tmp_path / "x.npz"), [str(images / "b.png")], top=1)
    pixels = np.asarray(Image.open(images / "b.png"), np.float32)[4:20, 2:18] / 255
    pixels = (pixels - [0.4, 0.5, 0.6]) / np.array([0.2, 0.3, 0.4])
    logits = np.asarray(
        model.apply({"params": params}, pixels[None].astype(np.float32))
    )
    assert result["top"][0]["class"] == str(logits.argmax())


def test_preprocessing_follows_the_image_size(checkpoint, images, tmp_path):
    _, model, params = checkpoint
    about = Metadata(
        transforms=(
            {"op": "resize_small", "size": 20},
            {"op": "central_crop", "size": 16},
        )
    )
    weights.save(tmp_path / "x.npz", model.cfg, params, about)
    image = str(images / "b.png")
    assert list(predict.predict(str(tmp_path / "x.npz"), [image], 1, image_size=48))


def test_several_labels(checkpoint, images, tmp_path):
    _, model, params = checkpoint
    weights.save(tmp_path / "x.npz", model.cfg, params, Metadata(multilabel=True))
    (result,) = predict.predict(str(tmp_path / "x.npz"), [str(images / "a.png")])
    assert abs(sum(e["probability"] for e in result["top"]) - 1) > 1e-3


def test_more_images_than_a_batch(checkpoint, images, monkeypatch):
    monkeypatch.setattr(predict, "_BATCH", 2)
    paths = [str(images / "a.png")] * 2 + [str(images / "b.png")]
    results = list(predict.predict(checkpoint[0], paths))
    assert [r["image"] for r in results] == paths
    first, second, third = ([e["probability"] for e in r["top"]] for r in results)
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert np.abs(np.subtract(first, third)).max() > 1e-3  # and the padding is dropped


def test_model_without_a_head(images, tmp_path):
    model, flat = small_model(num_classes=0)
    weights.save(tmp_path / "x.npz", model.cfg, fit.unflatten(flat))
    with pytest.raises(UserError, match="no head"):
        list(predict.predict(str(tmp_path / "x.npz"), [str(images / "a.png")]))


def test_needs_no_tensorflow(checkpoint, images):
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from vit_jax import predict\n"
        f"print(list(predict.predict({checkpoint[0]!r}, [{str(images / 'a.png')!r}])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
