"""The demonstration: small models that remember differently, on text that every machine has.

Each is trained on the Python library's own source, then quality (bits per byte of held-out text)
is set against what its memory costs (cache bytes per token).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mukv import config, loaded, runs
from mukv.core.files import write_atomic
from mukv.decode import Sampling
from mukv.describe import describe

PROMPT = "def __init__(self, "
CONTINUATION = 160
SAMPLING = Sampling(temperature=0.7, top_p=0.9)


@dataclass(frozen=True)
class Contestant:
    """One way of remembering: its name in tables, and the preset that has it."""

    name: str
    preset: str


CONTESTANTS = (Contestant("MHA", "tiny-mha"), Contestant("MQA", "tiny-mqa"))


def demonstrate(out: Path, fast: bool, console: Console) -> dict[str, Any]:
    """Train, compare, plot; returns the table as data and the paths of what was written."""
    steps = 80 if fast else 400
    rows = []
    for contestant in CONTESTANTS:
        overrides = [f"train.steps={steps}", "train.batch=16", "train.validation_batches=32"]
        run = config.load(contestant.preset, overrides)
        folder = runs.RunDirectory(out / f"{contestant.preset}-{steps}")
        console.print(f"[bold]{contestant.name}[/]: {run.model.attention.describe()}")
        outcome = runs.train(run, folder, title=contestant.name)
        facts = describe(run)
        model = loaded.load(folder.path)
        made = model.generate_ids([model.encode(PROMPT)], CONTINUATION, SAMPLING)
        rows.append(
            {
                "name": contestant.name,
                "run": str(folder.path),
                "parameters": facts["parameters"],
                "cache_bytes_per_token": facts["cache_bytes_per_token"],
                "bits_per_byte": outcome.validation_bits_per_byte,
                "training_tokens_per_second": outcome.tokens_per_second,
                "decoding_tokens_per_second": made.tokens_per_second,
                "continuation": model.tokenizer.decode(made.tokens[0]),
            }
        )
    plot = out / "quality-against-memory.png"
    draw(rows, plot)
    table = out / "results.json"
    write_atomic(table, json.dumps(rows, indent=2))
    show(rows, console)
    paths = {"plot": str(plot), "table": str(table), "runs": [row["run"] for row in rows]}
    console.print(f"plot:  {plot}\ntable: {table}", highlight=False, soft_wrap=True)
    for row in rows:
        console.print(f"{row['name']:6} {row['run']}", highlight=False, soft_wrap=True)
    return {"rows": rows, **paths}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The comparison, and a continuation from each."""
    table = Table("", "parameters", "cache bytes/token", "bits/byte", "decoding tokens/s")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['cache_bytes_per_token']:,}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['decoding_tokens_per_second']:,.0f}",
        )
    console.print(table)
    for row in rows:
        console.print(f"[bold]{row['name']}[/] continues [dim]{PROMPT}[/]")
        console.print(row["continuation"], markup=False, highlight=False)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte against cache bytes per token; down and to the left is better."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 11}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for row in rows:
            point = row["cache_bytes_per_token"], row["bits_per_byte"]
            axes.scatter(*point, s=70, zorder=3)
            axes.annotate(row["name"], point, xytext=(9, 6), textcoords="offset points")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.margins(0.25)
        axes.grid(alpha=0.3, zorder=0)
        axes.set_xlabel("cache bytes per token")
        axes.set_ylabel("bits per byte, held-out text")
        axes.set_title("Quality against memory (down and left is better)")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial.png")
        figure.savefig(partial, dpi=150)
        partial.replace(path)
