"""Scores of Compactor equal its formula in float64, after a prompt and after a fold."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mukv.cache import Policy
from tests.laws.test_policies import One, best_of, positions

SINKS, RECENT, BLOCK, SKETCH = 2, 3, 8, 6
NAME = f"compactor(sinks={SINKS},recent={RECENT},block={BLOCK},sketch={SKETCH})"


@pytest.fixture(scope="module")
def one():
    return One()


def standard(score):
    return (score - score.mean()) / score.std(ddof=1)


def leverage(one, row, places):
    """Compute leverage scores [head entry] of keys after undoing RoPE in complex numbers."""
    key = np.float64(one.key[row][:, places])
    turn = one.place[row][places][:, None] * 100.0 ** -(np.arange(4) / 4)
    still = (key[..., :4] + 1j * key[..., 4:]) * np.exp(-1j * turn)
    still = np.concatenate([still.real, still.imag], axis=-1)
    draw = np.asarray(jax.random.normal(jax.random.key(0), (8, SKETCH)))
    x = (still - still.mean(1, keepdims=True)) @ draw / SKETCH**0.5
    inner = np.linalg.inv(x.swapaxes(1, 2) @ x + 0.01 * np.eye(SKETCH))
    return np.einsum("hks,hst,hkt->hk", x, inner, x)


def attention(one, row, places):
    """Compute attention [head entry] within blocks, unscaled and not causal, times |v|."""
    found = []
    for start in range(0, len(places), BLOCK):
        block = places[start : start + BLOCK]
        query = np.float64(np.asarray(one.queries)[row][:, :, block])
        weights = np.exp(np.einsum("hgqd,hkd->hgqk", query, np.float64(one.key[row][:, block])))
        weights /= weights.sum(-1, keepdims=True)
        found.append(weights.sum(2).mean(1))
    return np.concatenate(found, 1) * np.linalg.norm(one.value[row][:, places], axis=-1)


def smooth(x):
    return np.stack([np.convolve(row, np.ones(3) / 3, "same") for row in x])


@pytest.mark.product
@pytest.mark.parametrize(("options", "blend"), [("", 0.6), (",blend=0.1", 0.1)])
def test_a_prompt(one, options, blend):
    body, _ = one.body(NAME[:-1] + options + ")", 0.4)
    for row, count in enumerate(one.count):
        places = list(range(SINKS, count - RECENT))
        score = np.full((2, count), np.inf)
        score[:, places] = standard(smooth(attention(one, row, places)))
        score[:, places] += blend * standard(leverage(one, row, places))
        for head in range(2):
            assert positions(body, row, head) == best_of(score[head], int(count * 0.4))


@pytest.mark.product
def test_a_fold(one):
    """After a fold, heads keep the entries with the best scores: those of the prompt keep their
    attention, its newest ones get the mean."""
    body, later = one.body(NAME, 14.0)
    for row, count in enumerate(one.count):
        early = list(range(SINKS, count - RECENT))
        first = attention(one, row, early)
        new = list(range(one.length, one.x.shape[1] - RECENT))
        own = attention(one, row, new)
        raw, spread = [], []
        for head in range(2):
            kept = [p for p in positions(body, row, head) if p >= SINKS]
            old = [first[head][p - SINKS] if p in early else first.mean() for p in kept]
            raw.append(np.append(old, own[head]))
            spread.append(leverage(one, row, [*kept, *new])[head])
        number = SINKS + len(raw[0]) + RECENT
        read = count + one.x.shape[1] - one.length
        score = standard(smooth(np.array(raw))) + (1 - 14 / read) * standard(np.array(spread))
        for head in range(2):
            places = [*positions(body, row, head), *range(one.length, one.x.shape[1])]
            whole = np.full(number, np.inf)
            whole[SINKS:-RECENT] = score[head]
            expected = [int(one.place[row][places[i]]) for i in best_of(whole, 14)]
            assert positions(later, row, head) == expected


def test_names():
    assert str(Policy.parse("compactor:0.5")) == "compactor:0.5"
    assert Policy.parse("kvpress:compactor").keep == Policy.parse("compactor").keep
