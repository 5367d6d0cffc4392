# SPDX-License-Identifier: Apache-2.0
"""Accuracy, calibration, per-class, kNN and linear probe against numpy, on eight
devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_context import context

from vit_jax import evaluators
from vit_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig
from vit_jax.errors import UserError
from vit_jax.evaluators import EVALUATORS, check_run
from vit_jax.evaluators.context import _add, _start

RNG = np.random.default_rng(0)
K = 7
X = RNG.normal(size=(37, K)).astype(np.float32)  # also the logits
Y = RNG.integers(0, K, 37)
EYE = np.eye(K)


@pytest.fixture(autouse=True)
def _same_numbers_for_each_test():
    global RNG
    RNG = np.random.default_rng(1)


def softmax(x):
    p = np.exp(x - x.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def fake():
    return context({"test": (X, Y)}, EYE)


@pytest.mark.parametrize(("batch", "devices"), [(16, 8), (8, 1), (40, 8)])
def test_accuracy_counts_each_of_37_examples_once(batch, devices):
    fake = context({"test": (X, Y)}, EYE, batch=batch, devices=devices)
    result = EVALUATORS["accuracy"].measure(fake)
    order = np.argsort(-X, 1)
    assert result["count"] == 37
    assert result["accuracy"] == (order[:, 0] == Y).sum() / 37
    assert result["top5"] == (order[:, :5] == Y[:, None]).any(1).sum() / 37
    loss = -np.log(softmax(X)[np.arange(37), Y]).mean()
    np.testing.assert_allclose(result["loss"], loss, rtol=1e-6)


def test_several_labels_count_as_right_if_the_argmax_is_one_of_them():
    labels = (RNG.random((37, K)) < 0.4).astype(np.float32)
    labels[:4] = 0  # no label at all: left out of the accuracy, not of the loss
    fake = context({"test": (X, labels)}, EYE, cfg=Config(loss="sigmoid"))
    result = EVALUATORS["accuracy"].measure(fake)
    has = labels.any(1)
    right = labels[np.arange(37), X.argmax(1)] > 0
    assert result["count"] == has.sum() < 37
    assert result["accuracy"] == (right & has).sum() / has.sum()
    loss = np.where(labels > 0, np.log1p(np.exp(-X)), np.log1p(np.exp(X))).sum(1).mean()
    np.testing.assert_allclose(result["loss"], loss, rtol=1e-6)


def test_top5_needs_more_than_five_classes():
    fake = context({"test": (X[:, :5], Y % 5)}, np.eye(5))
    assert "top5" not in EVALUATORS["accuracy"].measure(fake)


def test_ignored_labels_are_left_out():
    labels = np.where(np.arange(37) < 10, -1, Y)
    result = EVALUATORS["accuracy"].measure(context({"test": (X, labels)}, EYE))
    assert result["count"] == 27
    assert result["accuracy"] == (X.argmax(1) == Y)[10:].sum() / 27


def test_sums_keep_their_digits_over_many_batches():
    part = {"loss": jnp.float32(0.1), "count": jnp.int32(1)}
    total = _start(part)
    for _ in range(9_999):
        total = _add(total, part)
    assert int(total[0]["count"]) == 10_000
    # A plain float32 sum is off by 1e-4 here.
    np.testing.assert_allclose(total[0]["loss"], 1e4 * np.float32(0.1), rtol=1e-7)


@pytest.mark.heavy
def test_calibration(tmp_path):
    n = 4000
    x = RNG.normal(size=(n, K)) * 3
    y = np.array([RNG.choice(K, p=p) for p in softmax(x)])  # calibrated by construction
    result = EVALUATORS["calibration"].measure(
        context({"test": (x, y)}, EYE, out=str(tmp_path))
    )
    p = softmax(x.astype(np.float32))
    confidence, right = p.max(1), p.argmax(1) == y
    at = np.minimum((np.ceil(confidence * 15) - 1).astype(int), 14)
    ece = sum(
        abs(right[at == b].mean() - confidence[at == b].mean()) * (at == b).mean()
        for b in np.unique(at)
    )
    np.testing.assert_allclose(result["ece"], ece, rtol=1e-4)
    brier = ((p - np.eye(K)[y]) ** 2).sum(1).mean()
    np.testing.assert_allclose(result["brier"], brier, rtol=1e-5)
    assert np.load(tmp_path / "calibration.npz")["count"].sum() == n
    twice = EVALUATORS["calibration"].measure(context({"test": (2 * x, y)}, EYE))
    assert twice["ece"] > 2 * result["ece"], "overconfident logits are not noticed"


def test_per_class_and_confusion(tmp_path):
    fake = context({"test": (X, Y)}, EYE, out=str(tmp_path))
    result = EVALUATORS["per_class"].measure(fake)
    expected = np.zeros((K, K), int)
    np.add.at(expected, (Y, X.argmax(1)), 1)
    saved = np.load(tmp_path / "confusion.npz")
    np.testing.assert_array_equal(saved["confusion"], expected)
    accuracies = np.diag(expected) / expected.sum(1)
    np.testing.assert_allclose(result["mean"], accuracies.mean())
    assert result["min"] == accuracies.min()
    table = json.loads((tmp_path / "per_class.json").read_text())
    assert table["class3"] == {"accuracy": accuracies[3], "count": int((Y == 3).sum())}


def blobs(n, classes=3, width=8, spread=0.1, seed=0):
    """Features that a linear classifier separates."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(classes, width))
    y = np.arange(n) % classes
    return centres[y] + spread * rng.normal(size=(n, width)) + 5.0, y


