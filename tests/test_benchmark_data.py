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


@pytest.mark.heavy
def test_files_that_are_not_good_jpegs_are_left_out(tmp_path, caplog):
    write_folder(tmp_path, {"a": 5, "b": 5}, ("train",))
    good = encoded(picture(0))
    for i, content in enumerate([b"", good[:-40], encoded(picture(1), "PNG")]):
        (tmp_path / f"train/a/bad{i}.jpg").write_bytes(content)
    (tmp_path / "train/b/gone.jpg").symlink_to("/nowhere.jpg")
    found = run(tmp_path)
    assert found["images"] == 10
    assert "left out 4 files that are not good JPEGs" in caplog.text
    # Ratios by CPU time first: those by wall time tell of the other programs.
    ratios = [k for k in found if k.startswith(("times", "share"))]
    assert [k.endswith("_cpu") for k in ratios] == [True] * 3 + [False] * 3
    assert min(found["images_per_second"].values()) > 0
    # Every kind of storage is timed, and compared with the files.
    stored = [
        "tfrecord",
        "array_record",
        "tar",
        "parquet",
        "shrunk_256_90",
        "shrunk_320_95",
    ]
    assert list(found["times_files_cpu"]) == list(found["times_files"]) == stored
    most = found["images_per_second_at_most"]
    assert list(most) == ["files", *stored]
    assert found["images_per_second_by_cores"]["files"]["224"] <= most["files"]
    every = ["obvious", "decode_only", "files", *stored]
    assert list(found["images_per_second"]) == every


def test_more_cores_bring_more_up_to_what_one_thread_draws(tmp_path):
    assert benchmark.by_cores(0.001, 50_000) == {
        "8": 8_000, "24": 24_000, "112": 50_000, "224": 50_000
    }  # fmt: skip


def test_a_folder_without_classes_will_do(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
    assert run(tmp_path)["images"] == 4


def test_a_folder_without_jpegs_is_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(encoded(picture(0), "PNG"))
    with pytest.raises(UserError, match="holds no JPEG file"):
        run(tmp_path)
    (tmp_path / "1.jpg").write_bytes(encoded(picture(0), "PNG"))
    with pytest.raises(UserError, match=r"none of 1 images in .* is a JPEG"):
        run(tmp_path)


def test_the_config_is_checked_first(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 2})
    wrong = ({"op": "inception_crop", "area": 0.5},)
    with pytest.raises(UserError, match=r"area is 0.5: it must be a list"):
        run(tmp_path, train_transforms=wrong)
