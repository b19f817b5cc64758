"""Pairwise testing: choose few combinations of parts, so that every pair of parts occurs in one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

Row = TypeVar("Row")
Part = tuple[str, Any]
"""An axis (such as "attention") and a value of it (such as "gqa")."""
ORDERS = 20
"""Number of random orders of the rows that a search tries unless told otherwise."""


def cover(
    rows: Iterable[Row],
    parts: Callable[[Row], Iterable[Part]],
    size: int = 2,
    cost: Callable[[Row], float] = lambda _: 1.0,
    searches: int = ORDERS,
) -> list[Row]:
    """Choose few of the rows, so that every group of `size` parts of different axes that occurs in
    `rows` also occurs in a chosen row.

    parts: function that returns the parts of a row, which may have several values of an axis
    cost: function that returns the time that a row takes, in any unit
    searches: number of random orders of the rows that are tried

    The search is greedy: it takes the row with the most groups that are not covered yet, of equal
    rows one of least cost, and of these the first. Since the order of the rows matters, the result
    is the cheapest of several searches over random orders with fixed seeds.
    """
    rows = list(rows)
    costs = list(map(cost, rows))
    bit: dict[frozenset[Part], int] = {}

    def mask(row: Row) -> int:
        found = map(frozenset, itertools.combinations(dict.fromkeys(parts(row)), size))
        groups = (group for group in found if len({axis for axis, _ in group}) == size)
        return sum(1 << bit.setdefault(group, len(bit)) for group in groups)

    masks = [mask(row) for row in rows]

    def greedy(order: list[int]) -> list[int]:
        missing, chosen = (1 << len(bit)) - 1, []
        while missing:
            best = max(order, key=lambda row: ((masks[row] & missing).bit_count(), -costs[row]))
            missing &= ~masks[best]
            chosen.append(best)
        return chosen

    orders = (random.Random(seed).sample(range(len(rows)), len(rows)) for seed in range(searches))
    cheapest = min(map(greedy, orders), key=lambda chosen: sum(costs[row] for row in chosen))
    return [rows[number] for number in sorted(cheapest)]


def pairs(axes: Mapping[str, Iterable[Any]]) -> list[tuple[Any, ...]]:
    """Choose few combinations of one value per axis, so that every two values of different axes
    occur in a combination."""
    return cover(itertools.product(*axes.values()), lambda row: zip(axes, row, strict=True))


def params(
    rows: Iterable[Row],
    quick: Sequence[Row],
    name: Callable[[Row], str] | None = None,
    unpack: bool = False,
    group: Callable[[Row], str] | None = None,
) -> list[Any]:
    """Make the pytest parameters of a test from rows.

    rows: all rows
    quick: rows of the quick round; all other rows have the marker `product`
    name: function that names a row
    unpack: whether a row is a tuple of values for several parameters
    group: function that names the group of a row, whose tests run in one process; None for `name`
    """

    def param(row: Row) -> Any:
        marks = [] if row in quick else [pytest.mark.product]
        values = row if unpack and isinstance(row, tuple) else (row,)
        if name is None:
            return pytest.param(*values, marks=marks)
        together = pytest.mark.xdist_group((group or name)(row))
        return pytest.param(*values, id=name(row), marks=[*marks, together])

    return [param(row) for row in rows]