def separable(batch=16):
    weights = np.zeros((8, 3))
    return context(
        {"train": blobs(50), "test": blobs(37, seed=1)}, weights, batch=batch
    )


@pytest.mark.heavy
def test_knn_and_linear_probe_separate_what_is_separable():
    result = EVALUATORS["knn"].measure(separable(), k=(1, 5))
    assert result == {"accuracy_k1": 1.0, "accuracy_k5": 1.0, "count": 37}
    result = EVALUATORS["linear_probe"].measure(
        separable(), l2=(1e-2, 1e-3), iterations=30
    )
    assert result["accuracy"] == 1.0
    assert result["held_out_accuracy"] == 1.0
    assert result["count"] == 37


def test_knn_votes_like_numpy():
    train = RNG.normal(size=(45, K)), RNG.integers(0, 3, 45)
    splits = {"train": train, "test": (X, Y % 3)}
    result = EVALUATORS["knn"].measure(context(splits, np.zeros((K, 3))), k=(3, 10))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit(X) @ unit(train[0]).T
    order = np.argsort(-similarity, 1)
    for k in (3, 10):
        votes = np.zeros((37, 3))
        for i in range(37):
            for j in order[i, :k]:
                votes[i, train[1][j]] += np.exp(similarity[i, j] / 0.07)
        expected = (votes.argmax(1) == Y % 3).sum() / 37
        assert result[f"accuracy_k{k}"] == pytest.approx(expected, abs=1e-12)


def test_padding_is_nobodys_neighbour():
    """45 examples on 8 devices leave 3 rows of zeros, nearer than any example here."""
    train = np.abs(RNG.normal(size=(45, K))), np.zeros(45, int)
    splits = {"train": train, "test": (-np.abs(X), np.zeros(37, int))}
    result = EVALUATORS["knn"].measure(context(splits, np.zeros((K, 3))), k=(1, 3))
    assert result["accuracy_k1"] == result["accuracy_k3"] == 1


