# SPDX-License-Identifier: Apache-2.0
"""The tables of the paper, typed in a second time, against what the recipes build."""

import pytest

from vit_jax import optim, recipes, vtab_tasks
from vit_jax.config import Config, OptimConfig, from_dict, to_dict
from vit_jax.errors import UserError

# Table 3: models, data, epochs, base lr, schedule, weight decay, dropout, steps.
TABLE3 = [
    ("ViT-B/16 ViT-B/32", "jft", 7, 8e-4, "linear", 0.1, 0.0, 517_822),
    ("ViT-L/32", "jft", 7, 6e-4, "linear", 0.1, 0.0, 517_822),
    ("ViT-L/16", "jft", 7, 4e-4, "linear", 0.1, 0.0, 517_822),
    ("ViT-L/16", "jft", 14, 4e-4, "linear", 0.1, 0.0, 1_035_644),
    ("ViT-H/14", "jft", 14, 3e-4, "linear", 0.1, 0.0, 1_035_644),
    ("R50x1 R50x2", "jft", 7, 1e-3, "linear", 0.1, 0.0, 517_822),
    ("R101x1", "jft", 7, 8e-4, "linear", 0.1, 0.0, 517_822),
    ("R152x1 R152x2", "jft", 7, 6e-4, "linear", 0.1, 0.0, 517_822),
    ("R50+ViT-B/16 R50+ViT-B/32", "jft", 7, 8e-4, "linear", 0.1, 0.0, 517_822),
    ("R50+ViT-L/32", "jft", 7, 2e-4, "linear", 0.1, 0.0, 517_822),
    ("R50+ViT-L/16", "jft", 7, 4e-4, "linear", 0.1, 0.0, 517_822),
    ("R50+ViT-L/16", "jft", 14, 4e-4, "linear", 0.1, 0.0, 1_035_644),
    ("ViT-B/16 ViT-B/32", "imagenet21k", 90, 1e-3, "linear", 0.03, 0.1, 311_948),
    ("ViT-L/16 ViT-L/32", "imagenet21k", 30, 1e-3, "linear", 0.03, 0.1, 103_982),
    ("ViT-L/16 ViT-L/32", "imagenet21k", 90, 1e-3, "linear", 0.03, 0.1, 311_948),
    ("ViT-B/16 ViT-B/32 ViT-L/16 ViT-L/32", "imagenet", 300, 3e-3, "cosine", 0.3, 0.1,
     93_835),
]  # fmt: skip
ROWS3 = [(model, *row) for models, *row in TABLE3 for model in models.split()]


@pytest.mark.parametrize(
    ("model", "data", "epochs", "lr", "schedule", "decay", "dropout", "steps"), ROWS3
)
def test_table_3(model, data, epochs, lr, schedule, decay, dropout, steps):
    cfg = recipes.pretrain(model, data, epochs)
    assert (cfg.model.name, cfg.batch, cfg.steps) == (model, 4096, steps)
    assert (cfg.data.image_size, cfg.model.dropout) == (224, dropout)
    o = cfg.optim
    assert (o.name, o.b1, o.b2, o.schedule) == ("adam", 0.9, 0.999, schedule)
    assert (o.learning_rate, o.weight_decay, o.warmup) == (lr, decay, 10_000)
    assert o.clip == 1.0
    rate = optim.create_schedule(o, steps)
    end = 1e-5 if schedule == "linear" else 0.0
    middle = 10_000 + (steps - 10_000) / 2
    for t, expected in [
        (0, 0.0), (5_000, lr / 2), (10_000, lr), (middle, (lr + end) / 2), (steps, end),
    ]:  # fmt: skip
        assert float(rate(t)) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_table_3_is_complete():
    """Rows beyond Table 3: hybrids and H/14 where only their ViT, or L, is listed."""
    beyond = {(m, d) for d, rows in recipes.PRETRAIN.items() for m in rows} - {
        (row[0], row[1]) for row in ROWS3
    }
    assert {d for _, d in beyond} <= {"imagenet21k", "imagenet"}
    assert {m for m, _ in beyond} == {"ViT-H/14"} | {
        f"R50+ViT-{size}" for size in ("B/16", "B/32", "L/16", "L/32")
    }
    for model, data in beyond:
        twin = "ViT-L/16" if model == "ViT-H/14" else model.removeprefix("R50+")
        assert recipes.PRETRAIN[data][model] == recipes.PRETRAIN[data][twin]


@pytest.mark.parametrize(
    ("data", "classes", "bias"),
    [("jft", 18_291, -10), ("imagenet21k", 21_843, -10), ("imagenet", 1000, -6.9)],
)
def test_pretraining_is_multi_label_with_a_biased_head(data, classes, bias):
    cfg = recipes.pretrain("ViT-B/32", data)
    assert (cfg.loss, cfg.model.num_classes) == ("sigmoid", classes)
    assert (cfg.model.head_bias, cfg.model.pre_logits) == (bias, True)
    assert cfg.model.head == "token"


