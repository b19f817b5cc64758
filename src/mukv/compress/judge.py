"""Every policy with every budget, on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mukv.cache import FULL, Policy
from mukv.compress.reader import Reader
from mukv.compress.rows import Rows
from mukv.loaded import Model

TOKENS = 16_384
"""Tokens of all rows that are worked on at once."""


@dataclass(frozen=True)
class Result:
    """One policy with one budget; field names are public. cache_bytes, bytes_read_per_step: of one
    row. tokens_per_second: of decoding, all rows together."""

    policy: str
    budget: float
    perplexity: float
    recall: float
    recall_aware: float
    cache_bytes: int
    bytes_per_token: float
    bytes_read_per_step: int
    tokens_per_second: float


def grid(names: str, budgets: Sequence[float]) -> list[tuple[Policy, float]]:
    """`full`, then each policy with each budget; once, if budgets mean nothing to it."""
    made: list[tuple[Policy, float]] = [(FULL, 1.0)]
    for name in names.split(","):
        for budget in budgets:
            policy = Policy.parse(name, budget, "--policy")
            pair = policy, budget if policy.budgeted else 1.0
            if pair not in made:
                made.append(pair)
    return made


def judge(
    model: Model,
    rows: Rows,
    policies: Sequence[tuple[Policy, float]],
    show: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Every policy on the same rows. Raises BadInput, before anything is compiled, where one does
    not fit."""
    compute = model.run.train.compute.resolve(model.decoder.vocab_size)
    length = rows.tokens.shape[1]
    readers = []
    for policy, budget in policies:
        chosen, centres = model.calibrated(policy)
        shared = (model.decoder, model.decoding, compute, chosen, centres)
        readers.append((Reader(*shared, rows.read, length), budget))
        readers[-1][0].check()
    results = []
    for reader, budget in readers:
        results.append(_result(reader, budget, rows))
        if show:
            show(results[-1])
    return results


def _result(reader: Reader, budget: float, rows: Rows) -> Result:
    count, length = rows.tokens.shape
    batch = min(count, max(1, TOKENS // length))
    programs, losses, hits, seconds, steps = reader.programs(), [], [], 0.0, 0
    for first in range(0, count, batch):
        # The last ones are read again where rows are left over: one shape, one compilation.
        start = min(first, count - batch)
        some = rows.tokens[start : start + batch]
        if first == 0:
            reader(some, programs)
        (loss, hit), taken = reader(some, programs)
        losses.append(loss[first - start :])
        hits.append(hit[first - start :])
        seconds += taken
        steps += batch * reader.blocks * reader.tail
    loss, hit = np.concatenate(losses), np.concatenate(hits)
    text, unaware, aware = rows.asked[:, :, rows.read :]
    return Result(
        policy=str(reader.policy),
        budget=budget,
        perplexity=math.exp(min(float(loss[text].mean(dtype=np.float64)), 700.0)),
        recall=float(hit[unaware].mean()),
        recall_aware=float(hit[aware].mean()),
        cache_bytes=reader.cache_bytes(),
        bytes_per_token=reader.cache_bytes() / length,
        bytes_read_per_step=reader.bytes_read(),
        tokens_per_second=steps / seconds,
    )
