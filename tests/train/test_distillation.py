"""A teacher: its loss is the formula, it stays as it is, and everything else holds with it."""

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
from mukv.train.distillation import Distillation
from mukv.train.step import Trainer
from mukv.train.training import Training
from tests.laws import matrix
from tests.laws.matrix import EXACT, LENGTH, VOCAB
from tests.laws.test_resume import assert_same_bits
from tests.training import EXACT as STEP
from tests.training import steps

STUDENT = matrix.build("mqa", "rope", "plain")
TEACHER = matrix.build("gqa", "rope", "plain")
LAST = 4


def trainer(data: int = 1, **changes: Any) -> Trainer:
    settings = {"steps": 8, "batch": 8, "length": LENGTH, "compute": STEP, "teacher": "there"}
    mesh = MeshShape(data).build()
    made = Trainer(STUDENT, Training(**settings | changes), mesh, TEACHER)
    made.teach(matrix.weights(TEACHER, seed=1))
    return made


def log_softmax(logits: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [None, 5])
def test_the_loss_is_the_formula(share, temperature, chunk):
    weights, theirs = matrix.weights(STUDENT), matrix.weights(TEACHER, seed=1)
    ids = matrix.tokens()
    weight = np.random.default_rng(0).random(ids.shape).astype(np.float32)
    targets = np.roll(ids, -1, axis=1)
    compute = replace(EXACT, loss_chunk=chunk)
    teacher = Teacher(TEACHER, theirs, share, temperature)
    found = summed_loss(STUDENT, weights, ids, targets, weight, compute=compute, teacher=teacher)
    ours, taught = STUDENT(weights, ids), TEACHER(theirs, ids)
    chosen = np.take_along_axis(log_softmax(ours), targets[..., None], axis=-1)[..., 0]
    entropy = -np.sum(chosen * weight)
    p, q = (log_softmax(np.asarray(each) / temperature) for each in (taught, ours))
    apart = np.sum(np.sum(np.exp(p) * (p - q), axis=-1) * weight)
    assert float(found.cross_entropy) == pytest.approx(entropy, rel=1e-5)
    assert float(found.divergence) == pytest.approx(apart, rel=1e-4)
    wanted = (1 - share) * entropy + share * temperature**2 * apart
    assert float(found.objective) == pytest.approx(wanted, rel=1e-5)


def test_chunks_change_no_gradient():
    weights, theirs = matrix.weights(STUDENT), matrix.weights(TEACHER, seed=1)
    ids, ones = matrix.tokens(), np.ones((2, LENGTH), np.float32)

    def gradient(chunk: int | None) -> Any:
        def loss(weights: Any) -> jax.Array:
            teacher = Teacher(TEACHER, theirs, 0.5, 2.0)
            given = weights, ids, np.roll(ids, -1, axis=1), ones
            compute = replace(EXACT, loss_chunk=chunk)
            return summed_loss(STUDENT, *given, compute=compute, teacher=teacher).objective

        return jax.jit(jax.grad(loss))(weights)

    for one, other in zip(*map(jax.tree.leaves, (gradient(None), gradient(5))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_model_that_is_its_teacher_has_nothing_to_learn_from_it():
    weights, ids = matrix.weights(STUDENT), matrix.tokens()
    ones = np.ones(ids.shape, np.float32)

    def loss(mine: Any, share: float) -> jax.Array:
        teacher = Teacher(STUDENT, weights, share, 1.5)
        targets = np.roll(ids, -1, axis=1)
        given = mine, ids, targets, ones
        return summed_loss(STUDENT, *given, compute=EXACT, teacher=teacher).objective

    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(weights, 1.0)
    assert abs(float(value)) < 1e-4
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-5
    usual = jax.jit(jax.grad(loss), static_argnums=1)(weights, 0.0)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(usual)) > 1e-2


def test_a_divergence_is_zero_only_for_equal_predictions():
    logits = np.random.default_rng(0).standard_normal((2, 3, VOCAB)).astype(np.float32)
    np.testing.assert_allclose(divergences(logits, logits + 7, 1.0), 0, atol=1e-6)
    assert float(divergences(logits, 1.1 * logits, 1.0).min()) > 0


def test_a_student_comes_closer_and_the_teacher_stays():
    train = trainer(distillation=Distillation(1.0), learning_rate=0.01)
    before = jax.tree.map(np.asarray, train.frozen)
    _, metrics = steps(train, train.initial_state(), 0, 8)
    assert metrics[-1].counts["divergence"] < 0.8 * metrics[0].counts["divergence"]
    assert_same_bits(before, train.frozen)
    assert "divergence" not in _without(train).counts


def _without(train: Trainer) -> Any:
    alone = replace(train.training, teacher=None)
    plain = Trainer(STUDENT, alone, train.mesh)
    return steps(plain, plain.initial_state(), 0, 1)[1][0]


def test_weight_zero_is_no_teacher():
    train = trainer(distillation=Distillation(0.0))
    assert float(_without(train).loss) == pytest.approx(
        float(steps(train, train.initial_state(), 0, 1)[1][0].loss), rel=1e-6
    )


@pytest.mark.parametrize("settings", [{}, {"data": 2, "accumulate": 2}])
def test_resume_is_bit_equal(tmp_path, settings):
    first = trainer(**settings)
    whole, _ = steps(first, first.initial_state(), 0, LAST)
    again = trainer(**settings)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, steps(again, again.initial_state(), 0, 2)[0])
    fresh = trainer(**settings)
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(None, fresh.abstract_state())
    assert_same_bits(steps(fresh, state, 2, LAST)[0], whole)


def test_devices_and_pieces_change_nothing():
    one, split = trainer(), trainer(data=2, accumulate=2)
    states = [steps(train, train.initial_state(), 0, 2)[0] for train in (one, split)]
    for a, b in zip(*(jax.tree.leaves(state.weights) for state in states), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


def test_its_weights_count_in_the_memory_of_a_step():
    train = trainer()
    alone = Trainer(STUDENT, replace(train.training, teacher=None), train.mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(train.frozen))
    assert size == 4 * sum(param.size for param in named(TEACHER.params()).values())
    assert footprint.least_bytes(train) == footprint.least_bytes(alone) + size
    assert footprint.step_bytes(train) >= footprint.step_bytes(alone) + size
    assert sum(
        np.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(train.abstract_frozen())
    ) == size  # fmt: skip


def test_it_is_held_in_the_type_that_is_multiplied():
    train = trainer(compute=replace(STEP, operands="bfloat16"))
    kept = named(train.frozen["teacher"])
    assert kept["stage0.slot0.read.query"].dtype == jnp.bfloat16
    assert kept["stage0.slot0.attention_norm.gain"].dtype == jnp.float32


def test_a_trainer_that_is_given_none_refuses():
    with pytest.raises(BadInput, match=r"train\.teacher: got 'there'; null here"):
        Trainer(STUDENT, Training(batch=8, teacher="there"), MeshShape().build())


@pytest.mark.parametrize(
    ("field", "value"), [("weight", -0.1), ("weight", 1.1), ("temperature", 0.0)]
)
def test_a_wrong_share_is_told(field, value):
    with pytest.raises(BadInput, match=f"{field}: got {value}"):
        Distillation(**{field: value})
