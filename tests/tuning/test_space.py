"""Ranges of a sweep are parsed into the points that they mean."""

from __future__ import annotations

from itertools import islice

import pytest

from mukv.core.errors import BadInput
from mukv.tuning import space


def test_ranges_and_overrides_are_told_apart():
    found, fixed = space.split(
        [
            "train.learning_rate=1e-4..1e-2:log:3",
            "train.seed=0,1",
            "train.schedule={kind: wsd, decay: 0.2}",
            "model.plan=[{repeats: 2}, {repeats: 1}]",
            "data.path=../texts/a..b",
            "model.attention.heads=2..8:3",
        ]
    )
    assert fixed == [
        "train.schedule={kind: wsd, decay: 0.2}",
        "model.plan=[{repeats: 2}, {repeats: 1}]",
        "data.path=../texts/a..b",
    ]
    assert found["train.learning_rate"].values == pytest.approx((1e-4, 1e-3, 1e-2))
    assert found["train.seed"].values == (0, 1)
    assert found["model.attention.heads"].values == (2, 5, 8)
    assert len(space.grid(found)) == 18


def test_random_points_depend_on_their_number_alone():
    found, _ = space.split(["a=1e-4..1e-2:log", "b=x,y,z", "c=1..9"])
    first, again = (list(islice(space.random(found, 3), n)) for n in (4, 9))
    assert again[:4] == first
    assert len({tuple(point.values()) for point in again}) == 9
    for point in again:
        assert 1e-4 <= point["a"] <= 1e-2
        assert point["b"] in "xyz"
        assert isinstance(point["c"], int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=3..1", r"a: got '3..1'; LOW below HIGH \(did you mean 1..3\?\)"),
        ("a=1e-2..1e-4:log", "did you mean"),
        ("a=1..1", "LOW below HIGH"),
        ("a=x..y", "a: got 'x..y'; LOW..HIGH"),
        ("a=1..", "LOW..HIGH"),
        ("a=0..1:log", "greater than 0"),
        ("a=1..2:cubic", "LOW..HIGH:log"),
        ("a=1..2:1", "COUNT at least 2"),
        ("a=1,1", "distinct values"),
        ("a=1,[2]", "plain values"),
        ("a=1", "sweep: got 'a=1'; at least one key="),
    ],
)
def test_bad_ranges(text, message):
    with pytest.raises(BadInput, match=message):
        space.split([text])


def test_a_grid_needs_counts():
    with pytest.raises(BadInput, match=r"a: got '1..2'; 1..2:COUNT for a grid"):
        space.grid({"a": space.Interval(1, 2)})
