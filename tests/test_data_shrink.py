# SPDX-License-Identifier: Apache-2.0
"""Shards whose images were made smaller: what is in them, and who may write them."""

import io
import json
import re

import numpy as np
import pytest
from data_files import encoded, picture, write_folder
from PIL import Image, ImageCms, ImageOps

from vit_jax.data import graph, records, write_records
from vit_jax.data.shrink import Shrink
from vit_jax.errors import UserError

SHRINK = Shrink(32, 95)


def shrunk(data, shrink=SHRINK):
    """(the file to write, its pixels)"""
    made = shrink(data, graph.pixels(data, "encoded"))
    return made, np.asarray(Image.open(io.BytesIO(made)).convert("RGB")).astype(int)


def written(folder, **options):
    """{name: image file} of the split train, and its index."""
    options = {"split": "train", "shards": 2} | options
    index = write_records.write(options.pop("source"), str(folder), **options)["train"]
    part = records.load(
        records.DataConfig(source="records", path=str(folder), test_split="train")
    ).train
    return [bytes(i) for i in part.read(np.arange(len(part)))[0]], index


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (33, 200), (4000, 33)])
def test_the_shorter_side_is_the_wanted_one_and_the_ratio_stays(size):
    width, height = size
    made, pixels = shrunk(encoded(picture(0, height, width)))
    assert made.startswith(b"\xff\xd8")
    assert min(pixels.shape[:2]) == 32
    factor = 32 / min(size)
    assert pixels.shape[:2] == (round(height * factor), round(width * factor))
    small = picture(0, height, width).resize(pixels.shape[1::-1])
    assert np.abs(pixels - np.asarray(small)).mean() < 4


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("side", [32, 33, 1000])
def test_what_is_small_enough_stays_byte_by_byte(format, side):
    data = encoded(picture(0, 32, 64), format)
    assert shrunk(data, Shrink(side, 95))[0] == data


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured_once(orientation):
    """Pillow's own turning is the reference; the file says nothing of it any more."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(3, 64, 96), exif=exif)
    made, pixels = shrunk(data)
    assert Image.open(io.BytesIO(made)).getexif().get(0x0112, 1) == 1
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = np.asarray(upright.resize(pixels.shape[1::-1], 1))
    assert np.abs(pixels - expected).mean() < 4


MODES = {
    "grey": lambda: encoded(picture(0, 64, 80).convert("L")),
    "cmyk": lambda: encoded(picture(0, 64, 80).convert("CMYK")),
    "palette": lambda: encoded(picture(0, 64, 80).quantize(256), "PNG"),
    "alpha": lambda: encoded(picture(0, 64, 80).convert("RGBA"), "PNG"),
    "grey alpha": lambda: encoded(picture(0, 64, 80).convert("LA"), "PNG"),
    "two colours": lambda: encoded(picture(0, 64, 80).convert("1"), "PNG"),
    "16 bit": lambda: encoded(
        Image.fromarray(np.asarray(picture(0, 64, 80).convert("L")).astype("u2") * 257),
        "PNG",
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_what_readers_made_of_it(mode):
    data = MODES[mode]()
    _, pixels = shrunk(data)
    whole = Image.fromarray(graph.pixels(data, "encoded"))
    expected = np.asarray(whole.resize(pixels.shape[1::-1], Image.Resampling.LANCZOS))
    assert np.abs(pixels - expected).mean() < 4


def profile(primaries, gamma):
    """An ICC profile (version 2) of a display with linear (X, Y, Z) of red, green and
    blue and one gamma, as its specification lays them out."""

    def fixed(values):
        return b"".join(
            round(v * 65536).to_bytes(4, "big", signed=True) for v in values
        )

    bodies = {
        b"desc": b"desc" + bytes(4) + (5).to_bytes(4, "big") + b"wide\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"free\0",
        b"wtpt": b"XYZ " + bytes(4) + fixed((0.9642, 1.0, 0.8249)),
    }
    for letter, xyz in zip("rgb", primaries, strict=True):
        bodies[f"{letter}XYZ".encode()] = b"XYZ " + bytes(4) + fixed(xyz)
        curve = round(gamma * 256).to_bytes(2, "big")
        bodies[f"{letter}TRC".encode()] = (
            b"curv" + bytes(4) + (1).to_bytes(4, "big") + curve
        )
    table, body = b"", b""
    start = 128 + 4 + 12 * len(bodies)
    for tag, content in bodies.items():
        content += bytes(-len(content) % 4)
        sizes = (start + len(body), len(content))
        table += tag + b"".join(v.to_bytes(4, "big") for v in sizes)
        body += content
    whole = (len(bodies)).to_bytes(4, "big") + table + body
    header = (128 + len(whole)).to_bytes(4, "big") + bytes(4) + b"\x02\x10\0\0"
    header += b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += fixed((0.9642, 1.0, 0.8249)) + bytes(48)
    return header + whole


# Of sRGB, adapted to D50, green and red exchanged: a red pixel means green.
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
SWAPPED = profile((SRGB[1], SRGB[0], SRGB[2]), 2.2)


@pytest.mark.parametrize("side", [32, 1000])
def test_colour_profiles_are_honoured_in_small_images_too(side):
    red = Image.new("RGB", (80, 64), (200, 30, 30))
    made, pixels = shrunk(encoded(red, icc_profile=SWAPPED), Shrink(side, 95))
    assert np.abs(pixels - (30, 200, 30)).max() < 12
    assert "icc_profile" not in Image.open(io.BytesIO(made)).info
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for ignored in (srgb, b"not a profile"):
        small = encoded(red, icc_profile=ignored)
        assert shrunk(small, Shrink(64, 95))[0] == small
    # One of other colours than the pixels have is not for them.
    cmyk = encoded(red.convert("CMYK"), icc_profile=SWAPPED)
    assert shrunk(cmyk, Shrink(64, 95))[0] == cmyk


def test_command(tmp_path, command):
    photos = write_folder(tmp_path / "photos", {"a": 3, "b": 3}, ("train", "test"))
    (photos / "train/a/cut.jpg").write_bytes(encoded(picture(0))[:-99])
    flags = ("--shorter_side=12", "--quality=80")
    module, dest = "vit_jax.data.write_records", tmp_path / "records"
    done = command(photos, dest, *flags, module=module)
    assert done.returncode == 0
    assert "6 of 6 images are smaller now" in done.stdout
    assert "left out" in done.stdout
    images, index = written(
        dest, source=str(photos), shards=1, shorter_side=12, quality=80
    )
    assert (index["shorter_side"], index["quality"], len(images)) == (12, 80, 6)
    for other in (("--shorter_side=12",), ("--shorter_side=13", flags[1]), ()):
        done = command(photos, dest, *other, module=module)
        assert done.returncode == 2
        assert "shards of two writings do not mix" in done.stderr
        assert json.loads((dest / "train.json").read_text()) == index


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--shorter_side=12", "--quality=0"),
            r"--quality is 0: it must lie in \[1, 1",
        ),
        (("--shorter_side=12", "--quality=101"), r"--quality is 101"),
        (("--shorter_side=-1",), r"--shorter_side is -1"),
        (("--quality=80",), r"--quality changes nothing without --shorter_side"),
        (("--process_id=2", "--num_processes=2"), r"--process_id is 2 of --num"),
    ],
)
def test_bad_settings(flags, message, tmp_path, command):
    done = command("x", tmp_path, *flags, module="vit_jax.data.write_records")
    assert done.returncode == 2
    assert re.search(message, done.stderr)


def test_a_side_above_all_images_changes_none_and_says_so(tmp_path, command):
    photos = write_folder(tmp_path / "photos", {"a": 3, "b": 3}, ("train", "test"))
    dest = tmp_path / "records"
    flags = ("--split=train", "--shorter_side=1000")
    done = command(photos, dest, *flags, module="vit_jax.data.write_records")
    assert "0 of 6 images are smaller now" in done.stdout
    images, _ = written(dest, source=str(photos), shards=1, shorter_side=1000)
    assert set(images) == {f.read_bytes() for f in photos.glob("train/*/*.jpg")}


def test_a_writing_with_other_settings_is_refused_half_way(tmp_path):
    """Where the first was killed before its index: the sidecars tell."""
    photos = str(write_folder(tmp_path / "photos", {"a": 4, "b": 4}, ("train", "test")))
    dest = tmp_path / "records"
    before, _ = written(dest, source=photos, shorter_side=12, quality=80)
    (dest / "train.json").unlink()
    (dest / "train-00001-of-00002.tfrecord").unlink()
    for side, quality in ((12, 90), (16, 80), (0, 90)):
        with pytest.raises(UserError, match="of two writings do not mix"):
            written(dest, source=photos, shorter_side=side, quality=quality)
    assert written(dest, source=photos, shorter_side=12, quality=80)[0] == before


def test_shards_of_two_settings_are_not_read_together(tmp_path):
    photos = str(write_folder(tmp_path / "photos", {"a": 4, "b": 4}, ("train", "test")))
    a, b = tmp_path / "a", tmp_path / "b"
    written(a, source=photos, shorter_side=12)
    written(b, source=photos, shorter_side=16)
    name = "train-00001-of-00002.tfrecord"
    (a / name).write_bytes((b / name).read_bytes())
    with pytest.raises(UserError, match=f"{name} .* but .*train.json says"):
        written_reader(a)
    (a / f"{name}.npz").write_bytes((b / f"{name}.npz").read_bytes())
    text = (a / "train.json").read_text()
    index = json.loads(text)
    index["shards"][1]["bytes"] = (b / name).stat().st_size
    (a / "train.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not the shard that its index lists"):
        written_reader(a)


def written_reader(folder):
    cfg = records.DataConfig(source="records", path=str(folder), test_split="train")
    part = records.load(cfg).train
    return part.read(np.arange(len(part)))


def test_processes_share_the_shards_out(tmp_path):
    """In any order of ending; the last one writes the index, the same as one alone."""
    photos = str(write_folder(tmp_path / "photos", {"a": 5, "b": 5}, ("train", "test")))
    alone = written(tmp_path / "alone", source=photos, shards=3)
    shared = tmp_path / "shared"
    options = {"split": "train", "shards": 3, "num_processes": 2}
    assert write_records.write(photos, str(shared), process_id=1, **options) == {}
    assert sorted(p.name for p in shared.glob("*.tfrecord")) == [
        "train-00001-of-00003.tfrecord"
    ]
    assert write_records.write(photos, str(shared), process_id=0, **options)
    assert written_reader(shared)[0] == alone[0]
    assert json.loads((shared / "train.json").read_text()) == alone[1]
