# SPDX-License-Identifier: Apache-2.0
"""Distributions and arguments of the transforms, against what the paper's code does."""

import numpy as np
import pytest
from data_files import encoded, picture

from vit_jax.data import order, transforms
from vit_jax.data import randaugment as ra
from vit_jax.data.decode import decode, decode_crop, resize_to
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError


def seeds(count):
    return tf.constant(order.augmentation_seeds(np.arange(count), 0))


def for_each_seed(function, count):
    """``function(seed)`` for ``count`` seeds, stacked."""
    made = tf.data.Dataset.from_tensor_slices(seeds(count)).map(function).batch(count)
    return next(iter(made)).numpy()


def compose(*ops, size=16, exact=False):
    return transforms.compose(ops, size=size, exact=exact, knob="data.train_transforms")


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def reference_windows(height, width, count):
    """The published description of TensorFlow's sampler, written in numpy."""
    rng, found = np.random.default_rng(1), []
    low, high = 0.05 * height * width, 1.0 * height * width
    while len(found) < count:
        ratio = rng.uniform(0.75, 1.33)
        least = round(np.sqrt(low / ratio))
        most = round(np.sqrt(high / ratio))
        if round(most * ratio) > width:
            most = int((width + 0.5 - 1e-7) / ratio)
        most = min(most, height)
        h = int(rng.integers(min(least, most), most + 1))
        w = round(h * ratio)
        if w * h < low:
            h += 1
            w = round(h * ratio)
        elif w * h > high:
            h -= 1
            w = round(h * ratio)
        if low <= w * h <= high and 0 < w <= width and 0 < h <= height:
            found.append((h, w))
    return np.array(found)


def test_inception_crop_has_tensorflows_distribution():
    height, width, count = 256, 512, 4000
    shape = tf.constant([height, width, 3])
    windows = for_each_seed(lambda s: transforms.inception_window(shape, s), count)
    top, left, h, w = windows.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert abs((h * w / (height * width)).mean() - 0.24) < 0.01  # not 0.525
    expected = reference_windows(height, width, 20_000)
    for mine, theirs in ((h, expected[:, 0]), (w / h, expected[:, 1] / expected[:, 0])):
        quantiles = np.linspace(0.02, 0.98, 13)
        scale = theirs.std()
        np.testing.assert_allclose(
            np.quantile(mine, quantiles),
            np.quantile(theirs, quantiles),
            atol=0.1 * scale,
        )
    # Placed uniformly among the places where it fits.
    place = left / np.maximum(width - w, 1)
    assert abs(place.mean() - 0.5) < 0.02
    assert abs(place.std() - np.sqrt(1 / 12)) < 0.02


@pytest.mark.heavy
def test_flip_is_fair_and_mirrors(noise):
    run = compose({"op": "resize"}, {"op": "flip"})
    plain = compose({"op": "resize"})(tf.constant(noise), seeds(1)[0]).numpy()
    flipped = 0
    for made in for_each_seed(lambda s: run(tf.constant(noise), s), 400):
        mirrored = (made == plain[:, ::-1]).all()
        assert mirrored or (made == plain).all()
        flipped += mirrored
    assert abs(flipped - 200) < 4 * 10  # standard deviation 10


def test_resize_is_bilinear_without_antialiasing(noise):
    expected = tf.image.resize(noise, [16, 16], "bilinear", antialias=False).numpy()
    np.testing.assert_allclose(resize_to(tf.constant(noise), 16), expected, atol=0.5001)
    for method in ("area", "nearest"):
        expected = tf.image.resize(noise, [16, 16], method).numpy()
        made = resize_to(tf.constant(noise), 16, method=method)
        np.testing.assert_allclose(made, expected, atol=0.5001)


@pytest.mark.parametrize("size", [16, 300])
def test_many_images_are_resized_as_one_is(size):
    shapes = [(40, 56), (1, 1), (7, 300), (size, size), (333, 2)]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*s, 3), np.uint8) for s in shapes]
    plain = transforms.resize_many(images, [False] * 5, size).numpy()
    for made, image in zip(plain, images, strict=True):
        expected = resize_to(tf.constant(image), size).numpy().astype(int)
        assert np.abs(made - expected).max() <= 1  # both round, once and twice
    mirror = np.array([True, False, True, True, False])
    mirrored = transforms.resize_many(images, mirror, size).numpy()
    np.testing.assert_array_equal(mirrored[mirror], plain[mirror][:, :, ::-1])
    np.testing.assert_array_equal(mirrored[~mirror], plain[~mirror])


