"""The headline picture: what is still right, by length and against the cache that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mukv.figures import saved_figure

MARKERS = "osD^vPX*<>ph"


def draw(rows: Sequence[Mapping[str, Any]], path: Path, series: str = "task") -> None:
    """Exact match by length (left) and against cache bytes per token (right).

    rows: as `mukv bench --json` gives them; series: the key whose values are the lines.
    """
    names = list(dict.fromkeys(str(row[series]) for row in rows))
    with saved_figure(path, (10, 4.4)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for number, name in enumerate(names):
            own = [row for row in rows if str(row[series]) == name]
            look = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}"}
            lengths = [row["length"] for row in own]
            scores = [row["exact_match"] for row in own]
            left.plot(lengths, scores, label=name, ms=5, **look)
            left.fill_between(lengths, *_bounds(own), color=look["color"], alpha=0.12, lw=0)
            bytes_each = [row["cache_bytes_per_token"] for row in own]
            right.plot(bytes_each, scores, alpha=0.4, color=look["color"])
            for place, (x, y) in enumerate(zip(bytes_each, scores, strict=True)):
                right.scatter(x, y, s=70 - 55 * place / len(own), zorder=3, **look)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set_ylim(-0.03, 1.03)
            axes.grid(alpha=0.3, zorder=0)
        left.set(xlabel="tokens", ylabel="exact match", title="By length, with 95 % intervals")
        every = [row["cache_bytes_per_token"] for row in rows]
        right.set_xlim(min(every) / 2, max(every) * 2)
        right.set(
            xlabel="cache bytes per token", title="Against memory (larger marks: shorter texts)"
        )
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _bounds(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["interval"][0] for row in rows], [row["interval"][1] for row in rows]
