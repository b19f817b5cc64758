"""Measure how much training through a cache policy lowers the loss under that policy.

Run: python benchmarks/through_policy.py --out FOLDER [--policy snapkv:0.25] [--tail 16]
    [--preset tiny] [--steps 1500] [--more 300] [--rows 128]

A small model is trained on the default text, and then twice for `--more` steps from the same
weights and on the same rows: with all entries, and through the policy. Each of the three models is
read on the same validation rows with all entries and under the policy, which drops entries after
every `--tail` tokens. The table has the loss that the policy adds, in nats a token, as the mean
over rows with a 95 % interval, and its difference to that of the untouched model, row by row.
Repeating an interrupted command continues it.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mukv.cache import Policy
from mukv.core.compute import settled
from mukv.model.loss import token_losses
from mukv.model.through import Through
from mukv.runs.config import Run, load
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import open_feed
from mukv.runs.train import train_run
from mukv.storage.weights import load_weights

LENGTH, BATCH = 256, 16


def run_of(options: argparse.Namespace, *changes: str) -> Run:
    """Make the configuration of one training."""
    sizes = (f"train.length={LENGTH}", "train.batch=8", "data.packing=contiguous")
    quiet = ("train.evaluate_every=null", "train.checkpoint_every=100")
    return load(options.preset, [*sizes, *quiet, *changes])


def trained(options: argparse.Namespace) -> dict[str, tuple[Run, Any]]:
    """Train the three models, or load existing ones; return run and weights by name."""
    base = options.out / "untouched"
    start = (f"train.start={base}", f"train.steps={options.more}", "train.learning_rate=0.002")
    through = (f"train.policy={options.policy}", f"train.policy_tail={options.tail}")
    runs = {
        "untouched": run_of(options, f"train.steps={options.steps}"),
        "trained on, all entries": run_of(options, *start, "train.seed=1"),
        "trained on, through the policy": run_of(options, *start, *through, "train.seed=1"),
    }
    found = {}
    for number, (name, run) in enumerate(runs.items()):
        folder = RunDirectory(base if number == 0 else options.out / f"more-{number}")
        train_run(run, folder, name)
        found[name] = run, load_weights(folder.weights)[0]
    return found


def losses(run: Run, weights: Any, rows: int, through: Through | None) -> np.ndarray:
    """Return the mean loss of each validation row, in nats a token."""
    model, compute = run.model, settled(run.train.compute)

    @jax.jit
    def mean(weights: Any, tokens: Any, targets: Any) -> Any:
        hidden = model.forward(weights, tokens, compute=compute, through=through).hidden
        return token_losses(model, weights, hidden, targets, compute).mean(axis=1)

    source = open_feed(run)[1].source("validation", 0, BATCH, LENGTH)
    scaled = model.scaled(weights)
    batches = islice(source.once(rows // BATCH), rows // BATCH)
    return np.concatenate([np.asarray(mean(scaled, b.tokens, b.targets)) for b in batches])


def shown(values: np.ndarray) -> str:
    """Format the mean over rows with its 95 % interval."""
    error = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.4f} ± {error:.4f}"


def main() -> None:
    """Train, read and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--policy", default="snapkv:0.25")
    parser.add_argument("--tail", type=int, default=16)
    parser.add_argument("--preset", default="tiny")
    for name, number in (("steps", 1500), ("more", 300), ("rows", 128)):
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    policy = Policy.parse(options.policy)
    through = Through(policy, options.tail)
    columns = ("", "all entries", str(policy), "added", "against untouched")
    table, first = Table(*columns), None
    for name, (run, weights) in trained(options).items():
        whole, less = (losses(run, weights, options.rows, way) for way in (None, through))
        added = less - whole
        first = added if first is None else first
        difference = "" if first is added else shown(added - first)
        table.add_row(name, f"{whole.mean():.4f}", f"{less.mean():.4f}", shown(added), difference)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
