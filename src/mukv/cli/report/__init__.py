"""Write one self-contained HTML page about finished runs (`mukv report`).

The page has training curves, quality against cache bytes, and the results of `analyze`, `compress`
and `bench` in each run directory. Runs share an axis of bits per byte only if they were trained on
the same text, and an axis of nats per token only if they also share a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mukv.cli.report.found import findings
from mukv.cli.report.pictures import curves, trade_off
from mukv.cli.report.told import Told, gather, same_text
from mukv.core.errors import telling_disk_errors
from mukv.core.names import even, shortened
from mukv.show.page import Page
from mukv.storage.files import temporary

COLUMNS = (
    *("run", "data", "tokenizer", "parameters", "cache bytes/token", "constant cache bytes"),
    *("step", "tokens seen", "training loss, nats/token (one batch)"),
    *("held-out loss, nats/token", "held-out bits/byte"),
)


def report(sources: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the page; return the numbers of its first table, its path, and what was left out.

    sources: run directories, or folders of run directories
    out: the HTML file

    Raises BadInput for a source that is not a run, or whose configuration can't be read. Unreadable
    runs in a folder of runs are left out.
    """
    runs, left_out = gather(sources)
    names = [shortened(run.name) for run in runs[:4]]
    page = Page("Runs: " + ", ".join(names) + (" ..." * (len(runs) > 4)))
    page.table(COLUMNS, _rows(runs))
    if any(step for run in runs for step in run.stale.values()):
        page.note("Held-out figures with a step were measured at that step, not at the last one.")
    groups = same_text(runs)
    if len(groups) > 1:
        page.text(
            f"These runs read {len(groups)} different texts. Their losses and bits per byte can't "
            "be compared: each text has its own section and axes."
        )
    with telling_disk_errors(out), temporary(out) as drawn:
        drawn.mkdir()
        for group in groups:
            if len(groups) > 1:
                page.heading(f"Runs on {group[0].data}")
            for draw in (curves, trade_off):
                path = drawn / "drawn.png"
                caption = draw(group, path)
                if caption:
                    page.picture(path, caption)
    for run in runs:
        left_out += [f"{run.name}: {why}" for why in run.left_out]
        left_out += findings(page, run.name, run.folder)
    if left_out:
        page.heading("What was left out")
        for why in left_out:
            page.note(why)
    page.save(out)
    told = [{"run": str(run.folder), **run.facts} for run in runs]
    return {"page": str(out), "runs": told, "left_out": left_out}


def _rows(runs: Sequence[Told]) -> list[list[str]]:
    def column(key: str) -> list[str]:
        values = even([run.facts[key] for run in runs])
        steps = [run.stale.get(key) for run in runs]
        return [v if s is None else f"{v} (step {s:,})" for v, s in zip(values, steps, strict=True)]

    keys = (
        *("parameters", "cache_bytes_per_token", "cache_bytes_constant", "step", "tokens", "loss"),
        *("validation_loss", "validation_bits_per_byte"),
    )
    columns = zip(*(column(key) for key in keys), strict=True)
    return [[r.name, r.data, r.tokenizer, *rest] for r, rest in zip(runs, columns, strict=True)]
