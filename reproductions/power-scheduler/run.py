"""Compare one setting of the power scheduler for all horizons and batches with cosine tuned for
each.

    python reproductions/power-scheduler/run.py [--draw]

The setting is fitted at two short horizons and one batch size, then used at four and eight times
the longer horizon and at half and twice the batch size. Cosine is tuned there in half octaves, and
also run with the short horizon's learning rate, unchanged and changed by each rule of
`train.budget`. Losses are saved in runs/power-scheduler, results.json and figure.png beside this
file; --draw makes the figure from the existing file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mukv.cli import launch
from mukv.data.feed import Feed
from mukv.runs import config
from mukv.runs.resolve import open_feed
from mukv.scaling.budget import BUDGETS
from mukv.show.figures import saved_figure
from mukv.storage.files import write_atomic
from mukv.tuning.together import Point, Together

Setting = tuple[str, ...]
HERE = Path(__file__).parent
LENGTH, BATCH = 64, 16
SHORT = (50, 100)
PUBLISHED = -0.51
EXPONENTS = (0.0, -0.25, PUBLISHED, -0.75)
FIRST = -7.0
"""log2 of the learning rate at which tuning begins."""
TARGETS = {"4 x tokens": (16, 400), "8 x tokens": (16, 800), "half batch": (8, 800),
           "twice the batch": (32, 200)}  # fmt: skip
"""Rows and steps; the last two have four times the tokens."""
SEEDS = (0, 1, 2)
LABELS = {
    "cosine_tuned": "cosine, tuned for this target",
    "power": "power scheduler, as fitted (exponent 0)",
    "power_published": f"power scheduler, exponent {PUBLISHED}, amplitude fitted",
    "cosine_not_tuned": "cosine, rate of the short horizon",
    "cosine_sde": "cosine, numbers by the sde rule",
    "cosine_power": "cosine, rate by the power rule",
}
MODEL = (
    "model.d_model=64",
    "model.attention={heads: 2, kv_heads: 2, head_dim: 32}",
    "model.mlp.hidden=192",
    "model.plan=[{repeats: 2}]",
    f"train.length={LENGTH}",
    "train.optimizer={kind: adam_atan2, weight_decay: 0}",
    "train.validation_batches=64",
)


@dataclass
class Bench:
    """Losses of trained runs, by their overrides."""

    path: Path
    losses: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.losses = json.loads(self.path.read_text())
        self.feed: Feed = open_feed(config.load("tiny", MODEL))[1]

    def measure(
        self, rows: int, steps: int, settings: Sequence[Setting], title: str
    ) -> list[float]:
        """Return the mean loss over seeds of each setting of the schedule."""
        size = (f"train.batch={rows}", f"train.steps={steps}")
        given = [(*size, *each) for each in settings]
        keys = [(*each, f"train.seed={seed}") for each in given for seed in SEEDS]
        todo = [key for key in keys if " ".join(key) not in self.losses]
        for start in range(0, len(todo), 24):
            part = todo[start : start + 24]
            loaded = [config.load("tiny", [*MODEL, *key]) for key in part]
            group = Together([Point(run.model, run.train) for run in loaded], self.feed)
            *_, last = group.run(title)
            for key, row in zip(part, last.numbers, strict=True):
                self.losses[" ".join(key)] = row["validation_loss"]
            write_atomic(self.path, json.dumps(self.losses, indent=1))
        return [statistics.mean(self.by_seed(rows, steps, each)) for each in settings]

    def by_seed(self, rows: int, steps: int, setting: Setting) -> list[float]:
        """Return the measured losses of a setting by seed."""
        size = (f"train.batch={rows}", f"train.steps={steps}")
        keys = ((*size, *setting, f"train.seed={seed}") for seed in SEEDS)
        return [self.losses[" ".join(key)] for key in keys]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/power-scheduler"))
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure, from the existing file"
    )
    given = parser.parse_args()
    if given.draw:
        draw(json.loads((HERE / "results.json").read_text())["targets"])
        return
    launch.prepare()
    bench = Bench(given.runs / "losses.json")
    seen = SHORT[-1] * BATCH * LENGTH
    unit = BATCH * LENGTH / 4096

    def power(rate: float, exponent: float) -> Setting:
        """Return the setting whose learning rate is `rate` after the tokens of the longer short
        horizon.
        """
        amplitude = rate / unit / seen**exponent
        numbers = f"warmup: 10, decay: 0.2, amplitude: {amplitude}, exponent: {exponent}"
        return "train.learning_rate=0.06", f"train.schedule={{kind: power, {numbers}}}"

    results: dict[str, Any] = fit(bench, power)
    settings = {
        "power": power(results["rate"], results["exponent"]),
        "power_published": power(results["rate_at_published"], PUBLISHED),
    }

    def cosine(rows: int, steps: int, title: str, start: float) -> dict[float, float]:
        """Return losses by log2 of the learning rate."""
        return tuned(
            lambda rates: bench.measure(rows, steps, [peak(2**rate) for rate in rates], title),
            start,
        )

    carried = best_of(cosine(BATCH, SHORT[-1], "cosine, short", FIRST))
    results["cosine_short_rate"] = 2**carried
    results["targets"] = {}
    for name, (rows, steps) in TARGETS.items():
        swept = cosine(rows, steps, f"cosine, {name}", carried)
        best = best_of(swept)
        results["targets"][name] = {
            **{
                key: bench.measure(rows, steps, [setting], f"{key}, {name}")[0]
                for key, setting in settings.items()
            },
            "by_seed": {
                key: bench.by_seed(rows, steps, setting)
                for key, setting in {**settings, "cosine_tuned": peak(2**best)}.items()
            },
            "cosine_tuned": swept[best],
            "cosine_tuned_rate": 2**best,
            "cosine_not_tuned": swept[carried],
            **{
                f"cosine_{kind}": bench.measure(
                    rows, steps, [(*peak(2**carried), rule(kind))], f"{kind}, {name}"
                )[0]
                for kind in BUDGETS
            },
        }
    write_atomic(HERE / "results.json", json.dumps(results, indent=1) + "\n")
    show(results)
    draw(results["targets"])


def peak(rate: float) -> Setting:
    schedule = "train.schedule={kind: cosine, warmup: 10, final: 0}"
    return f"train.learning_rate={rate}", schedule


def tuned(measure: Callable[[list[float]], list[float]], start: float) -> dict[float, float]:
    """Return losses by log2 of the learning rate, from `start` on until the best has neighbours on
    both sides.
    """
    losses: dict[float, float] = {}
    best = start
    while new := [rate for rate in (best - 0.5, best, best + 0.5) if rate not in losses]:
        losses |= dict(zip(new, measure(new), strict=True))
        best = best_of(losses)
    return losses


def best_of(losses: Mapping[Any, float]) -> Any:
    return min(losses, key=lambda key: losses[key])


def rule(kind: str) -> str:
    tuned = f"batch: {BATCH * LENGTH}, tokens: {BATCH * LENGTH * SHORT[-1]}"
    return f"train.budget={{kind: {kind}, {tuned}}}"


def fit(bench: Bench, power: Callable[[float, float], Setting]) -> dict[str, Any]:
    """Return the setting with the lowest sum of losses over the short horizons."""
    sums: dict[tuple[float, float], float] = {}
    for exponent in EXPONENTS:

        def both(rates: list[float], exponent: float = exponent) -> list[float]:
            settings = [power(2**rate, exponent) for rate in rates]
            title = f"power, exponent {exponent}"
            by_horizon = [bench.measure(BATCH, steps, settings, title) for steps in SHORT]
            return [sum(each) for each in zip(*by_horizon, strict=True)]

        sums |= {(rate, exponent): loss for rate, loss in tuned(both, FIRST).items()}
    rate, exponent = best_of(sums)
    published = best_of({rate: loss for (rate, e), loss in sums.items() if e == PUBLISHED})
    short = [
        {"log2_rate": rate, "exponent": exponent, "sum": loss}
        for (rate, exponent), loss in sums.items()
    ]
    fitted = {"rate": 2**rate, "exponent": exponent, "rate_at_published": 2**published}
    return {**fitted, "short": short}


def show(results: Mapping[str, Any]) -> None:
    title = f"fitted: {results['rate']:.4f} after the short horizon, exponent {results['exponent']}"
    table = Table("", *LABELS.values(), "tuned at", title=title)
    for name, row in results["targets"].items():
        losses = (f"{row[key]:.4f}" for key in LABELS)
        table.add_row(name, *losses, f"{row['cosine_tuned_rate']:.4f}")
    Console(width=140).print(table)


def draw(targets: Mapping[str, Mapping[str, float]]) -> None:
    title = f"Loss beyond cosine tuned for the same target; means of {len(SEEDS)} seeds"
    with saved_figure(HERE / "figure.png", (8, 4.6), title) as figure:
        axes = figure.subplots()
        names = list(targets)
        compared = [key for key in LABELS if key != "cosine_tuned"]
        for shift, key in enumerate(compared):
            gaps = [targets[name][key] - targets[name]["cosine_tuned"] for name in names]
            places = [i + 0.16 * (shift - 2) for i in range(len(names))]
            axes.bar(places, gaps, 0.15, label=LABELS[key])
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.3, axis="y")
        figure.legend(
            *axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2
        )


if __name__ == "__main__":
    main()
