"""The reference has a meaning for every key, and its page in docs is up to date."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mukv.core.errors import BadInput
from mukv.runs.config import Run
from mukv.schema import reference
from mukv.schema.schema import build

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
KEYS = [(cls, key) for (_, cls), keys in reference.sections(Run) for key in keys]


def test_every_key_has_a_meaning():
    assert len(KEYS) > 200
    assert [f"{cls.__name__}: {key.path}" for cls, key in KEYS if len(key.meaning) < 8] == []


def test_fields_of_a_class_have_meanings_of_their_own():
    """Two fields share a meaning only if its words apply to each of them alone."""
    shared = {
        (cls.__name__, meaning)
        for (_, cls), keys in reference.sections(Run)
        for meaning, number in Counter(key.meaning for key in keys).items()
        if number > 1
    }
    assert shared == set()


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == reference.markdown(Run), "run: python docs/configuration.py"


@pytest.mark.product
def test_every_key_is_found_by_its_path():
    for cls, key in KEYS:
        found = reference.find(Run, key.path)
        assert any(each.owner is cls or each.meaning == key.meaning for each in found)


@dataclass(frozen=True)
class Inner:
    """Inner part. Its words may have a last: this is no field.

    size: size in tokens; None for
        all
    first, last: one of two
    """

    kind: Literal["inner"] = "inner"
    size: int | None = None
    first: Literal["a", "b"] = "a"
    last: bool = False


@dataclass(frozen=True)
class Other:
    """Other part.

    size: size in bytes
    weights: a number each
        for two roles
    """

    kind: Literal["other"] = "other"
    size: int = 3
    weights: tuple[float, ...] = (1.0, 2.0)


@dataclass(frozen=True)
class Outer:
    """Parts.

    part: one part
    parts: several parts
    needed: has no default
    """

    needed: str
    part: Inner | Other = Inner()
    parts: tuple[Inner, ...] = ()


def test_facts_of_a_key():
    (key,) = reference.find(Outer, "part.first")
    assert (key.meaning, key.type) == ("one of two", "one of a, b")
    assert (key.default, key.allowed, key.kinds) == ("a", ("a", "b"), ("inner",))
    (key,) = reference.find(Outer, "part.last")
    assert key.meaning == "one of two", "a word with a colon inside a sentence is no field"
    (key,) = reference.find(Outer, "part.weights")
    assert (key.meaning, key.default_text) == ("a number each for two roles", "[1.0, 2.0]")
    (key,) = reference.find(Outer, "part")
    assert (key.allowed, key.default_text) == (("inner", "other"), "{kind: inner}")
    (key,) = reference.find(Outer, "needed")
    assert (key.required, key.default_text, key.meaning) == (True, "required", "has no default")


def test_a_key_of_several_kinds_is_shown_for_each():
    first, second = reference.find(Outer, "part.size")
    assert (first.meaning, first.kinds) == ("size in tokens; null for all", ("inner",))
    assert (second.meaning, second.kinds) == ("size in bytes", ("other",))


@pytest.mark.parametrize("path", ["parts.0.size", "parts.N.size", "parts.size"])
def test_entries_of_a_list(path):
    (key,) = reference.find(Outer, path)
    assert key.path == "parts.N.size"
    build(Outer, {"needed": "", "parts": [{"kind": "inner", "size": 4}]})


@pytest.mark.parametrize(
    ("root", "path", "near"),
    [
        (Outer, "part.sise", "part.size"),
        (Outer, "parts.0.lst", "parts.N.last"),
        (Run, "train.optimiser", "train.optimizer"),
        (Run, "model.window", "model.attention.window"),
        (Run, "0", None),
    ],
)
def test_an_unknown_key_has_a_nearest(root, path, near):
    with pytest.raises(BadInput) as caught:
        reference.find(root, path)
    assert caught.value.nearest == near


def test_summaries():
    assert reference.summary(Inner) == "Inner part"
    assert reference.summary(Other) == "Other part"
