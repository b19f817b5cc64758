"""Measure a model on texts, and write the results as CSV tables, pictures and an HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mukv.analysis import plots, samples
from mukv.analysis.capture import CapturedRows, batch_rows
from mukv.analysis.clusters import MEASURES, READS, Prediction
from mukv.analysis.scores import THRESHOLDS, Predicted
from mukv.analysis.sparsity import MASSES, PARTS, SHARES, Sparsity, measure
from mukv.cache.centres import Centres
from mukv.core.compute import Compute
from mukv.core.names import distinct, printable
from mukv.model.decoder import Decoder
from mukv.show.page import Page
from mukv.show.progress import Bar
from mukv.storage.files import write_atomic

LONGEST = 80
"""Maximum number of characters of a text's name in a file name; file systems allow 255 bytes."""
Found = Mapping[str, Sequence[Sparsity]]
"""Measures of each layer, by name of the text."""


def look(
    model: Decoder, weights: Any, texts: Mapping[str, CapturedRows], compute: Compute | None = None
) -> dict[str, list[Sparsity]]:
    """Measure the attention sparsity of a model on windows of each text, with a progress bar.

    weights: stacked and scaled
    texts: rows by name

    Raises BadInput for layers whose attention has other stores than one entry per token.
    """
    found: dict[str, list[Sparsity]] = {}
    total = sum(len(rows.tokens) for rows in texts.values())
    with Bar("measuring", total) as bar:
        done = 0
        for name, rows in texts.items():
            length = rows.tokens.shape[1]

            def shown(
                rows: CapturedRows = rows, length: int = length, name: str = name
            ) -> Iterable[CapturedRows]:
                nonlocal done
                for batch in samples.batched(rows, batch_rows(model, length)):
                    yield batch
                    done = min(done + len(batch.tokens), total)
                    bar.show(done, {"text": name})

            found[name] = measure(model, weights, shown(), length, compute)
    return found


def write(found: Found, out: Path, title: str, about: Mapping[str, str]) -> Page:
    """Write tables and pictures into a folder; return the page that shows them, not yet saved."""
    for name, rows in tables(found).items():
        write_atomic(out / f"{name}.csv", csv_text(rows))
    page = Page(title)
    page.table(("", ""), about.items())
    if len(found) > 1:
        page.heading("Comparison of texts")
        page.picture(out / "texts.png", plots.texts(found, out / "texts.png"))
    files = distinct((name.replace("/", "-") for name in found), LONGEST)
    for short, (name, layers) in zip(files, found.items(), strict=True):
        prefix = f"{short}-" if len(found) > 1 else ""
        page.heading(f"Text: {name}")
        page.table(COLUMNS, (summary(layer) for layer in layers))
        for draw in (plots.heads, plots.curves, plots.needed, plots.errors, plots.agreement):
            path = out / f"{prefix}{draw.__name__}.png"
            page.picture(path, draw(layers, path))
    return page


def write_clusters(
    found: Sequence[Prediction], centres: Centres, out: Path, page: Page
) -> dict[str, Any]:
    """Write the table and picture of how well centres predict the entries that queries need. Adds
    them to the page; returns the fields that `--json` prints."""
    rows = [
        {"layer": layer.layer, "head": head, "read": share}
        | {name: float(getattr(layer, name)[head, place]) for name in MEASURES}
        for layer in found
        for head in range(len(layer.captured))
        for place, share in enumerate(READS)
    ]
    write_atomic(out / "clusters.csv", csv_text(rows))
    when = "after" if centres.rotated else "before"
    page.heading(f"{centres.clusters} clusters per head: {centres.kind}, {when} rotation")
    means = [
        {
            name: float(np.mean([getattr(x, name)[:, place].mean() for x in found]))
            for name in MEASURES
        }
        for place in range(len(READS))
    ]
    page.table(
        ("read", *MEASURES),
        (
            (f"1/{round(1 / share)}", *(f"{row[name]:.3f}" for name in MEASURES))
            for share, row in zip(READS, means, strict=True)
        ),
    )
    page.picture(out / "clusters.png", plots.clusters(found, out / "clusters.png"))
    return {
        "kind": centres.kind,
        "rotated": centres.rotated,
        "clusters": centres.clusters,
        "largest_cluster": float(np.mean([layer.sizes[:, 0].mean() for layer in found])),
        "read": [{"share": share, **row} for share, row in zip(READS, means, strict=True)],
    }


def write_scores(found: Sequence[Predicted], out: Path, page: Page) -> dict[str, Any]:
    """Write the table of how well scores are predicted, and add it to the page; return the fields
    that `--json` prints."""
    names = [f"kept at {least:g}" for least in THRESHOLDS]
    rows = [
        {"layer": each.layer, "r2": each.r2, **dict(zip(names, each.kept, strict=True))}
        for each in found
    ]
    write_atomic(out / "scores.csv", csv_text(rows))
    page.heading("Predicted scores")
    page.table(
        ("layer", "variance predicted", *names),
        ((row["layer"], *(f"{row[name]:.3f}" for name in ("r2", *names))) for row in rows),
    )
    means = np.mean([each.kept for each in found], axis=0).tolist()
    return {
        "kind": "scores",
        "r2": float(np.mean([each.r2 for each in found])),
        "kept": [
            {"threshold": least, "share": share}
            for least, share in zip(THRESHOLDS, means, strict=True)
        ],
        "layers": [{"layer": each.layer, "r2": each.r2} for each in found],
    }


