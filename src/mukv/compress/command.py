"""Implement `mukv compress`: choose texts, compare policies, write results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mukv.compress.judge import Comparison, Result, judge
from mukv.compress.rows import USUAL, rows_of
from mukv.compress.table import write
from mukv.core.errors import BadInput
from mukv.runs import inputs
from mukv.runs.loaded import Model
from mukv.show.progress import say


@dataclass(frozen=True)
class CompressSettings:
    """Options of `mukv compress`. Raises BadInput for values out of range.

    text: a text file
    tokens: a .npy file of ids, instead of text
    compared: the policies
    samples: rows of text; None for as many as have 4,096 tokens in all, at most 8
    strings: planted strings; 0 leaves recall out
    seed: random seed of windows and strings
    """

    text: Path | None
    tokens: Path | None
    compared: Comparison
    samples: int | None
    strings: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise BadInput("--samples", self.samples, "at least 1")
        if self.strings < 0:
            raise BadInput("--strings", self.strings, "at least 0")
        if self.compared.aware and not self.strings:
            raise BadInput("--aware", "--strings 0", "at least one planted string")


@dataclass(frozen=True)
class Compressed:
    """Results of a comparison. length: tokens per row. files: what was written."""

    results: list[Result]
    length: int
    files: list[Path]


def usual_length(model: Model) -> int:
    """Return the default number of tokens per row: as in training, but at least USUAL."""
    length = max(inputs.window(model, None), USUAL)
    return min(length, model.network.context or length)


def compress(
    model: Model, name: str, length: int, settings: CompressSettings, folder: Path
) -> Compressed:
    """Compare policies, and write a table and a figure into a folder.

    name: of the model, for the figure. length: tokens per row.

    Raises BadInput for texts that are too short, for ids that the model does not have, and for
    policies that do not fit.
    """
    if settings.text is not None:
        texts = inputs.rows_of_text(model, settings.text)
    else:
        assert settings.tokens is not None
        texts = inputs.rows_of_ids(settings.tokens)
    rows = rows_of(texts, length, settings.samples, settings.strings, settings.seed)
    for read in (rows.text, rows.planted):
        if read.size:
            inputs.check_ids(model, read)
    planted = f", {rows.asked} strings planted in {len(rows.planted)} more" if rows.asked else ""
    say(f"{len(rows.text):,} rows of {rows.length:,} tokens{planted}")
    results = judge(model, rows, settings.compared, folder)
    files = write(results, folder, f"{name}, rows of {rows.length} tokens")
    return Compressed(results, rows.length, files)
