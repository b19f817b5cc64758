"""Law 6: sharding is invisible.

Eight simulated devices must train as one does. They add the same float32 numbers in another order,
so that a sum of n terms may differ by about sqrt(n) * 6e-8 of its size, a few 1e-7 here. Losses and
norms are therefore compared to 2e-5, and each weight tensor to 2 % of the learning rate after three
updates, root mean square; or to three times what rounding changes, if that is more: the same
training on one device, with initial weights that are off by one unit in the last place.
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
from mukv.scaling.optimizers import AdamW
from tests.laws import matrix
from tests.pairs import cover, params
from tests.training import EXACT, batch, steps, trainer

RATE, STEPS = 1e-3, 3
TRAINING = {"learning_rate": RATE, "optimizer": AdamW(epsilon=1e-3)}
"""With this epsilon, a gradient that is all noise moves its weight by noise. Adam's usual one would
move it by the learning rate, in a direction that rounding decides."""
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


def limit(least, changes):
    """Return a tolerance: three times the largest change by rounding; at least `least`, and at most
    ten times that."""
    return float(np.clip(3 * max(changes), least, 10 * least))


def norms(seen):
    return np.array([metrics.gradient_norm for metrics in seen])


def distances(state, other):
    """Return the root mean square of the difference of each weight tensor."""

    def distance(one, two):
        return float(np.sqrt(np.mean((np.asarray(one) - np.asarray(two)) ** 2)))

    return jax.tree.leaves(jax.tree.map(distance, state.weights, other.weights))


@functools.lru_cache(1)
def alone(combination):
    """Return the state and metrics after training on one device, and the tolerances of gradient
    norms, relative, and of weights."""
    model = build(combination)
    weights = matrix.weights(model)
    train = trainer(model, **TRAINING)
    state, seen = steps(train, train.state_of(weights), 0, STEPS)
    near, far = [], []
    for seed in range(2):
        start = train.state_of(matrix.rounded(weights, seed))
        other, found = steps(train, start, 0, STEPS)
        near.extend(np.abs(norms(found) / norms(seen) - 1))
        far.extend(distances(state, other))
    return state, seen, limit(2e-5, near), limit(0.02 * RATE, far)


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
    model = build(combination)
    state, metrics, near, far = alone(combination)
    split = trainer(model, **TRAINING, **MESHES[mesh])
    sharded, seen = steps(split, split.state_of(matrix.weights(model)), 0, STEPS)
    for one, eight in zip(metrics, seen, strict=True):
        np.testing.assert_allclose(eight.loss, one.loss, rtol=2e-5)
    np.testing.assert_allclose(norms(seen), norms(metrics), rtol=near)
    assert max(distances(state, sharded)) < far


@pytest.mark.product
@pytest.mark.parametrize("mesh", MESHES)
def test_weights_are_drawn_alike(mesh):
    """Each device draws its own shard of the weights that one device draws."""
    model = build(("mqa", "rope", "plain"))
    weights = model.init()
    sharded = trainer(model, **MESHES[mesh]).initial_state().weights
    for one, eight in zip(*map(jax.tree.leaves, (weights, sharded)), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-6)


def gradients(train, *several):
    """Return losses and gradient of a batch for each of these weights."""
    program, given = jax.jit(train._gradient), train.put(batch(0))
    placed = [train.state_of(weights).weights for weights in several]
    with jax.set_mesh(train.mesh):
        return [jax.device_get(program(each, given, None)) for each in placed]


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
    """Each gradient is within 2e-5 of its largest number and the loss within 1e-6, or within three
    times what rounding changes. A gradient below a thousandth of the largest counts as that much:
    those of weights without an effect are noise."""
    model = build(combination)
    weights = matrix.weights(model)
    changed = (matrix.rounded(weights, seed) for seed in range(2))
    (alone, expected), *changed = gradients(trainer(model, compute=compute), weights, *changed)
    ((losses, found),) = gradients(trainer(model, compute=compute, **mesh), weights)
    near = [abs(other.objective / alone.objective - 1) for other, _ in changed]
    np.testing.assert_allclose(losses.objective, alone.objective, rtol=limit(1e-6, near))
    several = [jax.tree.leaves(each) for each in (expected, found, *(each for _, each in changed))]
    largest = max(np.abs(one).max() for one in several[0])
    for one, eight, *others in zip(*several, strict=True):
        most = max(np.abs(one).max(), 1e-3 * largest)
        changes = [np.abs(other - one).max() / most for other in others]
        np.testing.assert_allclose(eight, one, rtol=0, atol=most * limit(2e-5, changes))


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