def test_linear_probe_finds_the_minimum():
    from scipy.optimize import minimize

    x, y = RNG.normal(size=(60, 4)), RNG.integers(0, 3, 60)
    z = (x - x.mean(0)) / x.std(0)

    def loss(flat):
        w = flat.reshape(5, 3)
        p = softmax(z @ w[:-1] + w[-1])
        return -np.log(p[np.arange(60), y]).mean() + 0.05 * (w[:-1] ** 2).sum()

    w = minimize(loss, np.zeros(15), tol=1e-10).x.reshape(5, 3)
    test = RNG.normal(size=(400, 4))
    predicted = (((test - x.mean(0)) / x.std(0)) @ w[:-1] + w[-1]).argmax(1)
    splits = {"train": (x, y), "test": (test, predicted)}
    result = EVALUATORS["linear_probe"].measure(
        context(splits, np.zeros((4, 3))), l2=(0.1,)
    )
    assert result["accuracy"] > 0.995  # agrees with scipy but for ties at the border


def test_names_carry_the_prefix(fake):
    entries = (
        {"type": "accuracy"},
        {"type": "calibration", "prefix": "ece15", "bins": 15},
    )
    cfg = Config(eval=EvalConfig(evaluators=entries))
    names = evaluators.run(context({"test": (X, Y)}, EYE, cfg=cfg))
    assert {"test/accuracy", "test/loss", "ece15/ece"} <= set(names)
    assert names["test/accuracy"] == EVALUATORS["accuracy"].measure(fake)["accuracy"]
    assert evaluators.prefix({"type": "accuracy", "split": "train"}) != "train"


