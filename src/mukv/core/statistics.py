"""Confidence intervals of 95 %, and fits of lines and parabolas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mukv.core.typing import Float

SURE = 1.959964
"""Standard deviations from the mean to either end of a two-sided 95 % interval."""


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927).

    right: number of successes among `count` trials; need not be an integer
    """
    if not count:
        return 0.0, 1.0
    share, z = right / count, SURE**2 / count
    middle = (share + z / 2) / (1 + z)
    reach = SURE * math.sqrt(share * (1 - share) / count + z / count / 4) / (1 + z)
    # Rounding must not leave the proportion itself outside.
    return min(max(0.0, middle - reach), share), max(min(1.0, middle + reach), share)


def of_mean(values: Float[np.ndarray, " sample"]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of independent values, assumed Gaussian; None for fewer
    than two values.
    """
    if len(values) < 2:
        return None
    mean, reach = values.mean(), SURE * values.std(ddof=1) / math.sqrt(len(values))
    return float(mean - reach), float(mean + reach)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit a line by least squares; return its slope and the standard error of the slope."""
    x, y = np.array(points, float).T
    x = x - x.mean()
    slope = float(x @ y / (x @ x))
    residual = y - y.mean() - slope * x
    return slope, float(np.sqrt(residual @ residual / max(len(points) - 2, 1) / (x @ x)))


def vertex(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return x and y of the minimum of the parabola through the finite points.

    x is clipped to the range of the points. Where there are fewer than three points, or the
    parabola has no minimum, the lowest point is returned.
    """
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
