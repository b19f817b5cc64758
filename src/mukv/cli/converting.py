"""The commands `mukv import` and `mukv export`: from and to the format of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mukv.cli import launch
from mukv.cli.app import AllowNonfinite, Json, app, hold_run
from mukv.core.errors import unknown_name
from mukv.show import output

TYPES = ("float32", "bfloat16", "float16")


@app.command("import")
def import_(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of Hugging Face or Meta (consolidated.*.pth), a hub id or a GGUF file.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run directory to make.")],
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Convert a pretrained model to a run directory, which all other commands accept.

    Example: `mukv import meta-llama/Llama-3.2-1B --out runs/llama-1b`
    """
    launch.prepare()
    from mukv.runs.exchange import import_model

    hold_run(context, out)
    output.print_facts(import_model(source, out, allow_nonfinite), as_json)


@app.command()
def export(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Type of weights: {', '.join(TYPES)}; default: unchanged."),
    ] = None,
    allow_nonfinite: AllowNonfinite = False,
    as_json: Json = False,
) -> None:
    """Write a folder that transformers loads: weights, configuration and tokenizer.

    Example: `mukv export runs/NAME --out exported --dtype bfloat16`
    """
    launch.prepare()
    from mukv.runs import loaded
    from mukv.runs.exchange import export_model

    if dtype is not None and dtype not in TYPES:
        raise unknown_name("--dtype", dtype, TYPES)
    hold_run(context, out)
    model = loaded.load(run, allow_nonfinite=allow_nonfinite)
    facts = export_model(model, Path(run), out, dtype)
    output.print_facts(facts, as_json)
