"""Answers to lm-evaluation-harness equal log-probabilities computed from the model's logits."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

import mukv
from mukv.core.errors import BadInput
from mukv.runs.harness import Answers, harness_model

pytestmark = pytest.mark.xdist_group("trained")


def ask(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def model(trained):
    return mukv.load(trained)


def log_likelihood(model, ids):
    scores = np.asarray(model.logits(ids), np.float64)[0]
    return (scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)))[:-1]


PAIRS = [("Déjà", " vu number"), ("", "Déjà"), ("Déjà vu ", "number 3."), ("x" * 70, "y")]


@pytest.mark.product
def test_likelihood_of_continuations(model):
    """Likelihoods of rows of different lengths equal sums from logits; a space before a word counts
    as part of it."""
    found = Answers(model).loglikelihood([ask(*pair) for pair in PAIRS])
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        ids = np.array(model.encode(context + continuation))
        table = log_likelihood(model, ids)
        known = len(model.encode(context.rstrip()))
        chosen = table[np.arange(len(ids) - 1), ids[1:]][known - 1 :]
        assert total == pytest.approx(chosen.sum(), rel=1e-4)
        assert greedy == (table.argmax(axis=-1)[known - 1 :] == ids[known:]).all()


@pytest.mark.product
def test_the_greedy_continuation_is_known_as_such(model):
    text = model.generate("Déjà", max_tokens=6).text
    (found,) = Answers(model).loglikelihood([ask("Déjà", text)])
    assert found[1] or "\ufffd" in text


@pytest.mark.product
def test_likelihood_of_texts(model):
    (found,) = Answers(model).loglikelihood_rolling([ask("Déjà vu number 3. " * 4)])
    (pair,) = Answers(model).loglikelihood([ask("", "Déjà vu number 3. ")])
    ids = np.array(model.encode("Déjà vu number 3. " * 4))
    assert found == pytest.approx(-model.evaluate([ids]).loss * (len(ids) - 1), rel=1e-6)
    assert found < pair[0] < 0


def test_an_end_token_is_put_only_before_what_has_no_context(model):
    """For a tokenizer without start tokens, as the harness's own classes do."""
    encode = model.tokenizer.encode
    tokenizer = SimpleNamespace(start=(), encode=encode)
    network = SimpleNamespace(context=None)
    answers = Answers(SimpleNamespace(tokenizer=tokenizer, ends=(7, 8), network=network))
    assert answers._pair("Déjà", " vu") == ([*encode("Déjà vu")], len(encode("Déjà")))
    assert answers._pair("", "vu") == ([7, *encode("vu")], 1)


def test_continuations_end_at_stop_texts(model):
    whole = model.generate("Déjà", max_tokens=12).text
    settings = {"until": [whole[3:5], "never"], "max_gen_toks": 12, "do_sample": False}
    found = Answers(model).generate_until([ask("Déjà", settings), ask("Déjà", {})])
    assert found[0] == whole.split(whole[3:5])[0]
    assert found[1].startswith(whole)
    assert len(found[1]) > len(whole)


def test_it_is_a_model_of_the_harness(trained):
    if find_spec("lm_eval") is None:
        with pytest.raises(BadInput, match=r"mukv\[eval\]"):
            harness_model(trained)
        return
    from lm_eval.api.model import LM

    assert isinstance(harness_model(trained), LM)
