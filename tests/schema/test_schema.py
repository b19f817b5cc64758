"""Mappings are built into configuration objects, or refused with one clear line."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mukv.core.errors import BadInput, nearest_name
from mukv.runs import config
from mukv.schema.schema import build, to_mapping, to_yaml
from mukv.schema.yaml_text import dump_yaml, parse_yaml, read_yaml


@dataclass(frozen=True)
class Grouped:
    kind: Literal["grouped"] = "grouped"
    heads: int = 4
    kv_heads: int = 4
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise BadInput("kv_heads", self.kv_heads, f"must divide heads ({self.heads})", "2")


@dataclass(frozen=True)
class Latent:
    kind: Literal["latent"] = "latent"
    heads: int = 6
    rank: int = 8


@dataclass(frozen=True)
class Layer:
    attention: Grouped | Latent | None = None
    window: int | None = None


@dataclass(frozen=True)
class Model:
    attention: Grouped | Latent = field(default_factory=lambda: Grouped(heads=8))
    plan: tuple[Layer, ...] = (Layer(), Layer())
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Train:
    rate: float = 0.1
    bias: bool = False
    title: str = ""
    names: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    rates: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Layer] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)


@dataclass(frozen=True)
class Needs:
    path: str


GOOD = [
    ({}, Run()),
    ({"model": {"attention": {"kind": "latent"}}}, Run(Model(Latent()))),
    # What is left out is as in the field's default, unless another kind is chosen.
    ({"model": {"attention": {"kv_heads": 2}}}, Run(Model(Grouped(heads=8, kv_heads=2)))),
    ({"model": {"plan": [{"attention": {"kind": "latent"}}]}}, Run(Model(plan=(Layer(Latent()),)))),
    ({"train": {"rate": 1, "betas": [0, 1]}}, Run(train=Train(rate=1.0, betas=(0.0, 1.0)))),
    ({"train": {"rates": {"a": 2}}}, Run(train=Train(rates={"a": 2.0}))),
    ({"train": {"parts": {"a": {"window": 2}}}}, Run(train=Train(parts={"a": Layer(window=2)}))),
]

BAD = [
    ({"modle": {}}, "modle", "model"),
    ({"model": {"attention": {"kv_head": 2}}}, "model.attention.kv_head", "kv_heads"),
    ({"model": {"attention": {"kind": "group"}}}, "model.attention.kind", "grouped"),
    ({"model": {"attention": {"kind": ["latent"]}}}, "model.attention.kind", None),
    (
        {"model": {"attention": {"kind": "latent", "kv_heads": 2}}},
        "model.attention.kv_heads",
        "heads",
    ),
    ({"model": {"attention": {"kv_heads": 3}}}, "model.attention.kv_heads", "2"),
    ({"model": {"attention": None}}, "model.attention", None),
    ({"model": {"attention": "latent"}}, "model.attention", None),
    ({"model": {"attention": {"heads": "3"}}}, "model.attention.heads", None),
    ({"model": {"attention": {"heads": 3.5}}}, "model.attention.heads", None),
    ({"model": {"attention": {"heads": True}}}, "model.attention.heads", None),
    ({"model": {"attention": {"heads": None}}}, "model.attention.heads", None),
    ({"model": {"plan": {"window": 1}}}, "model.plan", None),
    ({"model": {"plan": [{}, {"window": "x"}]}}, "model.plan.1.window", None),
    ({"model": {"plan": [{"attention": {"heads": 1}}]}}, "model.plan.0.attention.kind", None),
    ({"model": {"dtype": "bfloat"}}, "model.dtype", "bfloat16"),
    ({"train": {"rate": "fast"}}, "train.rate", None),
    ({"train": {"rate": float("nan")}}, "train.rate", None),
    ({"train": {"bias": 1}}, "train.bias", None),
    ({"train": {"title": 3}}, "train.title", None),
    ({"train": {"betas": [1, 2, 3]}}, "train.betas", None),
    ({"train": {"rates": {"a": "x"}}}, "train.rates", None),
    ({"train": {"parts": {"a": {"windo": 2}}}}, "train.parts.a.windo", "window"),
    ({1: 2}, "1", None),
    ([], "configuration", None),
]


@pytest.mark.parametrize(("mapping", "expected"), GOOD)
def test_builds_what_the_mapping_says(mapping, expected):
    assert build(Run, mapping) == expected


@pytest.mark.parametrize(("mapping", "where", "nearest"), BAD)
def test_refuses_with_the_path_and_the_nearest_name(mapping, where, nearest):
    with pytest.raises(BadInput) as caught:
        build(Run, mapping)
    assert (caught.value.where, caught.value.nearest) == (where, nearest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "kind"),
    [("mla", "latent"), ("MHA", "grouped"), ("gdn", "gated_delta"), ("latnet", "latent")],
)
def test_an_attention_by_its_name_in_papers_suggests_the_kind(typed, kind):
    with pytest.raises(BadInput) as caught:
        config.load("tiny", [f"model.attention.kind={typed}"])
    assert (caught.value.where, caught.value.nearest) == ("model.attention.kind", kind)


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("tyni", "tiny"), ("TINY", "tiny"), ("smal", "small"), ("entirely different", None)],
)
def test_the_nearest_name(typed, nearest):
    assert nearest_name(typed, ["small", "tiny"]) == nearest


def test_counts_the_other_mistakes():
    with pytest.raises(BadInput, match=r"^train.rat: .*\(\+2 more: model.plan, model.dtype\)$"):
        build(Run, {"train": {"rat": 1}, "model": {"dtype": 1, "plan": 2}})


def test_errors_name_what_a_leaf_needs():
    with pytest.raises(BadInput, match=r"heads: got '3'; needs a whole number$"):
        build(Run, {"model": {"attention": {"heads": "3"}}})
    with pytest.raises(BadInput, match=r"scale: got 'x'; needs a number or null$"):
        build(Run, {"model": {"attention": {"scale": "x"}}})
    with pytest.raises(BadInput, match="path: got None; required: text"):
        build(Needs, {}, "data")


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
whole = st.integers(-(2**53), 2**53)
layers = st.builds(
    Layer,
    st.none() | st.builds(Latent, heads=whole) | st.builds(Grouped, scale=numbers),
    st.none() | whole,
)
runs = st.builds(
    Run,
    st.builds(
        Model,
        st.builds(Latent, rank=whole) | st.builds(Grouped, kv_heads=st.sampled_from((1, 2))),
        st.lists(layers).map(tuple),
    ),
    st.builds(
        Train,
        numbers,
        st.booleans(),
        st.text(),
        st.lists(st.text()).map(tuple),
        st.tuples(numbers, numbers),
        st.dictionaries(st.text(), numbers),
        st.dictionaries(st.text(), layers),
    ),
)


@pytest.mark.product
@given(runs)
def test_yaml_round_trip_is_exact(run):
    assert build(Run, parse_yaml(to_yaml(run), "test")) == run


keys = st.sampled_from(
    ["model", "train", "attention", "plan", "kind", "heads", "window", "rate", "rates", "parts"]
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(keys | st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(keys, plain) | plain)
def test_a_random_mapping_is_at_worst_bad_input(mapping):
    with suppress(BadInput):
        build(Run, mapping)


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.", 1.0),
        ("+2", 2),
        ("0x10", 16),
        ("no", "no"),
        ("2020-01-01", "2020-01-01"),
        ("1:30", "1:30"),
        ("'1e-3'", "1e-3"),
        ("=", "="),
        ("", None),
        ('"a\\N\\L\\P"', "a\x85\u2028\u2029"),
        ("é", "é"),
        ("[true, ~]", [True, None]),
    ],
)
def test_reads_words_as_yaml_1_2_does(text, value):
    read = parse_yaml(text, "test")
    assert (read, type(read)) == (value, type(value))
    assert parse_yaml(dump_yaml(value), "test") == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: [1\n", r"line 3, column 1"),
        (b"a: 1\nb: 2\na: 3\n", r"'a' is there twice.*line 3, column 1"),
        (b"- 1\n", "mapping"),
        (b"", "mapping"),
        (b"a: \xff\xfe", "UTF-8"),
        (b"a: \x01", "line 1"),
        (b"a: &x [*x]", "plain"),
        (b"a: !!set {b}", "plain"),
        (b"a: !!python/object:os.system x", "line 1"),
        (b"[" * 5000, "plain"),
        (b"a: " + b"9" * 5000, "plain"),
    ],
)
def test_a_bad_file_is_reported_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no.yaml", tmp_path / "a\0b"):
        with pytest.raises(BadInput, match="needed"):
            read_yaml(path)


@given(st.binary() | st.text("[]{}:,-&*!|>'\"%@ \n\tab01.<=~?#").map(str.encode))
def test_random_bytes_are_at_worst_bad_input(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(content)
    with suppress(BadInput):
        read_yaml(path)


def test_to_mapping_is_plain_and_complete():
    assert to_mapping(Layer(Latent())) == {
        "attention": {"kind": "latent", "heads": 6, "rank": 8},
        "window": None,
    }
