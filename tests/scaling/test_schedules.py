"""Warm-up, peak and final learning rate of schedules are those of their fields."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mukv.scaling.budget import BUDGETS
from mukv.scaling.schedules import DECAYS, SCHEDULES, Falling, Plan, Prolongable
from mukv.train.training import Training
from tests.pairs import params


def rates(schedule, steps, peak=0.5):
    plan = Plan(peak, steps, 4096)
    return np.array([schedule.rate(jnp.asarray(step), plan) for step in range(steps)])


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(
    ("steps", "warmup"),
    params(
        [(s, w) for s in (2, 3, 17, 100) for w in (0, 1, 5) if w < s - 1],
        [(2, 0), (3, 1), (17, 5)],
        unpack=True,
    ),
)
def test_the_last_update_has_the_final_rate(kind, steps, warmup):
    cls = SCHEDULES[kind]
    if issubclass(cls, Falling):
        for final in (0.0, 0.1, 1.0):
            found = rates(cls(warmup=warmup, final=final), steps)
            assert found[-1] == pytest.approx(0.5 * final, abs=1e-7)
            assert found[warmup] == pytest.approx(0.5, rel=1e-6)
    else:
        assert issubclass(cls, Prolongable)
        for shape, decay in DECAYS.items():
            schedule = cls(warmup=warmup, decay=1.0, shape=shape)
            plan = Plan(0.5, steps, 4096)
            # The rate reaches zero only at the update after the last one.
            assert float(schedule.rate(jnp.asarray(steps), plan)) == pytest.approx(0, abs=1e-7)
            assert (rates(schedule, steps) > 0).all()
            assert float(decay(jnp.asarray(0.0))) == pytest.approx(1)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_warm_up_rises_to_what_follows(kind):
    found = rates(SCHEDULES[kind](warmup=5), 50)
    assert (np.diff(found[:6]) >= 0).all()
    assert (np.diff(found[6:]) <= 1e-9).all()
    assert found[0] == pytest.approx(found[5] / 5, rel=1e-3)


@pytest.mark.parametrize("budget", BUDGETS)
def test_with_a_budget_the_final_rate_is_a_share_of_the_changed_peak(budget):
    training = Training(
        batch=16, length=64, steps=40, budget=BUDGETS[budget](batch=256, tokens=8192)
    )
    changed = training.effective
    assert changed.learning_rate != training.learning_rate
    found = rates(changed.schedule, changed.steps, changed.learning_rate)
    assert found[-1] == pytest.approx(0.1 * changed.learning_rate, rel=1e-5)
