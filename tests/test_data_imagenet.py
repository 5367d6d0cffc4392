# SPDX-License-Identifier: Apache-2.0
"""ImageNet's tree as Kaggle has it, and tiny-imagenet-200. (Its archives: test_data_tar.)"""

import numpy as np
import pytest
from data_files import encoded, picture

from vit_jax import data
from vit_jax.config import DataConfig
from vit_jax.data import sources
from vit_jax.errors import UserError

IMAGES = iter(encoded(picture(i)) for i in range(10_000))
NAMES = ("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)")
WNIDS = ("n01440764", "n02012849", "n03126707")


def write(root, texts=(), images=()):
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(next(IMAGES))
    for name, text in dict(texts).items():
        (root / name).write_text(text)
    return root


@pytest.fixture
def kaggle(tmp_path):
    """Validation and test images lie in flat folders, one image of which has two boxes."""
    tree = "ILSVRC/Data/CLS-LOC"
    images = [f"{tree}/train/{w}/{w}_{i}.JPEG" for w in WNIDS for i in range(2)]
    images += [f"{tree}/val/ILSVRC2012_val_0000000{i + 1}.JPEG" for i in range(3)]
    images += [f"{tree}/test/ILSVRC2012_test_00000001.JPEG"]
    solution = ["ImageId,PredictionString"]
    for number, wnid in (2, WNIDS[2]), (1, WNIDS[1]), (3, WNIDS[0]):
        box = f"{wnid} 85 1 499 272 "
        solution.append(f"ILSVRC2012_val_0000000{number},{box * number}")
    words = f"{WNIDS[0]} tench, Tinca tinca\n{WNIDS[1]} crane\n{WNIDS[2]} crane\n"
    texts = {
        "LOC_val_solution.csv": "\n".join(solution),
        "LOC_synset_mapping.txt": words,
    }
    return write(tmp_path, texts, images)


@pytest.mark.parametrize("inside", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_tree(inside, kaggle):
    if not inside:  # as spreadsheets write text
        for file in kaggle.glob("LOC_*"):
            file.write_text("\ufeff" + file.read_text())
    for test_split in ("test", "val"):
        cfg = DataConfig(
            source="folder",
            path=str(kaggle / inside),
            image_size=8,
            test_split=test_split,
        )
        assert data.describe(cfg) == data.DataInfo(3, NAMES, 6, 3, False)
    test = sources.load(cfg).test
    files = [test.name_of(i).rsplit("_", 1)[1] for i in range(3)]
    assert files == ["00000002.JPEG", "00000001.JPEG", "00000003.JPEG"]
    assert np.concatenate(test.read(np.arange(3))[1]).tolist() == [2, 1, 0]
    (batch,) = data.eval_batches(cfg, batch=3, split="val")
    assert batch["label"].tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ImageId,Box\nILSVRC2012_val_00000001,x\n",
            r"is not Kaggle's .*PredictionString",
        ),
        ("ImageId,PredictionString\nx,n01440764\n", r"lists 1 files that do not exist"),
        ("ImageId,PredictionString\n\nx\n", "is not Kaggle's"),
        (
            "ImageId,PredictionString\nILSVRC2012_val_00000001,n99999999 1\n",
            r"csv, line 2: unknown class 'n99999999'",
        ),
    ],
)
def test_a_wrong_solution(text, message, kaggle):
    (kaggle / "LOC_val_solution.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        data.describe(DataConfig(source="folder", path=str(kaggle)))


def test_images_folders_and_a_list_with_tabs(tmp_path):
    """As in tiny-imagenet-200."""
    images = [f"train/{w}/images/{w}_{i}.JPEG" for w in WNIDS for i in range(2)]
    images += [f"val/images/val_{i}.JPEG" for i in range(3)]
    images += [f"test/images/test_{i}.JPEG" for i in range(3)]
    lines = [f"val_{i}.JPEG\t{WNIDS[2 - i]}\t0\t32\t44\t62\n" for i in range(3)]
    words = "".join(
        f"{w}\t{n.split(' (')[0]}\n" for w, n in zip(WNIDS, NAMES, strict=True)
    )
    texts = {
        "words.txt": f"n00001740\tentity\n{words}",
        "wnids.txt": "\n".join(WNIDS[::-1]),
    }
    write(tmp_path, texts, images)
    for w in WNIDS:
        (tmp_path / f"train/{w}/{w}_boxes.txt").write_text(
            f"{w}_0.JPEG\t0\t0\t62\t62\n"
        )
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    cfg = DataConfig(source="folder", path=str(tmp_path), image_size=8)
    assert data.describe(cfg) == data.DataInfo(3, NAMES, 6, 3, False)
    (batch,) = data.eval_batches(cfg, batch=3)
    assert batch["label"].tolist() == [2, 1, 0]
