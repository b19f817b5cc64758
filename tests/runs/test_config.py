"""Presets and public configuration keys; random values for them are accepted or refused."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mukv.core import params
from mukv.core.errors import BadInput
from mukv.runs import config
from mukv.runs.config import Run
from mukv.schema import schema
from mukv.schema.yaml_text import parse_yaml


@pytest.mark.parametrize("name", config.presets())
def test_a_preset_is_what_its_yaml_says(name):
    run = config.load(name)
    assert schema.build(Run, parse_yaml(schema.to_yaml(run), name)) == run


def test_tiny_is_small():
    run = config.load("tiny")
    assert params.count(run.model.params()) < 1_000_000
    assert (run.train.steps, run.data.path) == (100, None)
    assert run.model.attention.kv_heads < run.model.attention.heads


@pytest.mark.parametrize("name", [name for name in config.presets() if name.startswith("tiny-")])
def test_a_variant_differs_from_tiny_in_the_model_only(name):
    tiny, variant = config.load("tiny"), config.load(name)
    assert variant.model != tiny.model
    assert (variant.train, variant.data, variant.mesh) == (tiny.train, tiny.data, tiny.mesh)


def test_public_keys():
    mapping = {
        "data": {"path": "t"},
        "train": {
            "steps": 2,
            "seed": 3,
            "batch": 4,
            "length": 5,
            "learning_rate": 6.0,
            "checkpoint_every": 7,
        },
        "mesh": {"data": 2, "tensor": 2},
    }
    run = schema.build(Run, mapping)
    for section, keys in mapping.items():
        found = schema.to_mapping(getattr(run, section))
        assert {key: found[key] for key in keys} == keys
    for kind in ("sp", "mup", "ntk", "mean_field"):
        scaling = schema.build(Run, {"model": {"scaling": {"kind": kind}}}).model.scaling
        assert scaling.kind == kind


def leaves(mapping, path=""):
    for key, value in mapping.items() if isinstance(mapping, dict) else enumerate(mapping):
        yield f"{path}{key}"
        if isinstance(value, dict | list):
            yield from leaves(value, f"{path}{key}.")


LEAVES = sorted(leaves(schema.to_mapping(config.load("llama-3.1-8b"))))
PATHS = st.sampled_from([path for path in LEAVES if not path.endswith("repeats")])
NUMBERS = st.integers(-3, 99) | st.sampled_from([10**9, -(10**30), 1e-300, 1e300, 0.5])
WORDS = st.sampled_from(
    ["null", "true", ".nan", ".inf", "''", "[]", "{}", "[{}]", "[[1]]", "grouped", "{kind: rope}"]
)
VALUES = NUMBERS | WORDS | st.text(max_size=9)


@given(st.lists(st.builds("{}={}".format, PATHS, VALUES), min_size=1, max_size=3))
@settings(max_examples=100)
def test_random_overrides_are_at_worst_bad_input(overrides):
    with suppress(BadInput):
        run = config.load("llama-3.1-8b", overrides)
        params.count(run.model.params())


@given(st.binary(max_size=99))
def test_random_files_are_at_worst_bad_input(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(content)
    with suppress(BadInput):
        config.load(path)
