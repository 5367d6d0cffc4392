# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from vit_jax import config
from vit_jax.config import Config, DataConfig, ModelConfig
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
    ],
)
def test_bad_values_are_refused_by_name(values, words):
    with pytest.raises(UserError) as e:
        config.from_dict(values)
    for word in words:
        assert word in str(e.value)


def test_an_int_is_a_float():
    assert config.from_dict({"optim": {"learning_rate": 1}}).optim.learning_rate == 1.0


def test_difference_names_the_field():
    a = Config()
    b = config.replace(a, model__width=7, steps=3)
    assert config.difference(a, b) == ["model.width: 0 -> 7", "steps: 10000 -> 3"]
    assert config.difference(a, a) == []


def test_no_default_is_none():
    """The command line cannot override a None."""

    def leaves(part):
        for f in dataclasses.fields(part):
            value = getattr(part, f.name)
            yield from (
                leaves(value) if dataclasses.is_dataclass(value) else [(f.name, value)]
            )

    assert [name for name, value in leaves(Config()) if value is None] == []
