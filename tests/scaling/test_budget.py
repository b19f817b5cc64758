"""The three rules of `train.budget` scale hyperparameters with batch size and number of tokens."""

from __future__ import annotations

import pytest

from mukv.core.errors import BadInput
from mukv.scaling.budget import HyperP, PowerLaw, SquareRoot
from mukv.scaling.optimizers import AdamW
from mukv.train.training import Training

AT_BASE = Training(steps=10, batch=4, length=32, learning_rate=0.01)


@pytest.mark.parametrize("rule", [SquareRoot, PowerLaw, HyperP])
def test_nothing_changes_at_the_base(rule):
    found = Training(**{**vars(AT_BASE), "budget": rule(128, 1280)}).effective
    assert found.learning_rate == AT_BASE.learning_rate
    assert found.optimizer.beta2 == pytest.approx(AT_BASE.optimizer.beta2)


def test_square_root():
    """Complete(d)P: rate and decay scale by sqrt(B / D), epsilon by its inverse, 1 - beta by B /
    D."""
    budget = SquareRoot(batch=128, tokens=1280)
    found = Training(steps=20, batch=8, length=32, learning_rate=0.01, budget=budget).effective
    ratio = 2 / 4
    assert found.learning_rate == pytest.approx(0.01 * ratio**0.5)
    optimizer = found.optimizer
    assert optimizer.weight_decay == pytest.approx(0.1 * ratio**0.5)
    assert optimizer.epsilon == pytest.approx(1e-8 * ratio**-0.5)
    assert (optimizer.beta1, optimizer.beta2) == pytest.approx((0.95, 0.975))


def test_power_law():
    budget = PowerLaw(batch=128, tokens=1280)
    found = Training(steps=20, batch=8, length=32, learning_rate=0.01, budget=budget).effective
    assert found.learning_rate == pytest.approx(0.01 * 2 * 4**-0.51)
    assert found.optimizer == AdamW()


def test_hyperp():
    """Ren et al. 2026: the rate scales by sqrt(B) and by D ** -0.32."""
    budget = HyperP(batch=128, tokens=1280)
    found = Training(steps=20, batch=8, length=32, learning_rate=0.01, budget=budget).effective
    assert found.learning_rate == pytest.approx(0.01 * 2**0.5 * 4**-0.32)
    assert found.optimizer == AdamW()


def test_an_average_that_would_forget_more_than_all_is_refused():
    with pytest.raises(BadInput, match="beta1: got -"):
        Training(steps=1, batch=16, length=256, budget=SquareRoot(128, 1 << 20))
