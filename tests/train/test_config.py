"""The config: JSON round trip and refused values."""

import json

import pytest

from lsmha_fast.data import load_dataset
from lsmha_fast.train import TrainConfig
from lsmha_fast.train.run import data_name


def test_json_round_trip(tmp_path):
    config = TrainConfig(num_heads=(4, 16), lr=3e-4, augment=False)
    (tmp_path / "config.json").write_text(config.to_json())
    assert TrainConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize("text", ["", "[]", "{", '{"colour": 1}', '{"epochs": "many"}'])
def test_damaged_json_is_a_value_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        TrainConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "name, value",
    [
        ("data", "mnist"),
        ("amp", "fp8"),
        ("epochs", 0),
        ("batch_size", -1),
        ("attn_drop", 1.0),
        ("drop_path", -0.1),
        ("lr", float("nan")),
        ("weight_decay", float("inf")),
        ("conv_blocks", -1),
    ],
)
def test_refused_values_name_the_flag_and_the_value(name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be .* got {value}"):
        TrainConfig(**{name: value})


def test_to_json_holds_every_field():
    assert set(json.loads(TrainConfig().to_json())) == set(TrainConfig.__dataclass_fields__)


def test_pictures_name_the_data_as_the_data_set_does():
    config = TrainConfig(data="glyphs100", tier="medium")
    assert data_name(config) == load_dataset("glyphs100", "test", tier="medium").name
    assert data_name(TrainConfig(data="digits")) == load_dataset("digits", "test").name
