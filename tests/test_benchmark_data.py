# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder the benchmark of the input pipeline takes."""

import pytest
from data_files import encoded, picture, write_folder

from vit_jax.config import DataConfig
from vit_jax.data import benchmark
from vit_jax.errors import UserError


def run(folder, **options):
    cfg = DataConfig(source="folder", path=str(folder), image_size=8, **options)
    return benchmark.run(cfg, batch=2, rounds=1, steps=1)


def test_what_is_no_good_jpeg_is_left_out(tmp_path, caplog):
    write_folder(tmp_path, {"a": 5, "b": 5}, ("train",))
    good = encoded(picture(0))
    for i, content in enumerate([b"", good[:-40], encoded(picture(1), "PNG")]):
        (tmp_path / f"train/a/bad{i}.jpg").write_bytes(content)
    write_folder(tmp_path, {"a": 1, "b": 1}, ("test",))
    (tmp_path / "train/b/gone.jpg").symlink_to("/nowhere.jpg")
    assert run(tmp_path)["images"] == 10
    assert "left out 4 files that are no good JPEG" in caplog.text


def test_a_folder_without_jpegs_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(encoded(picture(i), "PNG"))
    with pytest.raises(UserError, match=r"none of 6 images in data.path .* is a JPEG"):
        run(tmp_path)


def test_the_config_is_checked_first(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    wrong = ({"op": "inception_crop", "area": 0.5},)
    with pytest.raises(UserError, match=r"area is 0.5: it must be a list"):
        run(tmp_path, train_transforms=wrong)
