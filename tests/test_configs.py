# SPDX-License-Identifier: Apache-2.0
"""Every config file builds, is short, says what to expect, and traces as a program."""

import ast
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import config, config_file, data, models, recipes, vtab_tasks
from vit_jax.data.tensorflow_cpu import tf
from vit_jax.errors import UserError
from vit_jax.program import build

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = {p.stem: p for p in sorted(CONFIGS.glob("*.py"))}
# What may be written after the colon, --config=configs/vit_l16.py:imagenet.
TABLE3 = [
    "vit_b16", "vit_b32", "vit_l16", "vit_l32", "vit_h14",
    "r50_vit_b16", "r50_vit_b32", "r50_vit_l16", "r50_vit_l32",
]  # fmt: skip
ARGUMENTS = {
    **{name: list(recipes.PRETRAIN) for name in TABLE3},
    "resnet": [m for m in recipes.PRETRAIN["jft"] if "ViT" not in m],
    "finetune": list(recipes.FINETUNE),
    "finetune_table2": ["ViT-L/16", "ViT-H/14"],
    "vtab": list(vtab_tasks.TASKS),
    "augreg_i1k": list(recipes.AUGREG_DEFAULT["imagenet"]),
    "augreg_i21k": list(recipes.AUGREG_DEFAULT["imagenet21k"]),
    "masked_patch": ["imagenet", "jft"],
    "cifar10": ["short", "long"],
    "small_pretrain": ["supervised", "masked"],
    "small_finetune": ["mnist", "cifar10"],
    "small_augreg": ["augreg", "none"],
    "vit_g14": list(recipes.SCALING),
}


def load(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"configs.{name}", FILES[name])
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = config.from_dict(module.get_config(*arguments))
    # A checkpoint would decide.
    return cfg if cfg.data.image_size else config.replace(cfg, data__image_size=224)


def test_names_that_scripts_rely_on_exist():
    assert set(FILES) >= {
        "digits", "cifar10", "vit_b16", "vit_l16", "vit_h14", "r50_vit_b16", "finetune",
        "masked_patch", "vit_s16_i1k",
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_config_files_are_short_and_say_what_to_expect(name):
    text = FILES[name].read_text()
    assert len(text.splitlines()) <= 25
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring
    if name != "digits":
        assert f"configs/{name}.py" in docstring


@pytest.mark.parametrize("name", FILES)
def test_every_argument_gives_a_config_that_fits(name):
    """Every row of the tables: sizes resolve, the schedule fits, the head does."""
    cases = [(a,) for a in ARGUMENTS.get(name, [])]
    for arguments in [(), *cases]:
        cfg = load(name, *arguments)
        assert cfg.optim.warmup < cfg.steps
        model = models.resolve(cfg.model)
        assert model.width > 0
        if cfg.loss == "masked_patch":
            assert model.head == "masked_patch"
        size = cfg.data.image_size
        assert 0 not in models.token_grid(model, (size, size))


@pytest.mark.parametrize("name", sorted(set(ARGUMENTS) & set(FILES)))
def test_an_unknown_argument_is_refused_by_name(name):
    with pytest.raises(UserError, match="choose one of"):
        load(name, "nonsense")


def test_an_argument_to_a_config_that_takes_none():
    with pytest.raises(UserError, match="takes no argument: leave out ':foo'"):
        config_file.Parser().parse("digits:foo")


@pytest.mark.heavy
@pytest.mark.parametrize("name", FILES)
def test_a_step_traces(name):
    """Shapes only: what comes out is what goes in. Of Table 3 a ViT and a hybrid: the
    others are the same programs in other sizes."""
    cfg = _shorter(load(name))
    info = data.DataInfo(10, tuple(map(str, range(10))), 100, 100, multilabel=False)
    program = build(cfg, jax.devices()[:1], info if not cfg.model.num_classes else None)
    state, batch = program.state_shape, program.batch_shape
    assert batch["image"].shape[:1] == (cfg.batch,)
    if name in {*TABLE3} - {"vit_b16", "r50_vit_b16"}:
        return
    after, metrics = jax.eval_shape(program.train_step, state, batch)
    assert _shapes(after) == _shapes(state)
    assert all(m.shape == () for m in metrics.values())
    assert {"loss", "learning_rate", "grad_norm"} <= set(metrics)


@pytest.mark.parametrize("name", FILES)
def test_synthetic_images_need_no_other_flag(name):
    cfg = config.replace(load(name), data__source="synthetic", data__subset=0.0)
    assert data.describe(cfg.data).num_train


def test_every_pipeline_makes_an_image():
    """What the configs do to a photo, training and evaluation, is done to one."""
    from data_files import encoded, picture

    from vit_jax.data import order, transforms

    pipelines = {}  # text of a pipeline and its size -> pipeline
    for name in FILES:
        for arguments in [(), *((a,) for a in ARGUMENTS.get(name, []))]:
            data = load(name, *arguments).data
            for ops in (data.train_transforms, data.eval_transforms):
                if ops:
                    pipelines[repr(ops), data.image_size] = ops
    assert len(pipelines) > 5
    photo = encoded(picture(0, 60, 80))
    seed = order.augmentation_seeds(np.arange(1), 0)[0]
    for (_, size), ops in pipelines.items():
        made = transforms.compose(ops, size=size, exact=False, knob="data")
        image = made(tf.constant(photo), tf.constant(seed))
        assert image.shape == (size, size, 3), ops


def _shorter(cfg):
    """The same widths; equal blocks are traced once, ResNet stages have one unit."""
    resolved = models.resolve(cfg.model)
    if resolved.depth:
        cfg = config.replace(cfg, model__layers="scan")
    if resolved.resnet:
        cfg = config.replace(cfg, model__resnet=(1,) * len(resolved.resnet))
    return cfg


def _shapes(tree):
    return jax.tree.map(lambda s: (s.shape, s.dtype), tree)
