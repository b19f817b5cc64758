"""Scores of answers equal values computed by hand: correct answers, ties, another tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.bench.grading import calibration_error
from mukv.bench.scoring import score
from mukv.bench.text import TextForm
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.data.tokenizer import ByteTokenizer
from mukv.tasks import TASKS, Samples
from mukv.tasks.feed import tokenizer

EXACT = Compute("float32", "float32")


@dataclass(frozen=True)
class Known:
    """Predict the next token from a table of logits, which is the weights."""

    vocab_size: int

    def hidden(self, weights, tokens, compute):
        return jax.nn.one_hot(tokens, self.vocab_size)

    def logits(self, weights, hidden, compute):
        return hidden @ weights


def samples(*rows):
    """Return rows whose answers are at places 2 and 3, and at place 5."""
    count = len(rows)
    start, stop = np.tile([2, 5], (count, 1)), np.tile([4, 6], (count, 1))
    return Samples(np.array(rows, np.int32), start, stop, np.zeros_like(start))


def test_answers_are_right_as_a_whole():
    follow = np.zeros((5, 5), np.float32)
    follow[[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]] = 9.0
    found = score(
        Known(5), jnp.asarray(follow), samples([0, 1, 2, 3, 4, 0], [0, 1, 2, 4, 4, 1]), EXACT
    )
    np.testing.assert_array_equal(found.right, [[True, True], [False, False]])
    np.testing.assert_allclose(found.tokens, [[1, 1], [0.5, 0]])
    sure = np.log2(1 + 4 * np.exp(-9))
    np.testing.assert_allclose(found.bits[0], [2 * sure, sure], rtol=2e-3)


def test_calibration_error():
    right = np.array([True, False, True, True])
    # Three answers are in the last bucket, two of them correct; one is at 0.5.
    found = calibration_error(right, np.array([0.92, 0.98, 0.5, 1.0]))
    assert found == pytest.approx((0.92 + 0.98 + 1.0 - 2 + 0.5) / 4)
    table = jnp.zeros((5, 5)).at[1, 2].set(9.0)
    scored = score(Known(5), table, samples([0, 1, 2, 3, 4, 0]), EXACT)
    # Probability 1 for the first token, 1/5 for the other two, where all logits are equal.
    unsure = 1 - 1 / (1 + 4 * np.exp(-9))
    assert scored.calibration_error == pytest.approx((unsure + 2 / 5) / 3, rel=1e-3)


@pytest.mark.parametrize("logit", [0.0, np.nan])
def test_ties_and_nan_are_wrong(logit):
    table = jnp.full((5, 5), logit)
    found = score(Known(5), table, samples([0, 1, 2, 3, 4, 0]), EXACT)
    assert not found.right.any()


@pytest.mark.parametrize("name", ["needle_multi_query", "fuzzy_recall", "program"])
@pytest.mark.parametrize("shots", [0, 2])
def test_text_of_another_tokenizer(name, shots):
    task, form = TASKS[name], TextForm(TASKS[name], ByteTokenizer(), shots)
    length = 2500 if shots else 1200
    found = form.batch(length, 0, np.arange(6))
    assert found.tokens.shape == (6, length)
    # The longest row has less room left than a few words take.
    assert (found.tokens != 0).sum(axis=1).max() > length - 40
    size = task.smallest
    puzzles = task.batch(size, 0, "test", np.arange(6))
    for row in range(6):
        answers = task.questions(puzzles, row)[1]
        here = zip(found.start[row], found.stop[row], strict=True)
        told = [form.tokenizer.decode(found.tokens[row, a:b]) for a, b in here if b > a]
        assert told == answers
    assert (found.fact < found.start).all()


def test_the_tasks_own_tokenizer_gives_its_arrays():
    task = TASKS["needle_multi_key"]
    found = TextForm(task, tokenizer(task)).batch(90, 0, np.arange(5))
    same = task.batch(90, 0, "test", np.arange(5))
    for mine, own in zip(found[:3], same[:3], strict=True):
        np.testing.assert_array_equal(mine, own)


def test_bad_input():
    with pytest.raises(BadInput, match="of this tokenizer"):
        TextForm(TASKS["needle"], ByteTokenizer()).batch(30, 0, np.arange(2))
    with pytest.raises(BadInput, match="can write"):
        TextForm(TASKS["needle"], tokenizer(TASKS["mqar"]))
