# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from ml_collections import ConfigDict

from vit_jax import config
from vit_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Positive,
    Share,
)
from vit_jax.errors import UserError


def test_json_round_trip_is_exact():
    cfg = Config(
        model=ModelConfig(resnet=(3, 4, 9)),
        data=DataConfig(
            train_transforms=({"op": "flip"}, {"op": "crop", "area": (0.05, 1.0)})
        ),
    )
    assert config.from_dict(json.loads(config.to_json(cfg))) == cfg


def test_config_dict_round_trip_is_exact():
    cfg = Config(model=ModelConfig(resnet=(2, 2)), steps=7)
    assert config.from_dict(dict(ConfigDict(config.to_dict(cfg)).items())) == cfg


def test_a_whole_number_in_a_file_can_be_overridden_by_a_fraction():
    """The command line takes the type of what is there."""
    values = config.config_dict(Config(optim=OptimConfig(warmup=10_000)))
    assert type(values.optim.warmup) is float


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().steps = 3  # type: ignore


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepss": 3}, ["config.stepss", "'steps'"]),
        ({"data": {"pth": "x"}}, ["config.data.pth", "'path'"]),
        ({"steps": 1.5}, ["config.steps", "1.5", "int"]),
        ({"steps": "many"}, ["config.steps", "'many'", "int"]),
        ({"steps": True}, ["config.steps", "True", "int"]),
        ({"loss": "softmx"}, ["config.loss", "'softmx'", "'softmax'"]),
        ({"model": {"resnet": 3}}, ["config.model.resnet", "list"]),
        (
            {"model": {"image_size": (1, 2, 3)}},
            ["config.model.image_size", "2 entries"],
        ),
        ({"model": 3}, ["config.model", "group of keys"]),
        ({"batch": 0}, ["config.batch is 0", "at least 1"]),
        ({"optim": {"clip": -1}}, ["config.optim.clip is -1", "at least 0"]),
        (
            {"optim": {"polyak": 1.5}},
            ["config.optim.polyak is 1.5", "at least 0 and below 1"],
        ),
        ({"optim": {"eps": 0.0}}, ["config.optim.eps is 0", "above 0"]),
        ({"optim": {"learning_rate": float("nan")}}, ["learning_rate is nan"]),
        ({"optim": {"learning_rate": float("inf")}}, ["learning_rate is inf"]),
        ({"model": {"head_bias": float("nan")}}, ["head_bias is nan", "finite"]),
        ({"mesh": (4, 0)}, ["config.mesh[1] is 0", "at least 1"]),
    ],
)
def test_bad_values_are_refused_by_name(values, words):
    with pytest.raises(UserError) as e:
        config.from_dict(values)
    for word in words:
        assert word in str(e.value)


def test_a_config_built_in_python_is_checked_too():
    with pytest.raises(UserError, match="accumulate is 0"):
        config.checked(Config(accumulate=0))
    assert config.checked(Config()) == Config()


def function(
    image,
    *,
    p: Share = 0.5,
    size: Positive | tuple[Positive, Positive] = 8,
    shots: Sequence[Positive] = (1,),
    data: Mapping[str, Any] | None = None,
    mapping: str,
):
    pass


def test_arguments_are_converted_like_fields():
    given = {"mapping": "x", "p": 1, "shots": [1, 5], "size": [2, 3], "data": None}
    assert config.arguments(function, given, "knob") == {
        "mapping": "x", "p": 1.0, "shots": (1, 5), "size": (2, 3), "data": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["knob needs the option 'mapping'"]),
        ({"image": 3}, ["knob has the unknown option 'image'", "'mapping'"]),
        ({"sise": 3}, ["'sise'", "did you mean 'size'"]),
        ({"p": 2}, ["knob.p is 2", "at least 0 and at most 1"]),
        ({"p": "half"}, ["knob.p is 'half'", "float"]),
        ({"size": "8"}, ["knob.size is '8'", "int", "list"]),
        ({"size": (8, 0)}, ["knob.size is (8, 0)", "at least 1"]),
        ({"shots": 5}, ["knob.shots is 5", "list"]),
        ({"shots": (5, 0)}, ["knob.shots[1] is 0"]),
        ({"data": 5}, ["knob.data is 5", "group of keys"]),
    ],
)
def test_bad_arguments_are_refused_by_name(given, words):
    with pytest.raises(UserError) as e:
        config.arguments(function, {"mapping": "x"} | given if given else {}, "knob")
    for word in words:
        assert word in str(e.value)


def test_a_stored_config_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "config.json"
    for text in ("", "{", "[1]", '{"stepss": 1}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config.json|stepss"):
            config.read(path)
    path.write_text(config.to_json(Config(steps=7)))
    assert config.read(path).steps == 7


@pytest.mark.parametrize(
    ("value", "expected"),
    [("vit_b16", "ViT-B/16"), ("ViT-b32", "ViT-B/32"), ("R50+ViT-B16", "R50+ViT-B/16")],
)
def test_the_nearest_name_is_written_in_another_way(value, expected):
    names = ["ViT-B/16", "ViT-B/32", "R50+ViT-B/16"]
    assert config.nearest(value, names) == f"did you mean {expected!r}? "
    assert config.nearest("quite else", names) == ""


@pytest.mark.parametrize(
    ("key", "expected"),
    [("lr", "learning_rate"), ("wd", "weight_decay"), ("momentum", "b1"), ("ema", "polyak")],
)  # fmt: skip
def test_names_of_other_projects_are_understood(key, expected):
    with pytest.raises(UserError, match=f"did you mean '{expected}'"):
        config.from_dict({"optim": {key: 0.1}})


@pytest.mark.parametrize(
    "value", ["fewshot,knn", ("fewshot,knn",), ["fewshot", {"type": "knn"}]]
)
def test_evaluators_and_transforms_may_be_given_by_name(value):
    found = config.from_dict({"eval": {"evaluators": value}}).eval.evaluators
    assert found == ({"type": "fewshot"}, {"type": "knn"})
    found = config.from_dict({"data": {"train_transforms": "flip"}}).data
    assert found.train_transforms == ({"op": "flip"},)
    with pytest.raises(
        UserError, match=r"config.eval.evaluators is 3: it must be a list"
    ):
        config.from_dict({"eval": {"evaluators": 3}})


def test_an_int_is_a_float():
    assert config.from_dict({"optim": {"learning_rate": 1}}).optim.learning_rate == 1.0


def test_difference_names_the_field():
    a = Config()
    b = config.replace(a, model__width=7, steps=3)
    assert config.difference(a, b) == {"model.width": (0, 7), "steps": (10000, 3)}
    assert config.difference(a, a) == {}


@pytest.mark.parametrize("field", ["b1", "b2", "polyak"])
def test_a_moving_average_that_forgets_nothing_is_refused(field):
    """1 - b1**t, which Adam divides by, would be 0."""
    with pytest.raises(UserError, match=rf"config.optim.{field} is 1.0: .* below 1"):
        config.from_dict({"optim": {field: 1.0}})
    assert config.from_dict({"optim": {field: 0.0}})


def test_no_default_is_none():
    """The command line cannot override a None."""

    def leaves(part):
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            yield from (
                leaves(value) if dataclasses.is_dataclass(value) else [(f.name, value)]
            )

    assert [name for name, value in leaves(Config()) if value is None] == []