def test_resnets_have_a_linear_head():
    assert not recipes.pretrain("R50x1", "jft").model.pre_logits


# Table 4: steps, grid, held-out share, warm-up (official code).
GRID = (0.001, 0.003, 0.01, 0.03)
TABLE4 = {
    "imagenet": (20_000, (0.003, 0.01, 0.03, 0.06), 0.01, 500),
    "cifar100": (10_000, GRID, 0.02, 500),
    "cifar10": (10_000, GRID, 0.02, 500),
    "pets": (500, GRID, 0.1, 100),
    "flowers": (500, GRID, 0.1, 100),
}


@pytest.mark.parametrize("dataset", TABLE4)
def test_table_4(dataset):
    steps, grid, holdout, warmup = TABLE4[dataset]
    cfg = recipes.finetune(dataset)
    assert (cfg.steps, cfg.batch, cfg.data.image_size) == (steps, 512, 384)
    assert (cfg.sweep.learning_rates, cfg.sweep.holdout) == (grid, holdout)
    assert (cfg.data.holdout, cfg.loss, cfg.sweep.seeds) == (0.0, "softmax", 3)
    o = cfg.optim
    assert (o.name, o.b1, o.momentum_dtype) == ("sgd", 0.9, "bfloat16")
    assert (o.clip, o.weight_decay, o.schedule) == (1.0, 0.0, "cosine")
    base = 0.01 if dataset == "cifar10" else 0.03
    rate = optim.create_schedule(o, steps)
    for t, expected in [
        (0, 0), (warmup / 2, base / 2), (warmup, base),
        ((steps + warmup) / 2, base / 2), (steps, 0),
    ]:  # fmt: skip
        assert float(rate(t)) == pytest.approx(expected, rel=1e-4, abs=1e-8)
    assert not cfg.model.pre_logits
    assert cfg.model.num_classes == 0  # of the data, so that any other may be given


def test_table_4_is_complete():
    assert set(recipes.FINETUNE) == set(TABLE4)


@pytest.mark.parametrize(
    ("model", "dropout"),
    [
        ("ViT-B/16", 0.0), ("ViT-B/32", 0.0), ("ViT-L/32", 0.0),
        ("ViT-L/16", 0.1), ("ViT-H/14", 0.1), ("R50+ViT-B/16", 0.1),
        ("R50+ViT-L/32", 0.1),
    ],
)  # fmt: skip
def test_finetuning_dropout_and_rate_are_the_official_ones(model, dropout):
    cfg = recipes.finetune("cifar10", model)
    assert cfg.model.dropout == dropout
    assert cfg.optim.learning_rate == (0.01 if model == "ViT-B/16" else 0.03)


def test_vtab_has_19_tasks_and_one_setting():
    assert len(vtab_tasks.TASKS) == 19
    for task in vtab_tasks.TASKS:
        cfg = recipes.vtab(task)
        assert (cfg.steps, cfg.batch, cfg.optim.learning_rate) == (2_500, 512, 0.01)
        assert (cfg.data.name, cfg.data.image_size) == (f"vtab/{task}", 384)


# AugReg: RandAugment (n, m) and mixup.
AUGREG = {
    "none": (0, 0, 0), "light1": (2, 0, 0), "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2), "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5), "strong2": (2, 20, 0.8),
}  # fmt: skip


@pytest.mark.parametrize("preset", AUGREG)
def test_augreg_presets(preset):
    n, m, alpha = AUGREG[preset]
    cfg = recipes.augreg("ViT-S/16", "imagenet", preset, 0.1, 0.03)
    ops = {op["op"]: op for op in cfg.data.train_transforms}
    assert list(ops)[:2] == ["inception_crop", "flip"]
    assert ("randaugment" in ops) == (n > 0)
    if n:
        assert ops["randaugment"] == {"op": "randaugment", "n": n, "m": m}
    assert cfg.mixup == alpha
    assert (cfg.model.dropout, cfg.model.stochastic_depth) == (0.1, 0.1)
    assert (cfg.optim.weight_decay, cfg.optim.learning_rate) == (0.03, 1e-3)
    assert (cfg.steps, cfg.optim.momentum_dtype) == (93_835, "bfloat16")


