"""The benchmark's picture has chance and intervals, and no series hides another."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from mukv.bench import picture
from mukv.show.figures import saved_figure


def rows(tasks: int, lengths: tuple[int, ...]) -> list[dict[str, object]]:
    return [
        {
            "task": f"task {number}",
            "length": length,
            "exact_match": 0.5,
            "interval": (0.4, 0.7),
            "chance": 0.1 + number / 100,
            "cache_bytes_per_token": 256.0,
        }
        for number in range(tasks)
        for length in lengths
    ]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Return a function that draws results and returns the figure."""
    kept: list = []

    @contextmanager
    def keeping(*args, **options):
        with saved_figure(*args, **options) as figure:
            kept.append(figure)
            yield figure

    monkeypatch.setattr(picture, "saved_figure", keeping)

    def draw(found):
        picture.draw(found, tmp_path / "x.png")
        return kept[-1]

    return draw


def error_bars(axes) -> list:
    """Return the error bars of each series."""
    return [each for each in axes.collections if hasattr(each, "get_segments")]


@pytest.mark.product
@pytest.mark.parametrize("lengths", [(128,), (128, 256, 512)])
def test_chance_and_intervals(drawn, lengths):
    figure = drawn(rows(12, lengths))
    for axes in figure.axes:
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        chances = {round(float(line.get_ydata()[0]), 2) for line in dotted if len(line.get_ydata())}
        assert chances == {round(0.1 + number / 100, 2) for number in range(12)}
        bars = [segment for group in error_bars(axes) for segment in group.get_segments()]
        ends = {(round(float(y[0][1]), 2), round(float(y[1][1]), 2)) for y in bars}
        assert (0.4, 0.7) in ends
        assert len(bars) == 12 * len(lengths)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["chance", *(f"task {number}" for number in range(12))]


def test_equal_scores_are_drawn_side_by_side(drawn):
    left, right = drawn(rows(2, (128, 256))).axes
    for axes in (left, right):
        first, second = (np.array(each.get_segments())[:, 0, 0] for each in error_bars(axes))
        assert not np.any(np.isclose(first, second))
