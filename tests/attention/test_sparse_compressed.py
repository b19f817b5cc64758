"""CSA: equivalences, the indexer's choice and loss, entries in pieces, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import CSA, HCA, EntryStore, Indexer, Mask
from mukv.attention.indexer import among, largest
from mukv.attention.mixer import Carried
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.params import map_params, named
from mukv.model import Decoder
from mukv.position import RoPE
from tests.laws.matrix import PLAIN
from tests.pairs import params

TOKENS, D_MODEL, EVERY = 13, 16, 3
SMALL = CSA(
    RoPE(pairing="interleaved"),
    heads=4,
    head_dim=8,
    rope_dim=4,
    query_rank=10,
    window=4,
    every=EVERY,
    groups=2,
    output_rank=6,
    sinks="learned",
    indexer=Indexer(heads=8, width=6, top_k=2),
)
POSITION = jnp.tile(jnp.arange(TOKENS), (2, 1))


def indexed(top_k: int | None) -> CSA:
    return dataclasses.replace(SMALL, indexer=dataclasses.replace(SMALL.indexer, top_k=top_k))


@pytest.fixture(scope="module")
def weights() -> dict:
    """Return random weights for writing and for reading."""
    random = np.random.default_rng(0)

    def one(param):
        drawn = max(param.fan_in_size, 1) ** -0.5 * random.standard_normal(param.shape)
        return jnp.asarray(drawn + (param.init == "ones"), jnp.float32)

    declared = {"write": SMALL.write_params(D_MODEL), "read": SMALL.read_params(D_MODEL)}
    return map_params(one, declared)


@pytest.fixture(scope="module")
def x() -> jax.Array:
    drawn = np.random.default_rng(9).standard_normal((2, TOKENS, D_MODEL))
    return jnp.asarray(drawn, jnp.float32)


def run(attention, weights, x, compute=PLAIN):
    """Run the layer over whole rows; return the output and the reported numbers."""
    written = attention.by_store(attention.write(weights["write"], x, POSITION))
    bags = [bag.entries(written[name], POSITION) for name, bag in attention.bags.items()]
    mask = Mask(aligned=True)
    y, reported = attention.read(weights["read"], x, POSITION, bags, mask, compute)
    return y, reported or {}


@pytest.mark.product
def test_without_the_chunk_before_and_with_all_entries_it_is_hca(weights, x):
    own = weights["write"]["compressed"]
    off = {**own, "bias": own["bias"].at[:, 0].set(-1e9)}
    same = {f.name: getattr(SMALL, f.name) for f in dataclasses.fields(HCA) if f.name != "kind"}
    hca = HCA(**same)
    last = {name: own[name][:, 1] for name in ("value", "gate", "bias")} | {"norm": own["norm"]}
    simple = {
        "write": {name: weights["write"][name] for name in ("key", "norm")} | {"compressed": last},
        "read": {name: each for name, each in weights["read"].items() if name != "index"},
    }
    given = {**weights, "write": {**weights["write"], "compressed": off}}
    for top_k in (None, TOKENS):
        found = run(indexed(top_k), given, x)[0]
        np.testing.assert_allclose(found, run(hca, simple, x)[0], atol=2e-6)
    assert np.abs(run(SMALL, given, x)[0] - found).max() > 1e-3
    assert np.abs(run(indexed(None), weights, x)[0] - found).max() > 1e-3


@pytest.mark.product
def test_chunks_of_queries_give_the_same(weights, x):
    """Chunks of 3 queries equal one pass in outputs, reported numbers and gradients."""

    def value(weights, x, compute):
        y, reported = run(SMALL, weights, x, compute)
        return jnp.sum(jnp.square(y)) + jnp.sum(reported["penalty"]), reported

    def of(compute):
        def given(weights, x):
            return value(weights, x, compute)

        return jax.jit(jax.value_and_grad(given, argnums=(0, 1), has_aux=True))(weights, x)

    chunked = of(Compute("float32", "float32", attention_chunk=3))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), chunked, of(PLAIN)
    )


def test_the_indexer_learns_from_its_loss_alone(weights, x):
    def output(weights):
        return jnp.sum(jnp.square(run(SMALL, weights, x)[0]))

    def penalty(weights):
        return jnp.sum(run(SMALL, weights, x)[1]["penalty"])

    for loss, learns in ((output, False), (penalty, True)):
        for name, gradient in named(jax.jit(jax.grad(loss))(weights)).items():
            assert (np.abs(gradient).max() > 0) == ((".index." in name) == learns), name


@pytest.mark.product
@pytest.mark.parametrize("top_k", [None, 2])
def test_an_indexer_without_weights_is_uniform(weights, x, top_k):
    read = weights["read"]
    index = {**read["index"], "weight": 0 * read["index"]["weight"]}
    given = {**weights, "read": {**read, "index": index}}
    reported = run(indexed(top_k), given, x)[1]
    np.testing.assert_allclose(reported["index_kl"], reported["index_kl_uniform"], atol=1e-6)
    assert (reported["index_kl"] > 1e-3).all()


def test_of_equal_scores_the_earliest_are_chosen():
    score = jnp.asarray([[[0.0, 3.0, -0.0, 0.0, 5.0, 0.0]]])
    visible = jnp.asarray([[[True, True, True, True, False, True]]])
    assert largest(score, visible, 3).tolist() == [[[1, 0, 2]]]
    order = jnp.asarray([3, 5, 0, 4, 1, 2])
    moved = largest(score[..., order], visible[..., order], 3, order[None])
    assert order[moved].tolist() == [[[1, 0, 2]]]
    assert largest(score, visible, 6).tolist() == [[[1, 0, 2, 3, 5, -1]]]
    assert among(largest(score, visible, 6), 6).tolist() == visible.tolist()


PIECES = [(1,) * 13, (3, 1, 5, 4), (2, 9, 2)]


@pytest.mark.product
@pytest.mark.parametrize("pieces", params(PIECES, PIECES[1:2]))
def test_entries_in_pieces_of_any_size(weights, x, pieces):
    """Entries written in pieces of any size equal those written at once. The second row has one
    valid token less in each piece."""
    whole = SMALL.write(weights["write"], x, POSITION)["compressed"]
    count, found = np.zeros(2, int), {name: [[], []] for name in whole}
    states = {name: state.zeros(2) for name, state in SMALL.states.items()}
    for piece in pieces:
        more = np.array([piece, max(piece - 1, 1)])
        place = count[:, None] + np.arange(piece)
        rows = jnp.take_along_axis(x, jnp.minimum(place, TOKENS - 1)[..., None], axis=1)
        carried = Carried(states, jnp.asarray(more))
        written = SMALL.write(weights["write"], rows, jnp.asarray(place), carried)
        states = {name: written[name] for name in states}
        for name, rows_of in found.items():
            for row in range(2):
                made = (count[row] + more[row]) // EVERY - count[row] // EVERY
                rows_of[row] += list(np.asarray(written["compressed"][name])[row, 0, :made])
        count += more
    for name, rows_of in found.items():
        for row in range(2):
            assert len(rows_of[row]) == count[row] // EVERY > 1
            expected = np.asarray(whole[name])[row, 0, : len(rows_of[row])]
            np.testing.assert_allclose(rows_of[row], expected, atol=2e-6)


@pytest.mark.parametrize("most", [None, 1, 3, 100])
def test_entries_that_are_read_on_average(most):
    store = EntryStore(every=4)
    read = [min(t // 4, most or t) for t in range(1, 22)]
    assert store.mean_visible(21, most) == pytest.approx(np.mean(read))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CSA(RoPE(), rope_dim=16, indexer=Indexer(width=8)), "indexer.width: got 8"),
        (lambda: CSA(every=0), "every: got 0"),
        (lambda: Indexer(top_k=0), "top_k: got 0"),
        (lambda: Indexer(loss=0.0), "loss: got 0"),
        (
            lambda: Decoder(attention=CSA(window=6, every=8)).layers,
            "window: got 6; at least 7 in layer 0",
        ),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()
