"""Names of policies, with parameters and budgets, as in kvpress: parsing inverts printing."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mukv.cache.budget import CacheBudget
from mukv.cache.policy import Policy
from mukv.cache.tables import (
    KEEPERS,
    MERGES,
    REFINERS,
    SELECTORS,
    SPREADS,
    STORES,
    TABLES,
    WHENS,
)
from mukv.cache.words import PEERS, parameters, split
from mukv.core.errors import BadInput


def values(cls, name):
    """Return a strategy for values of a parameter, most of which are allowed."""
    hint = get_type_hints(cls)[name]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if hint is bool:
        return st.booleans()
    if hint is float or float in get_args(hint):
        numbers = st.floats(0, 1) | st.floats(1, 64)
        return numbers if hint is float else numbers | st.none()
    counts = st.integers(0, 80) | st.sampled_from([2**bits for bits in range(10)])
    return counts if hint is int else counts | st.none()


@st.composite
def parts(draw, table):
    cls = table[draw(st.sampled_from(sorted(table)))]
    chosen = draw(st.sets(st.sampled_from(parameters(cls)))) if parameters(cls) else ()
    options = {name: draw(values(cls, name)) for name in sorted(chosen)}
    if cls.has_budget:
        shares = st.integers(1, 1000).map(lambda part: part / 1000)
        options["budget"] = CacheBudget(draw(shares | st.integers(2, 10**7).map(float)))
    try:
        return cls(**options)
    except BadInput:
        return cls()


@st.composite
def policies(draw):
    keep = draw(parts(KEEPERS))
    if keep.evicts:
        steps = draw(st.lists(parts(REFINERS), max_size=2, unique_by=type)) if REFINERS else ()
        shared = {"spread": SPREADS, "when": WHENS, "merge": MERGES}
        shared = {name: draw(parts(table)) for name, table in shared.items()}
        keep = dataclasses.replace(keep, refine=tuple(steps), **shared)
    return Policy(keep, draw(parts(STORES)), draw(parts(SELECTORS)))


@pytest.mark.product
@given(policies())
def test_parsing_is_the_inverse_of_printing(policy):
    assert Policy.parse(str(policy)) == policy
    assert Policy.parse(policy.name, 0.5).name == policy.name


def test_every_parameter_can_be_set():
    """Each parameter is set by its name; its default is left out of the policy's name."""
    for table in TABLES:
        for name, cls in table.items():
            head = "" if table in (KEEPERS, STORES, SELECTORS) else "knorm+"
            for field in parameters(cls):
                default = getattr(cls(), field)
                shown = "null" if default is None else str(default)
                shown = shown.lower() if isinstance(default, bool) else shown
                assert Policy.parse(f"{head}{name}({field}={shown})") == Policy.parse(head + name)


def test_parameters_and_budgets():
    text = "snapkv(window=64,kernel=7):0.25+adaptive(floor=0.3)+int4(group=64)+topk"
    policy = Policy.parse(text, 0.5)
    assert (policy.keep.window, policy.keep.kernel, policy.keep.spread.floor) == (64, 7, 0.3)
    assert (policy.store.group, policy.select.budget.amount) == (64, 0.5)
    assert str(policy) == text + ":0.5"
    assert policy.name == "snapkv(window=64,kernel=7)+adaptive(floor=0.3)+int4(group=64)+topk"
    assert str(Policy.parse(" snapkv ( window = 32 ) : 0.5 + int8 ")) == "snapkv:0.5+int8"
    assert Policy.parse("full").everything
    assert not Policy.parse("int8(group=16)").everything


def test_defaults_of_kvpress():
    assert Policy.parse("kvpress:snapkv:0.25") == Policy.parse("snapkv(window=64):0.25")
    assert Policy.parse("kvpress:snapkv(window=8):0.25").keep.window == 8
    assert Policy.parse("kvpress:knorm").keep.recent == 0
    for name, given_there in PEERS["kvpress"].items():
        cls = next(table[name] for table in TABLES if name in table)
        assert set(given_there) <= set(parameters(cls))
        Policy.parse(f"kvpress:{name}" if name in KEEPERS else f"snapkv+kvpress:{name}")


