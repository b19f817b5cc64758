"""The command `mukv compress`: measure quality, bytes and speed of cache policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.measure import Measurement
from rich.table import Table

from mukv.cli import launch
from mukv.cli.app import (
    ComputeType,
    Json,
    ModelName,
    StoredAs,
    app,
    beside,
    exactly_one,
    hold,
    note_unused_budget,
    tell,
)
from mukv.core.errors import BadInput
from mukv.core.names import even
from mukv.show import output
from mukv.show.terminal import Console, table

if TYPE_CHECKING:
    from mukv.compress import Result

DEFAULT_STRINGS, SURE_POINTS = 96, 10.0
"""Planted strings by default, and half the widest 95 % interval of recall that they may have, in
points.
"""
Columns = list[tuple[str, list[str]]]
"""Headers and the cells below them."""


@app.command()
def compress(
    context: typer.Context,
    model: ModelName,
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
            help="Budgets: fractions (at most 1) of the tokens read so far, or numbers of entries "
            "(above 1) per KV head; default: 0.25.",
        ),
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            metavar="B[,B]...",
            help="Fractions of the full cache's bytes: each policy gets the largest budget with "
            "which its cache takes no more.",
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens per row; default: as in training, at least 64.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Number of rows of text; default: 8, or 4096 / length if that is less."),
    ] = None,
    strings: Annotated[
        int, typer.Option(help="Number of planted strings, for recall; 0 leaves recall out.")
    ] = DEFAULT_STRINGS,
    aware: Annotated[
        bool,
        typer.Option("--aware", help="Also measure recall when the policy has seen the question."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed of rows and planted strings.")] = 0,
    compute: ComputeType = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure again what is stored in the folder.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: `compress` in the run directory.")
    ] = None,
    weights: StoredAs = None,
    as_json: Json = False,
) -> None:
    """Compare cache policies with the full cache: quality, bytes and speed.

    The first three quarters of each row are prefilled and compressed by the policy; the rest is
    predicted. Writes a table and a picture. What is measured is stored at once: after a stop, the
    same command continues.

    Example: `mukv compress runs/demo/tiny-mha-120 --text README.md --policy snapkv,pages:0.25`
    """
    launch.prepare()
    from mukv.cache import Policy
    from mukv.cache.words import split
    from mukv.compress import Comparison, CompressSettings
    from mukv.compress import command as work
    from mukv.runs import inputs, loaded, notes
    from mukv.runs.located import locate

    exactly_one("compress", text=text, tokens=tokens)
    budgets, bytes_kept = numbers(budget, "--budget"), numbers(shares, "--bytes")
    compared = Comparison(policy, budgets, bytes_kept, aware, again)
    settings = CompressSettings(text, tokens, compared, samples, strings, seed)
    note_unused(policy, budget, shares)
    folder = out or beside(model, "compress")
    hold(context, folder)
    found = locate(model)
    for name in split(policy, ","):
        found.check_policy(Policy.parse(name, 1.0, "--policy"))
    speaker = loaded.load(found, weights=weights).computing(compute, "--compute")
    length = inputs.window(speaker, work.usual_length(speaker) if length is None else length)
    tell(notes.of_length(length, speaker.run, "--length"))
    made = work.compress(speaker, Path(model).name, length, settings, folder)
    if as_json:
        facts = {"rows": [asdict(each) for each in made.results], "length": made.length}
        output.print_json({**facts, "files": [str(path) for path in made.files]})
    else:
        show_results(made.results, Console())
        for path in made.files:
            Console().say(str(path))


def numbers(text: str | None, where: str) -> tuple[float, ...]:
    """Parse numbers from "0.25,64"; None gives none. Raises BadInput for anything else."""
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(where, text, "numbers separated by commas") from None


def note_unused(policies: str, budget: str | None, shares: str | None) -> None:
    """Warn of the policies to which a given budget means nothing."""
    if budget is not None:
        note_unused_budget(policies)
    if shares is not None:
        from mukv.cache.words import split
        from mukv.compress.candidates import fits_bytes

        if fixed := [name for name in split(policies, ",") if not fits_bytes(name)]:
            output.warn(f"--bytes means nothing to {', '.join(fixed)}: they keep all entries")


def show_results(results: Sequence[Result], console: Console) -> None:
    """Print a row for each policy and budget; sizes and speeds also as multiples of those of the
    full cache. A console that is too narrow gets two tables, of quality and of speed.
    """
    full = results[0]
    quality: Columns = [
        ("bytes\nof full", [f"{row.bytes_of_full:.2f}" for row in results]),
        ("perplexity", even([row.perplexity for row in results])),
        ("recall", [_recall(row) for row in results]),
        ("recall\naware", [_percent(row.recall_aware) for row in results]),
        ("cache\nbytes", [f"{row.cache_bytes:,}" for row in results]),
    ]
    prefill = [f"{row.prefill_seconds / full.prefill_seconds:.2f}" for row in results]
    speed: Columns = [
        ("read\nbytes/step", [f"{row.bytes_read_per_step:,}" for row in results]),
        ("read\nof full", [f"{row.read_of_full:.2f}" for row in results]),
        ("decoding\ntokens/s", [f"{row.tokens_per_second:,.0f}" for row in results]),
        ("decoding\nx full", [f"{row.decoding_of_full:.2f}" for row in results]),
        ("prefill\nx full", prefill),
        ("capped", [_percent(row.capped) for row in results]),
        ("kept", [_percent(row.kept) for row in results]),
    ]
    caption = "bytes: of one row; equal budgets are not equal bytes (--bytes)"
    if full.recall is not None:
        caption = f"recall: share of {full.strings} planted strings, 95 % interval; {caption}"
    shown = [_table(results, [*quality, *speed], caption)]
    unlimited = console.options.update(width=1000)
    if Measurement.get(console, unlimited, shown[0]).maximum > console.width:
        shown = [_table(results, quality, caption), _table(results, speed)]
    for each in shown:
        console.print(each)
    wide = [row for row in results if row.recall is not None and _half(row) > SURE_POINTS]
    if wide:
        reach = max(map(_half, wide))
        output.warn(
            f"{full.strings} planted strings are too few to tell recall to "
            f"{SURE_POINTS:.0f} points: it may be {reach:.0f} points higher or lower; "
            f"--strings {DEFAULT_STRINGS} is enough"
        )


def _table(results: Sequence[Result], columns: Columns, caption: str | None = None) -> Table:
    """Make a table of the columns that have a cell with text."""
    used = [(name, cells) for name, cells in columns if any(cells)]
    made = table(("policy", "budget"), [name for name, _ in used], caption=caption)
    for row, *cells in zip(results, *(cells for _, cells in used), strict=True):
        # A budget up to 1 is a share, a larger one a number of entries.
        budget = f"{row.budget:.1%}" if row.budget <= 1 else f"{row.budget:,.0f} entries"
        made.add_row(row.policy, budget, *cells)
    return made


def _recall(row: Result) -> str:
    """Format recall with its interval: "50.0% (41-60)"; "" without recall."""
    if row.recall is None or row.recall_low is None or row.recall_high is None:
        return ""
    return f"{row.recall:.1%} ({100 * row.recall_low:.0f}-{100 * row.recall_high:.0f})"


def _half(row: Result) -> float:
    """Return half the width of the interval of recall, in points."""
    assert row.recall_low is not None
    assert row.recall_high is not None
    return 50 * (row.recall_high - row.recall_low)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
