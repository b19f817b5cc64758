"""Optimizers on a sphere: the published step, in numpy, and what is and is not on a sphere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.core.params import Param, map_params
from mukv.scaling.optimizers import AdamH, AdamW, Muon, MuonH
from mukv.scaling.parameterization import Resolved, Scaling
from tests.laws import matrix
from tests.laws.test_resume import assert_same_bits, whole_and_resumed
from tests.pairs import params
from tests.training import run, trainer

DECLARED = {
    "up": Param({"embed": 6, "hidden": 10}, fan_in=("embed",)).stacked(2),
    "experts": Param(
        {"experts": 3, "embed": 6, "hidden": 4}, fan_in=("embed",), batch=("experts",)
    ),
    "query": Param({"embed": 6, "heads": 2, "head_dim": 3}, fan_in=("embed",), tag="query"),
    "embedding": Param({"vocab": 9, "embed": 6}, role="embedding"),
    "readout": Param({"embed": 6, "vocab": 9}, role="readout", fan_in=("embed",)),
    "gain": Param({"embed": 6}, role="vector", init="ones"),
}
"""The query is resolved to start at zero."""
PLAIN = Resolved(1.0, 1.0, 1.0, 1.0, True)
RESOLVED = dict.fromkeys(DECLARED, PLAIN) | {"query": replace(PLAIN, deviation=0.0)}
SPHERES = {"up": 1, "experts": 1}
"""Number of leading axes, which count separate matrices."""
FACTOR = 3.0
KINDS = {
    "adamh": (AdamH, AdamW(weight_decay=0.0)),
    "muonh": (MuonH, Muon(weight_decay=0.0, rate=FACTOR)),
}
"""Each with its base optimizer."""


def drawn(seed: int) -> dict[str, Any]:
    keys = dict(zip(DECLARED, jax.random.split(jax.random.key(seed), len(DECLARED)), strict=True))
    return {name: jax.random.normal(keys[name], p.shape) for name, p in DECLARED.items()}


def norms(array: Any, leading: int) -> np.ndarray:
    array = np.asarray(array, np.float64)
    return np.sqrt(np.sum(array**2, axis=tuple(range(leading, array.ndim)), keepdims=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_published_one(kind):
    """W' = R norm(W - rate R norm(u)), where u is the update of the base optimizer; all other
    weights, and those that start at zero, are updated by the base optimizer itself."""
    rate, (ours, base) = 0.05, KINDS[kind]
    optimizer = ours(rate=FACTOR)
    one, other = (each.transform(DECLARED, RESOLVED) for each in (optimizer, base))
    weights = start = drawn(0)
    states = one.init(weights), other.init(weights)
    for step in range(3):
        slopes = drawn(step + 1)
        moved, first = one.update(slopes, states[0], weights)
        plain, second = other.update(slopes, states[1], weights)
        states = first, second
        after = optimizer.apply(DECLARED, RESOLVED, weights, moved, rate)
        for name, leading in SPHERES.items():
            radius = norms(start[name], leading)
            old, update = np.asarray(weights[name]), np.asarray(plain[name])
            new = old + rate * FACTOR * radius * update / norms(update, leading)
            expected = radius * new / norms(new, leading)
            np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-5)
        for name in {*DECLARED} - {*SPHERES}:
            np.testing.assert_array_equal(after[name], weights[name] + rate * plain[name])
        weights = after


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_on_their_spheres(kind):
    """After 300 large steps norms are those of the start, with decay of the other weights too."""
    optimizer = KINDS[kind][0](weight_decay=0.1)
    transform = optimizer.transform(DECLARED, RESOLVED)
    start = drawn(0)

    def step(carry: Any, seed: Any) -> Any:
        weights, state = carry
        moved, state = transform.update(drawn(seed), state, weights)
        return (optimizer.apply(DECLARED, RESOLVED, weights, moved, 0.3), state), None

    (weights, _), _ = jax.lax.scan(step, (start, transform.init(start)), jnp.arange(300))
    for name, leading in SPHERES.items():
        np.testing.assert_allclose(
            norms(weights[name], leading), norms(start[name], leading), rtol=1e-5
        )
        assert np.abs(np.asarray(weights[name] - start[name])).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", params(["sp", "ntk", "mup"], ["ntk"]))
def test_the_share_of_an_update_depends_on_depth_alone(kind, scaling):
    """At four times the width, and of `rate.hidden` and all multipliers, a matrix changes by the
    same share; CompleteP's factor for the depth is kept."""
    optimizer = KINDS[kind][0]()
    base = {"embed": 3, "hidden": 5, "heads": 2, "head_dim": 3, "layer": 1}
    plan = Scaling(kind=scaling, base=base, depth=0.5)
    slopes = drawn(1)

    def share(resolved: Any) -> float:
        transform = optimizer.transform(DECLARED, resolved)
        weights = drawn(0)
        moved, _ = transform.update(slopes, transform.init(weights), weights)
        return float(norms(moved["up"][0], 0).item() / norms(weights["up"][0], 0).item())

    same = map_params(lambda _: PLAIN, DECLARED)
    assert share(plan.resolve(DECLARED, 1)) == pytest.approx(share(same), rel=1e-5)
    assert share(plan.resolve(DECLARED, 4)) == pytest.approx(share(same) / 2, rel=1e-5)


def test_bad_rates_are_refused():
    with pytest.raises(BadInput, match=r"rate: got 0\.0"):
        MuonH(rate=0.0)
    with pytest.raises(BadInput, match=r"rate: got -1\.0"):
        AdamH(rate=-1.0)


@pytest.mark.product
@pytest.mark.parametrize("kind", KINDS)
def test_sharding_and_resume(kind, tmp_path):
    """Laws 6 and 8, on stacked layers."""
    model, optimizer = matrix.build("gqa", "rope", "plain", vocab_size=32), KINDS[kind][0]()
    settings = {"optimizer": optimizer, "learning_rate": 1e-2}
    assert_same_bits(*whole_and_resumed(model, 1, tmp_path, **settings))
    one, eight = (run(trainer(model, *mesh, **settings), 3)[0] for mesh in ((1, 1), (2, 4)))
    for alone, split in zip(*map(jax.tree.leaves, (one.weights, eight.weights)), strict=True):
        assert np.sqrt(np.mean((np.asarray(split) - np.asarray(alone)) ** 2)) < 0.02 * 1e-2