@pytest.mark.heavy
@pytest.mark.parametrize(
    "rest", [(), ("flip",), ("flip", "randaugment", "value_range")]
)
@pytest.mark.parametrize("exact", [False, True])
def test_together_is_the_same_as_alone(rest, exact):
    """Which examples share a group depends on the number of hosts; no bit may."""
    ops = [{"op": name} for name in ("inception_crop", *rest)]
    run = compose(*ops, exact=exact)
    photos = [encoded(picture(i, 60 + i, 80 - i)) for i in range(5)]
    drawn = seeds(5)
    alone = [run(tf.constant(p), s).numpy() for p, s in zip(photos, drawn, strict=True)]
    rows = [run.alone(tf.constant(p), s) for p, s in zip(photos, drawn, strict=True)]
    made = run.together({k: [r[k] for r in rows] for k in rows[0]}, drawn)
    np.testing.assert_array_equal(made, np.stack(alone))
    if rest in [(), ("flip",)]:  # nothing that enlarges a difference
        plain = compose(*ops, exact=True)
        for photo, seed, image in zip(photos, drawn, alone, strict=True):
            expected = plain(tf.constant(photo), seed).numpy().astype(int)
            same = np.abs(image - expected).mean()
            mirrored = np.abs(image - expected[:, ::-1]).mean()
            assert same < mirrored / 4, "the same crop, the same side, but for rounding"


def test_evaluation_pipelines(noise):
    small = transforms.resize_small(tf.constant(noise), None, size=20)
    assert small.shape == (20, 28, 3)  # 40 x 56, the shorter side 20
    middle = transforms.central_crop(small, None, size=16).numpy()
    np.testing.assert_array_equal(middle, small.numpy()[2:18, 6:22])
    run = compose({"op": "resize", "size": 20}, {"op": "random_crop"})
    big = resize_to(tf.constant(noise), 20).numpy()
    places = set()
    for made in for_each_seed(lambda s: run(tf.constant(noise), s), 200):
        places.update(
            (y, x)
            for y in range(5)
            for x in range(5)
            if (made == big[y : y + 16, x : x + 16]).all()
        )
    assert len(places) == 25


def test_value_range(noise):
    made = compose({"op": "resize"}, {"op": "value_range"})(
        tf.constant(noise), seeds(1)[0]
    )
    assert made.dtype == tf.float32
    ends = transforms.value_range(tf.constant([[[0, 255, 127]]], tf.uint8), None)
    np.testing.assert_allclose(ends, [[[-1, 1, 127 / 127.5 - 1]]], atol=1e-6)


def test_the_order_of_later_operations_does_not_change_earlier_draws(noise):
    image, seed = tf.constant(noise), seeds(9)[8]
    crop = compose({"op": "inception_crop"})(image, seed).numpy()
    flip = compose({"op": "inception_crop"}, {"op": "flip"})(image, seed).numpy()
    assert (flip == crop).all() or (flip == crop[:, ::-1]).all()


def test_operations_draw_apart_however_many_there_are(noise):
    """Five flips of fair and independent coins: how often an odd number of them mirrors."""
    flips = compose(*[{"op": "resize"}] + [{"op": "flip"}] * 5)
    plain = compose({"op": "resize"})(tf.constant(noise), seeds(1)[0]).numpy()
    images = for_each_seed(lambda seed: flips(tf.constant(noise), seed), 400)
    mirrored = (images == plain[None, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (images == plain[None]).all((1, 2, 3))).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / 20  # four standard deviations


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (
            ({"op": "flop"},),
            r"unknown transform in data.train_transforms 'flop': did you mean 'flip'",
        ),
        (({"op": "flip", "q": 1},), r"\[0\] \(flip\) has the unknown option 'q'"),
        (({"size": 3},), r"needs the key 'op'"),
        (({"op": 3},), r"needs the key 'op'"),
        (({"op": "resize", "method": "bilin"},), r"did you mean 'bilinear'"),
        (({"op": "resize", "size": "8"},), r"size is '8' of type str"),
        (({"op": "resize", "size": 0},), r"size is 0: it must be at least 1"),
        (({"op": "inception_crop", "area": 0.5},), r"area is 0.5: it must be a list"),
        (({"op": "inception_crop", "area": (0.5, 2)},), r"area\[1\] is 2.0"),
        (({"op": "inception_crop", "area": (0, 1)},), r"area\[0\] is 0.0: .* above 0"),
        (
            ({"op": "inception_crop", "area": (1, 0.05)},),
            r"must be \(lowest, highest\)",
        ),
        (({"op": "inception_crop", "ratio": (2, 1)},), r"must be \(lowest, highest\)"),
        (({"op": "inception_crop", "exact": "no"},), r"exact is 'no' of type str"),
        (({"op": "flip", "p": "half"},), r"p is 'half' of type str"),
        (({"op": "flip", "p": 2},), r"p is 2.0: it must be at least 0 and at most 1"),
        (({"op": "randaugment", "n": -1},), r"n is -1: it must be at least 0"),
        (({"op": "randaugment", "m": 40},), r"m is 40.0: it must be .* at most 20"),
        (
            ({"op": "value_range"}, {"op": "flip"}),
            r"\[0\] is value_range, .* come last",
        ),
        (({"op": "value_range"},) * 2, r"\[0\] is value_range, .* come last"),
    ],
)
def test_what_a_pipeline_may_not_say(ops, message):
    with pytest.raises(UserError, match=message):
        compose(*ops)


