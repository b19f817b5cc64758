"""Measure multi-query associative recall at its published segments (Arora et al. 2024, "Zoology").

    python reproductions/mqar/run.py [--large] [--draw]

Models of two layers are trained on five segments (tokens, pairs), from (64, 4) to (256, 64), and
tested on seven, up to (1024, 256). Variants differ in their attention layers. Each point is written
to results.json when it is done, and is not repeated; figure.png is beside it. --large: the
published vocabulary of 8,192, widths to 256, three seeds. --draw: the figure from the existing
file.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TRAINED = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
TESTED = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
TOKENS = 4096
"""Tokens of a batch, whatever the length of its rows."""
SAMPLES = 100
SALT = 1
"""Number of tokens that our sequences have more than the published ones."""
LOCAL = {"window": 2}
GLOBAL = {"position": {"kind": "nope"}}
HYBRID = [{"pattern": [LOCAL, GLOBAL]}]
VARIANTS: dict[str, dict[str, Any]] = {
    "local + NoPE": {"plan": HYBRID},
    "local + NoPE, MQA": {"plan": HYBRID, "kv_heads": 1},
    "RoPE": {"plan": [{"repeats": 2}]},
    "window 64": {"plan": [{"pattern": [LOCAL, {"window": 64, **GLOBAL}]}]},
    "MLA, rank width / 2": {"plan": HYBRID, "rank": 2},
    "MLA, rank width / 4": {"plan": HYBRID, "rank": 4},
    "reuse": {"plan": [{"pattern": [LOCAL, GLOBAL, {**GLOBAL, "reads": -1}]}]},
}  # fmt: skip
"""Variants by name: changes of a model of two layers of two heads, of which the first is local."""


def configuration(variant: str, width: int, vocab: int) -> dict[str, Any]:
    """Return the configuration of a model."""
    changes = VARIANTS[variant]
    grouped = {"heads": 2, "kv_heads": changes.get("kv_heads", 2), "head_dim": width // 2}
    own: dict[str, Any] = grouped
    if "rank" in changes:
        rank = width // changes["rank"]
        own = {"kind": "latent", "heads": 2, "rank": rank, "head_dim": width // 2, "rope_dim": 8}
    return {
        "vocab_size": vocab,
        "d_model": width,
        "attention": own,
        "mlp": {"hidden": width},
        "plan": changes["plan"],
        "readout": "tied",
    }


def point(variant: str, width: int, rate: float, seed: int, steps: int, words: int) -> dict:
    """Train one model; return its fraction of correct answers by segment."""
    import jax

    from mukv.bench.scoring import score
    from mukv.core.mesh import MeshShape
    from mukv.runs.config import Run
    from mukv.runs.describe import describe
    from mukv.schema import schema
    from mukv.tasks import Mqar
    from mukv.tasks.feed import TaskBatches
    from mukv.train.step import Trainer

    def task(pairs: int) -> Mqar:
        return Mqar(facts=pairs, keys=words, values=words)

    training = {
        "steps": steps, "seed": seed, "batch": TOKENS // 256, "length": 256,
        "learning_rate": rate, "schedule": {"kind": "cosine", "warmup": steps // 10},
        "optimizer": {"kind": "muon"}, "clip_norm": 1.0,
    }  # fmt: skip
    vocab = -(-task(4).vocab_size // 8) * 8
    mapping = {"model": configuration(variant, width, vocab), "train": training}
    run = schema.build(Run, mapping)
    trainer = Trainer(run.model, run.train, MeshShape().build())
    sources = [
        TaskBatches(task(pairs), seed, TOKENS // length, length + SALT, "train")
        for length, pairs in TRAINED
    ]
    state, began = trainer.initial_state(), time.monotonic()
    with jax.set_mesh(trainer.mesh):
        for step in range(steps):
            batch = sources[step % len(sources)].at(step)
            state, metrics = trainer.step(state, step, trainer.put(batch))
            if step % 100 == 0:
                print(variant, width, rate, step, float(metrics.loss), flush=True)
    scaled = run.model.scaled(state.weights)
    shares = {}
    for length, pairs in TESTED:
        samples = task(pairs).batch(length + SALT, seed, "test", np.arange(SAMPLES))
        found = score(run.model, scaled, samples)
        shares[f"{length}, {pairs}"] = float(found.right[found.present].mean())
    facts = describe(run)
    return {
        "variant": variant, "width": width, "learning_rate": rate, "seed": seed, "steps": steps,
        "words": words, "right": shares, "seconds": time.monotonic() - began,
        "cache_bytes_per_token": facts["cache_bytes_per_token"],
        "cache_bytes_constant": facts["cache_bytes_constant"],
    }  # fmt: skip


SMALL = (
    ("local + NoPE", 64, 0, 500),
    ("window 64", 64, 0, 500),
    ("MLA, rank width / 4", 64, 0, 500),
    ("local + NoPE, MQA", 64, 0, 500),
    ("local + NoPE", 32, 0, 500),
    ("RoPE", 64, 0, 500),
    ("reuse", 64, 0, 500),
    ("local + NoPE", 64, 1, 500),
    ("MLA, rank width / 2", 64, 0, 1000),
    ("local + NoPE", 64, 1, 1000),
    ("local + NoPE", 128, 0, 500),
    ("local + NoPE", 32, 0, 2000),
)
"""Points (variant, width, seed, steps). Smaller models need more steps to learn."""

KEYS = ("variant", "width", "learning_rate", "seed", "steps", "words")


def plan(large: bool) -> list[tuple[Any, ...]]:
    """Return all points, the most informative first."""
    if large:
        rates, widths, seeds = (1e-4, 4.6e-4, 2.2e-3, 1e-2), (32, 64, 128, 256), (0, 1, 2)
        return [
            (variant, width, rate, seed, 20_000, 4096)
            for variant, width, rate, seed in product(VARIANTS, widths, rates, seeds)
        ]
    return [(variant, width, 1e-2, seed, steps, 256) for variant, width, seed, steps in SMALL]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true")
    parser.add_argument(
        "--minutes", type=float, default=14.0, help="start no point after this time"
    )
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure, from the existing file"
    )
    given = parser.parse_args()
    path, began = HERE / "results.json", time.monotonic()
    if given.draw:
        draw(json.loads(path.read_text()), HERE / "figure.png")
        return
    rows = json.loads(path.read_text()) if path.exists() else []
    for each in plan(given.large):
        if any(tuple(row[key] for key in KEYS) == each for row in rows):
            continue
        if time.monotonic() - began > 60 * given.minutes:
            print("stopped; the same command goes on")
            break
        rows.append(point(*each))
        print(rows[-1], flush=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(rows, indent=1) + "\n")
        partial.replace(path)
    draw(rows, HERE / "figure.png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the fraction of correct answers by model (the longest trained of each) and segment."""
    from mukv.show.figures import saved_figure

    longest = {
        tuple(row[key] for key in KEYS if key != "steps"): row
        for row in sorted(rows, key=lambda row: row["steps"])
    }
    order = sorted(
        longest.values(),
        key=lambda row: (row["width"], list(VARIANTS).index(row["variant"]), row["seed"]),
    )
    shown = np.array(
        [[100 * row["right"][f"{n}, {pairs}"] for n, pairs in TESTED] for row in order]
    )
    with saved_figure(path, (8.4, 1.4 + 0.34 * len(order))) as figure:
        axes = figure.subplots()
        image = axes.imshow(shown, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for (row, column), share in np.ndenumerate(shown):
            axes.text(column, row, text(share), ha="center", va="center", fontsize=8,
                      color="black" if share > 60 else "white")  # fmt: skip
        axes.set_yticks(range(len(order)), [label(row) for row in order], fontsize=8)
        axes.set_xticks(range(len(TESTED)), [f"{n:,}\n{pairs}" for n, pairs in TESTED], fontsize=8)
        for row, (above, below) in enumerate(pairwise(order)):
            if above["width"] != below["width"]:
                axes.axhline(row + 0.5, color="white", lw=3)
        axes.axvline(4.5, color="white", lw=1, ls=":")
        axes.set(xlabel="tokens and pairs (right of the dotted line: longer than in training)")
        figure.colorbar(image, label="right answers, %", shrink=0.8)


def text(share: float) -> str:
    """Format a percentage; with two decimals close to a hundred."""
    return "100" if share == 100 else f"{share:.2f}" if share > 99 else f"{share:.0f}"


def label(row: dict[str, Any]) -> str:
    """Name a model by its width, variant, steps, and its seed unless it is the first."""
    seed = f", seed {row['seed']}" if row["seed"] else ""
    return f"{row['width']}: {row['variant']} ({row['steps']:,} steps{seed})"


if __name__ == "__main__":
    main()
