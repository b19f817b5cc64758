"""Compare cache policies on the same texts, and summarise each as one row."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mukv.compress import duration
from mukv.compress.candidates import Candidate, candidates
from mukv.compress.finished import Finished, key_of
from mukv.compress.measure import Job, jobs, measured
from mukv.compress.reader import PolicyReader
from mukv.compress.rows import Rows
from mukv.core.compute import settled
from mukv.core.statistics import of_mean, wilson
from mukv.runs.loaded import Model
from mukv.show import heartbeat
from mukv.show.progress import Bar


@dataclass(frozen=True)
class Result:
    """Measurements of one policy with one budget; field names are public.

    perplexity: of the tokens of the text after the prefill
    recall: fraction of the planted strings' tokens that are predicted, with the cue after
        compression; None without strings
    recall_aware: the same with the cues of up to eight strings also at the end of the prefilled
        text, so that the policy sees the questions; None if not measured
    cache_bytes: of one row; where layers share a budget, of a row in a batch whose pools have room
        for the row that keeps most
    bytes_per_token: cache_bytes divided by the length of a row
    bytes_of_full: cache_bytes divided by those of `full`
    bytes_read_per_step: bytes of the cache read in one decode step of one row
    read_of_full: bytes_read_per_step divided by those of `full`
    tokens_per_second: decoding speed of one row
    decoding_of_full: speed of decoding divided by that of `full`, measured in turn
    prefill_seconds: of one row, compression included
    samples: rows of text
    strings: planted strings
    perplexity_low, perplexity_high: 95 % interval, from the differences to `full` of the mean
        losses of stretches of one tail, taken as independent; None for a single stretch
    recall_low, recall_high: 95 % interval of recall, one trial per string (Wilson)
    capped: fraction of the choices of `topp` at which the budget was exhausted before the
        probability mass was reached; None for other policies
    kept: fraction of the prefilled entries that are kept, mean over rows, layers and heads; None
        for policies without a threshold
    """

    policy: str
    budget: float
    perplexity: float
    recall: float | None
    recall_aware: float | None
    cache_bytes: int
    bytes_per_token: float
    bytes_of_full: float
    bytes_read_per_step: int
    read_of_full: float
    tokens_per_second: float
    decoding_of_full: float
    prefill_seconds: float
    samples: int
    strings: int
    perplexity_low: float | None
    perplexity_high: float | None
    recall_low: float | None
    recall_high: float | None
    capped: float | None
    kept: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison.

    policies: names, separated by commas
    budgets: shares of the entries up to 1, or numbers of entries
    shares: bytes as shares of the full cache's; see `candidates`
    aware: whether recall with known questions is measured too
    again: whether measurements of earlier commands are forgotten
    """

    policies: str
    budgets: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    aware: bool = False
    again: bool = False


def judge(
    model: Model, rows: Rows, asked: Comparison, folder: Path, silent: bool = False
) -> list[Result]:
    """Compare policies on the same rows; the first is `full`, the baseline of the others.

    folder: where measurements are stored as they come; those of an earlier command are used again.
    silent: show no progress

    Raises BadInput before anything is measured if a policy does not fit.
    """
    compute = settled(model.run.train.compute)
    reader = PolicyReader(model.network, None, compute, rows.read, rows.length)
    compared = candidates(model, reader, asked.policies, asked.budgets, asked.shares)
    finished = Finished(folder, asked.again)
    weights, names = jax.tree.flatten(model.weights)
    every = jobs(reader, rows, compared, key_of(str(names), *weights), asked.aware)
    left = [job for job in every if finished.get(job.key) is None]
    if left:
        reader = replace(reader, weights=model.decoding)
        _measure(reader, rows, left, asked.aware, finished, silent, len(every) - len(left))
    known = {job.key: finished.known[job.key] for job in every}
    return results(reader, rows, compared, every, known)


