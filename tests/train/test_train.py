"""One training step: accumulation, clipping, precision, and steps with bad numbers."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.core.mesh import share_of_batch
from tests.conftest import MINUSCULE
from tests.laws import matrix
from tests.processes import finish, start
from tests.training import batch, run, steps, trainer

MODEL = matrix.build("gqa", "rope", "plain")


def weights_of(state):
    return jax.tree.map(np.asarray, state.weights)


@pytest.mark.product
def test_pieces_of_a_batch_make_the_batch():
    """Accumulating gradients over pieces of a batch equals the whole batch up to rounding, even if
    pieces have different numbers of weighted tokens."""
    (one, seen), (four, others) = (run(trainer(MODEL, accumulate=n), 2) for n in (1, 4))
    np.testing.assert_allclose([m.loss for m in others], [m.loss for m in seen], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), weights_of(four), weights_of(one)
    )


@pytest.mark.product
def test_the_gradient_is_clipped():
    """A limit above the norm changes nothing; a tiny limit bounds the gradient that Adam gets."""
    free, loose, tight = (run(trainer(MODEL, clip_norm=limit), 1) for limit in (None, 1e6, 1e-3))
    jax.tree.map(np.testing.assert_array_equal, weights_of(free[0]), weights_of(loose[0]))
    assert free[1][0].gradient_norm == tight[1][0].gradient_norm > 1e-3
    moment = sum(float(jnp.sum(leaf**2)) for leaf in _first_moments(tight[0]))
    expected = (0.1 * 1e-3) ** 2
    np.testing.assert_allclose(moment, expected, rtol=1e-3)


def _first_moments(state):
    return jax.tree.leaves(state.optimizer[0].mean)


@pytest.mark.product
def test_bfloat16_operands_stay_close(token_file, tmp_path):
    """With bfloat16 operands, which round by up to 2^-8, the loss changes by far less. They run in
    processes with XLA's optimisations, without which XLA has no such products."""
    losses = {}
    for operands in ("float32", "bfloat16"):
        changes = (*MINUSCULE, f"data.path={token_file}", f"train.compute.operands={operands}")
        process = start("train", "tiny", *changes, "--out", tmp_path / operands, "--json")
        status, out, error = finish(process)
        assert status == 0, error
        losses[operands] = json.loads(out)["loss"]
    assert losses["bfloat16"] != losses["float32"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=2**-8)


@pytest.mark.product
def test_a_bad_step_freezes_the_state():
    train = trainer(MODEL)
    state, _ = run(train, 1)
    before = jax.tree.map(np.asarray, state)
    poisoned = batch(1)._replace(weight=np.full_like(batch(1).weight, np.inf))
    with jax.set_mesh(train.mesh):
        state, metrics = train.step(state, 1, train.put(poisoned))
        assert not np.isfinite(metrics.loss)
    state, _ = steps(train, state, 2, 4)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)


@pytest.mark.product
@pytest.mark.parametrize(
    ("poison", "blamed"),
    [("stage0.slot0.mlp.up", "layer1.mlp"), ("readout", "logits")],
)
def test_the_layer_that_went_wrong_is_named(poison, blamed):
    train = trainer(MODEL)
    state = train.initial_state()

    def spoil(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name != poison:
            return leaf
        # The last one of a stack of layers.
        return leaf.at[-1].set(jnp.nan)

    spoilt = jax.tree_util.tree_map_with_path(spoil, state.weights)
    state = dataclasses.replace(state, weights=spoilt)
    assert train.blame(state, train.put(batch(0))) == f"the output of {blamed}"


def test_a_batch_must_fit_the_mesh():
    with pytest.raises(BadInput, match=r"train.batch: got 8.*multiple of mesh.data \(8\)"):
        trainer(MODEL, data=8, accumulate=2)
    with pytest.raises(BadInput, match=r"got 8.*multiple of mesh.replica x mesh.data \(8\)"):
        trainer(MODEL, data=4, replica=2, accumulate=2)


def test_a_row_must_fit_the_mesh():
    allowed = r"train.length: got 12.*multiple of mesh.context \(8\), such as 8 or 16"
    with pytest.raises(BadInput, match=allowed):
        trainer(MODEL, context=8)


def placed(*owners: list[int]) -> Any:
    """Return a mesh whose devices belong to these processes."""
    table = np.array([[SimpleNamespace(process_index=owner) for owner in row] for row in owners])
    return SimpleNamespace(devices=table, shape={"data": len(owners), "tensor": len(owners[0])})


@pytest.mark.parametrize(
    ("owners", "host", "hosts"),
    [
        ([[0, 0], [0, 0]], 0, 1),
        ([[0, 0], [1, 1]], 0, 2),
        ([[1], [1], [0], [0]], 1, 2),
        ([[1], [0], [1], [0]], 1, 2),
        ([[0, 1]], 0, 1),
        ([[2, 3], [0, 1]], 1, 2),
    ],
)
def test_processes_that_split_only_weights_read_the_same_rows(owners, host, hosts):
    assert share_of_batch(placed(*owners)) == {"host": host, "hosts": hosts}


def test_a_process_holds_whole_shares():
    with pytest.raises(BadInput, match=r"mesh.tensor: got 3"):
        share_of_batch(placed([0, 0, 1], [1, 2, 2]))


@pytest.mark.product
def test_the_loss_falls():
    """The loss on a fixed batch falls to less than a third."""
    train = trainer(MODEL, steps=60, learning_rate=1e-2)
    state = train.initial_state()
    with jax.set_mesh(train.mesh):
        fixed = train.put(batch(0))
        for step in range(60):
            state, metrics = train.step(state, step, fixed)
            if step == 0:
                first = float(metrics.loss)
    assert float(metrics.loss) < first / 3
