"""Compute the benchmark's scores without a model: of an independent solver, of random guesses, and
of the most common token at each position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mukv.core.errors import BadInput
from mukv.core.statistics import wilson
from mukv.tasks import AnyTask, Draws, Samples
from mukv.tasks.solvers import SOLVERS


def same(one: str, other: str) -> bool:
    """Whether two texts are equal apart from white space."""
    return one.split() == other.split()


def solved(task: AnyTask, samples: Samples) -> np.ndarray:
    """Return whether the task's independent solver answers correctly, bool [answer].

    The solver reads only the text.
    """
    solve = SOLVERS.get(task.kind) or getattr(task, "solve", None)
    if solve is None:
        allowed = "a task with a method solve(text), which answers the questions of a text"
        raise BadInput("--tasks", task.kind, allowed)
    right: list[bool] = []
    for row in range(len(samples.tokens)):
        text, answers = task.questions(samples, row)
        solutions = solve(text)
        right += [same(*pair) for pair in zip(answers, solutions, strict=True)]
    return np.array(right)


def by_position(seen: Samples, samples: Samples) -> np.ndarray:
    """Return whether each answer is the most common token at its position, bool [answer].

    seen: samples in which tokens are counted
    """
    columns = seen.tokens.T
    common = [np.bincount(column).argmax() for column in columns]
    return samples.right(np.broadcast_to(common, samples.tokens.shape))[samples.present]


def check(
    tasks: Mapping[str, AnyTask], lengths: Sequence[int], count: int, seed: int
) -> list[dict[str, Any]]:
    """Return a row for each task and length.

    count: number of samples of each

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
