"""How the best learning rate moves with the width under each parameterisation.

    python reproductions/lr-transfer/run.py [--widths 64,128,256] [--seeds 3]

Decoders of two layers on the Python library's own source, the learning rate swept at each width,
with Adam-atan2. Everything that was measured is kept in runs/lr-transfer, so that an interrupted
run goes on where it was. Writes results.json and figure.png beside this file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mukv import config, launch, runs, transfer
from mukv.core.files import write_atomic
from mukv.figures import legend, saved_figure
from mukv.scaling.parameterization import Constants

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
# The narrowest width is the base: every condition is the same network there.
RAISED = "one rate, the embedding's raised"
"""By the ratio of widths (Kalra and Barkeshli 2026)."""
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
    tokens = runs.open_corpus(run)
    found = transfer.Search(run.model, run.train, tokens, "packed", widths, seeds, folder)
    for width, model in found.models.items() if name == RAISED else ():
        rate = Constants(embedding=width / min(widths))
        found.models[width] = replace(model, scaling=replace(model.scaling, rate=rate))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/lr-transfer"))
    given = parser.parse_args()
    launch.prepare()
    widths = [int(width) for width in given.widths.split(",")]
    names = [given.only] if given.only else list(CONDITIONS)
    found: dict[str, tuple[transfer.Search, transfer.Transfer]] = {}
    for name in names:
        Console(stderr=True).print(name)
        each = search(name, widths, given.seeds, given.runs)
        found[name] = each, each.run()
    results = {name: transfer.facts(*each) for name, each in found.items()}
    write_atomic(HERE / "results.json", json.dumps(results, indent=1) + "\n")
    draw(found)
    table = Table("", "drift", "interval", "gap at the widest", *(f"best at {w}" for w in widths))
    for name, (_, each) in found.items():
        cells = [f"{o.loss:.3f} at 2^{o.rate:.1f}" for o in each.optima.values()]
        interval = f"{each.low:+.2f} to {each.high:+.2f}"
        table.add_row(name, f"{each.drift:+.2f}", interval, f"{each.gap:.3f}", *cells)
    Console(width=160).print(table)


def draw(found: dict[str, tuple[transfer.Search, transfer.Transfer]]) -> None:
    size = (3.1 * len(found), 3.6)
    with saved_figure(HERE / "figure.png", size, "Loss against learning rate, by width") as figure:
        panels = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (name, (search, each)) in zip(panels, found.items(), strict=True):
            for width, optimum in each.optima.items():
                rates = search.rates(width)
                means = [search.mean(width, rate) for rate in rates]
                (line,) = axes.plot(rates, means, marker=".", label=str(width))
                axes.plot(optimum.rate, optimum.loss, "*", ms=11, color=line.get_color())
            axes.set(title=f"{name}\ndrift {each.drift:+.2f}", xlabel="log2 learning rate")
            axes.grid(alpha=0.3)
        lowest = min(o.loss for _, each in found.values() for o in each.optima.values())
        panels[0].set(ylabel="validation loss, nats per token", ylim=(lowest - 0.05, lowest + 0.6))
        legend(figure, max(panels, key=lambda axes: len(axes.lines)), "width")


if __name__ == "__main__":
    main()
