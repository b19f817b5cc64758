"""Choose few rows of a product of parts, so that every pair of parts is in at least one of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pytest

Row = TypeVar("Row")
Part = tuple[str, Any]
"""The name of an axis and a value on it."""
ORDERS = 20


def cover(rows: Iterable[Row], parts: Callable[[Row], Iterable[Part]], size: int = 2) -> list[Row]:
    """Rows in which every group of `size` parts of different axes appears that is in `rows` at all.

    Greedy: the row with the most groups that are still missing comes next. Which of equals is taken
    first matters much, so this is the best of some orders, the same ones each time.
    parts: what a row consists of; it may have several values on an axis.
    """
    rows = list(rows)
    bit: dict[frozenset[Part], int] = {}

    def mask(row: Row) -> int:
        found = map(frozenset, itertools.combinations(dict.fromkeys(parts(row)), size))
        groups = (group for group in found if len({axis for axis, _ in group}) == size)
        return sum(1 << bit.setdefault(group, len(bit)) for group in groups)

    masks = [mask(row) for row in rows]

    def greedy(order: list[int]) -> list[int]:
        missing, chosen = (1 << len(bit)) - 1, []
        while missing:
            best = max(order, key=lambda number: (masks[number] & missing).bit_count())
            missing &= ~masks[best]
            chosen.append(best)
        return chosen

    orders = (random.Random(seed).sample(range(len(rows)), len(rows)) for seed in range(ORDERS))
    return [rows[number] for number in sorted(min(map(greedy, orders), key=len))]


def pairs(axes: Mapping[str, Iterable[Any]]) -> list[tuple[Any, ...]]:
    """Rows of the product of the axes, in which every two values of different axes meet."""
    return cover(itertools.product(*axes.values()), lambda row: zip(axes, row, strict=True))


def params(
    rows: Iterable[Row],
    quick: Sequence[Row],
    name: Callable[[Row], str] | None = None,
    unpack: bool = False,
) -> list[Any]:
    """Parameters of a test: all rows, of which those that are not in `quick` are for the product.

    name: the name of a row, which also keeps its tests in one process. unpack: a row is the values
    of several parameters.
    """

    def param(row: Row) -> Any:
        marks = [] if row in quick else [pytest.mark.product]
        values = row if unpack and isinstance(row, tuple) else (row,)
        if name is None:
            return pytest.param(*values, marks=marks)
        group = pytest.mark.xdist_group(name(row))
        return pytest.param(*values, id=name(row), marks=[*marks, group])

    return [param(row) for row in rows]
