# SPDX-License-Identifier: Apache-2.0
"""tfds sets through a small one that the test prepares, ImageNet's archives, VTAB."""

import dataclasses

import numpy as np
import pytest
from data_files import picture

from vit_jax import data, plan
from vit_jax.config import Config, DataConfig
from vit_jax.data import tfds_source, transforms, vtab
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError
from vit_jax.vtab_tasks import GROUPS, TASKS

import tensorflow_datasets as tfds  # isort: skip


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """Twenty training and seven validation images of three classes."""

    VERSION = tfds.core.Version("1.0.0")
    SIZES = (20, 7)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        train, validation = self.SIZES
        return {
            "train": self._generate_examples(train, 0),
            "validation": self._generate_examples(validation, 100),
        }

    def _generate_examples(self, count, seed):
        for i in range(count):
            yield i, {"image": np.asarray(picture(seed + i, 6, 8)), "label": i % 3}


class TinyTask(TinyPhotos):
    """Enough for the 800 + 200 images of VTAB-1k."""

    VERSION = tfds.core.Version("1.0.0")
    SIZES = (820, 210)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("tfds"))
    tfds_source.prepared("tiny_photos", root)
    return root


def test_a_tfds_set_and_its_splits(data_dir):
    cfg = DataConfig(source="tfds", name="tiny_photos", path=data_dir, image_size=8)
    assert data.describe(cfg) == data.DataInfo(3, ("x", "y", "z"), 20, 7, False)
    sliced = DataConfig(
        source="tfds",
        name="tiny_photos",
        path=data_dir,
        image_size=8,
        train_split="train[:75%]",
        test_split="train[75%:]",
    )
    info = data.describe(sliced)
    assert (info.num_train, info.num_test) == (15, 5)
    labels = next(data.train_batches(cfg, batch=20, seed=0))["label"]
    assert np.bincount(labels).tolist() == [7, 7, 6]
    masks = [b["mask"].sum() for b in data.eval_batches(cfg, batch=4)]
    assert sum(masks) == 7


def test_a_large_tfds_set_is_read_from_its_files(data_dir):
    """As above, but without the memory to hold it."""
    small, large = (
        DataConfig(
            source="tfds",
            name="tiny_photos",
            path=data_dir,
            image_size=8,
            train_split="train[10%:]",
            cache_gib=gib,
        )
        for gib in (1.0, 0.0)
    )
    assert data.describe(small) == data.describe(large)
    pixels = [
        sorted(
            (i.tobytes(), int(n)) for i, n in zip(b["image"], b["label"], strict=True)
        )
        for b in (
            next(data.eval_batches(c, batch=18, split="train")) for c in (small, large)
        )
    ]
    assert pixels[0] == pixels[1]


def test_unknown_names(data_dir):
    cfg = DataConfig(source="tfds", name="cifr10", path=data_dir)
    with pytest.raises(UserError, match=r"unknown tfds set 'cifr10'.*'cifar10'"):
        data.describe(cfg)
    with pytest.raises(UserError, match=r"data.name is empty"):
        data.describe(DataConfig(source="tfds"))
    cfg = DataConfig(
        source="tfds", name="tiny_photos", path=data_dir, train_split="nothing"
    )
    with pytest.raises(UserError, match=r"no split 'nothing': it has"):
        data.describe(cfg)


def test_a_set_can_be_prepared_for_the_first_time(tmp_path):
    """tfds imports a package for that which it does not depend on."""
    builder = tfds_source.unprepared("oxford_iiit_pet", str(tmp_path))
    assert len(builder.url_infos) == 2


@pytest.mark.parametrize(
    ("name", "classes"), [("oxford_iiit_pet", 37), ("vtab/dtd", 47)]
)
def test_a_plan_knows_the_classes_of_a_set_without_downloading_it(
    name, classes, tmp_path
):
    cfg = Config(data=DataConfig(source="tfds", name=name, path=str(tmp_path)))
    info = plan._describe(cfg)
    assert info is not None
    assert info.num_classes == classes
    assert not list(tmp_path.iterdir())


def test_a_plan_asks_for_the_classes_that_a_set_does_not_tell(tmp_path):
    cfg = Config(data=DataConfig(source="tfds", name="coco/2014", path=str(tmp_path)))
    with pytest.raises(UserError, match=r"give --config.model.num_classes=N"):
        plan._describe(cfg)


def test_imagenet_archives_missing_or_misplaced(tmp_path):
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    with pytest.raises(UserError, match=r"train.tar is missing.*val.tar is missing"):
        tfds_source.check_imagenet_archives(tmp_path)
    (tmp_path / "downloads" / "ILSVRC2012_img_val.tar").write_bytes(b"")
    (manual / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"val.tar is at .*downloads/ILSVRC.*, move it"):
        tfds_source.check_imagenet_archives(tmp_path)
    (manual / "ILSVRC2012_img_val.tar").write_bytes(b"")
    tfds_source.check_imagenet_archives(tmp_path)
    (manual / "ILSVRC2012_img_train.tar").unlink()
    cfg = DataConfig(source="tfds", name="imagenet2012", path=str(tmp_path))
    with pytest.raises(UserError, match=r"The exact tree is .*downloads/manual/ILSVRC"):
        data.describe(cfg)


# ------------------------------------------------------------------------------ VTAB


