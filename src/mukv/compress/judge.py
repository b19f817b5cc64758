"""Measure every policy with every budget on the same rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mukv.cache import FULL, Policy
from mukv.cache.words import split
from mukv.compress.reader import PolicyReader, Read
from mukv.compress.rows import Rows
from mukv.core.compute import settled
from mukv.core.statistics import of_mean, wilson
from mukv.runs.loaded import Model
from mukv.show.progress import Bar

TOKENS = 16_384
"""Tokens of all rows in one batch."""


@dataclass(frozen=True)
class Result:
    """Measurements of one policy with one budget; field names are public.

    perplexity: of plain text
    recall: fraction of the planted strings' tokens that are predicted, with the cue after
        compression
    recall_aware: the same with the cue before compression
    cache_bytes: of one row
    bytes_per_token: cache_bytes divided by the length of a row
    bytes_read_per_step: bytes of the cache read in one decode step of one row
    tokens_per_second: decoding speed over all rows
    prefill_seconds: of one row, compression included
    samples: rows of each kind
    perplexity_low, perplexity_high: 95 % interval of the difference to `full` on the same rows;
        None for one row
    recall_low, recall_high: 95 % interval of recall
    capped: fraction of the choices of `topp` at which the budget was exhausted before the
        probability mass was reached; None for other policies
    """

    policy: str
    budget: float
    perplexity: float
    recall: float
    recall_aware: float
    cache_bytes: int
    bytes_per_token: float
    bytes_read_per_step: int
    tokens_per_second: float
    prefill_seconds: float
    samples: int
    perplexity_low: float | None
    perplexity_high: float | None
    recall_low: float
    recall_high: float
    capped: float | None


def grid(names: str, budgets: Sequence[float]) -> list[tuple[Policy, float]]:
    """Return `full`, then each policy with each budget; only once where a policy has no budget."""
    made: list[tuple[Policy, float]] = [(FULL, 1.0)]
    for name in split(names, ","):
        takes = Policy.takes_budget(name, "--policy")
        for budget in budgets:
            policy = Policy.parse(name, budget, "--policy")
            pair = policy, budget if takes else policy.budget
            if pair not in made:
                made.append(pair)
    return made


def judge(
    model: Model, rows: Rows, policies: Sequence[tuple[Policy, float]], silent: bool = False
) -> list[Result]:
    """Measure every policy on the same rows; the first is the baseline of the others.

    Raises BadInput before anything is compiled if a policy does not fit.
    """
    compute = settled(model.run.train.compute)
    length = rows.tokens.shape[1]
    readers = []
    for policy, budget in policies:
        chosen, centres = model.calibrated(policy)
        shared = (model.network, model.decoding, compute, chosen, centres)
        readers.append((PolicyReader(*shared, rows.read, length), budget))
        readers[-1][0].check()
    passes = math.ceil(len(rows.tokens) / _together(rows))
    ticks = [passes * (reader.blocks + 1) for reader, _ in readers]
    results, full, before = [], None, 0
    with Bar("compress", sum(ticks), silent=silent) as bar:
        for (reader, budget), own in zip(readers, ticks, strict=True):
            done, name = itertools.count(before), f"{reader.policy.name} {budget:g}"

            def tick(done: Iterator[int] = done, name: str = name) -> None:
                bar.show(next(done), {"policy": name})

            tick()
            result, losses = _result(reader, budget, rows, _reads(reader, rows, tick), full)
            full, before = losses if full is None else full, before + own
            results.append(result)
            bar.say(f"{name}: perplexity {result.perplexity:.3f}, recall {result.recall:.1%}")
    return results


def _together(rows: Rows) -> int:
    """Return the number of rows per batch."""
    return min(len(rows.tokens), max(1, TOKENS // rows.tokens.shape[1]))


def _reads(reader: PolicyReader, rows: Rows, tick: Callable[[], None]) -> list[Read]:
    count, batch, programs = len(rows.tokens), _together(rows), reader.programs()
    reader.warm(rows.tokens[:batch], programs)
    reads = []
    for first in range(0, count, batch):
        # The last batch repeats earlier rows if needed, so that one shape is compiled.
        start = min(first, count - batch)
        read = reader(rows.tokens[start : start + batch], programs, tick=tick)
        new = slice(first - start, None)
        reads.append(replace(read, loss=read.loss[new], hit=read.hit[new]))
    return reads


def _result(
    reader: PolicyReader, budget: float, rows: Rows, reads: Sequence[Read], full: np.ndarray | None
) -> tuple[Result, np.ndarray]:
    """Return the result, and the loss of each row of plain text. full: these losses with the full
    cache.
    """
    loss, hit = (np.concatenate([getattr(r, name) for r in reads]) for name in ("loss", "hit"))
    _, unaware, aware = rows.asked[:, :, rows.read :]
    losses = loss[: rows.samples].mean(axis=1, dtype=np.float64)
    base = losses if full is None else full
    difference = of_mean(losses - base) or (None, None)
    low, high = (None if x is None else _perplexity(base.mean() + x) for x in difference)
    recall, capped = float(hit[unaware].mean()), float(np.mean([read.capped for read in reads]))
    interval = wilson(recall * rows.samples, rows.samples)
    worked = len(reads) * _together(rows)
    seconds = sum(read.decode_seconds for read in reads)
    result = Result(
        policy=reader.policy.name,
        budget=budget,
        perplexity=_perplexity(losses.mean()),
        recall=recall,
        recall_aware=float(hit[aware].mean()),
        cache_bytes=reader.cache_bytes(),
        bytes_per_token=reader.cache_bytes() / rows.tokens.shape[1],
        bytes_read_per_step=reader.bytes_read(),
        tokens_per_second=worked * reader.blocks * reader.tail / seconds,
        prefill_seconds=sum(read.prefill_seconds for read in reads) / worked,
        samples=rows.samples,
        perplexity_low=low,
        perplexity_high=high,
        recall_low=interval[0],
        recall_high=interval[1],
        capped=None if math.isnan(capped) else capped,
    )
    return result, losses


def _perplexity(loss: float) -> float:
    return math.exp(min(float(loss), 700.0))
