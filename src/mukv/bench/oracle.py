"""The benchmark's scores without a model: of an independent solver, of guessing, of
position alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mukv.core.statistics import wilson
from mukv.tasks import AnyTask, Draws, Samples
from mukv.tasks.solvers import SOLVERS


def same(one: str, other: str) -> bool:
    """Whether two texts are equal apart from white space."""
    return one.split() == other.split()


def solved(task: AnyTask, samples: Samples) -> np.ndarray:
    """Whether the task's independent solver answers correctly from the text, bool [answer]."""
    solve = SOLVERS[task.kind]
    right: list[bool] = []
    for row in range(len(samples.tokens)):
        text, answers = task.questions(samples, row)
        solutions = solve(text)
        right += [same(*pair) for pair in zip(answers, solutions, strict=True)]
    return np.array(right)


def by_position(seen: Samples, samples: Samples) -> np.ndarray:
    """Whether the most common token at each place of the samples `seen` is the correct one, bool
    [answer].
    """
    columns = seen.tokens.T
    common = [np.bincount(column).argmax() for column in columns]
    return samples.right(np.broadcast_to(common, samples.tokens.shape))[samples.present]


def check(
    tasks: Mapping[str, AnyTask], lengths: Sequence[int], count: int, seed: int
) -> list[dict[str, Any]]:
    """Return a row for each task and length.

    count: samples of each

    Raises BadInput before any work for a length that is too short for a task.
    """
    for task in tasks.values():
        for length in lengths:
            task.check_length(length)
    return [
        row(name, task, length, count, seed) for name, task in tasks.items() for length in lengths
    ]


def row(name: str, task: AnyTask, length: int, count: int, seed: int) -> dict[str, Any]:
    """Score one task at one length, with the solver in place of a model."""
    indices = np.arange(count)
    samples = task.batch(length, seed, "test", indices)
    oracle = solved(task, samples)
    guessed = samples.right(task.guess(samples, Draws.of(seed + 1, 0, indices)))[samples.present]
    placed = by_position(task.batch(length, seed, "train", indices), samples)
    return {
        "task": name,
        "length": length,
        "exact_match": float(oracle.mean()),
        "interval": wilson(int(oracle.sum()), len(oracle)),
        "chance": task.chance(samples),
        "oracle": float(oracle.mean()),
        "guesser": float(guessed.mean()),
        "position_only": float(placed.mean()),
        "cache_bytes_per_token": 0,
        "samples": count,
        "answers": len(oracle),
    }
