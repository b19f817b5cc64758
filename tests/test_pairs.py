"""The quick round contains every pair of parts, and `make test-all` every triple."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.laws import matrix
from tests.pairs import cover, pairs


def met(rows, axes):
    """Return all pairs of values of different axes that occur in one row."""
    numbered = [list(zip(axes, row, strict=True)) for row in rows]
    return {frozenset(pair) for row in numbered for pair in itertools.combinations(row, 2)}


@pytest.mark.parametrize(
    ("sizes", "most"),
    [((2, 2, 2), 4), ((3, 3, 3), 11), ((8, 10, 8), 88), ((4,) * 5, 28)],
)
def test_every_pair_is_covered_by_few_rows(sizes, most):
    axes = {f"axis{number}": range(size) for number, size in enumerate(sizes)}
    rows, product = pairs(axes), list(itertools.product(*axes.values()))
    assert set(rows) <= set(product)
    assert met(rows, axes) == met(product, axes)
    assert len(rows) == len(set(rows)) <= most
    assert len(sizes) < 3 or len(rows) <= math.prod(sizes) * 0.55
    assert rows == pairs(axes)


def test_a_row_may_have_several_values_of_an_axis():
    """With two of four positions in each row, half the rows cover all pairs, and two rows all
    values."""
    rows = [(kind, first) for kind in "ab" for first in range(4)]

    def parts(row):
        kind, first = row
        return [("kind", kind), ("place", first), ("place", (first + 1) % 4)]

    assert len(cover(rows, parts)) == 4
    assert len(cover(rows, parts, size=1)) == 2


def test_quick_rows_cover_pairs_of_attention_position_and_plan():
    """The quick rows contain every pair, with the positions that the model's layers have."""

    def found(rows):
        seen = set()
        for attention, position, plan in rows:
            model = matrix.build(attention, position, plan)
            places = {getattr(layer.attention, "position", None) for layer in model.layers}
            names = {name for name, each in matrix.POSITIONS.items() if each in places}
            seen |= {(attention, name) for name in names} | {(attention, plan)}
            seen |= {(name, plan) for name in names}
        return seen

    axes = [name for name in matrix.ATTENTIONS if name not in matrix.STATES], matrix.POSITIONS
    axes = *axes, matrix.COMPOSED
    wanted = {pair for two in itertools.combinations(axes, 2) for pair in itertools.product(*two)}
    wanted -= matrix.REFUSED
    wanted |= {(row[0], row[2]) for row in matrix.COMBINATIONS if row[2] in matrix.COMPOSED}
    assert wanted <= found(itertools.chain(*matrix.QUICK_BY_PROGRAM.values()))
    for rows in matrix.QUICK_BY_PROGRAM.values():
        assert {part for row in rows for part in matrix.parts(row)} == {
            *(("attention", name) for name in matrix.ATTENTIONS),
            *(("position", name) for name in matrix.POSITIONS),
            *(("plan", name) for name in matrix.COMPOSED),
        }
    assert {row[2] for row in matrix.COMBINATIONS} == {*matrix.COMPOSED, *matrix.SIMPLE}
    assert 4 * len(matrix.QUICK) < len(matrix.COMBINATIONS)


def test_all_rows_cover_triples_of_attention_position_and_composed_plan():
    """The rows of the full round contain every triple that the product has, and every pair with a
    simple plan."""

    def found(rows, plans):
        return {
            (attention, first, plan)
            for attention, _, plan, *positions in rows
            for first in positions
            if plan in plans
        }

    def with_positions(rows):
        for row in rows:
            yield *row, *(name for axis, name in matrix.parts(row) if axis == "position")

    chosen, product = map(list, map(with_positions, (matrix.COMBINATIONS, matrix.PRODUCT)))
    assert found(chosen, matrix.COMPOSED) == found(product, matrix.COMPOSED)
    pairs = [
        {pair for row in found(rows, matrix.SIMPLE) for pair in itertools.combinations(row, 2)}
        for rows in (chosen, product)
    ]
    assert pairs[0] == pairs[1]