def test_a_metric_says_whether_lower_is_better():
    for metric in ("test/loss", "calibration/ece", "mine/brier", "clean_train/loss"):
        assert evaluators.lower_is_better(metric)
    # A class or a task may be called like the end of one of them.
    for metric in ("test/accuracy", "knn/accuracy_k10", "vtab/piece", "train/gloss"):
        assert not evaluators.lower_is_better(metric)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            ({"type": "acuracy"},),
            "unknown config.eval.evaluators.0. type 'acuracy': did you mean 'accuracy'",
        ),
        (({},), "choose one of"),
        (
            ({"type": "knn", "kk": 3},),
            "evaluators.0. has the unknown option 'kk'",
        ),
        (({"type": "accuracy"},) * 2, "another 'prefix'"),
        (({"type": "knn", "prefix": 5},), "evaluators.0..prefix is 5: .* a string"),
        (
            ({"type": "knn", "prefix": "train"},),
            "prefix is 'train': .* training writes",
        ),
        (({"type": 5},), "unknown config.eval.evaluators.0. type '5'"),
        (({"type": "accuracy", "data": 5},), "evaluators.0..data is 5.* group of keys"),
        (
            ({"type": "accuracy", "data": {"imagesize": 3}},),
            "config.data.imagesize: did you mean 'image_size'",
        ),
        (({"type": "objectnet"},), "evaluators.0. needs the option 'mapping'"),
        (({"type": "calibration", "bins": 0},), "bins is 0: it must be at least 1"),
        (({"type": "fewshot", "shots": 5},), "shots is 5: it must be a list"),
        (({"type": "fewshot", "shots": ()},), "shots is .*at least one entry"),
        (({"type": "fewshot", "shots": (0,)},), "shots.0. is 0: .* at least 1"),
        (({"type": "fewshot", "seeds": -1},), "seeds is -1: .* at least 1"),
        (({"type": "fewshot", "seeds": 0},), "seeds is 0: .* at least 1"),
        (({"type": "fewshot", "l2": -3},), "l2 is -3.0: it must be above 0"),
        (({"type": "fewshot", "order": "random"},), "choose one of .*'shuffled'"),
        (({"type": "knn", "k": 10},), "k is 10: it must be a list"),
        (({"type": "knn", "k": ()},), "k is .*at least one entry"),
        (({"type": "knn", "temperature": 0},), "temperature is 0.0: .*above 0"),
        (({"type": "knn", "temperature": -1},), "temperature is -1.0: .*above 0"),
        (({"type": "linear_probe", "l2": 0.01},), "l2 is 0.01: it must be a list"),
        *(
            (({"type": "linear_probe", "held_out": x},), "above 0 and at most 0.5")
            for x in (0.0, 0.9, 1.0)
        ),
    ],
)
def test_bad_entries_are_refused_before_the_first_evaluation(entries, message):
    with pytest.raises(UserError, match=message):
        evaluators.check(Config(eval=EvalConfig(evaluators=entries)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("accuracy", {"data": {"imagesize": 3}}, "config.data.imagesize: did you mean 'image_size'"),
        ("accuracy", {"split": "empty"}, "split 'empty' .* has no examples"),
        ("accuracy", {"split": "unlabelled"}, "no example .* has a label"),
        ("calibration", {"split": "unlabelled"}, "no example .* has a label"),
        ("knn", {"k": (100,)}, "k is .100,.: choose at most the 37 training examples"),
        ("knn", {"train_split": "several"}, "several labels per image"),
        ("per_class", {"split": "several"}, "several"),
        ("per_class", {"split": "unknown"}, "no example .* has a label"),
        ("knn", {"train_split": "empty"}, "has no examples"),
    ],
)  # fmt: skip
def test_bad_input_has_one_message(name, options, message):
    splits = {
        "train": (X, Y), "test": (X, Y), "empty": (X[:0], Y[:0]),
        "unlabelled": (X, np.zeros((37, K))), "several": (X, EYE[Y]),
        "unknown": (X, np.full(37, -1)),
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        EVALUATORS[name].measure(context(splits, EYE), **options)


def test_a_test_split_without_labels_has_no_accuracy_of_features(monkeypatch):
    fake = context({"train": (X, Y), "test": (X, Y)}, EYE)
    read = type(fake.predictor).batches

    def batches(self, cfg, split, batch):
        for found in read(self, cfg, split, batch):
            yield found | {"mask": found["mask"] * (split == "train")}

    monkeypatch.setattr(type(fake.predictor), "batches", batches)
    with pytest.raises(
        UserError, match=r"no example of the split 'test' .* has a label"
    ):
        EVALUATORS["knn"].measure(fake, k=(3,))


@pytest.mark.parametrize("name", ["accuracy", "per_class", "real"])
def test_classes_in_another_order_are_refused(named, name):
    """Also of the data that only an evaluator reads."""
    named(classes=("b", "a"))
    fake = context({"test": (X, Y % 2)}, EYE[:, :2], class_names=("a", "b"))
    with pytest.raises(
        UserError, match="another order: class 0 is 'b' there and 'a' in"
    ):
        EVALUATORS[name].measure(fake, data={"path": "other"})


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("fewshot", "train"),
        ("fewshot", "test"),
        ("knn", "train"),
        ("knn", "test"),
        ("linear_probe", "test"),
        ("per_class", "test"),
    ],
)
def test_outputs_that_are_not_finite_are_refused(name, split):
    bad = X.copy()
    bad[3], bad[20, 2] = np.nan, np.inf
    labels = np.arange(37) % K
    splits = {"train": (X, labels), "test": (X, labels)} | {split: (bad, labels)}
    options = {"fewshot": {"shots": (1,)}, "linear_probe": {"l2": (1.0,)}}.get(name, {})
    with pytest.raises(UserError, match=f"not finite for 2 images of .*'{split}'"):
        EVALUATORS[name].measure(context(splits, EYE), **options)


def test_a_loss_that_is_not_finite_is_shown():
    """So that a run in training goes on."""
    bad = X.copy()
    bad[3] = np.nan
    fake = context({"test": (bad, Y)}, EYE)
    assert np.isnan(EVALUATORS["accuracy"].measure(fake)["loss"])
    assert np.isnan(EVALUATORS["calibration"].measure(fake)["brier"])


def test_masked_patch_models_have_no_accuracy():
    with pytest.raises(UserError, match="choose the evaluators 'fewshot'"):
        EVALUATORS["accuracy"].measure(
            context({"test": (X, Y)}, EYE, cfg=Config(loss="masked_patch"))
        )
    # And a run says so before it trains.
    with pytest.raises(UserError, match="choose the evaluators 'fewshot'"):
        check_run(Config(loss="masked_patch"))


