"""Commands that make something: a demonstration, a token file, a trained model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mukv import launch, output
from mukv.cli.app import Json, Overrides, app, hold, hold_run


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for runs, plot and table.")] = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A shorter demonstration.")] = False,
    as_json: Json = False,
) -> None:
    """Train small models that remember differently; show quality against cache bytes.

    Example: `mukv demo --fast`
    """
    launch.prepare()
    from mukv.demo import demonstrate

    hold(context, out)
    facts = demonstrate(out, fast, Console(stderr=as_json))
    if as_json:
        output.print_json(facts)


@app.command()
def data(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files or folders (text, .jsonl, .parquet), `stdlib`, `package:NAME`, `hf:NAME`.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the token file.")],
    tokenizer: Annotated[
        str, typer.Option(help="`bytes`, `bpe:SIZE` (trained on the text) or a tokenizer.json.")
    ] = "bytes",
    field: Annotated[str, typer.Option(help="Name of the text in JSONL and Parquet.")] = "text",
    validation: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.05,
    invalid: Annotated[str, typer.Option(help="Text that is not UTF-8: strict, replace, skip.")] = (
        "strict"
    ),
    workers: Annotated[int | None, typer.Option(help="Threads; default: one per core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Turn texts into a token file to train on.

    Example: `mukv data stdlib --out data/stdlib`
    """
    from mukv.data.build import build_tokens, speed_meter
    from mukv.data.tokens import SPLITS

    hold_run(context, out)
    began = time.monotonic()
    with speed_meter("reading") as report:
        tokens = build_tokens(
            sources, out, tokenizer, field, validation, invalid, workers, overwrite, report
        )
    seconds = time.monotonic() - began
    facts = {
        "path": str(tokens.path),
        "tokens": sum(len(tokens.split(name).tokens) for name in SPLITS),
        "documents": sum(len(tokens.split(name).starts) for name in SPLITS),
        "bytes": tokens.bytes,
        "vocab_size": tokens.vocab_size,
        "fingerprint": tokens.fingerprint,
        "megabytes_per_second": tokens.bytes / seconds / 1e6,
    }
    output.print_facts(facts, as_json)


@app.command()
def train(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A preset, a YAML file, or a run to continue.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory; default: runs/NAME-HASH.")
    ] = None,
    distributed: Annotated[
        str | None, typer.Option(help="auto, or HOST:PORT,PROCESSES,NUMBER.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a model, or continue a run.

    Example: `mukv train tiny train.steps=200 train.learning_rate=1e-3`
    """
    from mukv import runs

    run, folder = runs.resolve(source, overrides or [], out)
    launch.prepare(run.mesh.size, distributed)
    outcome = runs.train(run, folder, title=folder.path.name)
    if not launch.speaks():
        return
    facts = runs.summary(outcome, folder)
    if as_json:
        output.print_json(facts)
        return
    console = Console()
    bits = outcome.validation_bits_per_byte
    console.print(
        f"step {outcome.step}  loss {outcome.loss:.4f}  "
        + (f"{bits:.4f} bits per byte  " if bits is not None else "")
        + f"{outcome.tokens_per_second:,.0f} tokens/s"
    )
    console.print(f"run: {folder.path}", highlight=False, soft_wrap=True)
    if not outcome.finished:
        console.print(f"to continue: mukv train {folder.path}", highlight=False, soft_wrap=True)
