"""Save figures without a display, and define the styles that all figures share.

Names are drawn as plain text: TeX is not interpreted, control characters are escaped, and a label
that begins with an underscore stays in the legend. Legends are below the axes, where they hide no
line.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mukv.core.names import LONGEST, distinct, printable, shortened
from mukv.storage.files import replacing

MARKERS = "osD^vPX*<>ph"
STYLES = ("-", "--", "-.", ":")
CAPTION = "Description"
"""Key of the PNG text chunk that holds the caption, one of those that the PNG standard names."""
LETTERS_PER_INCH = 12
MOST_TICKS = 9
LEGEND_SIZE, ROW_INCHES = 8, 0.19
ALIKE, APART = 1.01, 1.2
"""Ratio below which two values share a tick, and below which the labels of two ticks
would touch.
"""
EDGE = 1.05
"""Ratio of the limit of a logarithmic axis to its outermost tick."""


@contextmanager
def saved_figure(
    path: Path, size: tuple[float, float], title: str | None = None, caption: str | None = None
) -> Iterator[Any]:
    """Yield a figure that is saved to `path` (PNG) when the block ends.

    size: width and height in inches
    caption: text saved in the file, for a page that shows the figure
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A font without a glyph draws a box; suppress the warning for each one.
    with mpl.rc_context({"font.size": 10, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        # A name of thousands of letters leaves the axes no room; the figure is still written.
        warnings.filterwarnings("ignore", "constrained_layout not applied")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        if title:
            wide = int(LETTERS_PER_INCH * size[0])
            figure.suptitle(textwrap.fill(shortened(title, 3 * wide), wide))
        _tidy(figure)
        about = {CAPTION: printable(caption)} if caption else None
        with replacing(path) as made:
            figure.savefig(made, dpi=150, format="png", metadata=about)


def series_styles(count: int) -> list[dict[str, Any]]:
    """Return `color`, `marker` and `linestyle` of each of `count` series; no two have the same
    colour.
    """
    import matplotlib as mpl

    few = count <= 10
    colours = [f"C{n}" if few else mpl.colormaps["turbo"]((n + 0.5) / count) for n in range(count)]
    return [
        {
            "color": colour,
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": STYLES[number // (10 if few else len(MARKERS)) % len(STYLES)],
        }
        for number, colour in enumerate(colours)
    ]


def labels(names: Iterable[object]) -> list[str]:
    """Return short and distinct names of series. A space is put before a leading underscore,
    because matplotlib leaves labels with one out of legends.
    """
    return [f" {name}" if name.startswith("_") else name for name in distinct(names)]


def legend(figure: Any, axes: Any, title: str | None = None) -> None:
    """Add a legend below all axes, of what is labelled in `axes`, in rows that fit.

    The figure grows by the height of the legend.
    """
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    letters = figure.get_figwidth() * LETTERS_PER_INCH * 10 / LEGEND_SIZE
    columns = max(1, min(len(names), int(letters / (max(map(len, names)) + 6))))
    rows = -(-len(names) // columns) + bool(title)
    figure.set_figheight(figure.get_figheight() + ROW_INCHES * rows)
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
    where |= {"fontsize": LEGEND_SIZE, "title_fontsize": LEGEND_SIZE}
    figure.legend(handles, names, title=title and shortened(title), **where)


def powers(axis: Any, values: Sequence[float], unit: float = 1) -> None:
    """Make an axis logarithmic with base 2.

    values: the values that are drawn, all greater than 0; ticks are at these values if they are few
        and far enough apart, else at powers of two
    unit: value that the label 1 stands for
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    distinct_values = sorted({float(value) for value in values if value > 0})
    if not distinct_values:
        return
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log", base=2)
    ticks = [at for at, after in pairwise([*distinct_values, np.inf]) if after / at > ALIKE]
    near = any(after / at < APART for at, after in pairwise(ticks))
    if near or len(ticks) > MOST_TICKS or distinct_values[0] < 1:
        low, high = (
            int(np.floor(np.log2(distinct_values[0]))),
            int(np.ceil(np.log2(distinct_values[-1]))),
        )
        step = 1 + (high - low) // MOST_TICKS
        ticks = [2.0**power for power in range(high, low - 1, -step)][::-1]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: _number(value / unit))
    least, most = distinct_values[0], distinct_values[-1]
    limits: tuple[float, float] | None = None
    if most / least < ALIKE:
        limits = least / 2, most * 2
    elif sum(least <= tick <= most for tick in ticks) < 2:
        # Values between two powers of two: the axis reaches both, so that its scale can be read.
        limits = min(least, ticks[0]) / EDGE, max(most, ticks[-1]) * EDGE
    if limits is not None:
        (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(limits)


def _number(value: float) -> str:
    """Format a tick: 16,384 or 0.003 or 1e-07."""
    if value and (abs(value) < 1e-4 or abs(value) >= 1e9):
        return f"{value:.3g}"
    return f"{value:,.0f}" if value == round(value) or value > 32 else f"{value:,.4g}"


def _tidy(figure: Any) -> None:
    """Shorten long names, label logarithmic axes with plain numbers, and prevent
    overlapping ticks.
    """
    from matplotlib.text import Text

    axes = [each for each in figure.axes if each.axison]
    for each in axes:
        for axis in (each.xaxis, each.yaxis):
            if axis.get_scale() == "log":
                _plain(axis)
            texts = [label.get_text() for label in axis.get_ticklabels()]
            if any(shortened(text, LONGEST // 2) != text for text in texts):
                axis.set_ticks(axis.get_ticklocs(), distinct(texts, LONGEST // 2))
    longest = int(LETTERS_PER_INCH * figure.get_figwidth())
    for text in figure.findobj(Text):
        lines = text.get_text().split("\n")
        text.set_text("\n".join(shortened(line, longest) for line in lines))
    figure.draw_without_rendering()
    for each in axes:
        for axis in (each.xaxis, each.yaxis):
            _thin(axis, figure)


def _plain(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers instead of TeX powers, with at least
    two ticks.
    """
    from matplotlib.ticker import FixedLocator, LogFormatter, MaxNLocator, NullLocator

    if not isinstance(axis.get_major_formatter(), LogFormatter):
        return
    low, high = sorted(axis.get_view_interval())
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [d * 10.0**n for n in decades for d in digits if low <= d * 10.0**n <= high]
        if len(ticks) >= 3:
            break
    if len(ticks) < 2:
        ticks = [t for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    while len(ticks) > MOST_TICKS:
        ticks = ticks[::2]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: _number(value))


def _thin(axis: Any, figure: Any) -> None:
    """Rotate overlapping words; of overlapping numbers, remove every second until none overlap."""
    if axis.axis_name == "x" and overlapping(axis, figure):
        texts = [label.get_text() for label in axis.get_ticklabels()]
        if not all(_is_number(text) for text in texts if text):
            axis.set_tick_params(rotation=35)
            for label in axis.get_ticklabels():
                label.set(ha="right", rotation_mode="anchor")
            return
    while overlapping(axis, figure):
        axis.set_ticks(_inside(axis)[::-2][::-1])
        figure.draw_without_rendering()


def _inside(axis: Any) -> list[float]:
    """Return the ticks within the limits of an axis."""
    low, high = sorted(axis.get_view_interval())
    return [place for place in axis.get_ticklocs() if low <= place <= high]


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").replace("\N{MINUS SIGN}", "-"))
    except ValueError:
        return False
    return True


def overlapping(axis: Any, figure: Any) -> bool:
    """Whether two labels of an axis touch. The figure must have been drawn."""
    renderer = figure.canvas.get_renderer()
    along = (lambda box: (box.x0, box.x1)) if axis.axis_name == "x" else lambda b: (b.y0, b.y1)
    shown = axis.get_ticklabels()
    places = zip(shown, axis.get_ticklocs(), strict=False)
    inside = set(_inside(axis))
    spans = sorted(along(text.get_window_extent(renderer)) for text, at in places if at in inside)
    return any(left[1] > right[0] for left, right in pairwise(spans))