def _measure(
    reader: PolicyReader,
    rows: Rows,
    left: Sequence[Job],
    aware: bool,
    finished: Finished,
    silent: bool,
    stored: int,
) -> None:
    """Do the jobs and store each result, with an estimate of the time and a progress bar."""
    work = duration.Work(reader, rows, left, aware)
    started = time.monotonic()
    with Bar("compress, percent", 100, silent=silent) as bar:
        again = f", {stored} of {stored + len(left)} measurements are stored" if stored else ""
        bar.say(f"about {heartbeat.duration(work.seconds)}{again}")

        def tick(kind: str) -> None:
            bar.show(work.done(kind), {})

        for job, found in measured(reader, rows, left, aware, tick):
            finished.add(job.key, found)
            bar.say(f"{job.candidate}: {_said(job, found)}")
            if job is left[0] and len(left) > 1:
                more = work.left(time.monotonic() - started)
                bar.say(f"about {heartbeat.duration(more)} left")


def _said(job: Job, found: dict[str, Any]) -> str:
    """Summarise one measurement."""
    if job.kind == "text":
        return f"perplexity {_perplexity(np.mean(found['losses'])):.3f}"
    known = f", aware {np.mean(found['known']):.1%}" if "known" in found else ""
    return f"recall {np.mean(found['hits']):.1%}{known}"


def results(
    reader: PolicyReader,
    rows: Rows,
    compared: Sequence[Candidate],
    every: Sequence[Job],
    known: dict[str, dict[str, Any]],
) -> list[Result]:
    """Return one row per candidate from all measurements, which are given by key."""
    made: list[Result] = []
    base: np.ndarray | None = None
    for each in compared:
        own = [job for job in every if job.candidate is each]
        of_kind = {
            kind: [known[job.key] for job in own if job.kind == kind]
            for kind in ("text", "strings")
        }
        losses = np.concatenate([found["losses"] for found in of_kind["text"]])
        base = losses if base is None else base
        made.append(_result(reader, rows, each, of_kind, losses, base, made))
    return made


def _result(
    reader: PolicyReader,
    rows: Rows,
    candidate: Candidate,
    found: dict[str, list[dict[str, Any]]],
    losses: np.ndarray,
    base: np.ndarray,
    before: Sequence[Result],
) -> Result:
    first, mean = found["text"][0], losses.mean()
    reach = _reach(losses - base, reader.tail)
    hits, aware = (
        np.concatenate([each[name] for each in found["strings"]])
        if found["strings"] and name in found["strings"][0]
        else None
        for name in ("hits", "known")
    )
    recall = None if hits is None else float(hits.mean())
    low, high = wilson(recall * rows.asked, rows.asked) if recall is not None else (None, None)
    full = before[0] if before else None
    size, read = int(first["cache_bytes"]), int(first["bytes_read"])
    return Result(
        policy=candidate.policy.name,
        budget=candidate.budget,
        perplexity=_perplexity(mean),
        recall=recall,
        recall_aware=None if aware is None else float(aware.mean()),
        cache_bytes=size,
        bytes_per_token=size / rows.length,
        bytes_of_full=size / full.cache_bytes if full else 1.0,
        bytes_read_per_step=read,
        read_of_full=read / full.bytes_read_per_step if full else 1.0,
        tokens_per_second=1 / first["step_seconds"],
        decoding_of_full=first["decoding_x_full"] if full else 1.0,
        prefill_seconds=first["prefill_seconds"],
        samples=len(rows.text),
        strings=rows.asked,
        perplexity_low=None if reach is None else _perplexity(mean - reach),
        perplexity_high=None if reach is None else _perplexity(mean + reach),
        recall_low=low,
        recall_high=high,
        capped=first["capped"],
        kept=float(np.concatenate([each["kept"] for each in found["text"]]).mean())
        if "kept" in first
        else None,
    )


def _reach(difference: np.ndarray, stretch: int) -> float | None:
    """Return half the 95 % interval of the mean of differences [row token], in nats; None for a
    single stretch.

    stretch: tokens whose mean is one trial
    """
    pieces = max(1, difference.shape[1] // stretch)
    parts = np.array_split(difference, pieces, axis=1)
    ends = of_mean(np.concatenate([part.mean(axis=1) for part in parts]))
    return None if ends is None else (ends[1] - ends[0]) / 2


def _perplexity(loss: float) -> float:
    return math.exp(min(float(loss), 700.0))