@pytest.mark.parametrize("ops", [[{"op": "flip"}], [{"op": "resize", "size": 8}]])
def test_images_of_another_size_are_refused(ops, noise):
    with pytest.raises(UserError, match=r"but config.data.image_size is 16"):
        compose(*ops)(tf.constant(noise), seeds(1)[0])


@pytest.mark.parametrize("op", ["central_crop", "random_crop"])
def test_crops_of_more_than_there_is_are_refused(op, noise):
    with pytest.raises(UserError, match=rf"{op}: the images have 8 x 8 .* size is 16"):
        compose({"op": "resize", "size": 8}, {"op": op})(
            tf.constant(noise), seeds(1)[0]
        )


def test_a_line_of_pixels_does_not_become_gigabytes():
    line = tf.zeros((1, 2000, 3), tf.uint8)
    assert transforms.resize_small(line, None, size=100).shape == (100, 200_000, 3)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="resize_small: too narrow"
    ):
        transforms.resize_small(line, None, size=200)


def test_fused_decoding_equals_decoding_and_cutting():
    data = tf.constant(encoded(picture(0, 120, 160)))
    window = tf.constant([16, 32, 64, 48])
    whole = decode(data).numpy()[16:80, 32:80]
    exact = decode_crop(data, lambda shape: window, target=0).numpy()
    # Chroma upsampling looks across the edge of the crop: only the outermost pixels
    # differ.
    np.testing.assert_array_equal(exact[1:-1, 1:-1], whole[1:-1, 1:-1])
    fast = decode_crop(data, lambda shape: window, target=64).numpy()
    assert np.abs(fast.astype(int) - exact).mean() < 2


