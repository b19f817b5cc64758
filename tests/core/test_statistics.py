"""Confidence intervals equal published figures."""

from __future__ import annotations

import numpy as np
import pytest

from mukv.core.statistics import of_mean, wilson


def test_wilson():
    # Newcombe (1998), table I: 81 of 263.
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == 0
    for count in range(1, 100):
        assert wilson(0, count)[0] == 0
        assert wilson(count, count)[1] == 1


def test_of_a_mean():
    assert of_mean(np.ones(1)) is None
    # Deviation sqrt(5 / 3), of the mean half of it.
    assert of_mean(np.arange(4.0)) == pytest.approx((1.5 - 1.2652, 1.5 + 1.2652), abs=1e-4)
