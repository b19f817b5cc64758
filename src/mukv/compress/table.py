"""What was found, as a table and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mukv.compress.judge import Result
from mukv.core.files import write_atomic
from mukv.figures import saved_figure


def write(results: Sequence[Result], folder: Path, title: str) -> list[Path]:
    """The table, and the trade-off as a picture."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(asdict(results[0])), lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(result) for result in results)
    write_atomic(folder / "compress.csv", text.getvalue())
    _draw(results, folder / "compress.png", title)
    return [folder / "compress.csv", folder / "compress.png"]


def _draw(results: Sequence[Result], path: Path, title: str) -> None:
    """Perplexity and recall against what is kept and what is read, full = 1."""
    full, names = results[0], list(dict.fromkeys(result.policy for result in results))
    across = {
        "bytes kept, of full": lambda r: r.cache_bytes / full.cache_bytes,
        "bytes read per step, of full": lambda r: r.bytes_read_per_step / full.bytes_read_per_step,
    }
    up = {"perplexity": lambda r: r.perplexity, "recall": lambda r: r.recall}
    with saved_figure(path, (10, 7), title) as figure:
        axes = figure.subplots(len(up), len(across), squeeze=False)
        for row, (label, height) in zip(axes, up.items(), strict=True):
            for axis, (under, place) in zip(row, across.items(), strict=True):
                for number, name in enumerate(names):
                    line = sorted((place(r), height(r)) for r in results if r.policy == name)
                    marker = "*" if name == "full" else "osDv^<>PX"[number // 10 % 9]
                    axis.plot(
                        *zip(*line, strict=True),
                        marker=marker,
                        markersize=11 if name == "full" else 5,
                        color="black" if name == "full" else f"C{number % 10}",
                        label=name,
                        linewidth=1,
                    )
                axis.axhline(height(full), color="0.8", linewidth=1, zorder=0)
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter(_share)
                axis.set(xlabel=under, ylabel=label)
                if label == "recall":
                    axis.set_ylim(-0.05, 1.05)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")


def _share(x: float, _: int) -> str:
    """A tick: 2, 1, 1/2, 1/4."""
    return f"{x:g}" if x >= 1 else f"1/{1 / x:.3g}"
