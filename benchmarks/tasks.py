"""Measure how fast samples of the synthetic tasks are made, on one core.

Run: python benchmarks/tasks.py [--json]

The script prints tokens per second of CPU time for whole batches, as the best of several runs. The
targets are 20 million for tasks of arrays and 2 million for the pseudo-program. For comparison, the
simplest task is also made one sample after the other, each with its own generator.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from mukv.tasks import TASKS

REPEATS = 7
TOKENS = 1 << 19
"""Tokens of a batch."""
LENGTHS = (256, 1024, 4096)
AIMS = {"program": 2.0}
AIM = 20.0


def rate(tokens: int, make: Callable[[], object]) -> float:
    """Return million tokens per second, the best of several runs."""
    best = float("inf")
    for _ in range(REPEATS):
        began = time.process_time()
        make()
        best = min(best, time.process_time() - began)
    return tokens / best / 1e6


def one_by_one(length: int, rows: int) -> np.ndarray:
    """Make a needle in filler, one sample after the other."""
    out = np.zeros((rows, length), np.int32)
    for row in range(rows):
        random = np.random.default_rng((0, row))
        out[row] = random.integers(3, 19, length)
        value = random.integers(10, size=3)
        needle = [19, 21 + random.integers(32), 53, *(54 + value), 64]
        at = random.integers(1, length - 14)
        out[row, at : at + 7] = needle
        out[row, -7:] = [20, *needle[1:]]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    for name, task in TASKS.items():
        found = {}
        for length in LENGTHS:
            indices = np.arange(TOKENS // length)
            make = lambda task=task, n=length, i=indices: task.batch(n, 0, "train", i)  # noqa: E731
            found[length] = rate(TOKENS, make)
        rows.append({"task": name, "million_tokens_per_second": found, "aim": AIMS.get(name, AIM)})
    peer = {n: rate(TOKENS, lambda n=n: one_by_one(n, TOKENS // n)) for n in LENGTHS}
    if given.json:
        print(json.dumps({"rows": rows, "peer": peer}))
        return
    table = Table("million tokens/s", *(f"{length:,}" for length in LENGTHS), "aim")
    for row in rows:
        speeds = (f"{speed:.1f}" for speed in row["million_tokens_per_second"].values())
        table.add_row(row["task"], *speeds, f"{row['aim']:.0f}")
    table.add_row("needle, one by one", *(f"{speed:.1f}" for speed in peer.values()), "")
    Console().print(table)


if __name__ == "__main__":
    main()
