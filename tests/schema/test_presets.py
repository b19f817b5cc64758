"""Overrides and presets merge by one rule: keys that are not set keep their values."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mukv.core.errors import BadInput
from mukv.schema.presets import apply_overrides, resolve_preset
from mukv.schema.schema import build, to_mapping


@dataclass(frozen=True)
class Grouped:
    kind: Literal["grouped"] = "grouped"
    heads: int = 4
    kv_heads: int = 4
    scale: float | None = None


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


@dataclass(frozen=True)
class Train:
    rate: float = 0.1
    bias: bool = False
    title: str = ""
    names: tuple[str, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)


FULL = to_mapping(Run())


def changed(*overrides: str, start=FULL) -> Run:
    return build(Run, apply_overrides(Run, start, overrides))


@pytest.mark.parametrize("start", [FULL, {}])
def test_an_override_changes_what_it_names(start):
    assert changed("train.rate=1e-3", start=start).train == Train(rate=1e-3)
    assert changed("model.plan.1.window=3", start=start).model.plan == (Layer(), Layer(window=3))
    assert changed("model.attention.kv_heads=2", start=start).model == Model(
        Grouped(heads=8, kv_heads=2)
    )
    assert changed("train.rates.a=2", "train.rates.b=3", start=start).train.rates == {
        "a": 2.0,
        "b": 3.0,
    }
    assert changed("train.names=[a, b]", "train.names.1=c", start=start).train.names == ("a", "c")
    assert changed("train.title=a=b", start=start).train.title == "a=b"
    assert changed(
        "model.plan.0.attention.kind=latent", "model.plan.0.attention.rank=2", start=start
    ).model.plan[0] == Layer(Latent(rank=2))


def test_a_new_kind_drops_what_it_does_not_have():
    assert changed("model.attention.kind=latent").model.attention == Latent(heads=8)
    assert changed("model.attention={kind: latent, rank: 3}").model.attention == Latent(
        heads=8, rank=3
    )
    assert changed("model.attention.kind=latent", start={}).model.attention == Latent()


@pytest.mark.parametrize("first", [0, 1])
def test_an_explicit_override_outlives_a_new_kind(first):
    overrides = ["model.attention.kind=latent", "model.attention.scale=2"]
    with pytest.raises(BadInput, match=r"model\.attention\.scale: got 2; no such key"):
        changed(overrides[first], overrides[1 - first])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.rate", "path.to.key=value"),
        ("=1", "path.to.key=value"),
        ("a..b=1", "path.to.key=value"),
        ("model.plan.2.window=1", r"model\.plan\.2.*0 to 1"),
        ("model.plan.-1.window=1", r"0 to 1"),
        ("model.plan.x=1", r"0 to 1"),
        ("train.names.0=1", "empty"),
        ("train.rate.x=1", r"train\.rate is a plain value"),
        ("train.rate=[", r"train\.rate: .*line 1"),
        ("train.rat=1", "did you mean 'rate'"),
        ("model.attention.kind=laten", "did you mean 'latent'"),
    ],
)
def test_a_bad_override_is_refused(override, message):
    with pytest.raises(BadInput, match=message):
        changed(override)


def test_the_given_mapping_is_left_alone():
    start = to_mapping(Run())
    changed("model.plan.0.window=1", "model.attention.kind=latent", start=start)
    assert start == FULL


keys = st.sampled_from(["model", "attention", "kind", "heads", "plan", "train", "rates", "0", "7"])
paths = st.lists(keys | st.text(max_size=3), max_size=5)
values = st.text(max_size=8) | st.sampled_from(["latent", "{kind: latent}", "[{}]", "1e-3", "{}"])


@given(st.lists(st.builds("{}={}".format, paths.map(".".join), values) | st.text(), max_size=4))
def test_random_overrides_are_at_worst_bad_input(overrides):
    with suppress(BadInput):
        changed(*overrides)


# Presets


@pytest.fixture
def folder(tmp_path):
    for name, text in {
        "tiny": "{model: {attention: {kind: grouped, heads: 6, kv_heads: 2}}, train: {rate: 1}}",
        "tiny-latent": "{extends: tiny, model: {attention: {kind: latent}}}",
        "layers": "{extends: tiny-latent, model: {plan: [{window: 2}]}}",
        "circle": "{extends: round}",
        "round": "{extends: circle}",
        "lost": "{extends: tinny}",
        "odd": "{extends: [tiny]}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_a_preset_extends_another(folder):
    run = build(Run, resolve_preset(Run, "layers", folder))
    assert run == Run(Model(Latent(heads=6), plan=(Layer(window=2),)), Train(rate=1.0))


def test_a_path_may_extend_a_preset_or_a_neighbour(folder, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.yaml").write_text("{extends: b.yaml, train: {title: a}}")
    (mine / "b.yaml").write_text("{extends: tiny, train: {bias: true}}")
    mapping = resolve_preset(Run, mine / "a.yaml", folder)
    assert build(Run, mapping).train == Train(rate=1.0, bias=True, title="a")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "preset: got 'tinny'.*did you mean 'tiny'"),
        ("lost", r"lost\.yaml: extends: got 'tinny'.*did you mean 'tiny'"),
        ("circle", "circle"),
        ("odd", "extends"),
        ("no/such.yaml", "no such file"),
        ("a\0/b.yaml", "needed"),
    ],
)
def test_a_bad_preset_is_refused(folder, name, message):
    with pytest.raises(BadInput, match=message):
        resolve_preset(Run, name, folder)