@pytest.mark.parametrize(
    ("target", "ratio"), [(64, 1), (33, 1), (32, 2), (16, 4), (8, 8)]
)
def test_large_crops_are_decoded_at_a_fraction(target, ratio):
    data = tf.constant(encoded(picture(0, 120, 160)))
    window = tf.constant([11, 13, 64, 96])
    crop = decode_crop(data, lambda shape: window, target=target)
    assert crop.shape == (64 // ratio, 96 // ratio, 3)


def test_a_truncated_jpeg_fails_whatever_the_crop():
    """Above the cut it would decode, and whether a file is bad would depend on luck."""
    data = encoded(picture(0, 240, 320))
    top = lambda shape: tf.constant([0, 0, 16, 16])
    decode_crop(tf.constant(data), top, target=0)
    for target in (0, 16):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode_crop(tf.constant(data[:-40]), top, target=target)


# -------------------------------------------------------------------- RandAugment


def test_randaugment_arguments_are_those_of_the_original():
    assert len(ra.OPERATIONS) == 16
    bits = [ra.posterize_bits(m / 10, False) for m in (0, 10, 15, 20)]
    assert bits == [0, 4, 6, 8]
    wrapped = [ra.solarize_threshold(m / 10, False) for m in (0, 10, 15, 20)]
    assert wrapped == [0, 0, 128, 0]
    np.testing.assert_allclose(
        [ra.factor(m / 10, False) for m in (0, 10, 20)], [0.1, 1.9, 3.7]
    )


def test_the_corrected_form_starts_at_the_identity(noise):
    image = tf.constant(noise)
    for name, operation in ra.OPERATIONS.items():
        made = operation(image, 0.0, tf.constant(1.0), tf.constant([0.5, 0.5]), True)
        if name not in ("AutoContrast", "Equalize", "Invert"):
            np.testing.assert_array_equal(made, image, name)


def test_quirks(noise):
    image = tf.constant(noise)
    grey = min(noise.shape[0] * noise.shape[1] / 256, 255)
    np.testing.assert_array_equal(
        ra.contrast(image, 0.0), np.full_like(noise, int(grey))
    )
    fill = np.float32(np.uint8(grey))
    blended = np.clip(fill + 1.9 * (noise - fill), 0, 255)
    np.testing.assert_allclose(ra.contrast(image, 1.9), np.floor(blended), atol=1)
    assert set(np.unique(ra.posterize(image, 0))) == {0, 128}
    np.testing.assert_array_equal(ra.posterize(image, 8), image)
    np.testing.assert_array_equal(ra.solarize(image, 0), 255 - noise)


def test_operations_against_pillow(noise):
    from PIL import Image, ImageOps

    image = Image.fromarray(noise)
    tensor = tf.constant(noise)
    np.testing.assert_array_equal(ra.equalize(tensor), ImageOps.equalize(image))
    np.testing.assert_allclose(
        ra.auto_contrast(tensor), np.asarray(ImageOps.autocontrast(image)), atol=1
    )
    np.testing.assert_array_equal(ra.invert(tensor), ImageOps.invert(image))
    np.testing.assert_array_equal(ra.posterize(tensor, 4), ImageOps.posterize(image, 4))
    np.testing.assert_array_equal(ra.solarize(tensor, 77), ImageOps.solarize(image, 77))
    brighter = np.clip(noise * 1.9, 0, 255)
    np.testing.assert_allclose(ra.brightness(tensor, 1.9), np.floor(brighter), atol=1)


def test_geometry(noise):
    image = tf.constant(noise)
    right = ra.translate_x(image, tf.constant(-10.0)).numpy()
    np.testing.assert_array_equal(right[:, 10:], noise[:, :-10])
    assert (right[:, :10] == ra.GREY).all()
    up = ra.translate_y(image, tf.constant(10.0)).numpy()
    np.testing.assert_array_equal(up[:-10], noise[10:])
    square = tf.constant(noise[:, :40])
    turned = ra.rotate(square, tf.constant(90.0)).numpy()
    np.testing.assert_array_equal(turned, np.rot90(noise[:, :40], 1))
    sheared = ra.shear_x(image, tf.constant(0.3)).numpy()
    np.testing.assert_array_equal(sheared[0], noise[0])
    np.testing.assert_array_equal(sheared[30, :-9], noise[30, 9:])
    hole = ra.cutout(image, 8, tf.constant([0.5, 0.5])).numpy()
    assert (hole[12:28, 20:36] == ra.GREY).all()
    assert (hole == ra.GREY).all(-1).sum() <= 16 * 16 + 5


def test_randaugment_applies_one_of_all_operations():
    """With the pixels of one image, every operation leaves its own result behind."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 130, 3), np.uint8)
    image = tf.constant(noise)
    results = {
        name: {
            f(image, 1.0, tf.constant(sign), tf.constant([0.5, 0.5]), False)
            .numpy()
            .tobytes()
            for sign in (-1.0, 1.0)
        }
        for name, f in ra.OPERATIONS.items()
        if name != "Cutout"  # anywhere
    }
    counts = dict.fromkeys(ra.OPERATIONS, 0)
    for made in for_each_seed(lambda s: ra.randaugment(image, s, n=1, m=10.0), 640):
        found = (n for n, r in results.items() if made.tobytes() in r)
        counts[next(found, "Cutout")] += 1
    # Solarize at m = 10 inverts, and so does Invert: they share 80 of 640 draws.
    assert counts.pop("Solarize") == 0
    assert abs(counts.pop("Invert") - 80) < 40
    # The others: 40 each, with a standard deviation of 6.
    assert min(counts.values()) > 15
    assert max(counts.values()) < 70


def test_magnitudes_in_pixels_that_exceed_the_image_are_mentioned(caplog):
    for side, m, words in ((224, 20.0, 0), (96, 3.0, 0), (32, 5.0, 1), (96, 10.0, 1)):
        caplog.clear()
        ra.randaugment(tf.zeros([side, side, 3], tf.uint8), seeds(1)[0], n=1, m=m)
        assert caplog.text.count("many become one colour") == words


@pytest.mark.heavy
def test_randaugment_applies_n_layers():
    image = tf.zeros([8, 8, 3], tf.uint8) + 10
    # 12 of the 16 operations do something to a plain dark image, most of them visibly.
    changed = [
        (for_each_seed(lambda s, n=n: ra.randaugment(image, s, n=n, m=10.0), 60) != 10)
        .any((1, 2, 3))
        .sum()
        for n in (0, 1, 4)
    ]
    assert changed[0] == 0
    assert changed[0] < changed[1] < changed[2]


def test_tensorflow_sees_no_accelerator():
    assert not tf.config.get_visible_devices("GPU")
    assert not tf.config.get_visible_devices("TPU")
