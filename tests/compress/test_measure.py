"""Losses and recall are those of decoding step by step, under every policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.cache import FULL, Policy
from mukv.compress.candidates import Candidate
from mukv.compress.measure import jobs, measured
from mukv.compress.reader import PolicyReader, one_row
from mukv.compress.rows import ANSWER, CUE, rows_of
from mukv.infer.functions import decode_functions
from mukv.infer.prompts import readings
from mukv.infer.replay import read_twice
from mukv.infer.sampling import Sampling
from mukv.model import Stage
from tests.laws import matrix
from tests.laws.matrix import EXACT, VOCAB
from tests.pairs import params

QUICK = ("snapkv", "topp")
KEEPERS = ("streaming", "snapkv", "h2o", "tova", "knorm", "keydiff", "expected", "random")
OTHERS = ("int8", "int4", "topk", "topp", "sparq", "pages", "clusters", "snapkv+int8")
OTHERS += ("tova+threshold(least=0.02,window=4)",)
TEXT = [matrix.tokens(1, 400, seed=5)[0]]


def reader_of(model, rows):
    weights = model.unstack(matrix.weights(model))
    return PolicyReader(model, weights, EXACT, rows.read, rows.length)


@pytest.fixture(scope="module")
def rows():
    return rows_of(TEXT, 64, 2, 3)


@pytest.fixture(scope="module")
def reader(rows):
    model = replace(matrix.build("gqa", "rope", "plain"), plan=(Stage(),))
    yield reader_of(model, rows)
    jax.clear_caches()


def candidate(reader, name):
    policy = FULL if name == "full" else Policy.parse(name, 0.6)
    return Candidate(policy, policy.budget, {}, reader.cache_bytes(policy, {}))


def decoded(reader, policy, tokens):
    """Return float64 logits after each token from the last one of the prefill on."""
    model, weights, read, tail = reader.model, reader.weights, reader.read, reader.tail

    @jax.jit
    def run(ids):
        cache = reader.cache(len(ids), policy, {})
        count = jnp.full(len(ids), read)
        first, cache = model.prefill(weights, cache, ids[:, :read], count, compute=EXACT)
        found = [first]
        for place in range(read, ids.shape[1]):
            if place > read and (place - read) % tail == 0:
                cache = model.fold(weights, cache)
            logits, cache = model.step(weights, cache, ids[:, place], compute=EXACT)
            found.append(logits)
        return jnp.stack(found, axis=1)

    return np.asarray(run(jnp.asarray(tokens)), np.float64)


def losses_of(logits, targets):
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(likely, targets[..., None], axis=-1)[..., 0]


@pytest.mark.product
@pytest.mark.parametrize("name", params(["full", *KEEPERS, *OTHERS], QUICK))
def test_measured_as_decoded(reader, rows, name):
    own = candidate(reader, name)
    every = jobs(reader, rows, [own], "model", aware=False)
    text, strings = (found for _, found in measured(reader, rows, every, False, lambda _: None))
    logits = decoded(reader, own.policy, rows.text)
    expected = losses_of(logits[:, :-1], rows.text[:, rows.read :])
    np.testing.assert_allclose(text["losses"], expected, atol=1e-4)
    for row, string in zip(rows.planted, rows.strings[:, 0], strict=True):
        ids = np.concatenate([row, string])[None]
        best = decoded(reader, own.policy, ids)[0].argmax(-1)
        place = [*rows.planted.tolist()].index(row.tolist())
        expected = best[CUE:-1] == string[CUE:]
        np.testing.assert_array_equal(strings["hits"][place][0], expected)
    assert text["prefill_seconds"] > 0
    assert text["step_seconds"] > 0
    assert (text["capped"] is None) == (name != "topp")
    if "threshold" in name:
        assert len(text["kept"]) == 2
        assert all(0 < share < 0.6 for share in text["kept"])
    assert 0 < text["bytes_read"] <= own.cache_bytes


def test_a_policy_that_reads_the_text_twice(reader, rows):
    """The losses are those behind the cache that decoding makes; a full budget changes nothing."""
    own, whole, full = (
        Candidate(policy, policy.budget, {}, reader.cache_bytes(policy, {}))
        for policy in (Policy.parse("kvzip(chunk=16)", 0.5), Policy.parse("kvzip", 1.0), FULL)
    )
    assert own.cache_bytes is None
    every = jobs(reader, rows, [full, own, whole], "model", aware=True)
    done: Counter[str] = Counter()
    told = [
        found for _, found in measured(reader, rows, every, True, lambda kind: done.update([kind]))
    ]
    of_full, of_own, of_whole = told[:3]
    np.testing.assert_allclose(of_whole["losses"], of_full["losses"], atol=1e-4)
    model, tokens = reader.model, rows.text[:, : rows.read]
    functions = decode_functions(model, Sampling(), EXACT)
    reads = readings(functions.prefill, functions.extend, tokens.tolist(), None, None)
    after = (reader.blocks - 1) * reader.tail
    room = len(tokens), rows.read + after, reader.tail
    given = own.policy, room, after, EXACT, jax.random.key(0)
    _, cache, _ = read_twice(model, reader.weights, tokens.tolist(), reads, *given)
    logits, _, _ = reader.record(tokens)
    expected = reader.losses(logits, cache, rows.text, lambda: None)
    np.testing.assert_allclose(of_own["losses"], expected, atol=1e-4)
    assert of_own["bytes_read"] <= of_own["cache_bytes"] < of_full["cache_bytes"]
    assert len(told[3:]) == 3
    assert all(np.shape(found["known"]) == np.shape(found["hits"]) for found in told[3:])
    assert done["replay"] == 2 * (2 + 1 + 1)  # text twice, strings, strings with the cues


@pytest.mark.product
def test_known_questions_end_the_prefilled_text(reader, rows):
    own = candidate(reader, "snapkv")
    every = jobs(reader, rows, [own], "model", aware=True)
    _, found = (found for _, found in measured(reader, rows, every, True, lambda _: None))
    for place, string in enumerate(rows.strings[:, 0]):
        row = rows.planted[place].copy()
        row[-CUE:] = string[:CUE]
        best = decoded(reader, own.policy, np.concatenate([row, string])[None])[0].argmax(-1)
        np.testing.assert_array_equal(found["known"][place][0], best[CUE:-1] == string[CUE:])
    assert np.shape(found["known"]) == (len(rows.planted), 1, ANSWER)


@pytest.mark.product
def test_stored_measurements_are_not_repeated(reader, rows):
    pair = [candidate(reader, name) for name in ("full", "knorm")]
    every = jobs(reader, rows, pair, "model", aware=False)
    assert len({job.key for job in every}) == len(every) == 4
    left = every[1:3]
    found = list(measured(reader, rows, left, False, lambda _: None))
    assert [job.key for job, _ in found] == [job.key for job in left]
    other = {job.key for job in jobs(reader, rows, pair, "other", aware=False)}
    assert not other & {job.key for job in every}


@pytest.mark.product
@pytest.mark.parametrize("name", params(["full", "knorm"], ["knorm"]))
def test_a_concept_model(name):
    rows = rows_of(TEXT, 32, 1, 0)
    model = matrix.concept(*matrix.CONCEPTS[0])
    reader = reader_of(model, rows)
    policy = FULL if name == "full" else Policy.parse(name, 0.9)
    logits, record, _ = reader.record(rows.text[:, : rows.read])
    cache, _ = reader.compressed(record, policy, {}, rows.text[:, : rows.read])
    found = reader.losses(logits, cache, rows.text, lambda: None)
    expected = decoded(reader, policy, rows.text)
    expected = losses_of(expected[:, :-1], rows.text[:, rows.read :])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(one_row(cache).length) == 1


@pytest.mark.product
def test_tokens_of_strings_are_known():
    strings = rows_of(TEXT, 64, 1, 200).strings
    assert 0 <= strings.min() < strings.max() < VOCAB
