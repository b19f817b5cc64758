"""Commands that look into a model, and that gather what others have found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mukv.cli import launch
from mukv.cli.app import Json, ModelName, app, hold, hold_run, tell
from mukv.core.errors import BadInput, unknown_name
from mukv.show import output
from mukv.show.terminal import Console, table

SAMPLES = 32


@app.command()
def analyze(
    context: typer.Context,
    model: ModelName,
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 text files, side by side; may be repeated.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Token ids: .npy, [token] or [row token].")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Window in tokens; default: as in training.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of each text.")] = SAMPLES,
    calibrate: Annotated[
        str | None,
        typer.Option(help="Cluster keys, queries, means or aligned; saved beside the model."),
    ] = None,
    clusters: Annotated[int, typer.Option(help="Clusters of each head.")] = 64,
    before_rotation: Annotated[
        bool, typer.Option("--before-rotation", help="Cluster what positions have not turned yet.")
    ] = False,
    calibration_tokens: Annotated[
        int, typer.Option(help="Tokens of the training text that are clustered.")
    ] = 1 << 16,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: `analysis` in the run directory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Who reads what: how few entries the queries of each layer and head need.

    Without a text: the held-out part of what the model was trained on. Writes tables, pictures and
    a page. Of given texts, every second window is clustered and the others judge the clusters.

    Example: `mukv analyze runs/demo/tiny-140 --text README.md --text setup.py --length 256`
    """
    launch.prepare()
    from mukv.analysis import calibrate as calibration
    from mukv.analysis import samples as pieces
    from mukv.analysis import study
    from mukv.analysis.capture import batch_rows
    from mukv.analysis.clusters import MEASURES, judge
    from mukv.cache.centres import KINDS
    from mukv.model import Decoder
    from mukv.runs import inputs, loaded, notes

    if samples < 1:
        raise BadInput("--samples", samples, "at least 1")
    if text and tokens:
        raise BadInput("analyze", "--text and --tokens", "one of the two")
    if calibrate is not None and calibrate not in KINDS:
        raise unknown_name("--calibrate", calibrate, KINDS)
    beside = Path(model) if Path(model).is_dir() else None
    folder = out or (beside or Path("runs") / Path(model).name) / "analysis"
    hold(context, folder, *([beside] if beside and calibrate is not None else []))
    speaker = loaded.load(model)
    length = inputs.window(speaker, length)
    tell(notes.of_length(length, speaker.run, "--length"))
    if text:
        names = names_of(text)
        rows = {n: inputs.rows_of_text(speaker, p) for n, p in zip(names, text, strict=True)}
        texts = {name: pieces.windows(name, each, length, samples) for name, each in rows.items()}
    elif tokens is not None:
        given = inputs.rows_of_ids(tokens)
        texts = {tokens.stem: pieces.windows(tokens.stem, given, length, samples)}
    else:
        texts = {"validation": pieces.held_out(inputs.corpus(speaker), length, samples)}
    for each in texts.values():
        inputs.check_ids(speaker, each.tokens)
    to_cluster = to_judge = pieces.joined(texts.values())
    if calibrate is not None:
        if text or tokens:
            to_cluster, to_judge = pieces.halves(to_judge)
        else:
            count = -(-calibration_tokens // length)
            to_cluster = pieces.from_training(inputs.corpus(speaker), length, count)
        calibration.check(clusters, to_cluster.tokens.size)
    decoder, compute = speaker.network, speaker.run.train.compute
    if not isinstance(decoder, Decoder):
        raise BadInput("MODEL", decoder.kind, "a model of kind decoder")
    found = study.look(decoder, speaker.scaled, texts, compute)
    about = {
        "model": model,
        "window": f"{length} tokens",
        "tokens": ", ".join(f"{name} {each.tokens.size:,}" for name, each in texts.items()),
    }
    page = study.write(found, folder, f"Who reads what: {Path(model).name}", about)
    facts = {"texts": study.facts(found), "out": str(folder)}
    if calibrate is not None:
        size = batch_rows(decoder, length)
        centres = calibration.calibrate(
            decoder,
            speaker.weights,
            pieces.even(to_cluster, size),
            calibrate,
            clusters,
            not before_rotation,
            compute=compute,
        )
        batches = pieces.batched(to_judge, size)
        predicted = judge(decoder, speaker.scaled, centres, batches, compute)
        saved = centres.save(beside or folder)
        facts["calibration"] = {
            **study.write_clusters(predicted, centres, folder, page),
            "path": str(saved),
        }
    page.save(folder / "analysis.html")
    if as_json:
        output.print_json(facts)
        return
    console = Console()
    for name, layers in found.items():
        caption = (
            "entries that hold a share of the mass; mass of the largest tenth of the weights, and "
            "relative error of the output with them alone; distance: in tokens"
        )
        shown = table(("layer",), study.SHORT[1:], f"text: {name}", caption)
        for layer in layers:
            shown.add_row(*study.short(layer))
        console.print(shown)
    if calibrate is not None:
        shown = table(("share read",), MEASURES, f"clusters: {calibrate}", "shares of 1")
        for row in facts["calibration"]["read"]:
            shown.add_row(f"{row['share']:.4f}", *(f"{row[name]:.3f}" for name in MEASURES))
        console.print(shown)
        console.say(f"centres: {facts['calibration']['path']}")
        if not speaker.by_head:
            output.warn("cache policies don't use them: entries are one set for all heads")
    console.say(f"page: {folder / 'analysis.html'}")


def names_of(paths: Sequence[Path]) -> list[str]:
    """What texts are called: their file names, and whole paths where those are alike."""
    stems = [path.stem for path in paths]
    return [s if stems.count(s) == 1 else str(p) for s, p in zip(stems, paths, strict=True)]


@app.command()
def report(
    context: typer.Context,
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of some.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """One page about runs that needs nothing else: curves, trade-offs, heat maps.

    Shows what `analyze`, `compress` and `bench` have left in the run directories.

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
        output.warn(f"left out: {len(facts['left_out']):,}; the page ends with what, and why")
    Console().say(f"page: {out}")
