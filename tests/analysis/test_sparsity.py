"""Every measure of attention sparsity equals its definition, computed in numpy for each query."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mukv.analysis import sparsity
from mukv.analysis.capture import CapturedRows, batch_rows
from mukv.analysis.samples import batched, windows
from mukv.analysis.sparsity import LEAST, MASSES, NEAR, SHARES, SINKS, measure
from mukv.core.errors import BadInput
from mukv.core.tap import capture
from tests.laws import matrix
from tests.pairs import params

LENGTH = 48
CASES = [("gqa", "rope", "reuse-window"), ("gqa-dressed", "alibi", "plain")]


def rows() -> CapturedRows:
    """Return three rows, of which the last has two documents."""
    ids = matrix.tokens(3, LENGTH)
    position = np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1))
    segment = np.ones_like(ids)
    position[2, 10:] -= 10
    segment[2, 10:] = 2
    return CapturedRows(ids, position, segment)


def taps(model, weights, given: CapturedRows):
    @jax.jit
    def look(weights, given):
        with capture() as seen:
            model.hidden(weights, *given, matrix.EXACT)
        return dict(seen)

    return look(weights, given)


@pytest.mark.parametrize("case", params(CASES, CASES[:1], "-".join))
def test_every_number_by_its_definition(case):
    model, given = matrix.build(*case), rows()
    weights = matrix.weights(model)
    # In batches of two, the second filled up with a row that must not count.
    found = measure(model, weights, batched(given, 2), LENGTH, matrix.EXACT)
    seen = taps(model, weights, given)
    for layer, measured in zip(model.layers, found, strict=True):
        attention = np.asarray(seen[f"layer{layer.index}.weights"])
        heads = attention.reshape(3, -1, LENGTH, LENGTH)
        value = np.asarray(seen[f"layer{layer.index}.value"])
        value = np.repeat(value, heads.shape[1] // value.shape[1], axis=1)
        wanted: dict[str, list] = {}
        for row, head, query in np.ndindex(3, heads.shape[1], LENGTH):
            here = given.position[row, query]
            visible = min(here + 1, layer.window or LENGTH)
            octave = int(np.ceil(np.log2(visible) - 1e-6))
            if (head, octave) != (1, measured.longest):
                continue
            w = heads[row, head, query]
            order = np.sort(w)[::-1]
            mass = np.cumsum(order)
            wanted.setdefault("curve", []).append(mass[measured.ranks - 1])
            wanted.setdefault("needed", []).append(
                [min(1 + int((mass < m * mass[-1]).sum()), visible) for m in MASSES]
            )
            exact, tops, errors = w @ value[row, head], [], []
            for share in SHARES:
                kept = np.where(w >= order[int(np.ceil(share * visible)) - 1], w, 0)
                lost = kept @ value[row, head] - exact
                tops.append(kept.sum())
                errors.append(np.linalg.norm(lost) / np.linalg.norm(exact))
            wanted.setdefault("top", []).append(tops)
            wanted.setdefault("error", []).append(errors)
            back = here - given.position[row]
            wanted.setdefault("sinks", []).append(w[given.position[row] < SINKS].sum())
            wanted.setdefault("near", []).append(w[(back < NEAR) & (w > 0)].sum())
            middle = heads[row, :, query].mean(axis=0)
            wanted.setdefault("far_from_mean", []).append(np.abs(w - middle).sum() / 2)
        last = measured.longest
        assert measured.queries[last] == len(wanted["top"])
        for name in ("top", "error", "sinks", "near", "far_from_mean"):
            got = getattr(measured, name)[1, last]
            np.testing.assert_allclose(got, np.mean(wanted[name], axis=0), rtol=1e-3, err_msg=name)
        for name in ("curve", "needed"):
            got = getattr(measured, name)
            for end, of in (("mean", np.mean), ("low", np.min), ("high", np.max)):
                right = of(wanted[name], axis=0)
                np.testing.assert_allclose(got[end][1, last], right, rtol=1e-3, err_msg=name)


@pytest.mark.product
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_most_read_entry_by_its_definition(case):
    """The most read entry of a row equals the entry with the largest summed weight, in the document
    with the most queries that see enough entries."""
    model, given = matrix.build(*case), rows()
    weights = matrix.weights(model)
    found = measure(model, weights, batched(given, 2), LENGTH, matrix.EXACT)
    seen = taps(model, weights, given)
    for layer, measured in zip(model.layers, found, strict=True):
        heads = np.asarray(seen[f"layer{layer.index}.weights"]).reshape(3, -1, LENGTH, LENGTH)
        heads = np.concatenate([heads, heads.mean(axis=1, keepdims=True)], axis=1)
        enough = min(LEAST, layer.window or LENGTH)
        shares, places = np.zeros((3, len(heads[0]))), np.zeros((3, len(heads[0])), int)
        for row in range(3):
            sees = np.minimum(given.position[row] + 1, layer.window or LENGTH) >= enough
            counts = {s: (sees & (given.segment[row] == s)).sum() for s in set(given.segment[row])}
            main = max(counts, key=lambda s: counts[s])
            inside = given.segment[row] == main
            mass = heads[row][:, sees & inside].sum(axis=1) / counts[main]
            places[row] = given.position[row, np.argmax(np.where(inside, mass, 0), axis=1)]
            shares[row] = np.where(inside, mass, 0).max(axis=1)
        for head, entry in enumerate(measured.most_read):
            assert entry.position == np.median(places[:, head])
            np.testing.assert_allclose(entry.share, shares[:, head].mean(), rtol=1e-4)
            np.testing.assert_allclose(entry.first, (places[:, head] < SINKS).mean(), rtol=1e-4)


def test_agreement_of_a_head_with_itself_is_one():
    model, given = matrix.build("gqa", "rope", "plain"), rows()
    (first, _) = measure(model, matrix.weights(model), [given], LENGTH, matrix.EXACT)
    assert LENGTH > LEAST
    np.testing.assert_allclose(np.diag(first.agreement), 1, atol=1e-6)
    np.testing.assert_allclose(first.agreement, first.agreement.T)
    assert 0 < first.agreement[0, 1] < 1


def test_octaves_and_ranks():
    got = sparsity.octave(np.arange(1, 10))
    assert got.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]
    assert sparsity.ranks(20).tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 20]


def test_windows_are_spread_and_short_texts_refused():
    texts = [np.arange(25), np.arange(100, 118)]
    found = windows("notes", texts, 8, 3)
    assert found.tokens[:, 0].tolist() == [0, 16, 108]
    with pytest.raises(BadInput, match="at most 25: notes"):
        windows("notes", texts, 30, 3)


def test_memory_of_a_pass_is_bounded():
    model = matrix.build("gqa", "rope", "plain")
    assert batch_rows(model, 1 << 13) == 1
    assert batch_rows(model, 1 << 10) == 4


def test_attention_to_entries_of_several_tokens_is_refused():
    model, given = matrix.build("hca", "rope", "plain"), rows()
    with pytest.raises(BadInput, match="hca in layer 0"):
        measure(model, matrix.weights(model), batched(given, 2), LENGTH, matrix.EXACT)
