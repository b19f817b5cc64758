"""Draw the pictures of a report. Each function compares runs on one text, returns the caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mukv.cli.report.told import Told
from mukv.show.figures import labels, legend, powers, saved_figure, series_styles

BITS = "validation_bits_per_byte"
MOST_POINTS, MARKED = 1000, 25
"""Most points of a curve that are drawn, and most points of a curve that marks every point."""
SHOWN, WORTH = 0.75, 1.5
"""Smallest fraction of a curve's values within the axis limits; and ratio of heights: the axis is
cut only if it would be more than this many times as tall with all values."""


def curves(runs: Sequence[Told], path: Path) -> str | None:
    """Plot the logged losses by step: a panel of nats per token for each group of runs with the
    same tokens, and a panel of bits per byte for all runs. Returns None if no loss was logged."""
    from matplotlib.ticker import MaxNLocator

    panels: list[tuple[str, str, list[Told]]] = []
    with_loss = [run for run in runs if run.curves["loss"]]
    groups: dict[str, list[Told]] = {}
    for run in with_loss:
        groups.setdefault(run.tokens, []).append(run)
    for group in groups.values():
        title = group[0].tokenizer if len(groups) > 1 else ""
        panels.append(("loss", title, group))
    judged = [run for run in runs if run.curves[BITS]]
    if judged:
        panels.append((BITS, "", judged))
    if not panels:
        return None
    units = {"loss": "training loss of one batch, nats/token", BITS: "held-out bits/byte"}
    shown = {run.name: style for run, style in zip(runs, series_styles(len(runs)), strict=True)}
    names = dict(zip((run.name for run in runs), labels(run.name for run in runs), strict=True))
    cut = False
    with saved_figure(path, (5.0 * len(panels), 3.6)) as figure:
        drawn = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (key, title, group) in zip(drawn, panels, strict=True):
            for run in group:
                steps, values = _points(run.curves[key])
                style = {**shown[run.name], "lw": 1.2, "ms": 4, "label": names[run.name]}
                if len(steps) > MARKED:
                    style["markevery"] = len(steps) // 8
                axes.plot(steps, values, **style)
            cut |= _clip(axes, [_points(run.curves[key]) for run in group])
            axes.set(xlabel="step", ylabel=units[key])
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
            axes.set_title(title, fontsize=9)
            axes.grid(alpha=0.3)
        all_drawn = {run.name for _, _, group in panels for run in group}
        missing = [name for name in names if name not in all_drawn]
        _common_legend(figure, drawn[-1], [n for n in names if n not in missing], names, shown)
    words = ["Training, by step: loss of single training batches"]
    words[0] += ", and bits per byte of held-out text." if judged else "."
    if len(groups) > 1:
        words.append("Nats per token are comparable only between equal tokens: a panel for each.")
    if len({run.held_out for run in judged}) > 1:
        words.append("The runs were evaluated on different amounts of the held-out text.")
    if cut:
        words.append("The axes leave out the high values of the first steps.")
    return " ".join(words)


def _common_legend(
    figure: Any, axes: Any, runs: Sequence[str], names: dict[str, str], shown: dict[str, Any]
) -> None:
    """Draw one legend that lists each run once, even if several panels show it."""
    there = set(axes.get_legend_handles_labels()[1])
    for run in runs:
        if names[run] not in there:
            axes.plot([], [], label=names[run], ms=4, **shown[run])
    legend(figure, axes)


def _points(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    """Return the steps and values of at most MOST_POINTS evenly spaced points, with the last."""
    points = sorted(curve.items())
    points = points[:: -max(1, -(-len(points) // MOST_POINTS))][::-1]
    return [step for step, _ in points], [value for _, value in points]


def _clip(axes: Any, drawn: Sequence[tuple[list[int], list[float]]]) -> bool:
    """Limit the axes so that the high values of the first steps don't flatten the curves; return
    whether some values are outside of the limits.

    At least the fraction SHOWN of each curve's values stays inside, and the whole second half, so
    that a diverging loss is visible.
    """
    values = [each for _, each in drawn]
    low, high = min(map(min, values)), max(map(max, values))
    top = max(
        max(float(np.quantile(each, SHOWN)), *each[len(each) // 2 :]) for each in values
    )  # fmt: skip
    if high - low <= WORTH * (top - low) or top <= low:
        return False
    room = 0.05 * (top - low)
    axes.set_ylim(low - room, top + room)
    shown = [step for steps, each in drawn for step, y in zip(steps, each, strict=True) if y <= top]
    last = max(steps[-1] for steps, _ in drawn)
    if last > min(shown):
        aside = 0.02 * (last - min(shown))
        axes.set_xlim(min(shown) - aside, last + aside)
    return True


def trade_off(runs: Sequence[Told], path: Path) -> str | None:
    """Plot bits per byte against cache bytes per token, for runs on one text. Returns None if fewer
    than two runs have both numbers."""
    points = {run.name: (run.facts["cache_bytes_per_token"], run.facts[BITS]) for run in runs}
    points = {name: point for name, point in points.items() if point[0] and point[1] is not None}
    if len(points) < 2:
        return None
    with saved_figure(path, (6.0, 4.0)) as figure:
        axes = figure.subplots()
        for name, style, (x, y) in zip(
            labels(points), series_styles(len(points)), points.values(), strict=True
        ):
            axes.scatter(x, y, s=50, label=name, color=style["color"], marker=style["marker"])
        powers(axes.xaxis, [x for x, _ in points.values()])
        axes.margins(0.15)
        axes.set(xlabel="cache bytes per token", ylabel="held-out bits/byte")
        axes.grid(alpha=0.3)
        legend(figure, axes)
    return "Quality against cache bytes, on one text: down and left is better. One point per run."