def test_the_table_is_complete():
    groups = [t.group for t in TASKS.values()]
    assert [groups.count(g) for g in GROUPS] == [7, 4, 8]
    classes = {name: t.classes for name, t in TASKS.items()}
    assert [*classes.values()][:11] == [102, 100, 47, 102, 37, 397, 10, 2, 10, 45, 5]
    assert [*classes.values()][11:] == [8, 6, 6, 16, 16, 4, 18, 9]
    no_flip = {n for n, t in TASKS.items() if not t.flip}
    assert no_flip == {"dsprites_location", "dsprites_orientation", "smallnorb_azimuth"}
    no_crop = {n for n, t in TASKS.items() if not t.crop}
    assert no_crop == {
        "clevr_count",
        "clevr_distance",
        "dmlab",
        "kitti_distance",
        "dsprites_location",
    }
    assert vtab.LABELS.keys() <= TASKS.keys()


SIZES = {
    "cifar100": ({"train": 50000}, "train[45000:45200]"),
    "pets": ({"train": 3680}, "train[2944:3144]"),
    "svhn": ({"train": 73257}, "train[65931:66131]"),
    "eurosat": ({"train": 27000}, "train[16200:16400]"),
    "resisc45": ({"train": 31500}, "train[18900:19100]"),
    "clevr_count": ({"train": 70000}, "train[63000:63200]"),
    "dtd": ({"validation": 1880}, "validation[0:200]"),
    "smallnorb_azimuth": ({"test": 24300}, "test[0:200]"),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_splits_are_those_of_the_benchmark(name):
    sizes, val = SIZES[name]
    found = vtab.split_expressions(TASKS[name], {"test": 24300} | sizes)
    assert found["val200"] == val
    assert found["train800val200"] == f"train[:800]+{val}"
    test = {"eurosat": "train[21600:]", "resisc45": "train[25200:]"}
    test |= {"clevr_count": "validation", "smallnorb_azimuth": "test[12150:]"}
    assert found["test"] == test.get(name, "test")


def test_label_rules():
    coords = {"objects": {"pixel_coords": np.array([[0, 0, 9.7], [0, 0, 8.2]])}}
    assert vtab.LABELS["clevr_distance"](coords) == 1
    assert vtab.nearest_clevr({"objects": {"pixel_coords": [[0, 0, 10.5]]}}) == 5
    assert vtab.LABELS["clevr_count"]({"objects": {"size": [1, 0, 1, 1]}}) == 1
    cars = {
        "objects": {"type": [3, 0, 2], "location": [[0, 0, 2.0], [0, 0, 30], [0, 0, 9]]}
    }
    assert vtab.nearest_kitti(cars) == 1
    nobody = {"objects": {"type": np.array([4]), "location": np.array([[0, 0, 2.0]])}}
    assert vtab.nearest_kitti(nobody) == 3
    assert vtab.LABELS["dsprites_location"]({"label_x_position": 31}) == 15
    turned = vtab.LABELS["dsprites_orientation"]
    assert [turned({"label_orientation": i}) for i in (0, 2, 3, 39)] == [0, 0, 1, 15]


@pytest.fixture
def tiny_task(monkeypatch):
    row = TASKS["dtd"]._replace(
        source="tiny_task", classes=3, val=("validation", 5), test=("train", 0.5)
    )
    monkeypatch.setitem(TASKS, "tiny", row)


def test_a_task_from_end_to_end(data_dir, tiny_task):
    cfg = DataConfig(source="tfds", name="vtab/tiny", path=data_dir, image_size=12)
    assert data.describe(cfg) == data.DataInfo(3, ("x", "y", "z"), 1000, 410, False)
    select = dataclasses.replace(cfg, train_split="train800")
    info = data.describe(select)
    assert (info.num_train, info.num_test) == (800, 200)


@pytest.mark.heavy
def test_crops_of_a_task_follow_the_image_size(data_dir, tiny_task, monkeypatch):
    """In one process, whichever size came first."""
    resized = []
    resize_to = transforms.resize_to

    def seen(image, size, **options):
        resized.append(size)
        return resize_to(image, size, **options)

    monkeypatch.setattr(transforms, "resize_to", seen)
    cfg = DataConfig(source="tfds", name="vtab/tiny", path=data_dir)
    for size, before in ((224, 261), (384, 448), (12, 14)):
        sized = dataclasses.replace(cfg, image_size=size)
        batch = next(data.train_batches(sized, batch=1, seed=0))
        assert batch["image"].shape == (1, size, size, 3)
        assert set(resized) == {before}
        resized.clear()


def test_dsprites_is_brightened():
    made = vtab.brighten(tf.io.encode_png(np.eye(4, dtype=np.uint8)[..., None]).numpy())
    np.testing.assert_array_equal(tf.io.decode_png(made)[..., 0], 255 * np.eye(4))


def test_transforms_of_a_task():
    ops = vtab.transforms(TASKS["dtd"], 384)
    assert ops == ({"op": "resize", "size": 448}, {"op": "random_crop"}, {"op": "flip"})
    assert vtab.transforms(TASKS["dsprites_location"], 384) == ({"op": "resize"},)
    cfg = DataConfig(source="tfds", name="vtab/dtt")
    with pytest.raises(UserError, match=r"unknown VTAB task .*did you mean 'dtd'"):
        data.describe(cfg)
