"""The command that asks a model what it remembers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from mukv import launch, output
from mukv.cli.app import Json, app
from mukv.core.errors import BadInput, unknown_name


@app.command()
def bench(
    oracle: Annotated[
        bool, typer.Option("--oracle", help="No model: an independent solver, a guesser.")
    ] = False,
    tasks: Annotated[str | None, typer.Option(help="Names with commas; default: all.")] = None,
    lengths: Annotated[str | None, typer.Option(help="In tokens, with commas.")] = None,
    samples: Annotated[int, typer.Option(help="Of each task and length.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    as_json: Json = False,
) -> None:
    """How much of a text a model still knows, by task and length.

    Example: `mukv bench --oracle --lengths 512`
    """
    launch.prepare()
    from mukv.bench import oracle as without_model
    from mukv.tasks import TASKS

    names = chosen(tasks, list(TASKS))
    sizes = numbers("--lengths", lengths or "512")
    if samples < 1:
        raise BadInput("--samples", samples, "at least 1")
    if not oracle:
        raise BadInput("bench", "no model", "--oracle")
    show(without_model.check(names, sizes, samples, seed), as_json)


def chosen(text: str | None, names: Sequence[str]) -> list[str]:
    """Names from "a,b", each in the table."""
    if text is None:
        return list(names)
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if name not in names:
            raise unknown_name("--tasks", name, names)
    if not found:
        raise BadInput("--tasks", text, f"names such as {names[0]},{names[1]}")
    return list(dict.fromkeys(found))


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers of at least 1 from "1,2,3", each once, in order."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise BadInput(option, text, "whole numbers with commas between, such as 64,128") from None
    if found[0] < 1:
        raise BadInput(option, text, "numbers of at least 1")
    return found


def show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """As one object, or as a table."""
    if as_json:
        output.print_json({"rows": rows})
        return
    names = ("task", "length", "exact", "95 %", "chance", "oracle", "bytes/token")
    columns = (Column(name, no_wrap=True) for name in names)
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            row["task"],
            f"{row['length']:,}",
            f"{row['exact_match']:.3f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['chance']:.2g}",
            f"{row['oracle']:.3f}",
            f"{row['cache_bytes_per_token']:,.0f}",
        )
    Console().print(table)
