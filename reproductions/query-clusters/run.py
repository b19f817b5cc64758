"""Measure which kind of clusters best predicts the entries that a query needs.

    python reproductions/query-clusters/run.py [--model runs/retrieval/model] [--clusters 32]

Four kinds of clusters (keys; queries; attention-weighted mean keys; queries and keys separately,
with a table between them), before and after rotation, are calibrated on one half of the windows and
evaluated on the other. Writes results.json and figure.png beside this file; --draw makes the figure
from the existing file.
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

from mukv.analysis.calibrate import calibrate
from mukv.analysis.capture import batch_rows
from mukv.analysis.clusters import MEASURES, READS, Prediction, judge
from mukv.analysis.samples import batched, even, halves
from mukv.cache.centres import KINDS
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
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--clusters", type=int, default=32)
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure, from the existing file"
    )
    given = parser.parse_args()
    if given.draw:
        draw(json.loads((HERE / "results.json").read_text()), HERE / "figure.png")
        return
    launch.prepare()
    results: dict[str, Any] = {}
    for subject in (subjects.trained(given.model), subjects.llama_shaped()):
        samples = given.samples if subject.model.d_model < 512 else max(given.samples // 12, 2)
        code = subjects.texts(given.length, samples)["code"]
        to_cluster, to_judge = halves(code)
        most = min(batch_rows(subject.model, given.length), 16)
        results[subject.name] = {}
        for kind in KINDS:
            for rotated in (True, False):
                centres = calibrate(
                    subject.model,
                    subject.stored,
                    even(to_cluster, most),
                    kind,
                    given.clusters,
                    rotated,
                )
                batches = batched(to_judge, most)
                found = judge(subject.model, subject.scaled, centres, batches)
                when = "after" if rotated else "before"
                results[subject.name][f"{kind}, {when} rotation"] = means(found)
                Console(stderr=True).print(f"{subject.name}: {kind}, {when} rotation")
    write_atomic(HERE / "results.json", json.dumps(results, indent=1) + "\n")
    draw(results, HERE / "figure.png")
    show(results)


def means(found: list[Prediction]) -> dict[str, Any]:
    """Return means over layers and heads by fraction of entries read; and by layer at an eighth."""
    eighth = READS.index(1 / 8)
    shown: dict[str, Any] = {
        name: np.mean([getattr(x, name).mean(axis=0) for x in found], axis=0).tolist()
        for name in MEASURES
    }
    shown["f1_by_layer"] = [float(x.f1[:, eighth].mean()) for x in found]
    shown["largest_cluster"] = float(np.mean([x.sizes[:, 0].mean() for x in found]))
    return shown


def show(results: dict[str, Any]) -> None:
    places = [READS.index(share) for share in (1 / 16, 1 / 8, 1 / 4)]
    names = [f"mass at 1/{round(1 / READS[at])}" for at in places]
    for subject, rows in results.items():
        table = Table("", *names, "precision", "recall", "F1 at 1/8", "largest cluster")
        for name, row in rows.items():
            eighth = [row[each][places[1]] for each in ("precision", "recall", "f1")]
            numbers = [*(row["captured"][at] for at in places), *eighth, row["largest_cluster"]]
            table.add_row(name, *(f"{number:.3f}" for number in numbers))
        first = next(iter(rows.values()))
        for bound in ("largest", "latest"):
            table.add_row(f"the {bound}", *(f"{first[bound][at]:.3f}" for at in places))
        table.title = subject
        Console(width=140).print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    with saved_figure(path, (5.2 * len(results), 5.0)) as figure:
        panels = figure.subplots(1, len(results), squeeze=False)[0]
        for axes, (subject, rows) in zip(panels, results.items(), strict=True):
            for number, (name, row) in enumerate(rows.items()):
                style = "-" if "after" in name else "--"
                colour = f"C{number // 2}"
                axes.plot(READS, row["captured"], style, color=colour, marker=".", label=name)
            first = next(iter(rows.values()))
            axes.plot(READS, first["largest"], color="black", lw=1, label="the largest weights")
            axes.plot(READS, first["latest"], color="black", lw=1, ls=":", label="the latest")
            axes.set(xscale="log", xlabel="share of entries read", title=subject, ylim=(0, 1))
            axes.set_xticks(READS, [f"1/{round(1 / share)}" for share in READS])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("attention mass captured")
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=4,
            fontsize=8,
            handlelength=4,
        )


if __name__ == "__main__":
    main()
