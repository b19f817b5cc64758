"""A conversation over one cache answers as one prefill of the whole conversation does."""

from __future__ import annotations

import numpy as np
import pytest

from mukv.cache import Policy
from mukv.core import programs
from mukv.core.errors import BadInput
from mukv.infer import conversation as module
from mukv.infer.conversation import Conversation
from mukv.infer.decode import TAIL, decoding_weights, generate
from mukv.infer.sampling import Sampling
from tests.laws import matrix
from tests.laws.matrix import EXACT, VOCAB
from tests.pairs import params

ROOM = 256
FIRST, SECOND = [3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2]


@pytest.fixture(scope="module")
def model():
    return matrix.build("gqa", "rope", "local-global")


@pytest.fixture(scope="module")
def weights(model):
    return decoding_weights(model, matrix.weights(model), EXACT)


@pytest.fixture
def begun(model, weights):
    def of(policy="full", length=ROOM, sampling=None):
        rule = Policy.parse(policy)
        return Conversation(model, weights, length, sampling, EXACT, rule)

    return of


@pytest.fixture
def whole(model, weights):
    """Return a function that returns greedy tokens after one prefill."""
    return lambda ids, number: generate(model, weights, [ids], number, compute=EXACT).tokens[0]


@pytest.mark.product
@pytest.mark.parametrize("policy", params(["full", "knorm", "snapkv"], ["knorm"]))
def test_turns_are_one_prefill(begun, whole, monkeypatch, policy):
    """Answers equal those after one prefill, over folds within the first answer and before the
    second, if the policy has room for every entry."""
    monkeypatch.setattr(module, "LONGEST", 8)
    talk, number = begun(policy), TAIL + 7
    one = talk.answer(FIRST, number)
    assert one.tokens == whole(FIRST, number)
    assert (one.read, one.kept) == (len(FIRST), 0)
    ids = [*FIRST, *one.tokens, *SECOND]
    two = talk.answer(ids, 9)
    assert two.tokens == whole(ids, 9)
    # The last token of the first answer was not read when it was drawn.
    assert (two.read, two.kept) == (1 + len(SECOND), len(ids) - 1 - len(SECOND))
    again = [*ids, *two.tokens, *FIRST]
    assert talk.answer(again, 5).tokens == whole(again, 5)


@pytest.mark.product
def test_other_earlier_tokens_rebuild_the_cache(begun, whole):
    talk = begun()
    talk.answer(FIRST, 4)
    other = [*FIRST[:-1], 8, *SECOND]
    found = talk.answer(other, 4)
    assert (found.kept, found.read) == (0, len(other))
    assert found.tokens == whole(other, 4)


@pytest.mark.product
def test_an_error_in_a_turn_leaves_a_cache_that_can_be_used(begun, whole):
    talk = begun()

    def fail(token):
        raise KeyboardInterrupt

    talk.answer(FIRST, 4)
    with pytest.raises(KeyboardInterrupt):
        talk.answer([*talk.ids, *SECOND], 4, show=fail)
    assert talk.ids == []
    assert talk.answer(SECOND, 4).tokens == whole(SECOND, 4)


@pytest.mark.product
def test_answers_end_at_end_tokens_and_limits(begun, whole):
    expected = whole(FIRST, 9)
    stop = expected[3]
    assert begun().answer(FIRST, 9, {stop}).tokens == expected[: expected.index(stop) + 1]
    two = begun().answer(FIRST, 9, ended=lambda tokens: len(tokens) == 2)
    assert two.tokens == expected[:2]
    full = begun(length=len(FIRST) + 3).answer(FIRST, 9)
    assert full.tokens == expected[:3]


def test_turns_of_like_length_compile_nothing(begun, monkeypatch):
    talk, ids = begun(), list(FIRST)
    for _ in range(3):
        ids += [*talk.answer(ids, 4).tokens, *FIRST]

    def fail(*_):
        raise AssertionError("a program is compiled")

    monkeypatch.setattr(programs, "_threads", fail)
    talk.answer(ids, 4)
    with pytest.raises(AssertionError, match="compiled"):
        talk.answer([*ids, *talk.ids, *FIRST * 10], 4)


@pytest.mark.product
def test_turns_draw_independently(begun):
    drawn = []
    for seed in (0, 0, 1):
        talk = begun(sampling=Sampling(1.5, seed=seed))
        one = talk.answer(FIRST, 12).tokens
        talk.reset()
        drawn.append((one, talk.answer(FIRST, 12).tokens))
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
    assert drawn[0][0] != drawn[2][0]


@pytest.mark.parametrize(
    ("ids", "number", "message"),
    [
        ([], 1, "at least one token"),
        ([1, VOCAB], 1, f"{VOCAB}; token ids go from 0 to {VOCAB - 1}"),
        ([1], 0, "max_tokens"),
        ([1] * ROOM, 1, f"{ROOM} tokens.*fewer than the {ROOM}"),
    ],
)
def test_what_can_not_be_read(begun, ids, number, message):
    talk = begun()
    talk.answer(FIRST, 2)
    before = list(talk.ids)
    with pytest.raises(BadInput, match=message):
        talk.answer(ids, number)
    assert talk.ids == before


def test_ids_are_those_of_the_cache(begun):
    talk = begun()
    made = talk.answer(FIRST, 5)
    assert talk.ids == [*FIRST, *made.tokens[:-1]]
    assert int(np.asarray(talk.cache.position())[0]) == len(talk.ids)
