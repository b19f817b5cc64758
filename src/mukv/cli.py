"""The command `mukv`: subcommands that read as sentences.

Standard output is for results, one JSON object as the last line with `--json`; progress and errors
go to standard error. Exit status 0, 1 (failed) or 2 (bad input).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from mukv import launch, output
from mukv.core.errors import BadInput, Failed, unknown_name

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A JAX laboratory for transformers with a small memory.",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="For instance train.steps=50")
]
POLICIES = ("full",)


def main() -> NoReturn:
    """Run the command line; every error that we know ends in one clear line."""
    launch.restart_with_allocator()
    try:
        code = app(prog_name="mukv", standalone_mode=False)
    except (BadInput, Failed) as error:
        output.complain(str(error), error.status)
    except typer.Exit as exit:
        code = exit.exit_code
    except typer.Abort:
        code = 1
    except KeyboardInterrupt:
        output.complain("interrupted", 1)
    except Exception as error:
        # Wrong options: click knows best how to say it; where it showed the help it is silent.
        if hasattr(error, "format_message"):
            message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
            if message:
                output.complain(message, 2)
            raise SystemExit(2) from None
        if isinstance(error, OSError):
            output.complain(str(error), 1)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            output.complain(f"not enough memory ({str(error).splitlines()[0]})", 1)
        raise
    raise SystemExit(code or 0)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs, plot and table.")] = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A shorter demonstration.")] = False,
    as_json: Json = False,
) -> None:
    """Train small models that remember differently; show quality against cache bytes.

    Example: `mukv demo --fast`
    """
    launch.prepare()
    from mukv.demo import demonstrate

    facts = demonstrate(out, fast, Console(stderr=as_json))
    if as_json:
        output.print_json(facts)


@app.command()
def data(
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


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run directory.")],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Token ids: .npy, [token] or [row token].")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Window in tokens; default: as in training.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte of a model on a text.

    Example: `mukv eval runs/demo/mha --text README.md`
    """
    launch.prepare()
    from mukv import inputs, loaded

    if (text is None) == (tokens is None):
        raise BadInput("eval", "--text and --tokens", "exactly one of the two")
    speaker = loaded.load(model)
    if text is not None:
        rows = inputs.rows_of_text(speaker, text)
    else:
        assert tokens is not None
        rows = inputs.rows_of_ids(tokens)
    if length is not None and length < 1:
        raise BadInput("--length", length, "at least 1 token")
    found = speaker.evaluate(rows, length)
    facts = {
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
    }
    output.print_facts(facts, as_json)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run directory.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    token_ids: Annotated[str | None, typer.Option(help="Ids to continue, as 1,2,3.")] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    stop: Annotated[str | None, typer.Option(help="Ids that end the text, as 1,2.")] = None,
    copies: Annotated[int, typer.Option(help="Continuations, decoded together.")] = 1,
    cache: Annotated[str, typer.Option(help="Cache policy.")] = "full",
    as_json: Json = False,
) -> None:
    """Continue a text; reports speed and cache bytes.

    Example: `mukv generate runs/demo/mha --prompt "def main(" --max-tokens 64`
    """
    launch.prepare()
    from mukv import inputs, loaded
    from mukv.decode import Sampling

    if (prompt is None) == (token_ids is None):
        raise BadInput("generate", "--prompt and --token-ids", "exactly one of the two")
    if cache not in POLICIES:
        raise unknown_name("--cache", cache, POLICIES)
    if copies < 1:
        raise BadInput("--copies", copies, "at least 1")
    sampling = Sampling(temperature, top_k, top_p, seed)
    ends = inputs.ids(stop, "--stop") if stop else ()
    speaker = loaded.load(model)
    given = speaker.encode(prompt or "")
    if token_ids is not None:
        given = inputs.ids(token_ids, "--token-ids")
    stream = None
    if not as_json and copies == 1:
        stream = output.Stream(speaker.tokenizer, sys.stdout)
        shown = Text(str(given) if prompt is None else prompt, "dim")
        Console(soft_wrap=True).print(shown, end="")
    made = speaker.generate_ids(
        [given] * copies, max_tokens, sampling, ends, stream.show if stream else None
    )
    texts = [speaker.tokenizer.decode(row) for row in made.tokens]
    if as_json:
        facts = {
            "token_ids": made.tokens[0],
            "text": texts[0],
            "cache_bytes": made.cache_bytes,
            "prefill_seconds": made.prefill_seconds,
            "tokens_per_second": made.tokens_per_second,
        }
        if copies > 1:
            facts["all_token_ids"] = made.tokens
        output.print_json(facts)
        return
    if stream:
        stream.end()
    for number, text in enumerate(() if stream else texts):
        Console().print(f"[bold]--- {number}[/]")
        sys.stdout.write(text + "\n")
    Console(stderr=True).print(
        f"[dim]{made.tokens_per_second:,.0f} tokens/s, first token after "
        f"{made.prefill_seconds:.3f} s, cache {made.cache_bytes:,} bytes[/]"
    )


@app.command()
def describe(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A preset, a YAML file or a run directory.")
    ],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs, cache bytes and shardings; allocates nothing.

    Example: `mukv describe llama-3.1-70b`
    """
    launch.prepare()
    from mukv import runs
    from mukv.describe import describe as facts_of
    from mukv.describe import show

    run, _ = runs.resolve(source, overrides or [], None)
    facts = facts_of(run)
    if as_json:
        output.print_json(facts)
    else:
        show(facts, run, Console())
