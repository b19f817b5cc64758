"""Train variants of a model with every learning rate and seed, and compare them.

    python reproductions/compare.py reproductions/shared-kv/cpu.yaml [--size 1m] [--draw]

Every point is a run directory, so that an interrupted comparison resumes. Each variant is evaluated
at its own best learning rate, by bits per byte of held-out text (mean over seeds) and by the steps
that it needs to reach the reference's loss, with two standard errors over seeds. Writes
results.json and figure.png beside the configuration; --draw makes the figure and the intervals from
the existing file. --size trains the variants at a size of the ladder: all rates with the first seed
at its first size; larger sizes carry each variant's best rate from there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any, Literal

import ladder
import numpy as np
import yaml
from intervals import extra_steps, steps_interval
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mukv.cli.demo import equal_size
from mukv.core.errors import BadInput
from mukv.core.params import count
from mukv.runs import config
from mukv.runs.describe import describe
from mukv.show.figures import MARKERS, saved_figure
from mukv.storage.files import write_atomic
from mukv.train.metrics import read_metrics

COLOURS = (*(f"C{number}" for number in range(10)), "black", "gold")


@dataclass(frozen=True)
class Place:
    """Paths of a comparison's results: results.json for cpu.yaml; other files have results
    with their own name.
    """

    config: Path
    size: str | None = None

    @property
    def named(self) -> bool:
        return self.config.stem != "cpu"

    @property
    def runs(self) -> Path:
        folder = Path("runs") / self.config.parent.name
        folder = folder / self.config.stem if self.named else folder
        return folder if self.size is None else folder / ladder.preset(self.size)

    @property
    def results(self) -> Path:
        name = f"{self.config.stem}.json" if self.named else "results.json"
        return ladder.named(self.config.with_name(name), self.size)

    @property
    def figure(self) -> Path:
        name = f"{self.config.stem}.png" if self.named else "figure.png"
        return ladder.named(self.config.with_name(name), self.size)


@dataclass(frozen=True)
class Point:
    """One run: a variant with a learning rate and a seed."""

    variant: str
    learning_rate: float
    seed: int

    def folder(self, root: Path) -> Path:
        name = self.variant.replace(" ", "-").replace(",", "").replace("/", "-")
        return root / f"{name}-{self.learning_rate:g}-{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """Contents of a YAML file.

    variants: overrides of `base` by name
    bases: presets of variants with another base
    swept: number of seeds with which all learning rates are tried, None for all; the others train
        only at a variant's best rate
    sizes: heads, head_dim and layers, the values of `$`-words in variants (`ladder.filled`); a
        file that has them can be trained at a size of the ladder
    carried: best rate by variant at the ladder's first size, for its larger sizes
    equal: "parameters" adjusts the width of MLPs so that all variants have as many parameters as
        `reference`; None uses the sizes in the file
    """

    base: str
    overrides: list[str]
    variants: dict[str, list[str]]
    reference: str
    learning_rates: list[float]
    seeds: list[int]
    bases: dict[str, str] = field(default_factory=dict)
    equal: Literal["parameters"] | None = "parameters"
    swept: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    carried: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sizes:
            filled = {name: ladder.filled(own, self.sizes) for name, own in self.variants.items()}
            object.__setattr__(self, "variants", filled)

    @classmethod
    def read(cls, place: Place, data: Path | None) -> Comparison:
        """Read a file; at a size of the ladder, with its preset, text and rates.

        data: token file for a size
        """
        stated = yaml.safe_load(place.config.read_text())
        size = place.size
        if size is None:
            return cls(**stated)
        if "sizes" not in stated:
            raise BadInput(
                "--size", size, f"nothing: {place.config} states the sizes of its models"
            )
        rates: dict[str, float] = {}
        if size != ladder.FIRST:
            tuned = json.loads(ladder.first(Place(place.config, ladder.FIRST).results).read_text())
            rates = {name: row["learning_rate"] for name, row in tuned.items()}
        text = ladder.corpus(data)
        whole = cls(
            **stated
            | {
                "base": ladder.preset(size),
                "overrides": [*ladder.kept(stated["overrides"]), f"data.path={text.path}"],
                "sizes": ladder.words(size),
                "swept": 1,
                "carried": rates,
            }
        )
        ladder.require_text(config.load(whole.base), text)
        based = {name: ladder.carried(own) for name, own in whole.variants.items()}
        return replace(whole, variants=based, sizes={})

    def rates(self, variant: str) -> list[float]:
        """Return the learning rates with which a variant is trained."""
        return [self.carried[variant]] if variant in self.carried else self.learning_rates

    def sweep(self) -> list[Point]:
        """Return the points seed by seed, so that an interrupted comparison can be evaluated by the
        first seeds.
        """
        found = product(self.seeds[: self.swept], self.variants)
        return [Point(v, rate, seed) for seed, v in found for rate in self.rates(v)]

    def final(self, best: dict[str, dict[str, Any]]) -> list[Point]:
        """Return the points of the other seeds at each variant's best learning rate."""
        rest = [] if self.swept is None else self.seeds[self.swept :]
        return [Point(v, best[v]["learning_rate"], seed) for seed in rest for v in best]

    def base_of(self, variant: str) -> str:
        return self.bases.get(variant, self.base)

    def sized(self, variant: str) -> list[str]:
        """Return all overrides of a variant, the width of its MLP included."""
        if self.equal is None:
            return self.overrides + self.variants[variant]
        target = count(
            config.load(self.base, self.overrides + self.variants[self.reference]).model.params()
        )
        given = self.overrides + self.variants[variant]
        run = equal_size(self.base, target, given)
        return [*given, f"model.mlp.hidden={run.model.mlp.hidden}"]


