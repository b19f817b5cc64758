"""What `mukv.load` returns compiles once per shape and checks types."""

from __future__ import annotations

from contextlib import contextmanager

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import mukv as package
from mukv.core.errors import BadInput

pytestmark = pytest.mark.xdist_group("trained")
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def model(trained):
    return package.load(trained)


@contextmanager
def compilations():
    """Yield a list to which each program that XLA compiles in the block is added."""
    seen = []

    def listen(event, _, **__):
        if event == COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


CALLS = {
    "logits": lambda model: model.logits([[1, 2, 3]]),
    "logits with places": lambda model: model.logits([[1, 2]], [[0, 1]], [[1, 1]]),
    "generate": lambda model: model.generate("ab", max_tokens=20),
    "another seed": lambda model: model.generate("ab", 20, temperature=1.0, seed=3),
    "a policy": lambda model: model.generate("ab", 20, policy="streaming:0.5+int8"),
    "evaluate": lambda model: model.evaluate([np.arange(20)]),
}


@pytest.mark.product
@pytest.mark.parametrize("name", CALLS)
def test_a_shape_is_compiled_once(model, name):
    jax.clear_caches()
    CALLS[name](model)
    with compilations() as seen:
        CALLS[name](model)
    assert seen == []


def test_the_counter_counts(model):
    with compilations() as seen:
        jax.jit(lambda x: x * 3 + 1.25)(np.arange(7.0))
    assert seen


def test_ids_in_any_form(model):
    expected = np.asarray(model.logits([[5, 6, 7]]))
    for given in (
        [5, 6, 7],
        (5, 6, 7),
        np.array([5, 6, 7]),
        jnp.array([[5, 6, 7]]),
        [np.int64(5), 6, 7],
    ):
        np.testing.assert_array_equal(model.logits(given), expected)
    assert expected.shape == (1, 3, 264)
    assert expected.dtype == np.float32


@pytest.mark.parametrize(
    "given",
    [
        [[0, 264]], [-1], [1 << 40], [0.5], [1.0], [True], ["a"], "abc", None, [], [[]],
        [[1], [1, 2]], [[[1]]], {"a": 1}, 3, np.array(["x"]), [float("nan")], [None],
    ],
)  # fmt: skip
def test_wrong_ids_are_reported(model, given):
    with pytest.raises(BadInput, match=r"^tokens: got"):
        model.logits(given)


def test_places_have_the_shape_of_the_tokens(model):
    with pytest.raises(BadInput, match=r"^segment: got"):
        model.logits([[1, 2]], segment=[[1]])


@pytest.mark.product
def test_one_prompt_or_several(model):
    one = model.generate("ab", max_tokens=12)
    both = model.generate(["ab", "cdef"], max_tokens=12)
    assert [type(both), len(both)] == [list, 2]
    assert both[0] == one
    assert len(one.token_ids) == 12
    warm = model.generate("ab", 12, temperature=1.0, seed=1)
    assert warm != model.generate("ab", 12, temperature=1.0, seed=2)
    assert model.generate("ab", 12, temperature=1.0, top_k=1, seed=2) == one


@pytest.mark.product
@pytest.mark.parametrize("policy", ["int8", "snapkv:0.5+int8", "full"])
def test_a_policy_as_text(model, policy):
    assert len(model.generate("ab" * 20, 4, policy=policy).token_ids) == 4


@pytest.mark.product
def test_a_text_ends_before_a_stop_text(model):
    whole = model.generate("ab", max_tokens=60, temperature=1.0)
    # A stop text in the middle of an answer, across tokens, which are bytes here.
    stop = whole.text[20:23]
    cut = model.generate("ab", max_tokens=60, temperature=1.0, stop=["never said", stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in model.tokenizer.decode(cut.token_ids)
    assert stop not in model.tokenizer.decode(cut.token_ids[:-1])
    assert model.generate("ab", 60, temperature=1.0, stop=stop) == cut


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"prompts": 3}, "prompts"), ({"prompts": []}, "prompts"),
        ({"prompts": ["a", 1]}, "prompts"),
        ({"max_tokens": "9"}, "max_tokens"), ({"max_tokens": 2.0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"), ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"), ({"top_k": 1.5}, "top_k"), ({"seed": "a"}, "seed"),
        ({"policy": "snapkv:2.5.1"}, "policy"), ({"policy": 3}, "policy"), ({"stop": 3}, "stop"),
        ({"policy": "snopkv"}, "policy"), ({"stop": [1]}, "stop"), ({"sampling": 0.7}, "sampling"),
    ],
)  # fmt: skip
def test_wrong_types_are_reported(model, given, name):
    with pytest.raises(BadInput, match=rf"^{name}: got"):
        model.generate(**{"prompts": "ab", "max_tokens": 4, **given})
