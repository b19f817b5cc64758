"""Intervals of what the findings compare, from what their results files hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SIGMAS = 2.0
RESAMPLED = 10_000


def extra_steps(mine: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """Share of steps that `mine` needs beyond `other` for the same loss, at the later of the
    losses that both reach; None if it can't be told from the curves."""
    goal = max(min(mine.values()), min(other.values()))

    def steps_to(curve: Mapping[int, float]) -> float | None:
        steps = np.array(sorted(curve))
        values = np.minimum.accumulate([curve[step] for step in steps])
        if values[-1] > goal or values[0] < goal:
            return None
        # Loss falls with the logarithm of steps.
        return float(np.exp(np.interp(-goal, -values, np.log(steps))))

    here, there = steps_to(mine), steps_to(other)
    return None if here is None or there is None else here / there - 1


def steps_interval(mine: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float] | None:
    """`extra_steps` with two standard errors to both sides; None if it can't be told, or of one
    seed.

    Seeds differ in their last loss by its standard error; the slope of the mean curves over the
    last half of the steps turns that into a share of steps.
    """
    curves = [{int(step): loss for step, loss in row["curve"].items()} for row in (mine, other)]
    ends = [row["by_seed"] for row in (mine, other)]
    middle = extra_steps(*curves)
    if middle is None or min(map(len, ends)) < 2:
        return None
    error = math.sqrt(sum(float(np.var(each, ddof=1)) / len(each) for each in ends))
    slopes = []
    for curve in curves:
        last = max(curve)
        half = min(curve, key=lambda step: abs(step - last / 2))
        slopes.append((curve[half] - curve[last]) / math.log(last / half))
    width = SIGMAS * error / float(np.mean(slopes))
    return (1 + middle) * math.exp(-width) - 1, (1 + middle) * math.exp(width) - 1


def resampled(counts: Sequence[int], most: int) -> tuple[float, float]:
    """95 % interval of the share of right answers when texts are drawn anew: questions about one
    text stand or fall together. counts: right answers of each text, of `most`."""
    drawn = np.random.default_rng(0).integers(len(counts), size=(RESAMPLED, len(counts)))
    shares = np.asarray(counts, float)[drawn].mean(axis=1) / most
    low, high = np.percentile(shares, (2.5, 97.5))
    return float(low), float(high)
