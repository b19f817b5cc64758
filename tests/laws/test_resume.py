"""Law 8: a run that is stopped at any step and resumed ends with bit-equal weights.

The quick round tests it with killed processes (tests/storage/test_kills.py)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mukv.storage.checkpoint import Checkpoints
from tests.laws import matrix
from tests.pairs import params
from tests.training import run, steps, trainer

LAST = 4


def whole_and_resumed(model, stop, folder, **settings):
    """Return the states at the end of a run, and of one that is restored at `stop`."""
    first, fresh = trainer(model, **settings), trainer(model, **settings)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(stop, run(first, stop)[0])
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(None, fresh.abstract_state())
    return run(first, LAST)[0], steps(fresh, state, stop, LAST)[0]


def assert_same_bits(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


STOPS = [(combination, 1 + number % (LAST - 1)) for number, combination in enumerate(matrix.SAMPLE)]


@pytest.mark.parametrize(("combination", "stop"), params(STOPS, [], unpack=True))
def test_resume_is_bit_equal(combination, stop, tmp_path):
    model = matrix.build(*combination)
    assert_same_bits(*whole_and_resumed(model, stop, tmp_path))


@pytest.mark.product
def test_at_any_step(tmp_path):
    model = matrix.build(*matrix.SAMPLE[0])
    train = trainer(model)
    whole = train.initial_state()
    with Checkpoints(tmp_path, keep_last=LAST) as checkpoints:
        for stop in range(LAST):
            checkpoints.save(stop, whole)
            whole, _ = steps(train, whole, stop, stop + 1)
        for stop in range(LAST):
            fresh = trainer(model)
            state = checkpoints.restore(stop, fresh.abstract_state())
            assert_same_bits(steps(fresh, state, stop, LAST)[0], whole)


MESHES = [
    {"data": 2, "tensor": 2, "accumulate": 2},
    {"replica": 2, "tensor": 2, "context": 2},
]


@pytest.mark.product
@pytest.mark.parametrize("mesh", params(MESHES, MESHES[:1], "-".join))
def test_on_a_mesh(tmp_path, mesh):
    model = matrix.build(*matrix.SAMPLE[0])
    assert_same_bits(*whole_and_resumed(model, 2, tmp_path, **mesh))