@pytest.mark.parametrize(
    ("metric", "entries"), [("test/loss", ()), ("acc", ({"type": "knn"},))]
)
def test_a_best_metric_that_nothing_measures_is_refused(metric, entries):
    best, measured = CheckpointConfig(keep_best=metric), EvalConfig(evaluators=entries)
    with pytest.raises(UserError, match=f"keep_best='{metric}' is not among"):
        check_run(Config(checkpoint=best, eval=measured))


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    fake = context({"test": (X, Y)}, EYE, out=str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"--out=.* cannot be written"):
        EVALUATORS["per_class"].measure(fake)


def test_features_of_more_than_one_batch_stay_in_order():
    from vit_jax.evaluators.features import bank, collect, moments

    x = np.arange(5000 * 3, dtype=np.float32).reshape(5000, 3) ** 0.5
    fake = context({"train": (x, np.arange(5000) % 7)}, np.zeros((3, 7)), batch=512)
    got, labels = collect(fake, fake.cfg.data, "train")
    np.testing.assert_array_equal(got, x)
    np.testing.assert_array_equal(labels, np.arange(5000) % 7)
    mean, std = moments(got)
    np.testing.assert_allclose(mean, x.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, x.std(0, dtype=np.float64), rtol=1e-6)
    held = bank(fake, got, labels, rows=100)
    assert held.x.shape == (7, 8, 100, 3)
    assert len(held.x.addressable_shards) == 8
    assert held.x.addressable_shards[0].data.shape == (7, 1, 100, 3)
    assert int(jax.device_get(held.y >= 0).sum()) == 5000


# Labels that are not the model's own ------------------------------------------


@pytest.fixture
def named(monkeypatch):
    """Replaces the data set behind the fake batches: its file and class names."""

    def patch(files=(), classes=()):
        weights = np.zeros((K, len(classes) or K))
        info = context({}, weights, class_names=tuple(classes)).info
        monkeypatch.setattr("vit_jax.data.describe", lambda cfg: info)
        monkeypatch.setattr(
            "vit_jax.evaluators.label_maps._file_names", lambda cfg, split: list(files)
        )

    return patch


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def test_real_leaves_images_without_labels_out(tmp_path, named):
    lists = [sorted(map(int, RNG.choice(K, i % 3, replace=False))) for i in range(37)]
    shuffled = RNG.permutation(37)  # the data is not in the order of the file names
    files = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in shuffled]
    named(files)
    fake = context({"test": (X, Y)}, EYE)
    top = X.argmax(1)
    right = [top[j] in lists[shuffled[j]] for j in range(37) if lists[shuffled[j]]]
    options = {"labels": write(tmp_path / "real.json", lists)}
    got = EVALUATORS["real"].measure(fake, **options)
    assert got["count"] == len(right) == 37 - sum(not x for x in lists)
    assert got["accuracy"] == sum(right) / len(right)
    assert got["original_accuracy"] == (top == Y).mean()
    by_name = {f"ILSVRC2012_val_{i:08d}.JPEG": x for i, x in enumerate(lists)}
    options = {"labels": write(tmp_path / "real.json", by_name)}
    assert EVALUATORS["real"].measure(fake, **options) == got


def test_imagenet_v2_folders_sort_as_text(named):
    k = 12
    names = sorted(map(str, range(k)))  # 0, 1, 10, 11, 2, ...
    x = RNG.normal(size=(37, k)).astype(np.float32)
    truth = RNG.integers(0, k, 37)
    x[np.arange(30), truth[:30]] += 10  # a good model
    labels = np.array([names.index(str(c)) for c in truth])
    named(classes=names)
    fake = context({"test": (x, labels)}, np.eye(k))
    got = EVALUATORS["imagenet_v2"].measure(
        fake, data={"source": "folder", "path": "v2"}
    )
    assert got["accuracy"] == (x.argmax(1) == truth).mean() > 0.8
    assert EVALUATORS["accuracy"].measure(fake)["accuracy"] < 0.5


