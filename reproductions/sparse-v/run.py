"""Measure attention mass on few values, errors without the others, and agreement of heads.

    python reproductions/sparse-v/run.py [--model runs/retrieval/model]
    python reproductions/sparse-v/run.py --draw

Reads code, prose and dialogue with a model that we trained and with one that has Llama's heads and
random weights. Writes results.json and figure.png beside this file; --draw makes the figure from
the existing file.
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

from mukv.analysis import study
from mukv.analysis.sparsity import MASSES, SHARES, Sparsity
from mukv.cli import launch
from mukv.show.figures import saved_figure
from mukv.storage.files import write_atomic

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import subjects  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/retrieval/model"))
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure, from the existing file"
    )
    given = parser.parse_args()
    path = HERE / "results.json"
    if given.draw:
        draw(json.loads(path.read_text()), HERE / "figure.png")
        return
    launch.prepare()
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for subject in (subjects.trained(given.model), subjects.llama_shaped()):
        samples = given.samples if subject.model.d_model < 512 else max(given.samples // 8, 1)
        texts = subjects.texts(given.length, samples)
        found = study.look(subject.model, subject.scaled, texts)
        kv_heads = subject.model.attention.key_heads
        facts = study.facts(found)
        results[subject.name] = {
            text: [
                {**row, **between_heads(layer, kv_heads), "shown": shown(layer)}
                for row, layer in zip(facts[text], layers, strict=True)
            ]
            for text, layers in found.items()
        }
    write_atomic(path, text_of(results))
    draw(results, HERE / "figure.png")
    show(results)


def between_heads(layer: Sparsity, kv_heads: int) -> dict[str, float]:
    """Return the mean agreement of two query heads that share a KV head, and of two that don't,
    with the range over all pairs.
    """
    heads = len(layer.agreement)
    of = np.arange(heads) // (heads // kv_heads)
    same, other = of[:, None] == of, of[:, None] != of
    pairs = ~np.eye(heads, dtype=bool)
    return {
        "agreement_same_kv_head": float(layer.agreement[same & pairs].mean()),
        "agreement_other_kv_heads": float(layer.agreement[other].mean()),
        "least_agreement": float(layer.agreement[pairs].min()),
        "largest_agreement": float(layer.agreement[pairs].max()),
    }


def shown(layer: Sparsity) -> dict[str, list[float]]:
    """Return the data of one layer for the figure. lost, error: by head and fraction of entries."""
    last, place = layer.longest, MASSES.index(0.95)
    numbers = {
        "ranks": layer.ranks,
        "mass": layer.curve["mean"][:, last].mean(axis=0),
        "worst_mass": layer.curve["low"][:, last].min(axis=0),
        "needed": layer.needed["mean"][:, : last + 1, place].mean(axis=0),
        "lost": 1 - layer.top[:, last].ravel(),
        "error": layer.error[:, last].ravel(),
    }
    return {name: np.round(each, 4).tolist() for name, each in numbers.items()}


def text_of(results: dict[str, Any]) -> str:
    """Format JSON with one line per layer."""
    subjects = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(
            f"  {json.dumps(text)}: [\n" + ",\n".join("   " + json.dumps(row) for row in rows) + "]"
            for text, rows in texts.items()
        )
        + "}"
        for name, texts in results.items()
    ]
    return "{\n" + ",\n".join(subjects) + "}\n"


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


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw sorted mass, entries for a mass by context, and error against lost mass, for
    each model.
    """
    with saved_figure(path, (12, 3.4 * len(results) + 0.3)) as figure:
        rows = figure.subplots(len(results), 3, squeeze=False)
        for (left, middle, right), (name, texts) in zip(rows, results.items(), strict=True):
            for text, layers in texts.items():
                each = [layer["shown"] for layer in layers]
                ranks = each[0]["ranks"]
                (line,) = left.plot(ranks, np.mean([x["mass"] for x in each], axis=0), label=text)
                worst = np.min([x["worst_mass"] for x in each], axis=0)
                left.plot(ranks, worst, ls=":", lw=1, color=line.get_color())
                needed = np.mean([x["needed"] for x in each], axis=0)
                middle.plot(2.0 ** np.arange(len(needed)), needed, marker=".")
                right.scatter(
                    np.concatenate([x["lost"] for x in each]),
                    np.concatenate([x["error"] for x in each]),
                    s=10,
                    alpha=0.6,
                )
            left.set(xlabel="largest weights", ylabel="mass", ylim=(0, 1.02))
            left.set_title(f"{name}\nsorted mass: mean, and the worst query (dotted)", fontsize=9)
            middle.set_yscale("log", base=2)
            middle.yaxis.set_major_formatter("{x:.0f}")
            middle.set(xlabel="entries that the query sees", ylabel="entries")
            middle.set_title("entries for 95 % of the mass", fontsize=9)
            right.plot([0, 1], [0, 1], color="grey", ls=":", lw=1)
            shares = ", ".join(f"{share:.0%}" for share in SHARES)
            right.set(xlabel="mass lost", ylabel="relative error of the output")
            right.set_title(f"V read for the largest {shares}", fontsize=9)
            for axes in (left, middle):
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter("{x:.0f}")
            for axes in (left, middle, right):
                axes.grid(alpha=0.3)
        figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


if __name__ == "__main__":
    main()
