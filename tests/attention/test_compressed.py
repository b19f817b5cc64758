"""Compressed attention: equivalences, what a query may see, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import HCA, Mask
from mukv.attention.mixer import Carried
from mukv.cache import Policy
from mukv.core.errors import BadInput
from mukv.core.params import map_params
from mukv.model.counting import cache_bytes
from mukv.position import CoPE, RoPE
from tests.laws import matrix
from tests.laws.matrix import EXACT, LENGTH, PLAIN
from tests.pairs import params

TOKENS, D_MODEL = 13, 16
SMALL = HCA(
    RoPE(pairing="interleaved"),
    heads=4,
    head_dim=8,
    rope_dim=4,
    query_rank=10,
    window=3,
    every=4,
    groups=2,
    output_rank=6,
    sinks="learned",
)


def weights(attention: HCA) -> tuple[dict, dict]:
    """Draw random weights for writing and reading. Those of compressed entries are drawn last, so
    that all rates share the others."""
    random = np.random.default_rng(0)

    def one(param):
        drawn = max(param.fan_in_size, 1) ** -0.5 * random.standard_normal(param.shape)
        return jnp.asarray(drawn + (param.init == "ones"), jnp.float32)

    read = map_params(one, attention.read_params(D_MODEL))
    declared = attention.write_params(D_MODEL)
    last = declared.pop("compressed", None)
    write = map_params(one, declared)
    return write | ({} if last is None else {"compressed": map_params(one, last)}), read


def stream(seed: int = 9) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((2, TOKENS, D_MODEL))
    return drawn.astype(np.float32)


def run(attention: HCA, write: dict, read: dict, x: np.ndarray, only: str | None = None):
    """Run the layer over whole rows. only: name of the store that is read; None for all."""
    position = jnp.tile(jnp.arange(TOKENS), (2, 1))

    @jax.jit
    def forward(x):
        written = attention.by_store(attention.write(write, x, position))
        bags = [
            bag.entries(written[name], position)
            for name, bag in attention.bags.items()
            if only in (None, name)
        ]
        return attention.read(read, x, position, bags, Mask(aligned=True), PLAIN)[0]

    return np.asarray(forward(x))


def test_at_rate_1_without_its_window_it_is_attention_to_normed_values():
    """At rate 1 without a window the layer equals attention in numpy with shared key and value
    R(rms(x W) gain), a sink, and the rotation undone on the output."""
    attention = dataclasses.replace(SMALL, every=1)
    write, read = weights(attention)
    x, own = stream(), write["compressed"]
    place = jnp.tile(jnp.arange(TOKENS), (2, 1))

    def unit(array):
        array = np.asarray(array)
        return array / np.sqrt((array**2).mean(-1, keepdims=True) + 1e-6)

    def turned(array, sign=1):
        """Return an array [batch head token dim] with its last dimensions rotated."""
        rotated = attention.position.rotate(jnp.asarray(array[..., 4:]), sign * place[:, None])
        return np.concatenate([array[..., :4], rotated], axis=-1)

    key = turned((unit(x @ own["value"]) * np.asarray(own["norm"]["gain"]))[:, None])
    latent = unit(x @ read["query_latent"]) * np.asarray(read["query_norm"]["gain"])
    query = turned(unit(np.einsum("btr,rhd->bhtd", latent, read["query"])))
    logits = np.einsum("bhqd,bnkd->bhqk", query, key) / np.sqrt(8)
    share = np.exp(np.where(np.tri(TOKENS, dtype=bool), logits, -np.inf))
    total = share.sum(-1, keepdims=True) + np.exp(np.asarray(read["sinks"])[:, None, None])
    heads = turned(np.einsum("bhqk,bnkd->bhqd", share / total, key), -1)
    groups = heads.reshape(2, 2, 2, TOKENS, 8)
    low = np.einsum("bghtd,ghdr->btgr", groups, read["output_down"])
    expected = np.einsum("btgr,gre->bte", low, read["output_up"])
    found = run(attention, write, read, x, only="compressed")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.product
def test_equal_gates_make_the_mean_then_its_norm():
    write, _ = weights(SMALL)
    own = write["compressed"]
    flat = {**own, "gate": 0 * own["gate"], "bias": 0 * own["bias"]}
    x, place = stream(), jnp.tile(jnp.arange(TOKENS), (2, 1))
    written = SMALL.write({**write, "compressed": flat}, jnp.asarray(x), place)
    value = np.asarray(x @ own["value"])[:, :12].reshape(2, 3, 4, 8).mean(2)
    mean = (
        value / np.sqrt((value**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(own["norm"]["gain"])
    )
    rotated = SMALL.position.rotate(
        jnp.asarray(mean[:, None, :, 4:]), jnp.asarray([[[0, 4, 8]]] * 2)
    )
    found = np.asarray(written["compressed"]["key"])[:, 0, :3]
    np.testing.assert_allclose(found[..., :4], mean[..., :4], atol=1e-6)
    np.testing.assert_allclose(found[..., 4:], rotated[:, 0], atol=1e-6)


def test_a_rate_beyond_the_length_leaves_the_window_alone():
    slow = dataclasses.replace(SMALL, every=TOKENS + 1)
    write, read = weights(slow)
    alone = dataclasses.replace(SMALL, every=None)
    found = run(slow, write, read, stream())
    bare = {name: weight for name, weight in write.items() if name != "compressed"}
    np.testing.assert_allclose(found, run(alone, bare, read, stream()), atol=1e-6)
    assert np.abs(found - run(SMALL, *weights(SMALL), stream())).max() > 1e-3


@pytest.mark.parametrize("entry", [0, 1, 2])
def test_an_entry_is_seen_from_its_last_token_on(entry):
    """A change of the first token of entry i reaches the query at that token, through the window of
    one, and then only queries from i m + m - 1 on."""
    attention = dataclasses.replace(SMALL, window=1)
    write, read = weights(attention)
    x = stream()
    changed = x.copy()
    changed[:, entry * 4] += 1
    difference = np.abs(run(attention, write, read, x) - run(attention, write, read, changed)).max(
        axis=(0, 2)
    )
    first = entry * 4
    assert (difference[:first] == 0).all()
    assert difference[first] > 1e-4
    assert (difference[first + 1 : first + 3] == 0).all()
    assert (difference[first + 3 :] > 1e-5).all()


@pytest.mark.product
def test_only_distances_matter():
    """Shifting all positions by a multiple of the rate does not change the output, since the
    rotation of the values is undone."""
    write, read = weights(SMALL)
    x = jnp.asarray(stream())

    def at(shift):
        position = jnp.tile(jnp.arange(TOKENS), (2, 1)) + shift
        written = SMALL.write(write, x, position)
        bags = [bag.entries(written[name], position) for name, bag in SMALL.bags.items()]
        return np.asarray(SMALL.read(read, x, position, bags, Mask(aligned=True), PLAIN)[0])

    np.testing.assert_allclose(at(400), at(0), atol=1e-4)


PIECES = [(13,), (1,) * 13, (3, 1, 5, 4), (2, 9, 2), (4, 4, 4, 1)]


@pytest.mark.product
@pytest.mark.parametrize("pieces", params(PIECES, PIECES[4:]))
def test_entries_in_pieces_of_any_size(pieces):
    """Entries written in pieces of any size equal those written at once. The second row has one
    valid token less in each piece."""
    write, _ = weights(SMALL)
    x = jnp.asarray(stream())
    whole = SMALL.write(write, x, jnp.tile(jnp.arange(TOKENS), (2, 1)))["compressed"]["key"]
    count, found = np.zeros(2, int), [[], []]
    states = {"unfinished": SMALL.states["unfinished"].zeros(2)}
    for piece in pieces:
        more = np.array([piece, max(piece - 1, 1)])
        place = count[:, None] + np.arange(piece)
        rows = jnp.take_along_axis(x, jnp.minimum(place, TOKENS - 1)[..., None], axis=1)
        written = SMALL.write(write, rows, jnp.asarray(place), Carried(states, jnp.asarray(more)))
        states = {"unfinished": written["unfinished"]}
        for row in range(2):
            made = (count[row] + more[row]) // 4 - count[row] // 4
            found[row] += list(np.asarray(written["compressed"]["key"])[row, 0, :made])
        count += more
    for row in range(2):
        assert len(found[row]) == count[row] // 4 > 1
        np.testing.assert_allclose(
            found[row], np.asarray(whole)[row, 0, : len(found[row])], atol=1e-6
        )


POLICIES = ["int8", "streaming:1.0", "knorm:1.0+int8", "clusters:1.0"]


@pytest.mark.product
@pytest.mark.parametrize("name", POLICIES)
def test_policies_act_on_the_compressed_entries(name):
    """With full budget, a policy changes the logits only by the rounding of int8."""
    model = matrix.build("hca", "rope", "plain")
    model = dataclasses.replace(model, attention=dataclasses.replace(model.attention, every=2))
    tree = matrix.weights(model)
    ids, cut = matrix.tokens(), 7
    policy = Policy.parse(name)

    @jax.jit
    def decode(weights, ids):
        def read(policy):
            cache = model.empty_cache(2, LENGTH, tail=2, dtype=EXACT.type, policy=policy)
            count = jnp.full(2, cut)
            scores, cache = model.prefill(weights, cache, ids[:, :cut], count, compute=EXACT)
            found = [scores]
            for place in range(cut, LENGTH):
                scores, cache = model.step(weights, cache, ids[:, place], compute=EXACT)
                cache = model.fold(weights, cache)
                found.append(scores)
            return jnp.stack(found)

        return read(Policy()), read(policy)

    plain, under = decode(model.unstack(tree), ids)
    np.testing.assert_allclose(under, plain, atol=0.1 if "int8" in name else 2e-5)
    assert (plain != under).any() == ("int8" in name)
    bytes_of = [cache_bytes(model, 2, LENGTH, 2, EXACT.type, each) for each in (Policy(), policy)]
    assert bytes_of[0] != bytes_of[1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HCA(CoPE()), "position: got .cope"),
        (lambda: HCA(heads=4, groups=3), "groups: got 3"),
        (lambda: HCA(head_dim=8, rope_dim=10), "rope_dim: got 10"),
        (lambda: HCA(every=0), "every: got 0"),
        (lambda: HCA(window=0), "window: got 0"),
        (lambda: HCA(RoPE(), rope_dim=3), "rotates pairs"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()


@pytest.mark.parametrize(
    ("every", "name", "words"),
    [
        (3, "snapkv", "one entry per 3 tokens .hca., which can't be chosen by queries"),
        (3, "topk", "keys and values of the same numbers"),
        (None, "int8", "each layer has a window"),
    ],
)
def test_policies_that_do_not_fit(every, name, words):
    model = matrix.build("hca", "rope", "plain")
    model = dataclasses.replace(model, attention=dataclasses.replace(model.attention, every=every))
    with pytest.raises(BadInput, match=words):
        model.empty_cache(1, LENGTH, 4, EXACT.type, Policy.parse(name, 0.5))
