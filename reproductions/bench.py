"""Train variants of a model on synthetic tasks at one length, and test them at longer ones.

    python reproductions/bench.py reproductions/positions/cpu.yaml [--minutes 14] [--size 1m]
        [--draw]

Every variant has the same learning rates and seeds, the same steps unless its overrides change
them, and is tested at its own best learning rate (`mukv.bench.trial`). Runs are run directories in
runs/, so that an interrupted comparison resumes; one of another configuration is refused. Writes
the rows as JSON and a figure with a column for each task beside the configuration
(`compare.Place`); --draw makes the figure from the existing file. --size trains the variants at a
size of the ladder: with four rates at its first one, with the best rate from there at larger ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ladder
import yaml
from compare import Place
from rich.console import Console
from rich.table import Table

from mukv.bench.examine import ExamineSettings
from mukv.bench.trial import Trial
from mukv.cli import launch
from mukv.core.errors import BadInput
from mukv.runs import config
from mukv.schema import schema
from mukv.show.figures import saved_figure, series_styles
from mukv.storage.files import write_atomic
from mukv.tasks import AnyTask


@dataclass(frozen=True)
class Tested:
    """A task, and the number of training steps on it."""

    task: AnyTask
    steps: int


@dataclass(frozen=True)
class Comparison:
    """Contents of a YAML file.

    variants: overrides of `base`, by name
    sizes: heads, head_dim and layers, the values of `$`-words in overrides (`ladder.filled`)
    carried: best rate by "task, variant" at the ladder's first size, for its larger sizes
    lengths: lengths of the test; the first is that of training
    """

    base: str
    overrides: tuple[str, ...]
    variants: dict[str, tuple[str, ...]]
    tasks: dict[str, Tested]
    lengths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: int
    samples: int = 200
    sizes: dict[str, int] = field(default_factory=dict)
    carried: dict[str, float] = field(default_factory=dict)
    settings: ExamineSettings = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", ExamineSettings(self.samples, free=0))
        if self.sizes:
            filled = {name: ladder.filled(own, self.sizes) for name, own in self.variants.items()}
            object.__setattr__(self, "variants", filled)
            object.__setattr__(self, "overrides", ladder.filled(self.overrides, self.sizes))

    @classmethod
    def read(cls, place: Place) -> Comparison:
        """Read a file; at a size of the ladder, with its preset and rates."""
        stated = yaml.safe_load(place.config.read_text())
        size = place.size
        if size is None:
            return schema.build(cls, stated)
        if "sizes" not in stated:
            raise BadInput(
                "--size", size, f"nothing: {place.config} states the sizes of its models"
            )
        run = config.load(ladder.preset(size))
        best: dict[str, float] = {}
        if size != ladder.FIRST:
            tuned = json.loads(ladder.first(Place(place.config, ladder.FIRST).results).read_text())
            best = {f"{row['task']}, {row['variant']}": row["learning_rate"] for row in tuned}
        tasks = {name: {**each, "steps": run.train.steps} for name, each in stated["tasks"].items()}
        whole = schema.build(
            cls,
            stated
            | {
                "base": ladder.preset(size),
                "overrides": ladder.kept(stated["overrides"]),
                "sizes": ladder.words(size),
                "tasks": tasks,
                "learning_rates": ladder.around(stated["learning_rates"]),
                "carried": best,
            },
        )
        based = {
            name: ladder.carried([*whole.overrides, *own]) for name, own in whole.variants.items()
        }
        return replace(whole, overrides=(), variants=based, sizes={})

    def rates(self, variant: str, task: str) -> tuple[float, ...]:
        """Return the learning rates with which a variant is trained on a task."""
        found = self.carried.get(f"{task}, {variant}")
        return self.learning_rates if found is None else (found,)

    def trial(self, variant: str, task: str, folder: Path) -> Trial:
        steps = f"train.steps={self.tasks[task].steps}"
        run = config.load(self.base, [*self.overrides, steps, *self.variants[variant]])
        root = folder / variant.replace(" ", "-").replace(",", "")
        rates = self.rates(variant, task)
        return Trial(run, self.lengths, rates, self.seeds, root, self.settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no variant after this time"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure, from the existing file"
    )
    ladder.add_options(parser)
    given = parser.parse_args()
    place, began = Place(given.config, given.size), time.monotonic()
    if given.draw:
        draw(json.loads(place.results.read_text()), place.figure)
        return
    launch.prepare()
    asked = Comparison.read(place)
    if place.size is not None:
        run = config.load(asked.base, asked.overrides)
        points = ((task, variant) for task in asked.tasks for variant in asked.variants)
        runs = asked.seeds * sum(len(asked.rates(variant, task)) for task, variant in points)
        ladder.require_fits(place.size, run, runs, 1, given.hours)
    rows: list[dict[str, Any]] = []
    for name, tested in asked.tasks.items():
        for variant in asked.variants:
            if time.monotonic() - began > 60 * given.minutes:
                break
            trial = asked.trial(variant, name, place.runs)
            found, seen = trial.examine(name, tested.task)
            rates = {
                f"{rate:g}": [r["exact_match"] for r in seen["rates"] if r["learning_rate"] == rate]
                for rate in asked.rates(variant, name)
            }
            rows += [{"variant": variant, **row, "validation_by_rate": rates} for row in found]
    if rows:
        write_atomic(place.results, json.dumps(rows, indent=1) + "\n")
        draw(rows, place.figure)
        show(rows, Console())


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print exact match by length, a table for each task."""
    for name in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == name]
        lengths = sorted({row["length"] for row in own})
        table = Table(name, "rate", *(f"{length:,}" for length in lengths), "bytes/token")
        for variant in dict.fromkeys(row["variant"] for row in own):
            mine = {row["length"]: row for row in own if row["variant"] == variant}
            cells = (spread(mine[length]["by_seed"]) for length in lengths)
            bytes_each = f"{mine[lengths[-1]]['cache_bytes_per_token']:,.0f}"
            table.add_row(variant, f"{mine[lengths[0]]['learning_rate']:g}", *cells, bytes_each)
        console.print(table)


