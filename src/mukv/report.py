"""`mukv report`: one page about finished runs, which needs nothing but itself.

Curves of training, quality against the memory that it costs, and what `analyze`, `compress` and
`bench` have left in each run directory.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput, nearest_name, telling_disk_errors
from mukv.core.files import temporary
from mukv.describe import describe
from mukv.figures import saved_figure
from mukv.metrics import read_metrics
from mukv.page import Page
from mukv.runs import RunDirectory

CURVES = (("loss", "loss, nats per token"), ("validation_bits_per_byte", "bits per byte, held out"))
FINDINGS = {
    "analysis": "Who reads what",
    "compress": "Cache policies",
    "bench": "The long-context benchmark",
}
"""Folders in a run directory whose pictures and tables belong to its report."""
COLUMNS = (
    *("run", "parameters", "cache bytes/token", "constant bytes"),
    *("step", "loss", "bits/byte"),
)
MOST_ROWS = 60
"""Of a table; the whole one lies beside the run."""


@dataclass(frozen=True)
class Told:
    """One run: what it is, what it reached, and its numbers by step."""

    name: str
    folder: Path
    facts: dict[str, Any]
    curves: dict[str, dict[int, float]]


def gather(sources: Sequence[Path]) -> list[Told]:
    """Run directories, and those that lie in folders; each once. Raises BadInput for others."""
    folders: list[Path] = []
    for source in sources:
        inside = [path.parent for path in sorted(source.glob("*/config.yaml"))]
        found = [source] if RunDirectory(source).exists else inside
        if not found:
            siblings = [path.parent.name for path in source.parent.glob("*/config.yaml")]
            near = nearest_name(source.name, siblings)
            nearest = str(source.parent / near) if near else None
            raise BadInput("RUN", str(source), "a run directory, or a folder of some", nearest)
        folders = list(dict.fromkeys([*folders, *(folder.resolve() for folder in found)]))
    names = [folder.name for folder in folders]
    return [
        told(folder, folder.name if names.count(folder.name) == 1 else str(folder))
        for folder in folders
    ]


def told(folder: Path, name: str) -> Told:
    """What a run directory says of itself."""
    facts = describe(RunDirectory(folder).load_config())
    curves: dict[str, dict[int, float]] = {key: {} for key, _ in CURVES}
    last: dict[str, Any] = {}
    for record in read_metrics(RunDirectory(folder).metrics):
        last |= record
        for key, _ in CURVES:
            if key in record:
                curves[key][record["step"]] = record[key]
    shown = ("step", "loss", "validation_bits_per_byte", "tokens_per_second")
    sizes = ("parameters", "cache_bytes_per_token", "cache_bytes_constant")
    numbers = {key: last.get(key) for key in shown} | {key: facts[key] for key in sizes}
    return Told(name, folder, numbers, curves)


def report(sources: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the page; returns the numbers of its first table and the path."""
    runs = gather(sources)
    page = Page("Runs: " + ", ".join(run.name for run in runs[:4]) + (" ..." * (len(runs) > 4)))
    page.table(COLUMNS, (_row(run) for run in runs))
    with telling_disk_errors(out), temporary(out) as pictures:
        for name, draw in (("curves", curves), ("trade-off", trade_off)):
            path = pictures / f"{name}.png"
            caption = draw(runs, path)
            if caption:
                page.picture(path, caption)
    for run in runs:
        for name, title in FINDINGS.items():
            _findings(page, run, run.folder / name, title)
    page.save(out)
    return {"page": str(out), "runs": [{"run": str(run.folder), **run.facts} for run in runs]}


def _row(run: Told) -> list[str]:
    facts = run.facts

    def number(key: str, form: str) -> str:
        return "" if facts[key] is None else format(facts[key], form)

    return [
        run.name,
        number("parameters", ","),
        number("cache_bytes_per_token", ",.0f"),
        number("cache_bytes_constant", ","),
        number("step", ","),
        number("loss", ".4f"),
        number("validation_bits_per_byte", ".4f"),
    ]


def _findings(page: Page, run: Told, folder: Path, title: str) -> None:
    """Pictures and short tables of what a command has left; nothing where there is nothing."""
    pictures, tables = sorted(folder.glob("*.png")), sorted(folder.glob("*.csv"))
    if not pictures and not tables:
        return
    page.heading(f"{title}: {run.name}")
    for path in tables:
        with path.open(newline="", encoding="utf-8") as file:
            first, *rows = csv.reader(file)
        if len(rows) <= MOST_ROWS:
            page.table(first, ([_shown(cell) for cell in row] for row in rows))
    for path in pictures:
        page.picture(path, path.stem.replace("-", " "))


def _shown(cell: str) -> str:
    """A cell of a table for a person: fractions to five digits."""
    try:
        return f"{float(cell):,.5g}" if "." in cell else f"{int(cell):,}"
    except ValueError:
        return cell


def curves(runs: Sequence[Told], path: Path) -> str | None:
    """What training logged, by step."""
    keys = [(key, label) for key, label in CURVES if any(run.curves[key] for run in runs)]
    if not keys:
        return None
    with saved_figure(path, (5.0 * len(keys), 3.6)) as figure:
        panels = figure.subplots(1, len(keys), squeeze=False)[0]
        for axes, (key, label) in zip(panels, keys, strict=True):
            for run in runs:
                points = sorted(run.curves[key].items())
                steps, values = [step for step, _ in points], [value for _, value in points]
                alone = "o" if len(steps) == 1 else None
                axes.plot(steps, values, lw=1.2, marker=alone, label=run.name)
            axes.set(xlabel="step", ylabel=label)
            axes.grid(alpha=0.3)
        panels[-1].legend(fontsize=7)
    return "Training: loss, and held-out text."


def trade_off(runs: Sequence[Told], path: Path) -> str | None:
    """Quality against what remembering a token costs."""
    keys = ("cache_bytes_per_token", "validation_bits_per_byte")
    points = {run.name: [run.facts[key] for key in keys] for run in runs}
    points = {name: point for name, point in points.items() if point[0] and point[1]}
    if len(points) < 2:
        return None
    with saved_figure(path, (6.0, 4.0)) as figure:
        axes = figure.subplots()
        for name, point in points.items():
            axes.scatter(*point, s=50, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set(xlabel="cache bytes per token", ylabel="bits per byte, held out")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return "Quality against memory: down and left is better."
