"""Law 6: sharding is invisible.

Eight simulated devices must train as one does. They add the same float32 numbers in another
order: each sum of n terms may move by about sqrt(n) * 6e-8 of its size, a few 1e-7 here. Adam
divides by the root of the mean square, so that the update of a single weight whose gradient is
all noise can turn around. So losses and norms are held to 2e-5, and each tensor of weights to 2 %
of the learning rate after three updates, root mean square.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.laws import matrix
from tests.training import run, trainer

RATE, STEPS = 1e-3, 3
MESHES = {"data": (8, 1, 1), "tensor": (1, 8, 1), "both": (2, 4, 2)}
"""data, tensor, accumulate"""


@pytest.fixture(scope="module", params=matrix.SAMPLE, ids="-".join)
def alone(request):
    model = matrix.build(*request.param)
    return model, run(trainer(model, learning_rate=RATE), STEPS)


@pytest.mark.parametrize("mesh", MESHES)
def test_sharding_is_invisible(alone, mesh):
    model, (state, metrics) = alone
    data, tensor, accumulate = MESHES[mesh]
    split = trainer(model, data, tensor, accumulate=accumulate, learning_rate=RATE)
    sharded, seen = run(split, STEPS)
    for one, eight in zip(metrics, seen, strict=True):
        np.testing.assert_allclose(eight.loss, one.loss, rtol=2e-5)
        np.testing.assert_allclose(eight.gradient_norm, one.gradient_norm, rtol=2e-5)
    for one, eight in zip(
        jax.tree.leaves(state.weights), jax.tree.leaves(sharded.weights), strict=True
    ):
        assert np.sqrt(np.mean((np.asarray(eight) - np.asarray(one)) ** 2)) < 0.02 * RATE


def test_weights_and_moments_are_split():
    """At least half of all numbers lie on one device only, as FSDP promises."""
    model = matrix.build("gqa", "rope", "plain")
    state = trainer(model, data=8).initial_state()
    big = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 64]
    held = sum(leaf.addressable_shards[0].data.size for leaf in big)
    assert held <= sum(leaf.size for leaf in big) / 8