def spread(shares: Sequence[float]) -> str:
    """Return the mean over seeds and the largest deviation from it."""
    mean = sum(shares) / len(shares)
    return f"{mean:.2f} ± {max(abs(share - mean) for share in shares):.2f}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw exact match by length (dotted: chance) above, and at the longest length against cache
    bytes per token below.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    with saved_figure(path, (5 * len(tasks), 7.6)) as figure:
        panels = figure.subplots(2, len(tasks), squeeze=False, sharey=True)
        for column, task in enumerate(tasks):
            above, below = panels[:, column]
            styles = series_styles(len(variants))
            for number, (variant, series) in enumerate(zip(variants, styles, strict=True)):
                own = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
                style = {key: series[key] for key in ("color", "marker")} | {"label": variant}
                lengths, scores = ([row[k] for row in own] for k in ("length", "exact_match"))
                above.plot(lengths, scores, ms=5, **style)
                # Offset, so that every range can be seen.
                aside = 1 + 0.02 * (number - (len(variants) - 1) / 2)
                for row in own:
                    above.vlines(row["length"] * aside, min(row["by_seed"]), max(row["by_seed"]),
                                 color=style["color"], alpha=0.5)  # fmt: skip
                if own:
                    below.scatter(own[-1]["cache_bytes_per_token"], scores[-1], s=70, **style)
            longest = max(row["length"] for row in rows if row["task"] == task)
            chance = next(row["chance"] for row in rows if row["task"] == task)
            seeds = max(len(row["by_seed"]) for row in rows if row["task"] == task)
            spread = f"vertical lines: range of {seeds} seeds" if seeds > 1 else "one seed"
            above.set(xlabel="tokens", title=f"{task}; {spread}")
            below.set(xlabel=f"cache bytes per token at {longest:,} tokens")
            for axes in (above, below):
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
                axes.set(ylabel="exact match", ylim=(-0.03, 1.03))
                axes.axhline(chance, color="0.4", ls=":", label="a guess")
                axes.grid(alpha=0.3)
            below.margins(x=0.3)
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=2 * len(tasks),
        )


if __name__ == "__main__":
    ladder.told(main)
