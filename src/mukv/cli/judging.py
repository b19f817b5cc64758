"""The command `mukv compress`: measure quality, bytes and speed of cache policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mukv.cli import launch
from mukv.cli.app import Json, StoredAs, app, beside, exactly_one, hold, note_unused_budget, tell
from mukv.core.errors import BadInput
from mukv.core.names import even
from mukv.show import output
from mukv.show.terminal import Console, table

if TYPE_CHECKING:
    from mukv.compress import Result


@app.command()
def compress(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run directory.")],
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Token ids: .npy, [token] or [row token].")
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]...",
            help="Cache policies; the parts of one are joined by +, as in snapkv+int8,pages.",
        ),
    ] = "streaming,snapkv,int8",
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="B[,B]...",
            help="Budgets: shares of the entries up to 1, or numbers of entries; default: 0.25.",
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per row; default: as in training, at least 64.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows for perplexity and for recall.")] = 8,
    seed: Annotated[int, typer.Option(help="Random seed of the planted strings.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: `compress` in the run directory.")
    ] = None,
    weights: StoredAs = None,
    as_json: Json = False,
) -> None:
    """Compare cache policies with the full cache: quality, bytes and speed.

    The first three quarters of each row are prefilled and compressed by the policy; the rest is
    decoded token by token. Writes a table and a picture.

    Example: `mukv compress runs/demo/tiny-140 --text README.md --policy snapkv,pages --budget 0.25`
    """
    launch.prepare()
    from mukv import compress
    from mukv.runs import inputs, loaded, notes

    exactly_one("compress", text=text, tokens=tokens)
    policies = compress.grid(policy, numbers("0.25" if budget is None else budget))
    if budget is not None:
        note_unused_budget(policy)
    folder = out or beside(model, "compress")
    hold(context, folder)
    speaker = loaded.load(model, weights=weights)
    if length is None:
        length = max(inputs.window(speaker, None), compress.USUAL)
        length = min(length, speaker.network.context or length)
    length = inputs.window(speaker, length)
    tell(notes.of_length(length, speaker.run, "--length"))
    if text is not None:
        texts = inputs.rows_of_text(speaker, text)
    else:
        assert tokens is not None
        texts = inputs.rows_of_ids(tokens)
    rows = compress.rows_of(texts, length, samples, seed)
    inputs.check_ids(speaker, rows.tokens)
    console = Console(stderr=True)
    count, read = rows.tokens.shape
    console.say(f"{count:,} rows of {read:,} tokens", "dim")
    results = compress.judge(speaker, rows, policies)
    files = compress.write(results, folder, f"{Path(model).name}, rows of {read} tokens")
    if as_json:
        facts = {"rows": [asdict(each) for each in results], "length": read}
        output.print_json({**facts, "files": [str(path) for path in files]})
    else:
        show_results(results, Console())
        for path in files:
            Console().say(str(path))


def numbers(text: str) -> list[float]:
    """Parse numbers from "0.25,64". Raises BadInput for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadInput("--budget", text, "numbers separated by commas") from None


def show_results(results: Sequence[Result], console: Console) -> None:
    """Print a row for each policy and budget. Prefill seconds are shown as a multiple of those of
    the first row, the full cache."""
    capped = any(row.capped is not None for row in results)
    numbers = ("perplexity", "recall", "recall\naware", "cache\nbytes", "read\nbytes/step")
    speeds = ("decoding\ntokens/s", "prefill\nx full")
    shown = table(
        ("policy", "budget"), (*numbers, *speeds, *(["capped"] if capped else [])),
        caption="recall: share of planted strings; aware: question in the prefill; bytes: per row",
    )  # fmt: skip
    perplexities = even([row.perplexity for row in results])
    for row, perplexity in zip(results, perplexities, strict=True):
        shown.add_row(
            row.policy,
            # A budget up to 1 is a share, a larger one a number of entries.
            f"{row.budget:.1%}" if row.budget <= 1 else f"{row.budget:,.0f} entries",
            perplexity,
            f"{row.recall:.1%}",
            f"{row.recall_aware:.1%}",
            f"{row.cache_bytes:,}",
            f"{row.bytes_read_per_step:,}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.prefill_seconds / results[0].prefill_seconds:.2f}",
            *(["" if row.capped is None else f"{row.capped:.1%}"] if capped else []),
        )
    console.print(shown)
