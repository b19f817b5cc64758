"""Compute intervals for the comparisons of the findings, from their results files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SIGMAS = 2.0
RESAMPLED = 10_000


def extra_steps(mine: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """Compute the fraction of steps that `mine` needs beyond `other` for the same loss.

    The loss is the higher of the two final losses, which both reach; None if the curves don't
    determine it.
    """
    goal = max(min(mine.values()), min(other.values()))

    def steps_to(curve: Mapping[int, float]) -> float | None:
        steps = np.array(sorted(curve))
        values = np.minimum.accumulate([curve[step] for step in steps])
        if values[-1] > goal or values[0] < goal:
            return None
        # Interpolate in the logarithm of steps, with which the loss falls linearly.
        return float(np.exp(np.interp(-goal, -values, np.log(steps))))

    here, there = steps_to(mine), steps_to(other)
    return None if here is None or there is None else here / there - 1


def steps_interval(mine: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float] | None:
    """Compute `extra_steps` with two standard errors on both sides; None if undetermined, or for
    one seed.

    Seeds differ in their final loss by its standard error; the slope of the mean curves over the
    last half of the steps converts that into a fraction of steps.
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
    """Compute the 95 % interval of the fraction of correct answers by resampling texts.

    Questions about one text are not independent, so whole texts are drawn. counts: correct answers
    of each text, out of `most`.
    """
    drawn = np.random.default_rng(0).integers(len(counts), size=(RESAMPLED, len(counts)))
    shares = np.asarray(counts, float)[drawn].mean(axis=1) / most
    low, high = np.percentile(shares, (2.5, 97.5))
    return float(low), float(high)
