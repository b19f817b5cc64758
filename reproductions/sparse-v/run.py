"""How much of the attention few values hold, and what the output loses with the others.

    python reproductions/sparse-v/run.py [--model runs/retrieval/model]

Reads code, prose and dialogue with a model that we trained and with one of Llama's heads and random
weights. Writes results.json and figure.png beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mukv import launch
from mukv.analysis import study
from mukv.analysis.sparsity import MASSES, SHARES, Sparsity
from mukv.core.files import write_atomic
from mukv.figures import legend, saved_figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import subjects  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/retrieval/model"))
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16)
    given = parser.parse_args()
    launch.prepare()
    found: dict[str, dict[str, list[Sparsity]]] = {}
    for subject in (subjects.trained(given.model), subjects.llama_shaped()):
        samples = given.samples if subject.model.d_model < 512 else max(given.samples // 8, 1)
        texts = subjects.texts(given.length, samples)
        found[subject.name] = study.look(subject.model, subject.scaled, texts)
    results = {name: study.facts(texts) for name, texts in found.items()}
    write_atomic(HERE / "results.json", json.dumps(results, indent=1) + "\n")
    draw(found, HERE / "figure.png")
    show(results)


def show(results: dict[str, Any]) -> None:
    columns = ("layer", "80 %", "99 %", "mass of top 10 %", "error", "mass of top 20 %", "error")
    for name, texts in results.items():
        for text, layers in texts.items():
            table = Table(*columns, title=f"{name}: {text}", box=None)
            for row in layers:
                table.add_row(
                    str(row["layer"]),
                    f"{row['needed']['0.8']:.1f}",
                    f"{row['needed']['0.99']:.1f}",
                    *(f"{row[kind][s]:.3f}" for s in ("0.1", "0.2") for kind in ("top", "error")),
                )
            Console().print(table)


def draw(found: dict[str, dict[str, list[Sparsity]]], path: Path) -> None:
    """Sorted mass, entries for a mass by context, and error against lost mass, for each model."""
    with saved_figure(path, (12, 3.4 * len(found))) as figure:
        rows = figure.subplots(len(found), 3, squeeze=False)
        for (left, middle, right), (name, texts) in zip(rows, found.items(), strict=True):
            for text, layers in texts.items():
                last = layers[0].longest
                mean = np.mean([x.curve["mean"][:, last].mean(axis=0) for x in layers], axis=0)
                (line,) = left.plot(layers[0].ranks, mean, label=text)
                low = np.min([x.curve["low"][:, last].min(axis=0) for x in layers], axis=0)
                left.plot(layers[0].ranks, low, ls=":", lw=1, color=line.get_color())
                place = MASSES.index(0.95)
                needed = [x.needed["mean"][:, :, place].mean(axis=0) for x in layers]
                middle.plot(2.0 ** np.arange(last + 1), np.mean(needed, axis=0), marker=".")
                lost = [1 - x.top[:, last] for x in layers]
                error = [x.error[:, last] for x in layers]
                right.scatter(np.concatenate(lost), np.concatenate(error), s=10, alpha=0.6)
            left.set(xscale="log", xlabel="largest weights", ylabel="mass", ylim=(0, 1.02))
            left.set_title(f"{name}\nsorted mass: mean, and the worst query (dotted)", fontsize=9)
            middle.set(xscale="log", yscale="log", xlabel="context", ylabel="entries")
            middle.set_title("entries for 95 % of the mass", fontsize=9)
            right.plot([0, 1], [0, 1], color="grey", ls=":", lw=1)
            shares = ", ".join(f"{share:.0%}" for share in SHARES)
            right.set(xlabel="mass lost", ylabel="relative error of the output")
            right.set_title(f"V read for the largest {shares}", fontsize=9)
            for axes in (left, middle, right):
                axes.grid(alpha=0.3)
        legend(figure, rows[0][0])


if __name__ == "__main__":
    main()
