"""The commands `mukv import`, `mukv export` and `mukv convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mukv.cli import launch
from mukv.cli.app import AllowNonfinite, Json, ModelName, app, hold_run
from mukv.core.errors import unknown_name
from mukv.show import output

TYPES = ("float32", "bfloat16", "float16")
TOKENS = 4096
"""Default number of calibration tokens: several times the width of a head, to fit its maps."""


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
    facts = import_model(source, out, allow_nonfinite)
    words = facts["tokenizer"]
    lines = {
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}, {facts['bytes']:,} bytes",
        "tokenizer": "none" if words is None else f"{words:,} tokens",
    }
    output.print_summary(facts, lines, f"run: {out}", as_json)


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
    lines = {
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}, {facts['dtype']}",
        "files": f"{facts['files']:,} of weights",
    }
    output.print_summary(facts, lines, f"folder: {out}", as_json)


@app.command()
def convert(
    context: typer.Context,
    model: ModelName,
    to: Annotated[
        str,
        typer.Option(
            help="gqa:N, mqa, shared_kv[:WIDTH], mla:RANK or reuse:N; options in parentheses, such "
            "as mla(rope=2):128."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run directory to make.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text files that it is fitted to; may be repeated. Default: what the model "
            "was trained on."
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="Number of tokens of the text that are read.")
    ] = TOKENS,
    as_json: Json = False,
) -> None:
    """Turn a grouped-query model into one with a smaller cache, as a start for more training.

    It has fewer KV heads, shared KV, latent attention, or layers that read the cache of others, and
    predicts worse than the model until it is trained again (`mukv train RUN`).

    Example: `mukv convert runs/llama-1b --to mla:128 --text README.md --out runs/llama-1b-mla`
    """
    launch.prepare()
    from mukv.runs.convert import convert_model
    from mukv.runs.describe import shown as number

    hold_run(context, out)
    facts = convert_model(model, to, out, text or (), calibration_tokens)
    read = facts["calibration_tokens"]
    entry, before = (number(facts[f"cache_bytes_per_token{when}"]) for when in ("", "_before"))
    lines = {
        "conversion": f"{to}, fitted to {read:,} tokens" if read else to,
        "parameters": f"{facts['parameters']:,}, before {facts['parameters_before']:,}",
        "cache": f"{entry} bytes per token and {facts['cache_bytes_constant']:,} bytes besides, "
        f"before {before} and {facts['cache_bytes_constant_before']:,}",
    }
    output.print_summary(facts, lines, f"run: {out}", as_json)
    if not as_json:
        output.warn(f"to train it again: mukv train {out} data.path=TEXT --out NEW")
