# SPDX-License-Identifier: Apache-2.0
"""Prediction prepares an image as evaluation during training does."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.weights import preprocessing


@pytest.fixture(scope="module")
def photo():
    """Smooth and with edges, 61 x 90."""
    y, x = np.mgrid[:61, :90]
    waves = [127 + 120 * np.sin(x / a + y / b) for a, b in ((5, 9), (17, 4), (3, 30))]
    image = np.stack(waves, axis=-1).astype(np.uint8)
    image[20:40, 30:50] = 255 - image[20:40, 30:50]
    return image


@pytest.mark.parametrize("size", [(32, 32), (128, 96), (61, 90), (7, 200)])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("method", ["bilinear", "bicubic", "area", "nearest"])
def test_resize_is_tensorflows(photo, size, antialias, method):
    if antialias and method in ("area", "nearest"):
        pytest.skip("has no anti-aliased form")
    tf = pytest.importorskip("tensorflow")
    want = tf.image.resize(photo, size, method, antialias=antialias)
    want = np.clip(np.rint(want), 0, 255).astype(np.uint8)
    got = preprocessing.resize(photo, size, method, antialias)
    difference = np.abs(got.astype(int) - want)
    # Rounding may fall to the other side: one level, in few places.
    assert difference.max() <= 1
    assert difference.mean() < 0.01


@pytest.mark.parametrize(
    "transforms",
    [
        ({"op": "resize"},),
        ({"op": "resize_small", "size": 40}, {"op": "central_crop"}),
        ({"op": "resize", "size": 48}, {"op": "central_crop", "size": 32}),
    ],
)
def test_same_as_the_data_pipeline(photo, tmp_path, transforms):
    tf = pytest.importorskip("tensorflow")
    from vit_jax.data import transforms as training

    file = tmp_path / "x.png"
    Image.fromarray(photo).save(file)
    run = training.compose(transforms, size=32, exact=True, knob="data.eval_transforms")
    want = run(tf.constant(file.read_bytes()), tf.constant([0, 0], tf.int64))
    want = np.asarray(want).astype(np.float32) / 127.5 - 1
    got = preprocessing.prepare(preprocessing.read_image(file), transforms, (32, 32))
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= 1.01 / 127.5


@pytest.mark.parametrize("size", [(32, 40), (61, 90), (150, 201)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic", "area", "nearest"])
def test_a_crop_right_after_a_resize_computes_the_same_pixels(photo, size, method):
    whole = preprocessing.resize(photo, size, method)
    got = preprocessing.resize(photo, size, method, crop=(21, 32))
    top, left = (size[0] - 21) // 2, (size[1] - 32) // 2
    np.testing.assert_array_equal(got, whole[top : top + 21, left : left + 32])


def test_range():
    image = np.array([0, 255], np.uint8).reshape(1, 2, 1)
    got = preprocessing.prepare(image, ({"op": "value_range"},), (1, 2))
    np.testing.assert_array_equal(got.ravel(), [-1, 1])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_modes_of_image_files(tmp_path, mode):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        values = np.full((4, 5), 0x80FF, np.uint16)
        Image.fromarray(values).save(file)
    else:
        Image.new("RGB", (5, 4), (128, 128, 128)).convert(mode).save(file)
    pixels = preprocessing.read_image(file)
    assert pixels.shape == (4, 5, 3)
    assert pixels.dtype == np.uint8
    if mode not in ("1", "P", "CMYK"):  # which cannot hold this grey
        assert (np.abs(pixels.astype(int) - 128) <= 1).all()
    assert preprocessing.read_image(file, channels=1).shape == (4, 5, 1)


def test_exif_orientation_is_applied_as_in_training(photo, tmp_path):
    tf = pytest.importorskip("tensorflow")
    from vit_jax.data.decode import decode

    exif = Image.Exif()
    for orientation in (3, 6):
        exif[0x0112] = orientation
        Image.fromarray(photo).save(tmp_path / "x.png", exif=exif)
        pixels = preprocessing.read_image(tmp_path / "x.png")
        np.testing.assert_array_equal(pixels, np.rot90(photo, orientation // 3 + 1))
        stored = (tmp_path / "x.png").read_bytes()
        np.testing.assert_array_equal(pixels, decode(tf.constant(stored)))


def test_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "x.jpg"
    with pytest.raises(UserError, match=r"x\.jpg does not exist"):
        preprocessing.read_image(file)
    with pytest.raises(UserError, match="is a folder"):
        preprocessing.read_image(tmp_path)
    Image.new("RGB", (50, 50)).save(file)
    for content in (b"", b"hello", file.read_bytes()[:-20]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"image .*x\.jpg cannot be read"):
            preprocessing.read_image(file)


def test_errors(photo):
    with pytest.raises(UserError, match=r"randaugment.*choose one of"):
        preprocessing.prepare(photo, ({"op": "randaugment"},), (8, 8))
    with pytest.raises(UserError, match="ends with images"):
        preprocessing.prepare(photo, ({"op": "resize", "size": 9},), (8, 8))
    with pytest.raises(UserError, match="smaller than"):
        preprocessing.prepare(photo, ({"op": "central_crop"},), (99, 99))


def test_operations_written_for_smaller_images_grow_to_the_model():
    """As in DINOv2's folders: a model of 518 pixels with a crop of 224."""
    ops = (
        {"op": "resize_small", "size": 256},
        {"op": "central_crop", "size": [224, 224]},
    )
    for model in (518, 224):
        got = preprocessing.rescaled(ops, (518, 518), (model, model))
        assert got[0]["size"] == round(256 * model / 224)
        assert got[1]["size"] in ([model, model], [224, 224])
