"""Distillation: the loss equals its formula, the teacher stays constant; resuming, sharding and
adapters work as without a teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape
from mukv.core.params import named
from mukv.model.loss import Teacher, divergences, summed_loss
from mukv.storage.checkpoint import Checkpoints
from mukv.train import footprint
from mukv.train.adapter import Adapter
from mukv.train.distillation import Distillation
from mukv.train.step import Trainer
from mukv.train.training import Training
from tests.laws import matrix
from tests.laws.matrix import EXACT, LENGTH, VOCAB
from tests.laws.test_resume import assert_same_bits
from tests.pairs import params
from tests.training import EXACT as UNROLLED
from tests.training import steps

STUDENT = matrix.build("mqa", "rope", "plain")
TEACHER = matrix.build("gqa", "rope", "plain")
STEP = replace(UNROLLED, unroll=False)


def trainer(data: int = 1, **changes: Any) -> Trainer:
    settings = {"steps": 8, "batch": 8, "length": LENGTH, "compute": STEP, "teacher": "there"}
    training = Training(**settings | changes)
    made = Trainer(
        STUDENT, training, MeshShape(data).build(), TEACHER if training.teacher else None
    )
    if training.teacher:
        made.teach(matrix.weights(TEACHER, seed=1))
    return made


@pytest.fixture(scope="module")
def taught() -> Trainer:
    """Return a trainer with a teacher and the usual settings, compiled once."""
    return trainer(learning_rate=0.01)


def log_softmax(logits: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("share", "temperature", "chunk"),
    params(
        [(s, t, c) for s in (0.3, 1.0) for t in (1.0, 2.5) for c in (None, 5)],
        [(0.3, 2.5, 5)],
        unpack=True,
    ),
)
def test_the_loss_is_the_formula(share, temperature, chunk):
    weights, theirs = matrix.weights(STUDENT), matrix.weights(TEACHER, seed=1)
    ids = jnp.asarray(matrix.tokens())
    weight = jnp.asarray(np.random.default_rng(0).random(ids.shape), jnp.float32)
    targets = jnp.roll(ids, -1, axis=1)
    compute = replace(EXACT, loss_chunk=chunk)

    @jax.jit
    def run(weights, theirs):
        teacher = Teacher(TEACHER, theirs, share, temperature)
        given = STUDENT, weights, ids, targets, weight
        found = summed_loss(*given, compute=compute, teacher=teacher)
        return found, STUDENT(weights, ids), TEACHER(theirs, ids)

    found, ours, taught = run(weights, theirs)
    chosen = np.take_along_axis(log_softmax(ours), targets[..., None], axis=-1)[..., 0]
    entropy = -np.sum(chosen * np.asarray(weight))
    p, q = (log_softmax(np.asarray(each) / temperature) for each in (taught, ours))
    apart = np.sum(np.sum(np.exp(p) * (p - q), axis=-1) * np.asarray(weight))
    assert float(found.cross_entropy) == pytest.approx(entropy, rel=1e-5)
    assert float(found.divergence) == pytest.approx(apart, rel=1e-4)
    wanted = (1 - share) * entropy + share * temperature**2 * apart
    assert float(found.objective) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.product
def test_a_student_equal_to_its_teacher_has_no_divergence():
    weights, ids = matrix.weights(STUDENT), jnp.asarray(matrix.tokens())
    ones = jnp.ones(ids.shape, jnp.float32)

    def loss(mine: Any, share: jax.Array) -> jax.Array:
        teacher = Teacher(STUDENT, weights, share, 1.5)
        given = mine, ids, jnp.roll(ids, -1, axis=1), ones
        compute = replace(EXACT, loss_chunk=5, unroll=False)
        return summed_loss(STUDENT, *given, compute=compute, teacher=teacher).objective

    compiled = jax.jit(jax.value_and_grad(loss))
    value, gradient = compiled(weights, 1.0)
    assert abs(float(value)) < 1e-4
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-5
    half = compiled(weights, 0.5)[1]
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(half)) > 1e-2


def test_a_divergence_is_zero_only_for_equal_predictions():
    logits = jax.random.normal(jax.random.key(0), (2, 3, VOCAB))
    np.testing.assert_allclose(divergences(logits, logits + 7, 1.0), 0, atol=1e-6)
    assert float(divergences(logits, 1.1 * logits, 1.0).min()) > 0


@pytest.mark.product
def test_a_student_comes_closer_and_the_teacher_stays(taught):
    before = jax.tree.map(np.asarray, taught.taught)
    _, metrics = steps(taught, taught.initial_state(), 0, 8)
    assert metrics[-1].counts["divergence"] < 0.9 * metrics[0].counts["divergence"]
    assert_same_bits(before, taught.taught)


@pytest.mark.product
def test_weight_zero_is_training_without_a_teacher_to_the_bit(taught):
    """Weight zero gives the bits of training without a teacher; a weight above zero does not."""
    without = trainer(teacher=None, learning_rate=0.01)
    zero = trainer(distillation=Distillation(0.0), learning_rate=0.01)
    start = without.initial_state()
    states, seen = zip(*(steps(t, t.initial_state(), 0, 2) for t in (without, zero)), strict=True)
    assert_same_bits(*states)
    assert [m.loss for m in seen[0]] == [m.loss for m in seen[1]]
    assert "divergence" not in seen[1][0].counts
    other, metrics = steps(taught, taught.initial_state(), 0, 2)
    assert float(metrics[0].loss) == pytest.approx(float(seen[0][0].loss), rel=1e-5)
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), other.weights, states[0].weights)
    assert max(jax.tree.leaves(apart)) > 1e-4
    assert jax.tree.structure(start) == jax.tree.structure(other)  # nothing more is saved


@pytest.mark.product
def test_resume_is_bit_equal(tmp_path, taught):
    whole, _ = steps(taught, taught.initial_state(), 0, 4)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, steps(taught, taught.initial_state(), 0, 2)[0])
    fresh = trainer(learning_rate=0.01)
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(None, fresh.abstract_state())
    assert_same_bits(steps(fresh, state, 2, 4)[0], whole)


@pytest.mark.product
def test_devices_and_pieces_change_nothing(taught):
    split = trainer(data=2, accumulate=2, learning_rate=0.01)
    states = [steps(train, train.initial_state(), 0, 2)[0] for train in (taught, split)]
    for a, b in zip(*(jax.tree.leaves(state.weights) for state in states), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.product
def test_adapters_learn_from_a_teacher():
    """Only the adapters change, and the divergence from the teacher falls."""
    train = trainer(distillation=Distillation(1.0), adapter=Adapter(rank=2), learning_rate=0.03)
    train.freeze(matrix.weights(STUDENT))
    before = jax.tree.map(np.asarray, (train.frozen, train.taught))
    state, metrics = steps(train, train.initial_state(), 0, 8)
    assert metrics[-1].counts["divergence"] < metrics[0].counts["divergence"]
    assert_same_bits(before, (train.frozen, train.taught))
    assert all(name.endswith((".a", ".b")) for name in named(state.weights))


def test_its_weights_count_in_the_memory_of_a_step():
    size = 4 * sum(param.size for param in named(TEACHER.params()).values())
    alone = trainer(teacher=None)
    train = Trainer(STUDENT, replace(alone.training, teacher="there"), alone.mesh, TEACHER)
    assert footprint.least_bytes(train) == footprint.least_bytes(alone) + size
    train.teach(matrix.weights(TEACHER, seed=1))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(train.taught)) == size
    assert footprint.least_bytes(train) == footprint.least_bytes(alone)


def test_it_is_held_in_the_type_that_is_multiplied():
    kept = named(trainer(compute=replace(STEP, operands="bfloat16")).taught)
    assert kept["stage0.slot0.read.query"].dtype == jnp.bfloat16
    assert kept["stage0.slot0.attention_norm.gain"].dtype == jnp.float32


def test_a_trainer_that_is_given_none_refuses():
    with pytest.raises(BadInput, match=r"train\.teacher: got 'there'; null here"):
        Trainer(STUDENT, Training(batch=8, teacher="there"), MeshShape().build())


@pytest.mark.parametrize(
    ("field", "value"), [("weight", -0.1), ("weight", 1.1), ("temperature", 0.0)]
)
def test_a_wrong_weight_is_reported(field, value):
    with pytest.raises(BadInput, match=f"{field}: got {value}"):
        Distillation(**{field: value})
