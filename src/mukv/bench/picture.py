"""Draw exact match by length and by cache bytes per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mukv.show.figures import labels, legend, powers, saved_figure, series_styles

CAPTION = (
    "Share of answers that are right in full, by length and against cache bytes per token (larger "
    "marks: shorter texts). Bars: 95 % intervals. Dotted: chance, what a guesser gets."
)


ASIDE = 0.03
"""Horizontal offset between neighbouring series, in octaves of length."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path, series: str = "task") -> None:
    """Draw exact match by length (left) and against cache bytes per token (right).

    rows: as in `mukv bench --json`
    series: key whose values are the lines
    """
    names = list(dict.fromkeys(str(row[series]) for row in rows))
    with saved_figure(path, (10, 4.4), caption=CAPTION) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        series_of = zip(names, labels(names), series_styles(len(names)), strict=True)
        for number, (name, label, style) in enumerate(series_of):
            own = sorted(
                (row for row in rows if str(row[series]) == name), key=lambda row: row["length"]
            )
            # Offset, so that equal scores do not hide each other.
            shift = 2 ** (ASIDE * (number - (len(names) - 1) / 2))
            lengths = [row["length"] * shift for row in own]
            scores = [row["exact_match"] for row in own]
            bars = _bars(own)
            left.errorbar(
                lengths, scores, bars, label=label, ms=5, capsize=2, elinewidth=1, **style
            )
            bytes_each = [row["cache_bytes_per_token"] * shift for row in own]
            faint = {"color": style["color"], "alpha": 0.4}
            right.errorbar(bytes_each, scores, bars, elinewidth=1, **faint)
            for place, (x, y) in enumerate(zip(bytes_each, scores, strict=True)):
                size = 70 - 55 * place / len(own)
                right.scatter(x, y, s=size, zorder=3, color=style["color"], marker=style["marker"])
            chances = [row["chance"] for row in own]
            for axes, x in ((left, lengths), (right, bytes_each)):
                wide = [min(x) / 1.15, *x, max(x) * 1.15]
                axes.plot(wide, [chances[0], *chances, chances[-1]], ":", lw=1.2, **faint)
        left.plot([], [], ":", color="0.4", label="chance")
        powers(left.xaxis, [row["length"] for row in rows])
        every = [row["cache_bytes_per_token"] for row in rows]
        powers(right.xaxis, every)
        right.set_xlim(min(every) / 2, max(every) * 2)
        for axes in (left, right):
            axes.set_ylim(-0.03, 1.03)
            axes.grid(alpha=0.3, zorder=0)
        left.set(xlabel="length, tokens", ylabel="exact match", title="By length")
        right.set(
            xlabel="cache bytes per token", title="Against memory (larger marks: shorter texts)"
        )
        legend(figure, left)


def _bars(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return the distances from the scores down and up to the ends of their intervals."""
    low, high = ([row["interval"][end] for row in rows] for end in (0, 1))
    scores = [row["exact_match"] for row in rows]
    return [
        [max(0.0, score - end) for score, end in zip(scores, low, strict=True)],
        [max(0.0, end - score) for score, end in zip(scores, high, strict=True)],
    ]
