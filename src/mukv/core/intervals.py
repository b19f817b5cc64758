"""How far what was measured can be trusted: intervals of 95 %."""

from __future__ import annotations

import math

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
