# SPDX-License-Identifier: Apache-2.0
"""The 19 tasks of VTAB-1k: what they are, how their examples are chosen, and what the
paper reaches on them (Table 9)."""

from typing import NamedTuple

GROUPS = ("natural", "specialized", "structured")
PAPER = ("h14_jft", "l16_jft", "l16_i21k")

_TEST = ("test", 0)
_VALIDATION = ("validation", 0)
_LATE = ("train", 0.9)


class Task(NamedTuple):
    """One row. ``val``: where the 200 validation examples begin, as (split, start), start
    a share of the split. ``test``: (split, start), to its end. ``flip`` and ``crop``:
    False where they would change the label."""

    group: str
    title: str
    # Accuracy in % after fine-tuning.
    h14_jft: float
    l16_jft: float
    l16_i21k: float
    source: str  # tfds name
    classes: int
    val: tuple[str, float] = _VALIDATION
    test: tuple[str, float] = _TEST
    flip: bool = True
    crop: bool = True


_NATURAL, _SPECIALIZED, _STRUCTURED = GROUPS

# fmt: off
TASKS = {
    "caltech101": Task(_NATURAL, "Caltech101", 95.3, 95.4, 90.8, "caltech101", 102, _LATE),
    "cifar100": Task(_NATURAL, "CIFAR-100", 85.5, 81.9, 84.1, "cifar100", 100, _LATE),
    "dtd": Task(_NATURAL, "DTD", 75.2, 74.3, 74.1, "dtd", 47),
    "flowers102": Task(_NATURAL, "Flowers102", 99.7, 99.7, 99.3, "oxford_flowers102", 102),
    "pets": Task(_NATURAL, "Pets", 97.2, 96.7, 92.7, "oxford_iiit_pet", 37, ("train", 0.8)),
    "sun397": Task(_NATURAL, "Sun397", 65.0, 63.5, 61.0, "sun397/tfds", 397),
    "svhn": Task(_NATURAL, "SVHN", 88.9, 87.4, 80.9, "svhn_cropped", 10, _LATE),
    "patch_camelyon": Task(_SPECIALIZED, "Camelyon", 83.3, 83.6, 82.5, "patch_camelyon", 2),
    "eurosat": Task(
        _SPECIALIZED, "EuroSAT", 96.7, 96.5, 95.6, "eurosat/rgb", 10,
        ("train", 0.6), ("train", 0.8),
    ),
    "resisc45": Task(
        _SPECIALIZED, "Resisc45", 91.4, 89.7, 85.2, "resisc45", 45,
        ("train", 0.6), ("train", 0.8),
    ),
    "retinopathy": Task(
        _SPECIALIZED, "Retinopathy", 76.6, 77.1, 75.3,
        "diabetic_retinopathy_detection/btgraham-300", 5,
    ),
    "clevr_count": Task(
        _STRUCTURED, "Clevr-Count", 91.7, 86.4, 70.3, "clevr", 8,
        _LATE, _VALIDATION, crop=False,
    ),
    "clevr_distance": Task(
        _STRUCTURED, "Clevr-Dist", 63.8, 63.1, 56.1, "clevr", 6,
        _LATE, _VALIDATION, crop=False,
    ),
    "dmlab": Task(_STRUCTURED, "DMLab", 53.1, 49.7, 41.9, "dmlab", 6, crop=False),
    "dsprites_location": Task(
        _STRUCTURED, "dSpr-Loc", 79.4, 74.5, 74.7, "dsprites", 16,
        ("train", 0.8), _LATE, flip=False, crop=False,
    ),
    "dsprites_orientation": Task(
        _STRUCTURED, "dSpr-Ori", 63.3, 60.5, 64.9, "dsprites", 16,
        ("train", 0.8), _LATE, flip=False,
    ),
    "kitti_distance": Task(
        _STRUCTURED, "KITTI-Dist", 84.5, 82.2, 79.9, "kitti", 4, crop=False
    ),
    "smallnorb_azimuth": Task(
        _STRUCTURED, "sNORB-Azim", 33.2, 36.2, 30.5, "smallnorb", 18,
        _TEST, ("test", 0.5), flip=False,
    ),
    "smallnorb_elevation": Task(
        _STRUCTURED, "sNORB-Elev", 51.2, 51.1, 41.7, "smallnorb", 9, _TEST, ("test", 0.5)
    ),
}
# fmt: on
