"""What `analyze`, `compress` and `bench` have left in a run directory."""

from __future__ import annotations

from pathlib import Path

from mukv.cli.report.foreign import LeftOut, read_picture, read_table
from mukv.show.page import Page

FINDINGS = {
    "analysis": "Who reads what",
    "compress": "Cache policies",
    "bench": "The long-context benchmark",
}
"""Folders in a run directory whose pictures and tables belong to its report."""
TABLES = {
    "compress": "Each policy and budget (a share up to 1, or a number of entries) beside the full "
    "cache: perplexity, shares of planted strings recalled, bytes of one row, speed.",
    "sparsity": "By text, layer, head and context in tokens: entries that hold a share of the "
    "attention mass, mass and output error of the largest weights.",
    "curve": "Attention mass of the largest weights, by text, layer, head and context.",
    "agreement": "Share of needed entries that two heads have in common.",
    "clusters": "What clusters predict of the entries that are needed, by layer, head and share "
    "of entries read.",
}
MOST_FILES = 200


def findings(page: Page, name: str, folder: Path) -> list[str]:
    """Add pictures and short tables to a page; returns what was left out, with the reasons."""
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