def test_lists_are_split_outside_of_brackets():
    assert split("a(b=1,c=2):3,d+e(f=1e+4),", ",") == ["a(b=1,c=2):3", "d+e(f=1e+4)", ""]
    assert split("a(b=1e+4)+c", "+") == ["a(b=1e+4)", "c"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snapkv(windw=3)", "policy: snapkv.windw: got 3; no such parameter; allowed: recent"),
        ("snapkv(windw=3)", "did you mean 'window'?"),
        ("snapkv(window=x)", "policy: snapkv.window: got 'x'; needs a whole number"),
        ("snapkv(window=3.5)", "needs a whole number"),
        ("snapkv(window=true)", "needs a whole number"),
        ("snapkv(window=0)", "snapkv.window: got 0; at least 1"),
        ("snapkv(window=1,window=2)", "each parameter once"),
        ("snapkv(window)", "FIELD=VALUE, such as window=64"),
        ("snapkv(window=)", "FIELD=VALUE, such as window=64"),
        ("snapkv(window=3", "NAME(FIELD=VALUE,...):BUDGET"),
        ("snapkv(window=3)0.5", "NAME(FIELD=VALUE,...):BUDGET"),
        ("snapkv(window=(3))", "NAME(FIELD=VALUE,...):BUDGET"),
        ("snapkv(spread=adaptive)", "no such parameter"),
        ("snapkv(budget=0.5)", "no such parameter"),
        ("int8+snapkv:0.0001", "policy: budget of snapkv: got 0.0001; a share of at least"),
        ("snapkv(pool=mex)", "needs one of mean, max; did you mean 'max'?"),
        ("snapkv+adaptive(floor=1.5)", "adaptive.floor: got 1.5; a share from 0 to 1"),
        ("snapkv+adaptive(floor=.nan)", "needs finite: a number"),
        ("snapkv+pyramid(beta=0.5)", "pyramid.beta: got 0.5; at least 1"),
        ("snapkv+adaptive:0.5", "adaptive has no budget; it stands behind a part that has one"),
        ("snapkv:0.5(window=3)", "before the budget; did you mean 'snapkv(window=3):0.5'?"),
        ("kvpress:snapkv:0.5(window=3)", "did you mean 'kvpress:snapkv(window=3):0.5'?"),
        ("snapkv+", "policy: got 'snapkv+'; the name of a part on each side of +"),
        ("snapkv++int8", "policy: got 'snapkv++int8'; the name of a part on each side of +"),
        ("snapkv, int8", "names of parts with + between them; did you mean 'snapkv+int8'?"),
        ("snapkv+adaptive+pyramid", "at most one part that says what to spread"),
        ("streaming(sinks=-1)", "streaming.sinks: got -1; at least 0"),
        ("knorm(recent=-1)", "knorm.recent: got -1; at least 0"),
        ("int8(group=24)", "int8.group: got 24; a power of 2 from 2 to 512"),
        ("snapkv+merge(similarity=2)", "merge.similarity: got 2.0; a cosine from 0 to 1"),
        ("snapkv+merge+drop", "at most one part that says what to merge"),
        ("knorm+threshold(window=-1)", "threshold.window: got -1; at least 0"),
        ("topp(mass=0)", "topp.mass: got 0.0; a share above 0"),
        ("tova(window=3)", "no such parameter; allowed: recent"),
        ("exact(bits=3)", "no such parameter; it has none"),
        (
            "kvpress:h2o",
            "got 'kvpress:h2o'; a policy whose defaults in kvpress are known: streaming",
        ),
        ("kvpres:snapkv", "did you mean 'kvpress'?"),
    ],
)
def test_refused(text, words):
    with pytest.raises(BadInput) as caught:
        Policy.parse(text)
    assert words in str(caught.value)
