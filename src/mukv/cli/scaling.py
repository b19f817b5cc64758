"""Commands about hyperparameters that hold at every width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mukv import launch, output
from mukv.cli.app import Json, Overrides, app
from mukv.core.errors import BadInput

if TYPE_CHECKING:
    from mukv.coordinates import Slope


@app.command()
def transfer(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset or a YAML file.")],
    overrides: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check", help="Coordinate check: changes of activations.")
    ] = False,
    widths: Annotated[
        str, typer.Option(help="Values of model.d_model, separated by commas.")
    ] = "64,128,256,512",
    seeds: Annotated[int, typer.Option(help="Runs at each width.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps before activations are compared.")] = 10,
    learning_rate: Annotated[
        float, typer.Option(help="Constant, and larger than for training.")
    ] = 2.0**-7,
    out: Annotated[Path | None, typer.Option("--out", help="The plot.")] = None,
    as_json: Json = False,
) -> None:
    """Whether hyperparameters hold as a model widens; exits 1 where they would not.

    Heads, KV heads, ranks and MLPs go with the width. The base is `model.scaling.base`, or else
    the narrowest width.

    Example: `mukv transfer tiny model.scaling.kind=mup --check --widths 64,128,256`
    """
    from mukv import coordinates, runs
    from mukv.data.batches import Batches

    if not check:
        raise BadInput("--check", "nothing", "needs --check: what is to be looked at")
    numbers = parse_widths(widths)
    run, _ = runs.resolve(source, overrides or [], None)
    launch.prepare()
    training = run.train
    tokens, packing = runs.open_corpus(run), run.data.packing
    batches = Batches(tokens, training.seed, training.batch, training.length, packing=packing)
    slopes = coordinates.check(
        run.model, training, batches.at(0), numbers, seeds, steps, learning_rate
    )
    passed = all(each.passed for each in slopes)
    scaling = run.model.scaling
    plot = out or Path("runs") / f"coordinates-{Path(source).stem}-{scaling.kind}.png"
    coordinates.draw(
        slopes, plot, f"{Path(source).stem}, {scaling.kind}: change after {steps} steps"
    )
    if as_json:
        output.print_json(
            {
                "slopes": {each.name: {**asdict(each), "passed": each.passed} for each in slopes},
                "passed": passed,
                "plot": str(plot),
            }
        )
    else:
        show(slopes, Console())
        Console().print(f"plot: {plot}", highlight=False, soft_wrap=True)
    if not passed:
        raise typer.Exit(1)


def parse_widths(text: str) -> list[int]:
    """Raises BadInput for anything but whole numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput("--widths", text, "whole numbers separated by commas") from None


def show(slopes: Sequence[Slope], console: Console) -> None:
    """A verdict for each activation."""
    columns = ("slope", "interval", "limit", "verdict")
    table = Table("change of", *columns, box=None, pad_edge=False)
    for each in slopes:
        verdict = "[bold red]grows[/]" if each.slope > 0 else "[bold red]shrinks[/]"
        table.add_row(
            each.name,
            f"{each.slope:+.2f}",
            f"{each.low:+.2f} to {each.high:+.2f}",
            f"{each.limit:.2f}",
            "flat" if each.passed else verdict,
        )
    console.print(table)
