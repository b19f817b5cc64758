"""Measure policies batch by batch: loss of text, recall of planted strings, speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mukv.cache import FULL
from mukv.compress.candidates import Candidate
from mukv.compress.finished import key_of
from mukv.compress.reader import PolicyReader, Tick, capped_share, for_steps, kept_shares, one_row
from mukv.compress.rows import CUE, TOKENS, Rows

VERSION = 2
"""Part of the key of every measurement: a change of what is measured changes it."""


@dataclass(frozen=True)
class Job:
    """One candidate on one batch of rows.

    kind: "text" for the loss of text, "strings" for recall of planted strings
    rows: indices of the batch in `Rows.text` or `Rows.planted`
    key: of the measurement
    """

    candidate: Candidate
    kind: Literal["text", "strings"]
    rows: slice
    key: str

    @property
    def first(self) -> bool:
        """Whether it is the batch whose first row speed is measured with."""
        return self.kind == "text" and self.rows.start == 0


def jobs(
    reader: PolicyReader,
    rows: Rows,
    candidates: Sequence[Candidate],
    model: str,
    aware: bool,
) -> list[Job]:
    """Return all jobs: batch after batch of the text, then of the planted strings.

    model: fingerprint of the weights. aware: also measure recall with known questions.
    """
    made: list[Job] = []
    shared = (VERSION, model, reader.model, reader.compute, reader.read, reader.length, reader.tail)
    for kind in ("text", "strings"):
        tokens = rows.text if kind == "text" else rows.planted
        for batch in batches(len(tokens), max(1, TOKENS // reader.length)):
            asked = (rows.strings[batch], aware) if kind == "strings" else (batch.start == 0,)
            for each in candidates:
                centres = [leaf for layer in each.centres.values() for leaf in layer.values()]
                own = (each.policy, *map(np.asarray, centres))
                key = key_of(*shared, kind, tokens[batch], *asked, *own)
                made.append(Job(each, kind, batch, key))
    return made


def batches(count: int, size: int) -> Iterator[slice]:
    """Yield slices of `size` rows that cover `count` rows; the last one may be smaller."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def measured(
    reader: PolicyReader, rows: Rows, left: Sequence[Job], aware: bool, tick: Callable[[str], None]
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Do the jobs and yield their measurements, as objects that JSON can hold.

    left: jobs of one batch are neighbours. tick: called with the kind of each finished part:
        "prefill", "text" or "strings" (several times per job), "policy", "replay".
    """
    place = 0
    while place < len(left):
        kind, batch = left[place].kind, left[place].rows
        same = [job for job in left[place:] if (job.kind, job.rows) == (kind, batch)]
        work = _text if kind == "text" else _strings
        yield from work(reader, rows, batch, same, aware, tick)
        place += len(same)


def _text(
    reader: PolicyReader,
    rows: Rows,
    batch: slice,
    jobs: Sequence[Job],
    aware: bool,
    tick: Callable[[str], None],
) -> Iterator[tuple[Job, dict[str, Any]]]:
    tokens = rows.text[batch]
    logits, record, prefill = reader.record(tokens[:, : rows.read])
    tick("prefill")
    full: Any = None
    for job in jobs:
        policy, centres, read = job.candidate.policy, job.candidate.centres, tokens[:, : rows.read]
        cache, choice = _chosen(reader, record, job, read, tick)
        if job.first:  # the first time compiles, the second one is measured
            cache, choice = _chosen(reader, record, job, read, tick)
        kept = {"kept": kept_shares(cache).tolist()} if policy.keep.by_threshold else {}
        own = cache
        if job.first:
            if full is None:
                full, _ = reader.compressed(one_row(record), FULL, {}, read[:1])
                full = for_steps(full)
            own = for_steps(one_row(cache)) if policy != FULL else full
            reader.begin_speeds(own, policy, tokens[:1, rows.read :])
        losses = reader.losses(logits, cache, tokens, _ticker(tick, "text"))
        measured: dict[str, Any] = {"losses": np.round(losses.astype(float), 6).tolist(), **kept}
        if job.first:
            speed = reader.speeds(own, policy, full, tokens[:1, rows.read :])
            stored = reader.stored(cache, policy, centres)
            measured |= {
                "prefill_seconds": prefill + choice,
                "step_seconds": speed.seconds,
                "decoding_x_full": speed.full,
                "capped": capped_share(cache) if policy.keep.limits else speed.capped,
                "bytes_read": reader.bytes_read(stored),
                "cache_bytes": stored.nbytes(),
            }
            tick("policy")
        yield job, measured


def _strings(
    reader: PolicyReader,
    rows: Rows,
    batch: slice,
    jobs: Sequence[Job],
    aware: bool,
    tick: Callable[[str], None],
) -> Iterator[tuple[Job, dict[str, Any]]]:
    tokens, strings = rows.planted[batch], rows.strings[batch]
    before: Any = None
    last = CUE * rows.together
    if aware:
        # What comes before the cues is read once, with or without cues after it.
        _, before, _ = reader.record(tokens[:, :-last])
        record = reader.extended(before, tokens[:, -last:])
    else:
        _, record, _ = reader.record(tokens)
    tick("prefill")
    for job in jobs:
        cache, _ = _chosen(reader, record, job, tokens, tick)
        hits = reader.recalled(cache, strings, _ticker(tick, "strings"))
        measured: dict[str, Any] = {"hits": hits.astype(int).tolist()}
        if aware:
            known = np.zeros(hits.shape, int)
            for start, cues in rows.reminders(batch):
                whole = np.concatenate([tokens[:, :-last], cues], axis=1)
                cache, _ = _chosen(reader, reader.extended(before, cues), job, whole, tick)
                some = slice(start, start + rows.together)
                known[:, some] = reader.recalled(cache, strings[:, some], _ticker(tick, "strings"))
            measured["known"] = known.tolist()
        yield job, measured


def _chosen(
    reader: PolicyReader, record: Any, job: Job, tokens: np.ndarray, tick: Callable[[str], None]
) -> tuple[Any, float]:
    """Return the cache of a job's candidate, and the seconds of one row."""
    policy, centres = job.candidate.policy, job.candidate.centres
    found = reader.compressed(record, policy, centres, tokens)
    if policy.keep.replays:
        tick("replay")
    return found


def _ticker(tick: Callable[[str], None], kind: str) -> Tick:
    return lambda: tick(kind)