@pytest.mark.parametrize(
    ("of_set", "of_model", "expected"),
    [
        (("b", "a", "c"), ("a", "b", "c"), [1, 0, 2]),
        (("0", "10", "2"), ("0", "10", "2"), [0, 1, 2]),
        (("0", "2", "1"), ("a", "b", "c"), [0, 2, 1]),
        (("n00000001", "n00000002"), ("tench", "goldfish"), [0, 1]),
        (("n00000001", "n00000002"), ("0", "1"), [0, 1]),
        (("x", "y"), ("a", "b"), "has the class 'x', which the model lacks"),
        (("1", "2"), ("a", "b"), "has the class '1', which the model lacks"),
        (("a",), ("a", "b"), "has 1 classes and the model 2"),
    ],
)
def test_imagenet_v2_needs_the_classes_of_the_model(named, of_set, of_model, expected):
    named(classes=of_set)
    labels = np.arange(37) % len(of_set)
    k = len(of_model)
    x = np.zeros((37, k), np.float32)
    fake = context({"test": (x, labels)}, np.eye(k), class_names=of_model)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            EVALUATORS["imagenet_v2"].measure(fake)
        return
    x[np.arange(37), np.take(expected, labels)] = 1
    assert EVALUATORS["imagenet_v2"].measure(fake)["accuracy"] == 1


@pytest.mark.parametrize("path", ["", "/tfds"])
def test_other_data_sets_keep_only_how_the_run_reads_images(
    tmp_path, monkeypatch, path
):
    """Splits, subsets, held-out shares and folders are of the run's own set."""
    read = {}

    def describe(cfg):
        read[cfg.name] = cfg
        return context({}, EYE).info

    monkeypatch.setattr("vit_jax.data.describe", describe)
    own = DataConfig(
        source="tfds" if path else "folder", path=path or "photos/", image_size=48,
        train_split="train[:98%]", test_split="train[98%:]", test_share=0.5,
        holdout=0.1, subset=0.5, subset_balanced=False, num_classes=K, cache_gib=3.0,
        eval_transforms=({"op": "central_crop"},),
    )  # fmt: skip
    labels = np.arange(37) % K
    splits = {"train": (X, labels), "test": (X, labels)}
    fake = context(splits, EYE, cfg=Config(data=own))
    EVALUATORS["fewshot"].measure(fake, datasets=("dtd",), shots=(1,), seeds=1)
    EVALUATORS["vtab"].measure(fake, tasks=("pets",), l2=(0.1,))
    EVALUATORS["imagenet_v2"].measure(fake, data={"name": "v2"})
    mapping = write(tmp_path / "map.json", {"class1": [0]})
    EVALUATORS["objectnet"].measure(fake, mapping=mapping, data={"source": "folder"})
    fresh = DataConfig(source="tfds", path=path, image_size=48, cache_gib=3.0)
    crop = own.eval_transforms
    fewshot = ({"op": "resize", "size": 55}, {"op": "central_crop", "size": 48})
    expected = {
        "dtd": {"eval_transforms": fewshot},
        "vtab/pets": {},
        "v2": {"eval_transforms": crop, "train_split": "test", "test_share": 1.0},
        "": {
            "eval_transforms": crop,
            "source": "folder",
            "path": "",
            "test_share": 1.0,
        },
    }
    for name, fields in expected.items():
        assert read[name] == dataclasses.replace(fresh, name=name, **fields)


