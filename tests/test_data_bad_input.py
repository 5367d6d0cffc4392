# SPDX-License-Identifier: Apache-2.0
"""Odd files are read as they should be; bad ones are skipped, counted and named."""

import dataclasses
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import fuzz_images
import numpy as np
import pytest
from data_files import (
    encoded,
    picture,
    take,
    write_folder,
    write_parquets,
    write_tars,
    write_tfrecords,
)
from PIL import Image, ImageOps

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import image_files
from vit_jax.data.decode import decode, decode_crop, shape_of
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError

RGB = picture(3, 40, 60)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be of this size and holds nothing."""

    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


def animated(format: str) -> bytes:
    buffer = io.BytesIO()
    frames = [half_transparent(picture(i, 40, 60)) for i in range(3)]
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def half_transparent(image: Image.Image) -> Image.Image:
    pixels = np.array(image.convert("RGBA"))
    pixels[: len(pixels) // 2, :, 3] = 0
    return Image.fromarray(pixels)


def as_rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


ODD = {
    "rgb": encoded(RGB),
    "grey jpeg": encoded(RGB.convert("L")),
    "cmyk jpeg": encoded(RGB.convert("CMYK")),
    "grey png": encoded(RGB.convert("L"), "PNG"),
    "palette png": encoded(RGB.convert("P"), "PNG"),
    "alpha png": encoded(RGB.convert("RGBA"), "PNG"),
    "grey alpha png": encoded(RGB.convert("LA"), "PNG"),
    "one-bit png": encoded(RGB.convert("1"), "PNG"),
    "bmp": encoded(RGB, "BMP"),
    "palette bmp": encoded(RGB.convert("P"), "BMP"),
    "one-bit bmp": encoded(RGB.convert("1"), "BMP"),
    "webp": encoded(RGB, "WEBP", lossless=True),
    "alpha webp": encoded(half_transparent(RGB), "WEBP", lossless=True),
    "animated webp": animated("WEBP"),
    "gif": animated("GIF"),
    "one pixel": encoded(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"),
    "trailing bytes": encoded(RGB) + b"\0\0\0",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_read_as_pillow_reads_them(name):
    made = decode(tf.constant(ODD[name])).numpy()
    assert shape_of(tf.constant(ODD[name])).numpy()[:2].tolist() == [*made.shape[:2]]
    # Decoders of JPEG may differ by a few steps, most in the conversion from CMYK.
    np.testing.assert_allclose(made, as_rgb(ODD[name]), atol=4)
    np.testing.assert_array_equal(image_files.read(ODD[name]), as_rgb(ODD[name]))


def test_sixteen_bits_become_eight():
    values = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    made = decode(tf.constant(encoded(Image.fromarray(values), "PNG"))).numpy()
    np.testing.assert_array_equal(made, np.repeat(values[..., None] >> 8, 3, -1))


def exif_block(orientation: int, endian: str) -> bytes:
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F] = "maker"
    exif[0x0112] = orientation
    return exif.tobytes()


def inserted(kind: int, body: bytes, jpeg: bytes, at: int = 2) -> bytes:
    """A JPEG with one more segment."""
    segment = bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body
    return jpeg[:at] + segment + jpeg[at:]


def after_the_pixels(png: bytes) -> bytes:
    """A PNG whose eXIf chunk stands behind the pixels, as some tools write it."""
    at = png.index(b"eXIf") - 4
    chunk = png[at : at + 12 + int.from_bytes(png[at : at + 4])]
    rest = png.replace(chunk, b"")
    return rest[:-12] + chunk + rest[-12:]


PLAIN = encoded(RGB)
ROTATED = {
    "jpeg": lambda exif: encoded(RGB, exif=exif),
    "comment": lambda exif: inserted(0xFE, b"made by", encoded(RGB, exif=exif)),
    "icc": lambda exif: inserted(
        0xE2, b"ICC_PROFILE" + bytes(9000), encoded(RGB, exif=exif)
    ),
    "app13": lambda exif: inserted(0xED, b"Photoshop 3.0", encoded(RGB, exif=exif)),
    "fill bytes": lambda exif: (
        PLAIN[:2] + b"\xff" * 99 + inserted(0xE1, exif, PLAIN)[2:]
    ),
    "late": lambda exif: inserted(0xE1, exif, PLAIN, PLAIN.index(b"\xff\xc0")),
    "progressive": lambda exif: encoded(RGB, exif=exif, progressive=True),
    "png": lambda exif: encoded(RGB, "PNG", exif=exif),
    "png, at the end": lambda exif: after_the_pixels(encoded(RGB, "PNG", exif=exif)),
    "webp": lambda exif: encoded(RGB, "WEBP", exif=exif, lossless=True),
}


@pytest.mark.parametrize("form", ROTATED)
def test_exif_orientation_counts_wherever_it_stands(form):
    """In training (a crop), in evaluation (the whole) and in prediction."""
    place = tf.constant([3, 7, 20, 16])
    for orientation in range(1, 9):
        exif = exif_block(orientation, "<>"[orientation % 2])
        stored = ROTATED[form](exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
        expected = np.asarray(expected.convert("RGB"))
        predicted = image_files.read(stored)
        np.testing.assert_array_equal(predicted, expected)
        data = tf.constant(stored)
        np.testing.assert_allclose(decode(data).numpy(), expected, atol=4)
        assert shape_of(data).numpy().tolist() == [*expected.shape]
        for target in (0, 16):
            crop = decode_crop(data, lambda _: place, target=target).numpy()
            # Chroma looks across the edge of a crop.
            np.testing.assert_allclose(
                crop[1:-1, 1:-1],
                expected[4:22, 8:22],
                atol=12,
                err_msg=f"{orientation}",
            )


def test_damaged_exif_leaves_an_image_as_it_is():
    exif = exif_block(6, ">")
    cut = [exif[:-n] for n in range(14, 40, 3)]
    for damaged in [
        *cut,
        exif.replace(b"MM", b"XX"),
        exif.replace(b"\0\x06", b"\0\x09"),
    ]:
        stored = inserted(0xE1, damaged, PLAIN)
        np.testing.assert_array_equal(image_files.read(stored), as_rgb(PLAIN))
        np.testing.assert_allclose(decode(tf.constant(stored)), as_rgb(PLAIN), atol=4)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (40, 60), (333, 17)])
def test_sides_of_webp_files_are_told_before_they_are_opened(
    height, width, monkeypatch
):
    rgb = picture(3, height, width)
    files = [
        encoded(rgb, "WEBP"),
        encoded(rgb, "WEBP", lossless=True),
        encoded(half_transparent(rgb), "WEBP"),
        encoded(rgb, "WEBP", icc_profile=bytes(100)),
    ]
    monkeypatch.delattr(image_files, "opened")
    for file in files:
        assert image_files.header(file) == (height, width, 1, 0)


def test_sizes_that_a_file_cannot_hold_are_refused():
    side = int((image_files.MEMORY / 8) ** 0.5)
    assert image_files.header(png_header(side, side))[:2] == (side, side)
    for sides in ((side, side + 1), (2**31 - 1, 2**31 - 1), (0, 5)):
        with pytest.raises(image_files.ImageFileError, match=r"pixels|no size"):
            image_files.header(png_header(*sides))
    # The bytes that follow may hold them; the absolute limit stays.
    large = png_header(2**13, 2**14) + bytes(2**21)
    assert image_files.header(large)[:2] == (2**14, 2**13)
    with pytest.raises(
        image_files.ImageFileError, match="is more than 134217728 pixels"
    ):
        image_files.header(png_header(2**13, 2**14 + 1) + bytes(2**22))
    big = bytearray(PLAIN)
    at = big.index(b"\xff\xc0") + 5
    big[at : at + 4] = b"\x7f\xff\x7f\xff"
    for read in (decode, shape_of):
        with pytest.raises(
            tf.errors.InvalidArgumentError, match="32767 x 32767 is more"
        ):
            read(tf.constant(bytes(big)))
    with pytest.raises(tf.errors.InvalidArgumentError, match="32767 x 32767 is more"):
        decode_crop(
            tf.constant(bytes(big)), lambda _: tf.constant([0, 0, 1, 1]), target=1
        )


@pytest.mark.process
def test_evaluation_takes_three_bytes_per_pixel():
    """Measured in a process of its own, whose peak nothing else has raised."""
    code = """if 1:
        import io, resource
        import fuzz_images
        from PIL import Image
        evaluate = fuzz_images.ways()["evaluation"]
        files = [io.BytesIO() for _ in range(2)]
        for file, side in zip(files, (100, 5000)):
            Image.new("RGB", (side, side), (10, 200, 30)).save(file, "JPEG")
        peaks = []
        for file in files:
            evaluate(file.getvalue())
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        print((peaks[1] - peaks[0]) / 5000**2)
    """
    folder = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=env)
    assert float(done.stdout) < 3.3


@pytest.mark.heavy
@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_smaller(orientation):
    """Alike in training, evaluation and prediction: colours and sides that a mean over
    2 x 2 pixels has."""
    across = np.linspace(0, 255, 6000).astype(np.uint8)
    pixels = np.broadcast_to(across[None, :, None], (5000, 6000, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(pixels)), exif=exif)
    assert image_files.header(data) == (5000, 6000, orientation, 1)
    halves = (
        pixels[::2, ::2].transpose(1, 0, 2) if orientation == 6 else pixels[::2, ::2]
    )
    whole = tf.constant(data)
    window = lambda shape: tf.concat([[0, 0], shape[:2]], 0)
    found = (
        decode(whole).numpy(),
        decode_crop(whole, window, target=0).numpy(),
        image_files.read(data),
    )
    for image in found:
        np.testing.assert_allclose(image.astype(int), halves, atol=2)
    memory = fuzz_images.Memory()
    image_files.read(data)
    assert memory.taken() < fuzz_images.bound(len(data))


@pytest.mark.slow
def test_a_hundred_megapixels(tmp_path):
    (tmp_path / "a").mkdir()
    big = Image.new("RGB", (12_500, 8_000), (10, 200, 30))
    for i in range(2):
        big.save(tmp_path / f"a/{i}.jpg")
    cfg = DataConfig(source="folder", path=str(tmp_path), image_size=16, test_share=0.5)
    for batch in (
        next(data.train_batches(cfg, batch=1, seed=0)),
        next(data.eval_batches(cfg, batch=1)),
    ):
        np.testing.assert_allclose(batch["image"][0, 8, 8], [10, 200, 30], atol=4)


BAD = {
    "truncated": encoded(RGB)[:-200],
    "zero bytes": b"",
    "no image": b"hello",
    "html": b"<html>403</html>",
    "claims too much": png_header(60_000, 60_000),
    "truncated png": encoded(RGB, "PNG")[:-300],
    "jpeg of a few bytes": b"\xff\xd8\xff\xe0abc",
    "jpeg of zeros": b"\xff\xd8\xff\xe0" + bytes(200),
    "jpeg of noise": b"\xff\xd8\xff" + np.random.default_rng(0).bytes(300),
}


def with_bad_files(root, count=1, good=10):
    write_folder(root, {"a": good, "b": good}, ("train", "test"))
    bad = []
    for i, content in enumerate([*BAD.values()][:count]):
        for split in ("train", "test"):
            bad.append(root / split / "a" / f"bad{i}.jpg")
            bad[-1].write_bytes(content)
    return bad


WRITERS = {"tar": write_tars, "parquet": write_parquets, "records": write_tfrecords}


@pytest.fixture(scope="module")
def bad_sets(tmp_path_factory):
    """{source: folder} of 10 photographs of each of two classes and all of ``BAD``."""
    root = tmp_path_factory.mktemp("bad")
    with_bad_files(root / "folder", len(BAD))
    written = {k: write(root / "folder", root / k) for k, write in WRITERS.items()}
    return {"folder": root / "folder"} | written


# Of those that are read in sequence, 29 photographs are one stream.
BAD_KINDS = ["folder", "folder cached", *WRITERS, *(f"{k} sequential" for k in WRITERS)]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", BAD_KINDS)
def test_bad_examples_are_skipped_counted_and_named(kind, bad_sets, caplog):
    source, _, way = kind.partition(" ")
    cfg = DataConfig(
        source=source,
        path=str(bad_sets[source]),
        image_size=8,
        max_bad=0.5,
        cache_gib=float(way == "cached"),
        access="sequential" if way == "sequential" else "auto",
        num_classes=2,
    )
    whole = take(data.train_batches(cfg, batch=12, seed=0), 6)
    for b in whole:
        assert (b["image"].reshape(12, -1).std(axis=1) > 0).all()
    # What stands in for a bad one does not depend on when it was found to be bad, nor on
    # the number of processes.
    late = next(data.train_batches(cfg, batch=12, seed=0, start=5))
    np.testing.assert_array_equal(late["image"], whole[5]["image"])
    if way != "sequential":
        half = data.train_batches(
            cfg, batch=12, seed=0, process_index=1, process_count=2
        )
        for b, expected in zip(half, whole[:2], strict=False):
            np.testing.assert_array_equal(b["image"], expected["image"][6:])
    tested = list(data.eval_batches(cfg, batch=8))
    labels = np.concatenate([b["label"][b["mask"] == 1] for b in tested])
    assert np.bincount(labels).tolist() == [10, 10]
    below = "data/train" if source == "parquet" else "train"
    train = str(bad_sets[source] / below)
    found = {n: r for n, r in data.bad_examples().items() if n.startswith(train)}
    assert len(found) == len(BAD)
    assert "60000 x 60000 is more than 134217728 pixels" in found.values()
    assert {"not an image, size in bytes: 0", "not an image, size in bytes: 5"} <= {
        *found.values()
    }
    reasons = [*found.values()]
    assert all("error" not in r and "node" not in r for r in reasons), reasons
    if source == "folder":
        assert {name.rsplit("/", 1)[1] for name in found} == {
            f"bad{i}.jpg" for i in range(len(BAD))
        }
    with pytest.raises(UserError, match=r"examples cannot be read.*raise config.data"):
        list(data.eval_batches(dataclasses.replace(cfg, max_bad=0.1), batch=8))


def test_one_bad_file_does_not_stop_a_small_set(tmp_path):
    with_bad_files(tmp_path)
    cfg = DataConfig(source="folder", path=str(tmp_path), image_size=8, cache_gib=0.0)
    assert len(take(data.train_batches(cfg, batch=21, seed=0), 2)) == 2


def test_no_bad_file_is_allowed_where_none_may_be(tmp_path):
    with_bad_files(tmp_path)
    cfg = DataConfig(source="folder", path=str(tmp_path), image_size=8, max_bad=0.0)
    with pytest.raises(UserError, match=r"1 of 21 examples cannot be read"):
        take(data.train_batches(cfg, batch=8, seed=0), 8)


def test_a_set_of_nothing_but_bad_files_stops(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").write_bytes(b"no image")
    cfg = DataConfig(source="folder", path=str(tmp_path), image_size=8, max_bad=1.0)
    with pytest.raises(UserError, match="4 of 4 examples cannot be read"):
        next(data.train_batches(cfg, batch=2, seed=0))


def test_damaged_files_of_every_format():
    """A few of what ``python tests/fuzz_images.py`` tries."""
    tally, failures, _ = fuzz_images.run(40, seed=1)
    assert not failures
    ways = ("training", "evaluation", "prediction")
    assert all(tally[f"{way} {end}"] for way in ways for end in ("read", "refused"))
