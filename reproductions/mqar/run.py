"""Multi-query associative recall at its published segments (Arora et al. 2024, "Zoology").

    python reproductions/mqar/run.py [--large]

Two layers are trained on five segments (tokens, pairs), from (64, 4) to (256, 64), and tested on
seven, up to (1024, 256). Variants differ in how they remember. Each point is written to
results.json when it is done, and is not repeated; figure.png beside it. --large: the published
vocabulary of 8,192, widths to 256, three seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TRAINED = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
TESTED = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
TOKENS = 4096
"""Of a batch, whatever its rows are long."""
SAMPLES = 100
SALT = 1
"""Every sequence of ours begins with one token more."""
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
"""By name: what differs from two layers of two heads, the first of them local."""


def configuration(variant: str, width: int, vocab: int) -> dict[str, Any]:
    """Of the model."""
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
    """Train one model; its share of right answers by segment."""
    import jax

    from mukv.bench.scoring import score
    from mukv.config import Run
    from mukv.core import schema
    from mukv.core.mesh import MeshShape
    from mukv.describe import describe
    from mukv.tasks import Mqar
    from mukv.tasks.feed import TaskBatches
    from mukv.train import Trainer

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


KEYS = ("variant", "width", "learning_rate", "seed", "steps", "words")


def plan(large: bool) -> list[tuple[Any, ...]]:
    """All points, the most telling first."""
    if large:
        rates, widths, seeds = (1e-4, 4.6e-4, 2.2e-3, 1e-2), (32, 64, 128, 256), (0, 1, 2)
        return [
            (variant, width, rate, seed, 20_000, 4096)
            for variant, width, rate, seed in product(VARIANTS, widths, rates, seeds)
        ]
    order = [(name, 64) for name in ("local + NoPE", "window 64", "MLA, rank width / 4")]
    order += [("local + NoPE, MQA", 64), ("local + NoPE", 32), ("MLA, rank width / 2", 64)]
    order += [(name, width) for width in (64, 32) for name in VARIANTS]
    return [(*each, 1e-2, 0, 500, 256) for each in dict.fromkeys(order)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--minutes", type=float, default=14.0, help="stop beginning points then")
    given = parser.parse_args()
    path, began = HERE / "results.json", time.monotonic()
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
    """Share of right answers by segment, a line for each variant and width."""
    from mukv.figures import saved_figure

    segments = [f"{length}, {pairs}" for length, pairs in TESTED]
    with saved_figure(path, (8, 4.4)) as figure:
        axes = figure.subplots()
        for row in rows:
            label = f"{row['variant']}, width {row['width']}"
            style = "-" if row["width"] == 64 else "--"
            colour = f"C{list(VARIANTS).index(row['variant'])}"
            values = [100 * row["right"][name] for name in segments]
            axes.plot(segments, values, style, marker="o", ms=3, color=colour, label=label)
        axes.axvspan(4.5, 6.5, color="0.92", zorder=0)
        axes.set(xlabel="tokens, pairs (grey: longer than in training)", ylabel="right answers, %")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)


if __name__ == "__main__":
    main()
