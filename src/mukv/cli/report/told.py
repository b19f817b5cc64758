"""Read the configuration, data and metrics of run directories for a report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mukv.cli.report.foreign import LeftOut, read_bytes
from mukv.core.errors import BadInput, nearest_name
from mukv.core.names import shortened
from mukv.data.tokens import SPLITS, open_tokens
from mukv.runs.config import Run
from mukv.runs.describe import describe
from mukv.runs.folder import RunDirectory
from mukv.train.metrics import read_metrics

HELD_OUT = ("validation_loss", "validation_bits_per_byte")
LOGGED = ("loss", *HELD_OUT)
SIZES = ("parameters", "cache_bytes_per_token", "cache_bytes_constant")
COMPARED = 1 << 16
"""Two texts count as the same if these first bytes of each split and its length are equal."""
HIGHEST = 1e12
"""Largest loss that curves show; with larger values the axis would flatten all others."""
MOST_COMPLAINTS = 3


@dataclass(frozen=True)
class Told:
    """The numbers of one run.

    name: name on the page
    folder: the run directory
    facts: last values of the numbers, by name
    curves: logged numbers, by name and step
    data, tokenizer: names on the page
    text: key that runs share if they were trained on the same text
    tokens: key that runs share if they were trained on the same tokens
    held_out: number of tokens on which the run was evaluated; None for the whole split
    stale: step of each held-out number that was not measured at the last step
    left_out: files and lines that could not be read, each with the reason
    """

    name: str
    folder: Path
    facts: dict[str, Any]
    curves: dict[str, dict[int, float]]
    data: str = ""
    tokenizer: str = ""
    text: str = ""
    tokens: str = ""
    held_out: int | None = None
    stale: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def gather(sources: Sequence[Path]) -> tuple[list[Told], list[str]]:
    """Read the run directories among the sources, and those in folders, each once. Return the runs,
    and the names of runs that were left out, with the reasons.

    Raises BadInput for a source that is neither a run directory nor a folder of them, and for a
    source that is a run directory that can't be read.
    """
    folders: dict[Path, bool] = {}
    for source in sources:
        inside = [path.parent for path in sorted(source.glob("*/config.yaml")) if path.is_file()]
        itself = RunDirectory(source).exists
        found = [source] if itself else inside
        if not found:
            siblings = [path.parent.name for path in source.parent.glob("*/config.yaml")]
            near = nearest_name(source.name, siblings)
            nearest = str(source.parent / near) if near else None
            raise BadInput("RUN", str(source), "a run directory, or a folder of them", nearest)
        for folder in found:
            named = folders.get(folder.resolve(), False)
            folders[folder.resolve()] = named or itself
    names = [folder.name for folder in folders]
    runs: list[Told] = []
    left_out: list[str] = []
    refused: BadInput | None = None
    for folder, named in folders.items():
        try:
            alone = names.count(folder.name) == 1
            runs.append(told(folder, folder.name if alone else str(folder)))
        except BadInput as error:
            if named:
                raise
            refused = error
            left_out.append(f"{folder}: {shortened(error, 300)}")
    if refused and not runs:
        raise refused
    return runs, left_out


def same_text(runs: Sequence[Told]) -> list[list[Told]]:
    """Group runs by the text that they were trained on."""
    groups: dict[str, list[Told]] = {}
    for run in runs:
        groups.setdefault(run.text, []).append(run)
    return list(groups.values())


def told(folder: Path, name: str) -> Told:
    """Read a run directory.

    name: name on the page

    Raises BadInput for a damaged configuration.
    """
    directory, left_out = RunDirectory(folder), list[str]()
    run = directory.load_config()
    described = describe(run)
    curves: dict[str, dict[int, float]] = {key: {} for key in LOGGED}
    last: dict[str, Any] = {}
    at: dict[str, int] = {}
    lines: list[tuple[int, str]] = []
    for record in read_metrics(directory.metrics, lambda *line: lines.append(line)):
        for key in [key for key in LOGGED if abs(record.get(key, 0)) > HIGHEST]:
            lines.append((record["step"], f"{key} of over {HIGHEST:g} at this step"))
            del record[key]
        last |= record
        for key in LOGGED:
            if key in record:
                curves[key][record["step"]] = record[key]
                at[key] = record["step"]
    left_out += [f"metrics.jsonl, line {line}: {why}" for line, why in lines[:MOST_COMPLAINTS]]
    if len(lines) > MOST_COMPLAINTS:
        left_out.append(f"metrics.jsonl: {len(lines) - MOST_COMPLAINTS:,} more lines")
    step = last.get("step")
    facts = {key: last.get(key) for key in ("step", *LOGGED, "tokens_per_second")}
    facts |= {key: described[key] for key in SIZES}
    facts["tokens"] = None if step is None else step * run.train.batch * run.train.length
    fingerprint = _fingerprint(folder)
    tokenizer, stamp = _tokenizer(directory.tokenizer)
    facts |= {"data_fingerprint": fingerprint, "tokenizer_fingerprint": stamp}
    alone = f"only {folder}"
    judged = run.train.validation_batches
    return Told(
        name,
        folder,
        facts,
        curves,
        data=_data(run, fingerprint),
        tokenizer=tokenizer,
        text=alone if fingerprint is None else _text(run, fingerprint) or fingerprint,
        tokens=alone if fingerprint is None else f"{fingerprint} {stamp}",
        held_out=None if judged is None else judged * run.train.batch * run.train.length,
        stale={key: at[key] for key in HELD_OUT if key in at and at[key] != step},
        left_out=left_out,
    )


def _fingerprint(folder: Path) -> str | None:
    """Return the data fingerprint in provenance.json; None if it can't be read."""
    try:
        found = json.loads(read_bytes(folder / "provenance.json"))["data_fingerprint"]
    except (LeftOut, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) and found else None


def _data(run: Run, fingerprint: str | None) -> str:
    stamp = "unknown" if fingerprint is None else shortened(fingerprint[:8])
    task = run.data.task
    mixed = "+".join(Path(part.path).name for part in run.data.mixture)
    name = f"task {task.kind}" if task else mixed or Path(run.data.path or "unknown").name
    return f"{shortened(name)} ({stamp})"


def _tokenizer(path: Path) -> tuple[str, str | None]:
    """Return the tokenizer's name on the page, and the SHA-256 of its file."""
    try:
        content = read_bytes(path)
    except LeftOut:
        return "unknown", None
    stamp = hashlib.sha256(content).hexdigest()
    try:
        model = json.loads(content)["model"]
        words = f"{shortened(model['type'])}, {len(model['vocab']):,} entries"
    except (ValueError, KeyError, TypeError, RecursionError):
        words = "of another format"
    return f"{words} ({stamp[:8]})", stamp


def _text(run: Run, fingerprint: str) -> str | None:
    """Return a hash of the beginning of the text that is the same for every tokenizer; None if the
    token file that the run was trained on is gone or was changed."""
    path = Path(run.data.path or "")
    if run.data.path is None or not (path / "meta.json").is_file():
        return None
    try:
        file = open_tokens(path)
    except (BadInput, OSError):
        return None
    if file.fingerprint != fingerprint:
        return None
    total = hashlib.sha256()
    for name in SPLITS:
        split = file.split(name)
        # COMPARED tokens: nearly every token has at least one byte. Special tokens have none.
        ids: np.ndarray = split.tokens[:COMPARED]
        begin = b"".join(map(file.tokenizer.token_data, ids.tolist()))[:COMPARED]
        total.update(f"{name} {split.bytes} {len(begin)} ".encode() + begin)
    return total.hexdigest()