@pytest.mark.parametrize(
    ("dataset", "model", "preset"),
    [
        ("imagenet21k", "ViT-Ti/16", "none"), ("imagenet21k", "ViT-S/32", "none"),
        ("imagenet21k", "ViT-S/16", "light1"), ("imagenet21k", "ViT-B/32", "light2"),
        ("imagenet21k", "ViT-B/16", "light2"), ("imagenet21k", "ViT-L/16", "medium2"),
        ("imagenet", "ViT-Ti/16", "light1"), ("imagenet", "ViT-S/32", "medium1"),
        ("imagenet", "ViT-S/16", "medium2"), ("imagenet", "ViT-B/32", "medium2"),
        ("imagenet", "ViT-B/16", "medium2"), ("imagenet", "ViT-L/16", "medium2"),
    ],
)  # fmt: skip
def test_augreg_default_presets(dataset, model, preset):
    assert recipes.augreg(model, dataset) == recipes.augreg(model, dataset, preset)


def test_s16_baseline():
    cfg = recipes.baseline()
    assert (cfg.steps, cfg.batch, cfg.loss, cfg.mixup) == (
        111_477,
        1024,
        "softmax",
        0.2,
    )
    assert (cfg.model.head, cfg.model.positions) == ("gap", "sincos2d")
    assert cfg.model.pre_logits
    assert {"op": "randaugment", "n": 2, "m": 10} in cfg.data.train_transforms
    o = cfg.optim
    assert (o.learning_rate, o.weight_decay, o.warmup) == (1e-3, 0.1, 10_000)
    assert (o.clip, o.schedule) == (1.0, "cosine")


@pytest.mark.parametrize("model", ["ViT-g/14", "ViT-G/14"])
def test_scaling_recipe(model):
    cfg = recipes.scaling(model)
    assert (cfg.steps, cfg.batch, cfg.model.num_classes) == (1_000_000, 16_384, 29_593)
    assert (cfg.model.head, cfg.model.head_bias, cfg.loss) == ("map", -10, "sigmoid")
    o = cfg.optim
    assert (o.name, o.b1, o.b2, o.clip) == ("adafactor", 0.9, 0.999, 1.0)
    assert o.momentum_dtype == "bfloat16"
    # 0.03 lr for the body and 3 lr for the head.
    assert [round(o.weight_decay * f, 6) for _, f in o.decay] == [3.0, 0.03]
    rate = optim.create_schedule(o, cfg.steps)
    for t, expected in [
        (5_000, 4e-4), (10_000, 8e-4), (40_000, 4e-4), (90_000, 8e-4 / 3),
        (975_000, 8e-4 / (1 + 96.5) ** 0.5 / 2), (1_000_000, 0),
    ]:  # fmt: skip
        assert float(rate(t)) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_masked_patch_recipe():
    cfg = recipes.masked_patch("jft")
    assert (cfg.steps, cfg.batch, cfg.loss) == (1_000_000, 4096, "masked_patch")
    assert (cfg.masked_target, cfg.masked_share) == ("mean", 0.5)
    o = cfg.optim
    assert (o.name, o.learning_rate, o.schedule) == ("adam", 2e-4, "cosine")
    assert (o.warmup, cfg.model.head) == (10_000, "masked_patch")
    assert recipes.masked_patch("imagenet").steps == 100_000


def test_shape_study_varies_one_size():
    base, deep = recipes.shape().model, recipes.shape(depth=64).model
    assert (base.depth, base.width, base.mlp_dim, base.patch) == (8, 1024, 2048, 32)
    assert (deep.depth, deep.width) == (64, 1024)


@pytest.mark.parametrize(
    "cfg",
    [
        recipes.pretrain("ViT-B/16"), recipes.finetune(), recipes.vtab(),
        recipes.augreg(), recipes.baseline(), recipes.scaling(), recipes.masked_patch(),
        recipes.shape(),
    ],
)  # fmt: skip
def test_recipes_are_valid_configs(cfg):
    assert isinstance(cfg, Config)
    assert isinstance(cfg.optim, OptimConfig)
    assert from_dict(to_dict(cfg)) == cfg


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: recipes.pretrain("ViT-B/17"), ["ViT-B/17", "'ViT-B/16'"]),
        (lambda: recipes.pretrain("ViT-B/16", "imagenet22k"), ["imagenet21k"]),
        (lambda: recipes.pretrain("ViT-B/16", "jft", 90), ["epochs is 90", "(7,)"]),
        (lambda: recipes.pretrain("R50x1", "imagenet"), ["R50x1", "ViT-B/16"]),
        (lambda: recipes.finetune("cifar"), ["'cifar'", "cifar10"]),
        (lambda: recipes.vtab("dt"), ["'dt'", "dtd"]),
        (lambda: recipes.augreg(preset="medium3"), ["medium3", "medium1"]),
        (lambda: recipes.augreg("ViT-H/14"), ["ViT-H/14", "ViT-L/16"]),
        (lambda: recipes.masked_patch("jtf"), ["jtf", "'jft'"]),
    ],
)
def test_unknown_recipes_are_refused_by_name(build, words):
    with pytest.raises(UserError) as e:
        build()
    for word in words:
        assert word in str(e.value)
