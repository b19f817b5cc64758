"""The commands `mukv transfer` and `mukv sweep`: transfer and search of hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mukv.cli import launch
from mukv.cli.app import Json, Overrides, app, hold, hold_run
from mukv.core.errors import BadInput
from mukv.core.names import even
from mukv.show import output
from mukv.show.terminal import Console, styled, table

if TYPE_CHECKING:
    from mukv.runs.config import Run
    from mukv.tuning.axes import Axis
    from mukv.tuning.coordinates import Slope
    from mukv.tuning.transfer import Transfer

GIGABYTE = 10**9
WIDTHS = "64,128,256,512"
MemoryLimit = Annotated[
    float | None,
    typer.Option(help="Maximum memory of one program, in gigabytes; default: what is free."),
]


@app.command()
def transfer(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset or a YAML file.")],
    overrides: Overrides = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only do the coordinate check: changes of activations.")
    ] = False,
    widths: Annotated[
        str | None,
        typer.Option(help="Values of model.d_model, with commas; default: " + WIDTHS + "."),
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Instead of widths: numbers of layers, such as 2,4,8.")
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(help="Instead of widths: values of train.batch, for as many rows in all."),
    ] = None,
    horizons: Annotated[
        str | None, typer.Option(help="Instead of widths: values of train.steps.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs at each value.")] = 3,
    steps: Annotated[int, typer.Option(help="Number of steps of the check.")] = 10,
    learning_rate: Annotated[
        float, typer.Option(help="Constant learning rate of the check, larger than in training.")
    ] = 2.0**-7,
    octaves: Annotated[
        int, typer.Option(help="Octaves swept first, on each side of the configured rate.")
    ] = 2,
    memory: MemoryLimit = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The check's plot, or the folder of the search.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Test whether the best learning rate is the same at every width; exits 1 if not.

    Sweeps the learning rate at every width and measures how far the optimum drifts; an interrupted
    search continues when the command is repeated. Heads, KV heads, ranks and MLPs scale with the
    width. The base width is `model.scaling.base`, or else the narrowest width. With --depths,
    --batches or --horizons the depth, the batch or the number of steps varies and not the width;
    `train.budget` then says how rates follow batch and tokens.

    Example: `mukv transfer tiny model.scaling.kind=mup --check --widths 64,128,256`
    """
    from mukv.runs.resolve import resolve

    axis, values = parse_axis(
        {"width": widths, "depth": depths, "batch": batches, "horizon": horizons}
    )
    if check and axis not in ("width", "depth"):
        raise BadInput("--check", axis, "width or depth, whose activations can be compared")
    run, _ = resolve(source, overrides or [], None)
    launch.prepare()
    name = f"{Path(source).stem}-{run.model.scaling.kind}" + f"-{axis}" * (axis != "width")
    if check:
        plot = out or Path("runs") / f"coordinates-{name}.png"
        hold_run(context, plot)
        passed = _check(run, axis, values, seeds, steps, learning_rate, plot, name, as_json)
    else:
        folder = out or Path("runs") / f"transfer-{name}"
        hold(context, folder)
        passed = _search(run, axis, values, seeds, octaves, memory, folder, name, as_json)
    if not passed:
        raise typer.Exit(1)


def _check(
    run: Run,
    axis: Axis,
    values: list[int],
    seeds: int,
    steps: int,
    learning_rate: float,
    plot: Path,
    name: str,
    as_json: bool,
) -> bool:
    from mukv.runs.resolve import open_feed
    from mukv.tuning import coordinates

    training, (_, feed) = run.train, open_feed(run)
    batches = feed.source("train", training.seed, training.batch, training.length)
    slopes = coordinates.check(
        run.model, training, batches.at(0), values, seeds, steps, learning_rate, axis
    )
    passed = all(each.passed for each in slopes)
    coordinates.draw(slopes, plot, f"{name}: change after {steps} steps", axis)
    if as_json:
        rows = {each.name: {**asdict(each), "passed": each.passed} for each in slopes}
        output.print_json({"slopes": rows, "passed": passed, "plot": str(plot)})
    else:
        show_slopes(slopes, Console())
        Console().say(f"plot: {plot}")
    return passed


def _search(
    run: Run,
    axis: Axis,
    values: list[int],
    seeds: int,
    octaves: int,
    memory: float | None,
    folder: Path,
    name: str,
    as_json: bool,
) -> bool:
    from mukv.runs.resolve import open_feed
    from mukv.tuning import transfer

    search = transfer.Search(
        run.model,
        run.train,
        open_feed(run)[1],
        values,
        seeds,
        folder,
        octaves,
        None if memory is None else int(memory * GIGABYTE),
        axis,
    )
    found = search.run()
    transfer.draw(search, found, folder / "transfer.png", name)
    if as_json:
        output.print_json({**transfer.facts(search, found), "folder": str(folder)})
    else:
        show_transfer(found, Console(), axis)
        Console().say(f"losses and plot: {folder}")
    return found.passed