@pytest.mark.parametrize("restrict", [False, True])
def test_objectnet_maps_many_classes_to_one(tmp_path, restrict):
    """7 classes of the model; a, b and c of the test set; nothing maps to b."""
    mapping = {"a": [0, 3], "c": "class5; class6"}
    fake = context({"test": (X, Y % 3)}, EYE)
    of_set = context({}, np.zeros((K, 3)), class_names=("a", "b", "c")).info
    fake = dataclasses.replace(fake, info=of_set, classes=fake.class_names)
    path = write(tmp_path / "map.json", mapping)
    got = EVALUATORS["objectnet"].measure(fake, mapping=path, restrict=restrict)
    to_set = np.array([0, -1, -1, 0, -1, 2, 2])
    logits = np.where(to_set < 0, -np.inf, X) if restrict else X
    order = np.argsort(-logits, 1)
    known = Y % 3 != 1
    assert got["count"] == known.sum()
    assert got["classes"] == 2
    hit = to_set[order] == (Y % 3)[:, None]
    assert got["accuracy"] == hit[known, 0].mean()
    assert got["top5"] == hit[known, :5].any(1).mean()
    every = write(tmp_path / "every.json", {"a": [0, 1, 2], "b": 3, "c": [4, 5, 6]})
    assert EVALUATORS["objectnet"].measure(fake, mapping=every)["classes"] == 3


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("real", "labels", [[1]] * 36, "labels for 36 images, but .* has 37"),
        ("real", "labels", [[7]] * 37, "names class 7 for 0, but the model has 7"),
        ("real", "labels", [[1]] * 5 + [["a"]] * 32, "names class 'a' for 5, but"),
        ("real", "labels", [None] * 37, "has None for 0: it must be a list"),
        ("real", "labels", 5, "must be a JSON list of lists of classes"),
        ("real", "labels", {"x": [1]}, "no labels for 37 of the 37 images"),
        ("objectnet", "mapping", [[1]], "must be a JSON object"),
        (
            "objectnet",
            "mapping",
            {"cat": [1]},
            "maps 'cat', which the test set does not",
        ),
        ("objectnet", "mapping", {"class1": ["clas1"]}, "did you mean 'class1'"),
        ("objectnet", "mapping", {"class1": [70]}, "class 70 for 'class1', but"),
        ("objectnet", "mapping", {"class1": [1.5]}, "class 1.5 for 'class1', but"),
        ("objectnet", "mapping", {"class1": [True]}, "class True for 'class1', but"),
        ("objectnet", "mapping", {"class1": None}, "has None for 'class1': it must"),
        ("objectnet", "mapping", {"class1": {"a": 1}}, "for 'class1': it must be"),
        (
            "objectnet",
            "mapping",
            {"class1": [0, 1], "class2": "class1"},
            "maps class 1 of the model to both 'class1' and 'class2'",
        ),
    ],
)
def test_bad_label_maps(tmp_path, named, name, option, value, message):
    named([f"{i:02d}.png" for i in range(37)])
    fake = context({"test": (X, Y)}, EYE)
    path = write(tmp_path / "map.json", value)
    with pytest.raises(UserError, match=message):
        EVALUATORS[name].measure(fake, **{option: path})


def test_several_labels_are_no_class_of_a_label_map(tmp_path, named):
    named()
    fake = context({"test": (X, EYE[Y])}, EYE)
    with pytest.raises(UserError, match="imagenet_v2 counts one label per image"):
        EVALUATORS["imagenet_v2"].measure(fake)
    path = write(tmp_path / "map.json", {"class1": [1]})
    with pytest.raises(UserError, match="objectnet counts one label per image"):
        EVALUATORS["objectnet"].measure(fake, mapping=path)


@pytest.mark.parametrize("labels", [{"1.png": [1]}, [[1]] * 37])
def test_real_labels_of_images_of_the_same_name(tmp_path, named, labels):
    named(["1.png"] * 37)
    fake = context({"test": (X, Y)}, EYE)
    path = write(tmp_path / "real.json", labels)
    with pytest.raises(UserError, match=r"several images called '1.png'"):
        EVALUATORS["real"].measure(fake, labels=path)


def test_unreadable_label_maps(tmp_path, named):
    named(["x"] * 37)
    fake = context({"test": (X, Y)}, EYE)
    with pytest.raises(UserError, match="cannot read the label map"):
        EVALUATORS["real"].measure(fake, labels=str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        EVALUATORS["real"].measure(fake, labels=str(tmp_path / "bad.json"))
