"""Figures are readable: names are drawn literally, ticks don't overlap, series differ in style."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from PIL import Image

from mukv.show.figures import (
    CAPTION,
    labels,
    legend,
    overlapping,
    powers,
    saved_figure,
    series_styles,
)
from mukv.tuning import coordinates, transfer

HOSTILE = (
    *("$\\frac{x$", "$$", "a_b^{", "_x", "__", "[/b]", "a\nb", "\x00\x1b", "\udcff", ""),
    *("\u202ex", "\u4e2d\u6587", "x" * 5000, "\\", "%s{0}", "<b>&", " ", "\u0301", "-1", "1,2"),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_is_drawn_wherever_it_stands(tmp_path, name):
    path = tmp_path / "x.png"
    with saved_figure(path, (4, 3), name, caption=name or "none") as figure:
        axes = figure.subplots()
        for label, style in zip(labels([name, name + "2"]), series_styles(2), strict=True):
            axes.plot([name, "other"], [1, 2], label=label, **style)
        axes.set(xlabel=name, title=name)
        axes.text(0, 1, name)
        legend(figure, axes, name)
    with Image.open(path) as image:
        assert image.size[0] == 600
    assert [each.name for each in tmp_path.iterdir()] == ["x.png"]


def test_a_legend_names_every_series(tmp_path):
    names = ["_x", "$\\frac{x$", "y"]
    with saved_figure(tmp_path / "x.png", (4, 3)) as figure:
        axes = figure.subplots()
        for label in labels(names):
            axes.plot([1, 2], label=label)
        legend(figure, axes)
    shown = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert shown == names
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())


def test_a_legend_covers_no_axes(tmp_path):
    with saved_figure(tmp_path / "x.png", (4, 3)) as figure:
        axes = figure.subplots()
        for number, style in enumerate(series_styles(50)):
            axes.plot([1, 2], label=f"series {number}", **style)
        legend(figure, axes)
    inside, box = axes.get_window_extent(), figure.legends[0].get_window_extent()
    assert box.y1 <= inside.y0
    assert inside.height > 150


@pytest.mark.parametrize("count", [1, 10, 11, 24, 60])
def test_series_are_told_apart(count):
    import matplotlib.colors as colours

    found = series_styles(count)
    assert len({colours.to_rgb(each["color"]) for each in found}) == count
    assert len({(each["marker"], each["linestyle"]) for each in found}) >= min(count, 10)


@pytest.mark.parametrize(
    ("low", "high"), [(1, 2), (1e-3, 1.1e-3), (1, 1e12), (3, 3), (1e-30, 1e30), (7, 95)]
)
def test_logarithmic_axes_have_plain_ticks_that_do_not_touch(tmp_path, low, high):
    with saved_figure(tmp_path / "x.png", (3, 2)) as figure:
        axes = figure.subplots()
        axes.plot([low, high], [low, high], "o")
        axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        shown = [label.get_text() for label in axis.get_ticklabels()]
        assert shown
        assert not any("$" in text for text in shown)
        assert not overlapping(axis, figure)


@pytest.mark.parametrize("values", [[8], [64, 128], [1000, 1001, 1002], [2**n for n in range(30)]])
def test_powers_of_two(tmp_path, values):
    with saved_figure(tmp_path / "x.png", (4, 2)) as figure:
        axes = figure.subplots()
        axes.plot(values, values, "o")
        powers(axes.xaxis, values)
    shown = [label.get_text() for label in axes.xaxis.get_ticklabels()]
    assert f"{values[-1]:,}" in shown
    assert not overlapping(axes.xaxis, figure)


@pytest.mark.parametrize("values", [[0.6, 0.75, 0.99], [0.3, 0.45], [520, 600, 610], [0.26, 1]])
def test_a_logarithmic_axis_has_two_ticks_in_view(tmp_path, values):
    """A logarithmic axis has two ticks, even if all values lie between two powers of two."""
    with saved_figure(tmp_path / "x.png", (4, 2)) as figure:
        axes = figure.subplots()
        axes.plot(values, values, "o")
        powers(axes.xaxis, values)
    low, high = axes.get_xlim()
    assert low < values[0] <= values[-1] < high
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2
    assert not overlapping(axes.xaxis, figure)


def test_the_caption_lies_in_the_file(tmp_path):
    with saved_figure(tmp_path / "x.png", (2, 2), caption="Für jeden: 95 % \u2026") as figure:
        figure.subplots().plot([1])
    with Image.open(tmp_path / "x.png") as image:
        assert image.info[CAPTION] == "Für jeden: 95 % \u2026"


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Return the list to which figures of the modules that measure with seeds are added."""
    kept: list = []

    @contextmanager
    def keeping(*args, **options):
        with saved_figure(*args, **options) as figure:
            kept.append(figure)
            yield figure

    for module in (coordinates, transfer):
        monkeypatch.setattr(module, "saved_figure", keeping)
    return kept


def has_bars(figure) -> bool:
    return any(each.has_yerr for axes in figure.axes for each in axes.containers)


@pytest.mark.product
@pytest.mark.parametrize("seeds", [1, 2])
def test_bars_stand_only_where_there_are_seeds(drawn, tmp_path, seeds):
    deviations = {64: 0.1, 128: 0.2} if seeds > 1 else {}
    slopes = [
        coordinates.Slope(name, 0.1, 0, 0.2, 0.2, {64: 1.0, 128: 1.5}, deviations)
        for name in ("embedding", "layer0.mlp", "layer1.mlp", "layer0.logits", "logits")
    ]
    coordinates.draw(slopes, tmp_path / "x.png", "title")

    class Search(transfer.Search):
        def __init__(self) -> None:
            self.points, self.seeds, self.axis = {64: None, 128: None}, seeds, "width"
            self.losses = {
                (width, rate, seed): abs(rate + 8) + seed / 10 + 1
                for width in (64, 128)
                for rate in (-9.0, -8.0, -7.0)
                for seed in range(seeds)
            }
            self.losses[128, -7.0, 0] = float("inf")

    search = Search()
    transfer.draw(search, search.verdict(), tmp_path / "y.png", "title")
    assert [has_bars(figure) for figure in drawn] == 2 * [seeds > 1]
    for name, word in (("x", "deviation of seeds"), ("y", "range of")):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert (word in image.info[CAPTION]) == (seeds > 1)
