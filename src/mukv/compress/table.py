"""Write the results as a table and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mukv.compress.judge import Result
from mukv.show.figures import labels, legend, powers, saved_figure, series_styles
from mukv.storage.files import write_atomic

FULL = {"color": "black", "marker": "*", "linestyle": "none"}
UNITS = {"perplexity": "perplexity", "recall": "recall, share of planted strings"}


def write(results: Sequence[Result], folder: Path, title: str) -> list[Path]:
    """Write the table and the figure of the trade-off; return their paths."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(asdict(results[0])), lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(result) for result in results)
    write_atomic(folder / "compress.csv", text.getvalue())
    _draw(results, folder / "compress.png", title)
    return [folder / "compress.csv", folder / "compress.png"]


def _draw(results: Sequence[Result], path: Path, title: str) -> None:
    """Draw perplexity and recall against bytes kept and bytes read, relative to the full cache."""
    full, names = results[0], list(dict.fromkeys(result.policy for result in results))
    across = {
        "bytes kept, of full": lambda r: r.bytes_of_full,
        "bytes read per step, of full": lambda r: r.read_of_full,
    }
    up = ("perplexity",) if full.recall is None else ("perplexity", "recall")
    about = (
        f"Policies of the cache at several budgets, beside the full cache: {title}, "
        f"{full.samples} of text, {full.strings} planted strings. Bars: 95 % intervals (of "
        "perplexity: of the difference to full). Grey line: full. Down (perplexity), up (recall) "
        "and left are better."
    )
    with saved_figure(path, (10, 3.5 * len(up)), title, about) as figure:
        axes = figure.subplots(len(up), len(across), squeeze=False)
        others = series_styles(max(1, len(names) - 1))
        for row, label in zip(axes, up, strict=True):
            for axis, (under, place) in zip(row, across.items(), strict=True):
                for number, (name, shown) in enumerate(zip(names, labels(names), strict=True)):
                    style = others[number - 1] if number else FULL
                    line = sorted((place(r), *_bar(r, label)) for r in results if r.policy == name)
                    x, y, *bars = zip(*line, strict=True)
                    intervals = any(map(any, bars))
                    axis.errorbar(
                        *(x, y, bars if intervals else None),
                        **{"label": shown, "linewidth": 1, "elinewidth": 0.7, "markersize": 5},
                        **style,
                    )
                axis.axhline(getattr(full, label), color="0.8", linewidth=1, zorder=0)
                powers(axis.xaxis, [place(result) for result in results])
                axis.xaxis.set_major_formatter(_share)
                axis.set(xlabel=under, ylabel=UNITS[label])
                axis.grid(alpha=0.3)
                if label == "recall":
                    axis.set_ylim(-0.05, 1.05)
        legend(figure, axes[0][0])


def _bar(result: Result, name: str) -> tuple[float, float, float]:
    """Return a value and the distances down and up to the ends of its interval."""
    middle, low, high = (getattr(result, f"{name}{end}") for end in ("", "_low", "_high"))
    return middle, middle - (middle if low is None else low), (high or middle) - middle


def _share(x: float, _: int) -> str:
    """Format a tick: 2, 1, 1/2, 1/4."""
    return f"{x:.3g}" if x >= 1 else f"1/{1 / x:.3g}"
