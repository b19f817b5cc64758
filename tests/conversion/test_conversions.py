"""Conversions to a smaller memory are exact where the dropped part carries no information.
Converted models are causal, and decode as they prefill."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import Eviction, Grouped
from mukv.conversion import CONVERSIONS, check, convert, examples_of, parse, windows
from mukv.conversion.fits import components, fit, rotation
from mukv.conversion.kv_heads import best_groups
from mukv.conversion.rotary import commuting, pairs_of
from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.model import Decoder, Layer, Stage
from mukv.model.counting import cache_bytes
from mukv.position import ALiBi, CoPE, NoPE, RoPE, YaRN
from mukv.scaling.parameterization import Constants, Scaling
from tests.laws import matrix
from tests.laws.matrix import D_MODEL, EXACT, VOCAB
from tests.laws.test_equivalences import decoded
from tests.pairs import params

H, G, D = 8, 4, 8
POSITIONS = {
    "rope": RoPE(base=100.0),
    "partial, interleaved": RoPE(base=100.0, partial=0.5, pairing="interleaved"),
    "p-rope": RoPE(base=100.0, p=0.5),
    "yarn": RoPE(base=100.0, scaling=YaRN(factor=4.0, original_length=16, fast=2.0)),
}
IDS = matrix.tokens()


PLAIN = (Stage(repeats=2),)


def source(position=POSITIONS["rope"], plan=PLAIN, **changes) -> Decoder:
    attention = Grouped(position=position, heads=H, kv_heads=G, head_dim=D, **changes)
    return Decoder(vocab_size=VOCAB, d_model=D_MODEL, attention=attention, plan=plan)


QUICK = replace(EXACT, unroll=False)
forward = lru_cache(partial(matrix.logits, compute=QUICK))


def logits(model: Decoder, weights, ids=IDS) -> np.ndarray:
    """Return the logits of the training forward pass; a model is compiled once."""
    position = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    return np.asarray(forward(model)(weights, ids, position, np.zeros_like(ids)))


def assert_same(one, two) -> None:
    np.testing.assert_allclose(logits(*one), logits(*two), atol=1e-4)


def converted(model, weights, to, calibrated=True):
    examples = None
    if calibrated:
        rows = matrix.tokens(24, seed=5)
        examples = examples_of(model, weights, rows, compute=QUICK)
    return convert(model, weights, parse(to), examples)


@pytest.mark.product
@pytest.mark.parametrize(
    ("position", "calibrated"),
    params(
        list(itertools.product(POSITIONS, [True, False])),
        [("rope", False), ("partial, interleaved", True)],
        unpack=True,
    ),
)
def test_conversions_with_all_heads_and_ranks_are_exact(position, calibrated):
    model = source(POSITIONS[position])
    weights = matrix.weights(model)
    turning = int(model.attention.position.partial * D)
    full = (f"gqa:{G}", f"gqa(by=similarity):{G}", f"shared_kv:{2 * D}", "reuse:1")
    for to in (*full, f"mla(rope={G}):{2 * G * D - G * turning}"):
        made = converted(model, weights, to, calibrated)
        difference = np.abs(logits(*made) - logits(model, weights)).max()
        assert difference < 1e-4, to


@pytest.mark.product
@pytest.mark.parametrize(
    "to", params(["shared_kv:16", "mla(rope=4):32"], ["mla(rope=4):32"], unpack=False)
)
def test_decode_is_prefill(to):
    model = source()
    weights = matrix.weights(model)
    found = decoded(*converted(model, weights, to))
    wanted = logits(model, weights)[:, -found.shape[1] :]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.product
@pytest.mark.parametrize(
    "to", ["mqa", "gqa(by=similarity):2", "shared_kv:10", "mla(rope=2):7", "reuse:2"]
)
def test_smaller_models_differ_and_are_causal(to):
    model = source()
    weights = matrix.weights(model)
    made, smaller = converted(model, weights, to)
    found = logits(made, smaller)
    assert np.abs(found - logits(model, weights)).max() > 1e-2
    changed = IDS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    np.testing.assert_array_equal(logits(made, smaller, changed)[:, :7], found[:, :7])


def test_heads_that_neighbours_share_are_their_mean():
    model = source(biases=("query", "key", "value", "output"))
    weights = matrix.weights(model)
    made, smaller = converted(model, weights, "gqa:2")
    before, after = (each["stage0"]["slot0"] for each in (weights, smaller))
    for name in ("key", "value", "key_bias", "value_bias"):
        leaf = before["write"][name]
        axis = leaf.ndim - 2
        pairs = np.split(leaf, 2, axis=axis)
        means = np.concatenate([pair.mean(axis=axis, keepdims=True) for pair in pairs], axis=axis)
        np.testing.assert_allclose(after["write"][name], means, atol=1e-6)
    for name, leaf in named(before["read"]).items():
        np.testing.assert_array_equal(named(after["read"])[name], leaf)
    assert made.attention.kv_heads == 2


def with_copied_heads(model: Decoder, few: int, seed: int = 0):
    """Return weights whose KV heads are copies of `few` heads in another order, each multiplied by
    a matrix that its queries and outputs invert."""
    random = np.random.default_rng(seed)
    pairs = pairs_of(model.attention.position, D)
    weights = matrix.weights(model)
    write = weights["stage0"]["slot0"]["write"]
    order = random.permutation(G)
    for repeat in range(2):
        for place, head in enumerate(order):
            first = order[place % few]
            if place < few:
                continue
            phase = np.exp(1j * random.uniform(0, 7, len(pairs.first)))
            rest = np.linalg.qr(random.standard_normal((len(pairs.rest),) * 2))[0]
            turn = pairs.matrix(phase, rest)
            other = np.linalg.qr(random.standard_normal((D, D)))[0]
            write["key"][repeat][:, head] = write["key"][repeat][:, first] @ turn
            write["value"][repeat][:, head] = write["value"][repeat][:, first] @ other
    return weights


TURNED = list(itertools.product([*POSITIONS.values(), NoPE()], [1, 2], [True, False]))


@pytest.mark.parametrize(
    ("position", "few", "calibrated"),
    params(TURNED, [TURNED[3], TURNED[6], TURNED[17]], unpack=True),
)
def test_heads_that_are_rotated_copies_become_one_without_loss(position, few, calibrated):
    model = source(position)
    weights = with_copied_heads(model, few)
    made = converted(model, weights, f"gqa(by=similarity):{few}", calibrated)
    assert np.abs(logits(*made) - logits(model, weights)).max() < 1e-4
    assert made[0].attention.kv_heads == few


def test_values_that_follow_from_keys_are_not_stored():
    model = source()
    weights = matrix.weights(model)
    write = weights["stage0"]["slot0"]["write"]
    mix = np.random.default_rng(0).standard_normal((2, G, D, D))
    write["value"] = np.einsum("legd,lgdv->legv", write["key"], mix).astype("float32")
    assert_same((model, weights), converted(model, weights, "shared_kv"))


@pytest.mark.parametrize("position", params(["rope", "partial, interleaved"], ["rope"]))
def test_mla_is_exact_for_keys_and_values_of_low_rank(position):
    """MLA of rank 5 is exact for values of rank 5 and keys that differ by complex factors; rank 4
    is not."""
    model = source(POSITIONS[position])
    weights, random = matrix.weights(model), np.random.default_rng(0)
    write, pairs = weights["stage0"]["slot0"]["write"], pairs_of(POSITIONS[position], D)
    for repeat in range(2):
        for head in range(1, G):
            factor = random.standard_normal((2, len(pairs.first))).T @ [1, 1j]
            turn = pairs.matrix(factor, np.zeros((len(pairs.rest),) * 2))
            write["key"][repeat][:, head] = write["key"][repeat][:, 0] @ turn
        write["key"][repeat][..., pairs.rest] = 0
    shape = write["value"].shape
    narrow = random.standard_normal((2, D_MODEL, 5)) @ random.standard_normal((2, 5, G * D))
    write["value"] = (narrow / 5).reshape(shape).astype("float32")
    made = converted(model, weights, "mla:5")
    assert_same((model, weights), made)
    worse = converted(model, weights, "mla:4")
    assert np.abs(logits(*worse) - logits(model, weights)).max() > 1e-2


@pytest.mark.parametrize("entries", ["mean", "first"])
def test_reuse_is_exact_for_layers_with_the_same_input(entries):
    """Reuse is exact if both layers have the same input, since the first adds nothing to the
    stream."""
    model = source()
    weights, random = matrix.weights(model), np.random.default_rng(0)
    slot, pairs = weights["stage0"]["slot0"], pairs_of(model.attention.position, D)
    slot["read"]["output"][0] = slot["mlp"]["down"][0] = 0
    slot["attention_norm"]["gain"][1] = slot["attention_norm"]["gain"][0]
    for head, other in enumerate([2, 0, 3, 1]):
        phase = np.exp(1j * random.uniform(0, 7, len(pairs.first)))
        turn = pairs.matrix(phase, np.zeros((0, 0)))
        mix = np.linalg.qr(random.standard_normal((D, D)))[0]
        key, value = slot["write"]["key"], slot["write"]["value"]
        key[1][:, other] = key[0][:, head] @ turn
        value[1][:, other] = value[0][:, head] @ mix
    made, smaller = converted(model, weights, f"reuse(entries={entries}):2")
    assert made.plan == (Stage((Layer(), Layer(reads=-1))),)
    assert_same((model, weights), (made, smaller))


@pytest.mark.parametrize(
    ("to", "numbers"),
    [
        ("gqa:2", 2 * 2 * D * 4),
        ("mqa", 2 * D * 4),
        ("shared_kv", G * D * 4),
        ("shared_kv:11", G * 11 * 4),
        ("mla:10", (10 + D) * 4),
        ("mla(rope=3):10", (10 + 3 * D) * 4),
        ("reuse:2", 2 * G * D * 2),
        ("reuse:3", 2 * G * D * 2),
    ],
)
def test_bytes(to, numbers):
    """The bytes of the allocated bodies of four layers equal the numbers per token of a formula."""
    model = source(plan=(Stage(repeats=4),))
    made, weights = converted(model, matrix.weights(model), to, calibrated=False)
    cache = made.empty_cache(1, 64, tail=1, dtype=jnp.dtype("bfloat16"))
    bodies = sum(leaf.nbytes for slot in cache.slots for leaf in jax.tree.leaves(slot.body))
    assert bodies == 64 * 2 * numbers
    assert cache_bytes(made, 1, 64, 1, jnp.dtype("bfloat16")) == cache.nbytes()
    shapes = {name: leaf.shape for name, leaf in named(weights).items()}
    assert shapes == {name: param.shape for name, param in named(made.params()).items()}


@pytest.mark.product
def test_layers_of_one_window_share_with_each_other():
    plan = (Stage((Layer(window=3), Layer(window=3), Layer())), Stage((Layer(window=3), Layer())))
    model = source(plan=plan)
    made, weights = converted(model, matrix.weights(model), "reuse:2")
    assert [layer.source for layer in made.layers] == [0, 0, 2, 3, 2]
    assert [layer.window for layer in made.layers] == [3, 3, None, 3, None]
    assert np.isfinite(logits(made, weights)).all()
    made, _ = converted(model, matrix.weights(model), "reuse:3")
    assert [layer.source for layer in made.layers] == [0, 0, 2, 0, 2]


DRESSED = {
    "norm": {"norm": matrix.RMSNorm(stored="offset")},
    "sinks": {"sinks": "learned", "softcap": 2.0, "scale": 0.5},
    "gates": {"gate": "head"},
    "gates of channels": {"gate": "channel"},
    "biases": {"biases": ("query", "key", "value", "output")},
}


@pytest.mark.parametrize("dress", params(DRESSED, ["norm"]))
def test_other_weights_of_an_attention(dress):
    """Norms, biases, sinks and gates are kept by exact conversions, or refused by name."""
    model = source(**DRESSED[dress])
    weights = matrix.weights(model)
    linear = dress not in ("norm", "biases")
    for to, fits in (
        ("gqa(by=similarity):4", True),
        ("reuse:1", True),
        ("shared_kv:16", linear and dress != "gates of channels"),
        ("mla(rope=4):32", linear),
    ):
        if fits:
            made = converted(model, weights, to)
            assert np.abs(logits(*made) - logits(model, weights)).max() < 1e-4, to
        else:
            with pytest.raises(BadInput, match=f"layer 0: attention.{next(iter(DRESSED[dress]))}"):
                check(model, parse(to))
    for to in ("gqa(by=similarity):2", "mqa", "reuse:2", "reuse(entries=first):2"):
        made, smaller = converted(model, weights, to)
        assert np.isfinite(logits(made, smaller)).all(), to


@pytest.mark.parametrize("to", ["gqa:2", "mla:8", "shared_kv:8", "reuse:2"])
def test_gates_of_learned_eviction_belong_to_a_memory(to):
    with pytest.raises(BadInput, match=r"layer 0: attention\.eviction: got 'gates'; null"):
        check(source(eviction=Eviction()), parse(to))


def test_heads_that_have_positions_of_their_own_keep_their_order():
    model = source(ALiBi())
    with pytest.raises(BadInput, match="heads keep their order"):
        check(model, parse("gqa(by=similarity):2"))
    made, weights = converted(model, matrix.weights(model), "gqa:2")
    assert made.attention.position == ALiBi()
    assert np.isfinite(logits(made, weights)).all()
    weights = matrix.weights(model)
    assert_same((model, weights), converted(model, weights, "shared_kv:16"))


@pytest.mark.parametrize(
    ("model", "to", "message"),
    [
        (source(), "gqa:3", "--to: kv_heads: got 3; possible with 4 KV heads: gqa:1, gqa:2, gqa:4"),
        (source(), "shared_kv:7", "--to: width: got 7; .* shared_kv:8 to 16"),
        (source(), "shared_kv:17", "--to: width: got 17"),
        (source(), "mla:57", "--to: rank: got 57; possible with rope=1: mla:1 to mla:56"),
        (source(), "mla(rope=5):1", "--to: rope: got 5; possible with 4 KV heads: 1 to 4"),
        (source(), "reuse:3", "--to: layers: got 3; .* reuse:1 to reuse:2"),
        (source(NoPE()), "mla:4", "layer 0: attention.position: got 'nope'; rope: gqa, mqa"),
        (source(CoPE(positions=4)), "shared_kv:9", "position: got 'cope'"),
        (matrix.build("latent", "rope", "plain"), "mla:4", "attention.kind: got 'latent'; grouped"),
        (source(norm=matrix.RMSNorm(), norm_values=True), "mqa", "norm_values: got True; false"),
        (matrix.build("gqa", "rope", "reuse"), "mqa", "layer 1: reads: got 0; null"),
        (matrix.concept("fixed", "sum", "prefix"), "mqa", "model.kind: got 'concept'; decoder"),
    ],
)  # fmt: skip
def test_impossible_conversions_are_refused_with_the_possible_ones(model, to, message):
    with pytest.raises(BadInput, match=message):
        check(model, parse(to))


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("gqua:2", "one of gqa:KV_HEADS, .* mqa; did you mean 'gqa'"),
        ("gqa", "a number behind a colon, such as gqa:KV_HEADS"),
        ("mla:0", "a whole number of at least 1 in place of '0'"),
        ("mla:x", "in place of 'x'"),
        ("mqa:2", "mqa has no number; or gqa:1"),
        ("gqa(bye=x):2", "gqa has the options by; did you mean 'by'"),
        ("gqa(by=x):2", "by: got 'x'; allowed: neighbours, similarity"),
        ("shared_kv(x=1)", "shared_kv has no options"),
        ("mla(rope=2:4", "NAME:NUMBER or"),
        ("gqa:2(by=x)", r"options before the colon; did you mean 'gqa\(by=x\):2'"),
        ("", "NAME:NUMBER or"),
    ],
)
def test_a_wrong_name_is_reported(to, message):
    with pytest.raises(BadInput, match=message):
        parse(to)


def test_names():
    assert parse("mqa") == parse("gqa:1") == parse(" gqa(by=neighbours):1")
    assert parse("mla( rope = 2 ):16") == CONVERSIONS["mla"](16, rope=2)
    assert parse("shared_kv") == CONVERSIONS["shared_kv"]()


def test_a_parameterisation_with_factors_is_refused():
    model = replace(source(), scaling=Scaling(multiplier=Constants(hidden=2.0)))
    with pytest.raises(BadInput, match=r"model\.scaling: .*mukv export"):
        check(model, parse("mqa"))


def test_examples_are_the_inputs_of_attention():
    model = source(plan=(Stage((Layer(), Layer(window=3))),))
    weights = matrix.weights(model)
    segment = np.ones_like(IDS)
    segment[:, -2:] = 0
    position = np.tile(np.arange(IDS.shape[1]), (len(IDS), 1))
    found = examples_of(model, weights, IDS, position, segment, EXACT)
    assert [layer.shape for layer in found] == [(IDS.size - 4, D_MODEL)] * 2
    stream = weights["embedding"][IDS[:, :-2]].reshape(-1, D_MODEL)
    normed = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + 1e-6)
    gain = weights["stage0"]["slot0"]["attention_norm"]["gain"][0]
    np.testing.assert_allclose(found[0], normed * gain, atol=1e-5)


def test_windows_are_spread_over_the_texts():
    texts = [np.arange(10), np.arange(100, 130)]
    found = windows(texts, length=8, tokens=32)
    assert found.shape == (4, 8)
    assert found[0, 0] == 0
    assert found[-1, 0] == 116
    assert all(one[0] < other[0] for one, other in pairwise(found))
    assert windows([np.arange(5)], length=8, tokens=100).tolist() == [[0, 1, 2, 3, 4]]


def test_fits():
    random = np.random.default_rng(0)
    x = random.standard_normal((40, 6))
    wanted = random.standard_normal((6, 3))
    np.testing.assert_allclose(fit(x, x @ wanted), wanted, atol=1e-6)
    turn = np.linalg.qr(random.standard_normal((6, 6)))[0]
    np.testing.assert_allclose(rotation(x, x @ turn), turn, atol=1e-9)
    pairs = pairs_of(RoPE(partial=0.7), 6)
    assert (len(pairs.first), len(pairs.rest)) == (2, 2)
    maps = commuting(pairs)
    factor, rest = random.standard_normal((2, 2)).T @ [1, 1j], random.standard_normal((2, 2))
    mixed = pairs.matrix(factor, rest)
    np.testing.assert_allclose(maps.fit(x, x @ mixed), mixed, atol=1e-6)
    np.testing.assert_allclose(pairs.complex(x @ mixed), pairs.complex(x) * factor)
    # No other matrix of the same rank has a smaller error in the metric.
    metric = np.diag([9.0, 1, 1, 1, 1, 1])
    down, up = components(x, metric, 3)
    error = np.sum((x - x @ down @ up) ** 2 @ metric)
    values = np.linalg.svd(x @ np.sqrt(metric), compute_uv=False)
    assert error == pytest.approx(np.sum(values[3:] ** 2))


def test_groups_are_of_the_most_similar_heads():
    likeness = np.eye(6)
    for group in ([0, 3], [1, 4], [2, 5]):
        likeness[np.ix_(group, group)] = 1
    found = best_groups(likeness, np.arange(6).reshape(3, 2))
    assert sorted(map(tuple, found.tolist())) == [(0, 3), (1, 4), (2, 5)]