COLUMNS = (
    "layer",
    *(f"entries for {mass:.3g}" for mass in MASSES),
    *(f"mass of top {share:.0%}" for share in SHARES),
    *(f"error at top {share:.0%}" for share in SHARES),
    *PARTS,
    "most-read entry",
    "its mass",
)
SHORT = (
    *("layer", "entries\nfor 80 %", "entries\nfor 95 %", "mass of\ntop 10 %", "error at\ntop 10 %"),
    *("mass on\nsinks", "mean\ndistance", "most-read\nentry", "its\nmass"),
)
"""Columns of the table in the terminal; sinks and most-read are defined in `sparsity`."""


def summary(layer: Sparsity) -> list[str]:
    """Format the means over heads at the longest context: one cell for each of COLUMNS."""
    last = layer.longest
    needed = [f"{value:.1f}" for value in layer.needed["mean"][:, last].mean(axis=0)]
    top = [f"{value:.3f}" for value in layer.top[:, last].mean(axis=0)]
    error = [f"{value:.3f}" for value in layer.error[:, last].mean(axis=0)]
    forms = {"distance": ",.1f"}
    parts = [f"{getattr(layer, n)[:, last].mean():{forms.get(n, '.3f')}}" for n in PARTS]
    entry = layer.most_read[-1]
    return [
        f"{layer.layer}", *needed, *top, *error, *parts, f"{entry.position}", f"{entry.share:.3f}"
    ]  # fmt: skip


def short(layer: Sparsity) -> list[str]:
    """Return the cells of `summary` that the table in the terminal shows: one for each of SHORT."""
    shown = dict(zip(COLUMNS, summary(layer), strict=True))
    first = ("layer", "entries for 0.8", "entries for 0.95", "mass of top 10%", "error at top 10%")
    return [shown[name] for name in (*first, "sinks", "distance", "most-read entry", "its mass")]


def facts(found: Found) -> dict[str, Any]:
    """Return the object that `--json` prints: means over heads at the longest context, by text."""

    def of(layer: Sparsity) -> dict[str, Any]:
        last = layer.longest

        def by(keys: Sequence[float], x: np.ndarray) -> dict[str, float]:
            means = x[:, last].mean(axis=0)
            return {f"{key:g}": float(value) for key, value in zip(keys, means, strict=True)}

        off = layer.agreement[~np.eye(len(layer.agreement), dtype=bool)]
        return {
            "layer": layer.layer,
            "context": 2**last,
            "needed": by(MASSES, layer.needed["mean"]),
            "top": by(SHARES, layer.top),
            "error": by(SHARES, layer.error),
            "error_renormalised": by(SHARES, layer.renormalised),
            **{name: float(getattr(layer, name)[:, last].mean()) for name in PARTS},
            "far_from_mean": float(layer.far_from_mean[:, last].mean()),
            "agreement": float(off.mean()) if off.size else 1.0,
            "most_read": layer.most_read[-1]._asdict(),
            "most_read_by_head": [each._asdict() for each in layer.most_read[:-1]],
        }

    return {name: [of(layer) for layer in layers] for name, layers in found.items()}


def tables(found: Found) -> dict[str, list[dict[str, Any]]]:
    """Return all measures as rows of tables, by file name without suffix."""
    by_context: list[dict[str, Any]] = []
    curve: list[dict[str, Any]] = []
    agreement: list[dict[str, Any]] = []
    most_read: list[dict[str, Any]] = []
    for text, layers in found.items():
        for layer in layers:
            for head, row in enumerate(layer.agreement):
                where = {"text": text, "layer": layer.layer, "head": head}
                entry = layer.most_read[head]._asdict()
                most_read.append({**where, **entry, "sinks": layer.sinks[head, layer.longest]})
                agreement += [
                    {**where, "other": other, "share": share} for other, share in enumerate(row)
                ]
                for octave in np.flatnonzero(layer.queries):
                    here = {**where, "context": 2**octave}
                    by_context.append({**here, **_numbers(layer, head, int(octave))})
                    for place, rank in enumerate(layer.ranks):
                        ends = {
                            name: layer.curve[end][head, octave, place]
                            for name, end in (("mean", "mean"), ("worst", "low"), ("best", "high"))
                        }
                        curve.append({**here, "largest": int(rank), **ends})
    return {
        "sparsity": by_context, "curve": curve, "agreement": agreement, "most_read": most_read
    }  # fmt: skip


def _numbers(layer: Sparsity, head: int, octave: int) -> dict[str, float]:
    numbers: dict[str, float] = {"queries": layer.queries[octave]}
    for place, mass in enumerate(MASSES):
        for name, end in (("", "mean"), ("_best", "low"), ("_worst", "high")):
            numbers[f"needed_{mass:g}{name}"] = layer.needed[end][head, octave, place]
    for place, share in enumerate(SHARES):
        numbers[f"top_{share:g}"] = layer.top[head, octave, place]
        numbers[f"error_{share:g}"] = layer.error[head, octave, place]
        numbers[f"error_renormalised_{share:g}"] = layer.renormalised[head, octave, place]
    for name in (*PARTS, "far_from_mean"):
        numbers[name] = getattr(layer, name)[head, octave]
    return numbers


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header line; numbers have six significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(value) if isinstance(value, str) else value