def train(comparison: Comparison, points: list[Point], root: Path, processes: int) -> None:
    """Train all unfinished points, each in a process with cores of its own."""
    steps = config.load(comparison.base, comparison.overrides).train.steps
    todo = [p for p in points if not finished(p.folder(root), steps)]
    cores: Queue[set[int]] = Queue()
    for mine in np.array_split(sorted(os.sched_getaffinity(0)), processes):
        cores.put(set(mine.tolist()))
    sized = {variant: comparison.sized(variant) for variant in comparison.variants}

    def run(point: Point) -> None:
        mine = cores.get()
        try:
            numbers = [
                f"train.learning_rate={point.learning_rate}",
                f"train.seed={point.seed}",
            ]
            out = ["--out", str(point.folder(root)), "--json"]
            base = comparison.base_of(point.variant)
            command = [sys.executable, "-m", "mukv", "train", base]
            done = subprocess.run(
                [*command, *sized[point.variant], *numbers, *out],
                capture_output=True,
                text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, mine),
            )
            if done.returncode:
                raise SystemExit(f"{point}: {done.stderr[-2000:]}")
        finally:
            cores.put(mine)
            bar.advance(task)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar,
        ThreadPoolExecutor(processes) as pool,
    ):
        task = bar.add_task(root.name, total=len(todo))
        list(pool.map(run, todo))


