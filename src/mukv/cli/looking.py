"""Commands that look into a model, and that gather what others have found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mukv import launch, output
from mukv.cli.app import Json, ModelName, app
from mukv.core.errors import BadInput

SAMPLES = 32


@app.command()
def analyze(
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
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: `analysis` in the run directory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Who reads what: how few entries the queries of each layer and head need.

    Without a text: the held-out part of what the model was trained on. Writes tables, pictures and
    a page.

    Example: `mukv analyze runs/demo/tiny-140 --text README.md --text setup.py --length 256`
    """
    launch.prepare()
    from mukv import inputs, loaded
    from mukv.analysis import study
    from mukv.analysis.samples import held_out, windows
    from mukv.model import Decoder

    if samples < 1:
        raise BadInput("--samples", samples, "at least 1")
    if text and tokens:
        raise BadInput("analyze", "--text and --tokens", "one of the two")
    speaker = loaded.load(model)
    length = inputs.window(speaker, length)
    if text:
        rows = {path.stem: inputs.rows_of_text(speaker, path) for path in text}
        texts = {name: windows(name, each, length, samples) for name, each in rows.items()}
    elif tokens is not None:
        texts = {tokens.stem: windows(tokens.stem, inputs.rows_of_ids(tokens), length, samples)}
    else:
        texts = {"validation": held_out(inputs.corpus(speaker), length, samples)}
    for rows in texts.values():
        inputs.check_ids(speaker, rows.tokens)
    if not isinstance(speaker.decoder, Decoder):
        raise BadInput("MODEL", speaker.decoder.kind, "a model of kind decoder")
    found = study.look(speaker.decoder, speaker.scaled, texts, speaker.run.train.compute)
    folder = out or Path(model) / "analysis"
    about = {
        "model": model,
        "window": f"{length} tokens",
        "tokens": ", ".join(f"{name} {rows.tokens.size:,}" for name, rows in texts.items()),
    }
    page = study.write(found, folder, f"Who reads what: {Path(model).name}", about)
    page.save(folder / "analysis.html")
    if as_json:
        output.print_json({**study.facts(found), "out": str(folder)})
        return
    console = Console()
    for name, layers in found.items():
        caption = "entries that hold a share of the mass; the largest tenth's mass and output error"
        table = Table(*study.SHORT, title=name, caption=caption, box=None)
        for layer in layers:
            table.add_row(*study.short(layer))
        console.print(table)
    console.print(f"page: {folder / 'analysis.html'}", highlight=False, soft_wrap=True)
