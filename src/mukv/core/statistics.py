"""Intervals of 95 % around measured means and shares; lines and parabolas through points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mukv.core.typing import Float

SURE = 1.959964
"""Standard deviations of a two-sided interval of 95 %."""


def wilson(right: float, count: int) -> tuple[float, float]:
    """Of a share (Wilson 1927). right: how many of `count`, which need not be whole."""
    if not count:
        return 0.0, 1.0
    share, z = right / count, SURE**2 / count
    middle = (share + z / 2) / (1 + z)
    reach = SURE * math.sqrt(share * (1 - share) / count + z / count / 4) / (1 + z)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def of_mean(values: Float[np.ndarray, " sample"]) -> tuple[float, float] | None:
    """Of the mean of independent values, taken as Gaussian; None for a single one."""
    if len(values) < 2:
        return None
    mean, reach = values.mean(), SURE * values.std(ddof=1) / math.sqrt(len(values))
    return float(mean - reach), float(mean + reach)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: the slope, and its standard error."""
    x, y = np.array(points, float).T
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    residual = y - y.mean() - slope * x
    return slope, float(np.sqrt(residual @ residual / max(len(points) - 2, 1) / (x @ x)))


def vertex(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Of the parabola through the finite points: where it is lowest, no further than they go, and
    how low. The lowest point where there is no such parabola."""
    given = np.array([x, y], float)
    across, up = given[:, np.isfinite(given[1])] if np.isfinite(given[1]).any() else given
    lowest = int(np.argmin(up))
    place = float(across[lowest]), float(up[lowest])
    if len(across) < 3:
        return place
    a, b, c = np.polyfit(across - place[0], up, 2)
    if a <= 0:
        return place
    shift = float(np.clip(-b / (2 * a), across.min() - place[0], across.max() - place[0]))
    return place[0] + shift, float(a * shift**2 + b * shift + c)
