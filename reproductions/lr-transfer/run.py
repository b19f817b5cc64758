"""Measure how the best learning rate changes with the width under each parameterisation.

    python reproductions/lr-transfer/run.py [--widths 64,128,256] [--seeds 3] [--only muP] [--draw]

Decoders of two layers are trained on the Python library's own source with Adam-atan2, with a sweep
of the learning rate at each width. All losses are saved in runs/lr-transfer, so that an interrupted
run resumes. Writes results.json and figure.png beside this file. A parameterisation that was not
measured now, or was measured at more widths before, keeps its entry in the file. --draw computes
verdicts and figure from the losses in the file.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mukv.cli import launch
from mukv.runs import config
from mukv.runs.resolve import open_feed
from mukv.scaling.parameterization import Constants
from mukv.show.figures import saved_figure
from mukv.storage.files import write_atomic
from mukv.tuning import transfer

HERE = Path(__file__).parent
BASE = (
    "model.d_model=64",
    "model.attention={heads: 2, kv_heads: 2, head_dim: 32}",
    "model.mlp.hidden=192",
    "model.plan=[{repeats: 2}]",
    "train.steps=120",
    "train.batch=16",
    "train.length=64",
    "train.learning_rate=0.015625",
    "train.optimizer={kind: adam_atan2, weight_decay: 0}",
    "train.schedule={kind: linear, warmup: 10, final: 0}",
    "train.validation_batches=32",
)
# The narrowest width is the base, where all conditions are the same network.
RAISED = "one rate, the embedding's raised"
"""The embedding's learning rate is multiplied by the ratio of widths (Kalra and Barkeshli 2026)."""
COMMON = 256
"""The largest width that all parameterisations have."""
CONDITIONS = {
    "one rate for all": ["model.scaling.alignment=ignored"],
    RAISED: ["model.scaling.alignment=ignored"],
    "SP, full alignment": ["model.scaling.kind=sp"],
    "muP": ["model.scaling.kind=mup"],
    "SP, no alignment": ["model.scaling.alignment=none"],
}


def search(name: str, widths: list[int], seeds: int, root: Path) -> transfer.Search:
    run = config.load("tiny", [*BASE, *CONDITIONS[name]])
    folder = root / name.replace(" ", "-").replace(",", "").replace("'", "")
    _, feed = open_feed(run)
    found = transfer.Search(run.model, run.train, feed, widths, seeds, folder)
    for width, point in found.points.items() if name == RAISED else ():
        rate = Constants(embedding=width / min(widths))
        model = replace(point.model, scaling=replace(point.model.scaling, rate=rate))
        found.points[width] = point._replace(model=model)
    return found


def verdict(found: transfer.Search, widths: list[int]) -> transfer.Transfer:
    """Compute the verdict over some of the measured widths."""
    part = copy.copy(found)
    part.points = {width: found.points[width] for width in widths}
    return part.verdict()


def facts(found: transfer.Search) -> dict[str, Any]:
    """Return the verdicts over all widths, and over those that every parameterisation has."""
    common = verdict(found, [width for width in found.points if width <= COMMON])
    numbers = {name: getattr(common, name) for name in ("drift", "low", "high", "gap")}
    whole = transfer.facts(found, found.verdict())
    return {"seeds": found.seeds, f"to_{COMMON}": numbers} | whole


def from_file(name: str, entry: dict[str, Any], root: Path) -> transfer.Search:
    """Make a search with the losses of an entry of the file."""
    seeds = 1 + max(row["seed"] for row in entry["losses"])
    found = search(name, [int(width) for width in entry["optima"]], seeds, root / "from-file")
    keys = ("width", "log2_rate", "seed")
    found.losses = {tuple(row[key] for key in keys): row["loss"] for row in entry["losses"]}
    return found


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Merge old and new entries: the new one of each parameterisation, unless the old one has more
    widths.
    """
    kept = {
        name: entry
        for name, entry in before.items()
        if name not in now or set(entry["optima"]) > set(now[name]["optima"])
    }
    both = now | kept
    return {name: both[name] for name in CONDITIONS if name in both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=list(CONDITIONS), default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/lr-transfer"))
    parser.add_argument(
        "--draw",
        action="store_true",
        help="only compute verdicts and figure, from the existing file",
    )
    given = parser.parse_args()
    launch.prepare()
    path = HERE / "results.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    now: dict[str, Any] = {}
    if given.draw:
        now = {name: facts(from_file(name, row, given.runs)) for name, row in before.items()}
    else:
        widths = [int(width) for width in given.widths.split(",")]
        for name in [given.only] if given.only else list(CONDITIONS):
            Console(stderr=True).print(name)
            each = search(name, widths, given.seeds, given.runs)
            each.run()
            now[name] = facts(each)
    results = merged(before, now)
    write_atomic(path, json.dumps(results, indent=1) + "\n")
    draw(results)
    show(results)


def show(results: dict[str, Any]) -> None:
    widths = list(max((row["optima"] for row in results.values()), key=len))
    table = Table("", "drift", "interval", "gap at the widest", *(f"best at {w}" for w in widths))
    for name, row in results.items():
        best = (row["optima"].get(width) for width in widths)
        cells = [f"{o['loss']:.3f} at 2^{o['rate']:.1f}" if o else "" for o in best]
        interval = f"{row['low']:+.2f} to {row['high']:+.2f}"
        table.add_row(name, f"{row['drift']:+.2f}", interval, f"{row['gap']:.3f}", *cells)
    Console(width=160).print(table)


def draw(results: dict[str, Any]) -> None:
    size = (3.1 * len(results), 4.0)
    with saved_figure(HERE / "figure.png", size, "Loss against learning rate, by width") as figure:
        panels = figure.subplots(1, len(results), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (name, row) in zip(panels, results.items(), strict=True):
            for width, optimum in row["optima"].items():
                losses: dict[float, list[float]] = {}
                for each in row["losses"]:
                    if each["width"] == int(width):
                        losses.setdefault(each["log2_rate"], []).append(each["loss"])
                means = {rate: sum(of) / len(of) for rate, of in losses.items()}
                spread = [
                    [mean - min(losses[rate]) for rate, mean in means.items()],
                    [max(losses[rate]) - mean for rate, mean in means.items()],
                ]
                (line, *_) = axes.errorbar(
                    list(means), list(means.values()), spread, marker=".", capsize=2, label=width
                )
                axes.plot(optimum["rate"], optimum["loss"], "*", ms=11, color=line.get_color())
            widest = max(map(int, row["optima"]))
            axes.set(
                title=f"{name}\nto {widest}: drift {row['drift']:+.2f}", xlabel="log2 learning rate"
            )
            axes.grid(alpha=0.3)
        lowest = min(o["loss"] for row in results.values() for o in row["optima"].values())
        panels[0].set(ylabel="validation loss, nats per token", ylim=(lowest - 0.05, lowest + 0.6))
        most = max(panels, key=lambda axes: len(axes.containers))
        figure.legend(
            *most.get_legend_handles_labels(),
            title="width (star: best; bars: range of seeds)",
            loc="outside lower center",
            ncols=4,
        )


if __name__ == "__main__":
    main()
