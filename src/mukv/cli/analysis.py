"""The commands `mukv analyze` and `mukv report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mukv.cli import launch
from mukv.cli.app import Json, ModelName, app, beside, hold, hold_run, tell
from mukv.show import output
from mukv.show.terminal import Console, table

if TYPE_CHECKING:
    from mukv.analysis.command import Analysis

SAMPLES = 32


@app.command()
def analyze(
    context: typer.Context,
    model: ModelName,
    text: Annotated[
        list[Path] | None, typer.Option(help="A UTF-8 text file; repeat it to compare texts.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Token ids: .npy, [token] or [row token].")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Window in tokens; default: as in training.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of windows per text.")] = SAMPLES,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Cluster keys, queries, means or aligned (for the policy clusters), or predict "
            "scores (for kvzap); saves the result with the model."
        ),
    ] = None,
    clusters: Annotated[int, typer.Option(help="Number of clusters per head.")] = 64,
    before_rotation: Annotated[
        bool, typer.Option("--before-rotation", help="Cluster keys and queries before rotation.")
    ] = False,
    calibration_tokens: Annotated[
        int, typer.Option(help="Number of tokens of the training text that calibrate.")
    ] = 1 << 16,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: `analysis` in the run directory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how few cache entries the queries of each layer and head need.

    Without a text, the held-out part of the training text is used. Writes tables, pictures and a
    page. With --calibrate, every second window of a given text calibrates, and the result is tested
    on the others.

    Example: `mukv analyze runs/demo/tiny-mha-120 --text README.md --text LICENSE --length 256`
    """
    launch.prepare()
    from mukv.analysis import command
    from mukv.runs import inputs, loaded, notes

    settings = command.AnalyzeSettings(
        tuple(text or ()), tokens, samples, calibrate, clusters, before_rotation, calibration_tokens
    )
    source = Path(model) if Path(model).is_dir() else None
    folder = out or beside(model, "analysis")
    hold(context, folder, *([source] if source and calibrate is not None else []))
    speaker = loaded.load(model)
    length = inputs.window(speaker, length)
    tell(notes.of_length(length, speaker.run, "--length"))
    if not settings.text and settings.tokens is None:
        Console(stderr=True).say(notes.of_held_out(inputs.corpus(speaker)))
    made = command.analyze(speaker, model, length, settings, folder, source)
    if as_json:
        output.print_json(made.facts)
        return
    _show_analysis(made, Console())
    if calibrate not in (None, command.SCORES) and not speaker.by_head:
        output.warn("cache policies don't use these centres: all heads share one set of entries")
    Console().say(f"page: {folder / 'analysis.html'}")


def _show_analysis(made: Analysis, console: Console) -> None:
    """Print a table for each text, and one for the clusters."""
    from mukv.analysis import study
    from mukv.analysis.clusters import MEASURES

    for name, layers in made.found.items():
        caption = (
            "entries that hold a share of the mass; mass of the largest tenth of the weights, and "
            "relative error of the output with them alone; sinks: the first 4 entries; mean "
            "distance in tokens; position of the most-read entry, and its share of the mass"
        )
        shown = table(("layer",), study.SHORT[1:], f"text: {name}", caption)
        for layer in layers:
            shown.add_row(*study.short(layer))
        console.print(shown)
    clusters = made.facts.get("calibration")
    if clusters is not None and clusters["kind"] == "scores":
        caption = "fraction of entries kept at each threshold, mean over layers"
        columns = tuple(f"{each['threshold']:g}" for each in clusters["kept"])
        shown = table(("variance predicted",), columns, "predicted scores", caption)
        shares = (f"{each['share']:.3f}" for each in clusters["kept"])
        shown.add_row(f"{clusters['r2']:.3f}", *shares)
        console.print(shown)
        console.say(f"predictors: {clusters['path']}")
    elif clusters is not None:
        shown = table(("share read",), MEASURES, f"clusters: {clusters['kind']}", "shares of 1")
        for row in clusters["read"]:
            shown.add_row(f"{row['share']:.4f}", *(f"{row[name]:.3f}" for name in MEASURES))
        console.print(shown)
        console.say(f"centres: {clusters['path']}")


@app.command()
def report(
    context: typer.Context,
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of them.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about runs: curves, trade-offs, heat maps.

    Includes the results of `analyze`, `compress` and `bench` in the run directories.

    Example: `mukv report runs/demo --out report.html`
    """
    launch.prepare()
    from mukv.cli.report import report as write

    hold_run(context, out)
    facts = write(runs, out)
    if as_json:
        output.print_json(facts)
        return
    if facts["left_out"]:
        output.warn(f"left out: {len(facts['left_out']):,}; the end of the page lists them")
    Console().say(f"page: {out}")
