"""Lines and parabolas through measured points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
