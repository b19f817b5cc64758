"""Add the results of `analyze`, `compress` and `bench` in a run directory to a report."""

from __future__ import annotations

from pathlib import Path

from mukv.cli.report.foreign import LeftOut, read_picture, read_table
from mukv.show.page import Page

FINDINGS = {
    "analysis": "Attention weights",
    "compress": "Cache policies",
    "bench": "The long-context benchmark",
}
"""Folders in a run directory whose pictures and tables belong to its report."""
TABLES = {
    "compress": "Each policy and budget (a share up to 1, or a number of entries) and the full "
    "cache: perplexity, share of planted strings recalled, bytes per row, speed.",
    "sparsity": "By text, layer, head and context in tokens: entries that hold a share of the "
    "attention mass, mass and output error of the largest weights.",
    "curve": "Attention mass of the largest weights, by text, layer, head and context.",
    "agreement": "Overlap of the entries that two heads need: intersection over union.",
    "clusters": "How well clusters predict the entries that queries need, by layer, head and share "
    "of entries read.",
}
MOST_FILES = 200


def findings(page: Page, name: str, folder: Path) -> list[str]:
    """Add the pictures and short tables of a run directory to a page; return the files that were
    left out, with the reasons."""
    left_out: list[str] = []
    for kind, title in FINDINGS.items():
        pictures = sorted((folder / kind).glob("*.png"))
        tables = sorted((folder / kind).glob("*.csv"))
        if not pictures and not tables:
            continue
        page.heading(f"{title}: {name}")
        for path in [*tables, *pictures][:MOST_FILES]:
            try:
                if path.suffix == ".csv":
                    table = read_table(path)
                    page.table(table.columns, table.rows, TABLES.get(path.stem, path.name))
                else:
                    page.picture(*read_picture(path))
            except LeftOut as why:
                left_out.append(f"{name}: {kind}/{path.name}: {why}")
        for path in [*tables, *pictures][MOST_FILES:]:
            left_out.append(f"{name}: {kind}/{path.name}: one of over {MOST_FILES} files")
    return left_out