def curve(folder: Path) -> dict[int, float]:
    """Return bits per byte of held-out text by step."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    key = "validation_bits_per_byte"
    return {record["step"]: record[key] for record in read_metrics(path) if key in record}


def curves(
    comparison: Comparison, variant: str, rate: float, root: Path, seeds: int | None = None
) -> list[dict[int, float]]:
    """Return the curves of the finished runs with the first `seeds` seeds, or with all."""
    points = (Point(variant, rate, seed) for seed in comparison.seeds[:seeds])
    folders = (point.folder(root) for point in points)
    return [curve(folder) for folder in folders if (folder / "weights").exists()]


def last(curve: dict[int, float]) -> float:
    return curve[max(curve)]


def finished(folder: Path, steps: int) -> bool:
    return steps in curve(folder) and (folder / "weights").exists()


def judge(comparison: Comparison, root: Path) -> dict[str, Any]:
    """Compare each variant with the reference.

    The learning rate is the best over the seeds with which all rates were tried; the result is over
    all seeds at that rate.
    """
    best: dict[str, dict[str, Any]] = {}
    for variant in comparison.variants:
        swept = {rate: curves(comparison, variant, rate, root, comparison.swept)
                 for rate in comparison.rates(variant)}  # fmt: skip
        tried = {rate: statistics.mean(map(last, found)) for rate, found in swept.items() if found}
        if not tried:
            continue
        rate = min(tried, key=lambda rate: tried[rate])
        found = curves(comparison, variant, rate, root)
        ends = [last(each) for each in found]
        best[variant] = {
            "learning_rate": rate,
            "bits_per_byte": statistics.mean(ends),
            "deviation": statistics.stdev(ends) if len(ends) > 1 else 0.0,
            "by_seed": ends,
            "by_rate": tried,
            "by_rate_and_seed": {rate: list(map(last, found)) for rate, found in swept.items()},
            "curve": {step: statistics.mean(each[step] for each in found) for step in found[0]},
        }
    compared(best)
    sizes(comparison, best)
    for variant, row in best.items():
        rates = comparison.rates(variant)
        edge = len(rates) > 1 and row["learning_rate"] in (rates[0], rates[-1])
        row["rate_at_edge_of_sweep"] = edge
    return best


def sizes(comparison: Comparison, best: dict[str, dict[str, Any]]) -> None:
    """Add parameters, FLOPs and bytes of each variant to its row."""
    for variant, row in best.items():
        configured = config.load(comparison.base_of(variant), comparison.sized(variant))
        facts = describe(configured)
        for name in ("parameters", "flops_per_token", "cache_bytes_per_token"):
            row[name] = facts[name]
        row["cache_bytes_constant"] = facts["cache_bytes_constant"]
        row["row_length"] = configured.train.length
        grown = facts["cache_bytes_per_token"] * configured.train.length
        row["row_bytes"] = round(grown + facts["cache_bytes_constant"])


def compared(best: dict[str, dict[str, Any]]) -> None:
    """Add the relative steps that each variant needs against every other to its row."""
    curves = {
        variant: {int(step): loss for step, loss in row["curve"].items()}
        for variant, row in best.items()
    }
    for variant, row in best.items():
        others = [other for other in best if other != variant]
        row["more_steps_than"] = {o: extra_steps(curves[variant], curves[o]) for o in others}
        row["more_steps_interval"] = {o: steps_interval(row, best[o]) for o in others}


def show(best: dict[str, dict[str, Any]], reference: str) -> None:
    columns = ("parameters", "cache bytes/token", "best rate", "bits/byte", "steps to equal loss")
    table = Table("", *columns)
    for variant, row in best.items():
        more = row["more_steps_than"].get(reference)
        interval = row["more_steps_interval"].get(reference)
        beyond = "" if interval is None else " ({:+.0%} to {:+.0%})".format(*interval)
        table.add_row(
            variant,
            f"{row['parameters']:,}",
            f"{row['cache_bytes_per_token']:,.0f}",
            f"{row['learning_rate']:g}" + (" (edge)" if row["rate_at_edge_of_sweep"] else ""),
            f"{row['bits_per_byte']:.4f} ± {row['deviation']:.4f}",
            "" if more is None else f"{more:+.0%}{beyond}",
        )
    Console().print(table)


def draw(best: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss by step, and the final loss against the cache bytes of a row of the training
    length.
    """
    with saved_figure(path, (10.5, 4.6), title) as figure:
        curves, front = figure.subplots(1, 2, width_ratios=(3, 2))
        for number, (variant, row) in enumerate(best.items()):
            look = {"color": COLOURS[number], "marker": MARKERS[number]}
            steps = sorted(row["curve"], key=int)
            curves.plot(
                list(map(int, steps)), [row["curve"][s] for s in steps], label=variant, ms=5, **look
            )
            bar = row["deviation"] if len(row["by_seed"]) > 1 else None
            front.errorbar(row["row_bytes"], row["bits_per_byte"], bar, **look)
        curves.set(xlabel="steps", ylabel="bits per byte, held-out text", xscale="log")
        length = next(iter(best.values()))["row_length"]
        seeds = max(len(row["by_seed"]) for row in best.values())
        bars = f"bars: standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
        front.set(xlabel=f"cache of a row of {length:,} tokens, KiB", title=bars)
        front.set_ylabel("bits per byte at the end")
        front.set_xscale("log", base=2)
        front.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:,.0f}")
        front.margins(x=0.15)
        steps = sorted(map(int, next(iter(best.values()))["curve"]))
        halved = [steps[-1] >> times for times in range(8) if steps[-1] >> times >= steps[0]]
        curves.set_xticks(halved, [f"{step:,}" for step in halved])
        curves.minorticks_off()
        for axes in (curves, front):
            axes.grid(alpha=0.3)
        figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: a folder in runs/")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure, from the existing file"
    )
    ladder.add_options(parser)
    given = parser.parse_args()
    place = Place(given.comparison, given.size)
    comparison = Comparison.read(place, given.data)
    title = f"{place.config.parent.name}: {place.config.stem}" if place.named else None
    if given.draw:
        best = json.loads(place.results.read_text())
        compared(best)
        sizes(comparison, best)
        write_atomic(place.results, json.dumps(best, indent=2) + "\n")
        draw(best, place.figure, title or place.config.parent.name)
        return
    root = given.runs or place.runs
    if place.size is not None:
        run = config.load(comparison.base, comparison.overrides)
        rest = len(comparison.seeds) - 1
        runs = len(comparison.sweep()) + rest * len(comparison.variants)
        ladder.require_fits(place.size, run, runs, given.processes, given.hours)
    train(comparison, comparison.sweep(), root, given.processes)
    best = judge(comparison, root)
    if final := comparison.final(best):
        train(comparison, final, root, given.processes)
        best = judge(comparison, root)
    write_atomic(place.results, json.dumps(best, indent=2) + "\n")
    draw(best, place.figure, title or place.config.parent.name)
    show(best, comparison.reference)


if __name__ == "__main__":
    ladder.told(main)