@app.command()
def sweep(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset or a YAML file.")],
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="key=RANGE...",
            help="LOW..HIGH[:log][:COUNT] or A,B,C; a single value is used in every trial.",
        ),
    ],
    sampler: Annotated[
        str | None,
        typer.Option(
            help="grid, random, tpe, gp; default: grid if every range has a COUNT, else tpe."
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Number of trials of random, tpe and gp.")] = 16,
    pruner: Annotated[str, typer.Option(help="none, median, halving.")] = "none",
    seed: Annotated[int, typer.Option(help="Random seed of the sampler.")] = 0,
    together: Annotated[
        int | None,
        typer.Option(
            help="Points that this process takes from the queue at a time; default: 16, or an "
            "eighth of the trials for samplers that learn (tpe, gp)."
        ),
    ] = None,
    memory: MemoryLimit = None,
    patience: Annotated[
        float,
        typer.Option(help="Seconds without a heartbeat after which a trial counts as killed."),
    ] = 60.0,
    storage: Annotated[
        str | None, typer.Option(help="A database's URL; default: a file in the folder.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the study; naming the same one joins it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Search hyperparameters; the same command in another process or machine joins the search.

    Points that differ only in numbers are trained together in one program. Each trial is a run
    directory.

    Example: `mukv sweep tiny train.learning_rate=1e-3..3e-2:log:6 train.seed=0,1`
    """
    from mukv.tuning.space import split

    space, overrides = split(given)
    gridded = all(part.values is not None for part in space.values())
    launch.prepare()
    from mukv.tuning.study import Settings
    from mukv.tuning.sweep import Sweep

    settings = Settings(sampler or ("grid" if gridded else "tpe"), pruner, trials, seed, patience)
    swept = Sweep(
        source,
        overrides,
        space,
        settings,
        out or Path("runs") / f"sweep-{Path(source).stem}",
        storage,
        together,
        None if memory is None else int(memory * GIGABYTE),
    )
    swept.work()
    results = swept.results()
    if as_json:
        output.print_json(results)
    else:
        show_sweep(results, list(swept.space), Console())


def parse_axis(given: Mapping[Axis, str | None]) -> tuple[Axis, list[int]]:
    """Parse the values of the only axis that is given, such as "64,128"; by default widths.

    Raises BadInput for several axes, and for anything but whole numbers.
    """
    from mukv.tuning.axes import AXES

    named: dict[Axis, str] = {axis: text for axis, text in given.items() if text is not None}
    if len(named) > 1:
        first, second, *_ = named
        allowed = f"not with --{AXES[first].plural}: one axis at a time"
        raise BadInput(f"--{AXES[second].plural}", named[second], allowed)
    axis, text = next(iter(named.items())) if named else ("width", WIDTHS)
    try:
        return axis, [int(part) for part in text.split(",")]
    except ValueError:
        where = f"--{AXES[axis].plural}"
        raise BadInput(where, text, "whole numbers separated by commas") from None


def show_slopes(slopes: Sequence[Slope], console: Console) -> None:
    """Print the slope and verdict of each activation."""
    numbers = ("slope, octaves\nper octave", "interval", "limit", "verdict")
    shown = table(("change of",), numbers)
    for each in slopes:
        direction = "grows" if each.slope > 0 else "shrinks"
        verdict = styled((f"{direction}{'' if each.sure else '?'}", "bold red"))
        shown.add_row(
            each.name,
            f"{each.slope:+.2f}",
            f"{each.low:+.2f} to {each.high:+.2f}",
            f"{each.limit:.2f}",
            "flat" if each.passed else verdict,
        )
    console.print(shown)
    if not all(each.sure for each in slopes):
        console.say(
            "?: the interval reaches the limit; more --seeds, more values or a smaller "
            "--learning-rate make it narrower",
            "dim",
        )


def show_transfer(found: Transfer, console: Console, axis: Axis = "width") -> None:
    """Print the best learning rate of each value, and the verdict."""
    numbers = ("best learning rate", "interval", "validation loss,\nnats/token")
    shown = table((axis,), (*numbers, ""))
    ends = [end for each in found.optima.values() for end in (each.rate, each.low, each.high)]
    rates = iter(even([2**end for end in ends]))
    for value, each in found.optima.items():
        rate, low, high = next(rates), next(rates), next(rates)
        edge = "" if each.inside else "at the edge"
        shown.add_row(f"{value:,}", rate, f"{low} to {high}", f"{each.loss:.4f}", edge)
    console.print(shown)
    verdict = ("transfers", "bold green") if found.passed else ("does not transfer", "bold red")
    words = (
        f"drift {found.drift:+.2f} ({found.low:+.2f} to {found.high:+.2f}) octaves per octave of "
        f"{axis}; the rate of {axis} {min(found.optima):,} costs {max(found.optima):,} "
        f"{found.gap:.3f} nats: "
    )
    console.print(styled(words, verdict), soft_wrap=True)


def show_sweep(results: dict[str, Any], names: Sequence[str], console: Console) -> None:
    """Print the ten best points; with several seeds their mean and standard deviation."""
    best = results["rows"][:10]
    several = any("seeds" in row for row in best)
    spreads = ("± over seeds", "seeds") if several else ()
    shown = table((*names, "validation loss,\nnats/token", *spreads, "run"), ())
    values = zip(*(_cells([row.get(name) for row in best]) for name in names), strict=True)
    for row, cells in zip(best, values if names else ((),) * len(best), strict=True):
        loss = row["validation_loss"]
        end = f"{loss:.4f}" if loss is not None else str(row["reason"] or row["state"])
        deviation = row.get("deviation")
        seeds = ("" if deviation is None else f"{deviation:.4f}", str(len(row.get("seeds", ()))))
        shown.add_row(*cells, end, *(seeds if several else ()), Path(row["run"]).name)
    console.print(shown)
    console.say(
        f"{results['complete']} of {results['trials']} runs complete; the runs are in "
        f"{Path(results['study']) / 'trials'}, the plot is {Path(results['study']) / 'sweep.png'}"
    )
    for name in results["edges"]:
        output.warn(
            f"{name}: the best value, {results['best'][name]:g}, is at the edge of what was tried; "
            "a better one may lie beyond"
        )


def _cells(values: Sequence[Any]) -> list[str]:
    """Format numbers with the same number of digits; other values are only made text."""
    if all(type(value) in (int, float) for value in values):
        return even(values)
    return [str(value) for value in values]
