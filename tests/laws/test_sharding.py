"""Law 6: sharding is invisible.

Eight simulated devices must train as one does. They add the same float32 numbers in another order,
so that a sum of n terms may differ by about sqrt(n) * 6e-8 of its size, a few 1e-7 here. Adam
divides by the root of the mean square, so that the update of a weight whose gradient is all noise
can change its sign. Losses and norms are therefore compared to 2e-5, and each weight tensor to 2 %
of the learning rate after three updates, root mean square.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.compute import Compute
from mukv.core.mesh import MeshShape, weight_shardings
from tests.laws import matrix
from tests.pairs import cover, params
from tests.training import EXACT, batch, run, trainer

RATE, STEPS = 1e-3, 3
MESHES: dict[str, dict[str, int]] = {
    "data": {"data": 8},
    "tensor": {"tensor": 2},
    "both": {"data": 2, "tensor": 4, "accumulate": 2},
    "context": {"data": 2, "tensor": 2, "context": 2},
    "long": {"context": 4},
    "replica": {"replica": 2, "data": 4},
    "all": {"replica": 2, "tensor": 2, "context": 2, "accumulate": 2},
}
"""A tensor axis of two splits all heads and the vocabulary; four leaves the KV heads whole. Rows
have 12 tokens: two devices of `context` exchange queries, four do not."""


def build(combination):
    """Build a model whose vocabulary can be split."""
    return matrix.build(*combination, vocab_size=32)


def axes(row):
    """Return the axes that a mesh splits, and the parts of a model."""
    mesh, combination = row
    return [*((axis, "split") for axis in MESHES[mesh]), *matrix.parts(combination)]


def meshes(row):
    return [("mesh", row[0])]


ALL = [*itertools.product(MESHES, matrix.SAMPLE)]
SPLIT = [*dict.fromkeys([*cover(ALL, axes), *cover(ALL, meshes, size=1)])]
"""Each axis of a mesh with each part of a model, and each mesh at least once."""
QUICK = [("both", matrix.SAMPLE[0])]
"""Meshes with both axes that split weights for use."""


def noise(combination):
    """Return a factor of all tolerances. In the row with inputs of layers, weights changed by a
    factor of 1 + 6e-8 n, n drawn from a normal distribution, change gradients by 7e-5."""
    return 10 if combination == ("shared-kv", "kerple", "local-global") else 1


@functools.lru_cache(1)
def alone(combination):
    """Return a model, and its state and metrics after training on one device."""
    model = build(combination)
    return model, run(trainer(model, learning_rate=RATE), STEPS)


@pytest.mark.parametrize(
    ("mesh", "combination"),
    params(
        sorted(dict.fromkeys([*SPLIT, *QUICK]), key=lambda row: matrix.SAMPLE.index(row[1])),
        QUICK,
        name=lambda row: f"{row[0]}-{'-'.join(row[1])}",
        unpack=True,
        group=lambda row: "-".join(row[1]),
    ),
)
def test_sharding_is_invisible(mesh, combination):
    model, (state, metrics) = alone(combination)
    split = trainer(model, learning_rate=RATE, **MESHES[mesh])
    sharded, seen = run(split, STEPS)
    near = noise(combination)
    for one, eight in zip(metrics, seen, strict=True):
        np.testing.assert_allclose(eight.loss, one.loss, rtol=2e-5)
        np.testing.assert_allclose(eight.gradient_norm, one.gradient_norm, rtol=2e-5 * near)
    for one, eight in zip(
        jax.tree.leaves(state.weights), jax.tree.leaves(sharded.weights), strict=True
    ):
        distance = np.sqrt(np.mean((np.asarray(eight) - np.asarray(one)) ** 2))
        assert distance < 0.02 * near * RATE


def gradient(train):
    """Return losses and gradient of a batch with the initial weights."""
    state = train.initial_state()
    with jax.set_mesh(train.mesh):
        return jax.device_get(jax.jit(train._gradient)(state.weights, train.put(batch(0)), None))


ACCELERATED = Compute("float32", "float32", unroll=True, platform="gpu", core="fused")
"""Off a CPU `tensor` also splits the tokens of the residual stream between blocks."""
GRADIENTS = [
    ({"data": 2, "tensor": 2, "context": 2}, EXACT),
    ({"replica": 2, "tensor": 4}, ACCELERATED),
    ({"data": 2, "tensor": 2, "context": 2}, ACCELERATED),
]


@pytest.mark.product
@pytest.mark.parametrize(("mesh", "compute"), GRADIENTS)
@pytest.mark.parametrize("combination", params(matrix.SAMPLE, [], "-".join))
def test_gradients_are_those_of_one_device(mesh, compute, combination):
    """Each gradient is within 2e-5 of its largest number, and the loss within 1e-6."""
    model, near = build(combination), noise(combination)
    (alone, expected), (losses, found) = (
        gradient(trainer(model, compute=compute, **split)) for split in ({}, mesh)
    )
    np.testing.assert_allclose(losses.objective, alone.objective, rtol=1e-6 * near)
    for one, eight in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        limit = 2e-5 * near * max(np.abs(one).max(), 1e-6)
        np.testing.assert_allclose(eight, one, rtol=0, atol=limit)


@pytest.mark.product
@pytest.mark.parametrize("combination", params(matrix.SAMPLE, matrix.SAMPLE[:1], "-".join))
def test_decoding_is_sharded_invisibly(combination):
    """With sharded weights, logits after a prompt and one more token are those of one device."""
    model, ids = build(combination), matrix.tokens(2)
    weights, count = matrix.weights(model), jnp.array([5, 6])

    @jax.jit
    def decode(weights, ids):
        weights = model.unstack(weights)
        cache = model.empty_cache(2, matrix.LENGTH, tail=2, dtype=matrix.EXACT.type)
        compute = matrix.EXACT
        first, cache = model.prefill(weights, cache, ids[:, :6], count, compute=compute)
        second, _ = model.step(weights, cache, ids[:, 6], compute=compute)
        return first, second

    alone = decode(weights, ids)
    for shape in (MeshShape(2, 2), MeshShape(context=3)):
        mesh = shape.build()
        with jax.set_mesh(mesh):
            pieces = jax.device_put(weights, weight_shardings(model.params(), mesh))
            for one, split in zip(alone, decode(pieces, ids), strict=True):
                np.testing.assert_allclose(split, one, atol=2e-5)


@pytest.mark.product
@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (1, 4), (4, 2)])
def test_weights_and_moments_are_split(data, tensor):
    """Every large array is sharded over `data` (FSDP), and over `tensor` except for KV heads."""
    model = build(("mqa", "rope", "plain"))
    state = trainer(model, data, tensor).initial_state()
    big = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 64]
    held = sum(leaf.addressable_shards[0].data.size for leaf in big)
    keys = 2 * 2 * 16 * 8 * 3 * (1 - 1 / tensor)  # keys and values, two layers, three arrays each
    assert held <= (sum(leaf.size for leaf in big) / tensor + keys) / data
