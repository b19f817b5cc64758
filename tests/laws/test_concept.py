"""Laws 1 to 5 and the identity of law 10 for concept models.

Every two of chunker, reduction and injection occur together; the rows that the laws compare are one
batch.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.params import named
from mukv.core.tap import capture
from mukv.model import Layer, Stage
from mukv.model.concept import Concepts, Cross, Delimiter, Fixed, Learned, Prefix
from mukv.model.counting import cache_bytes
from tests.laws import matrix
from tests.laws.matrix import (
    CONCEPTS,
    CUTS,
    EXACT,
    LENGTH,
    OTHER,
    QUICK_CONCEPTS_BY_PROGRAM,
    SAMPLE_CONCEPTS,
    VOCAB,
)
from tests.laws.test_resume import assert_same_bits, whole_and_resumed
from tests.pairs import params
from tests.training import run, trainer

TAIL = 2


@pytest.fixture(scope="module")
def case(request):
    yield matrix.Case(matrix.concept(*request.param))
    jax.clear_caches()


def over(program, every=1):
    """Parametrize a law by the combinations whose `program` the quick round compiles, or by one in
    `every` of them."""
    rows = params(CONCEPTS, QUICK_CONCEPTS_BY_PROGRAM[program][::every], "-".join)
    return pytest.mark.parametrize("case", rows, indirect=True)


@over("forward")
def test_causality_is_exact(case):
    """Law 1: changing token t changes no logit before t, to the bit, and changes that at t."""
    for t, row in enumerate(case.changed):
        np.testing.assert_array_equal(row[:t], case.whole[0, :t])
        assert (row[t] != case.whole[0, t]).any()


@over("decode", every=2)
def test_decode_is_prefill(case):
    """Law 2: decoding token by token and in two prefills equals one prefill; borders of chunks
    differ between the rows."""
    model, count = case.model, np.array([4, 6])
    weights = model.unstack(case.weights)
    cache = model.empty_cache(2, LENGTH, TAIL, EXACT.type)
    frozen = jax.tree.structure(cache.split()[0])
    prefill = jax.jit(
        lambda w, c, t, n, fresh: model.prefill(w, c, t, n, fresh, compute=EXACT), static_argnums=4
    )
    step = jax.jit(lambda w, c, t: model.step(w, c, t, compute=EXACT))
    fold = jax.jit(model.fold)
    scores, cache = prefill(weights, cache, case.ids[:, :6], jnp.asarray(count), True)
    concepts = []
    for number in range(LENGTH - 6):
        np.testing.assert_allclose(scores, case.whole[[0, 1], count - 1], atol=2e-5)
        if number and number % TAIL == 0:
            cache = fold(weights, cache)
        before = cache.concepts.position()
        scores, cache = step(weights, cache, case.ids[[0, 1], count])
        concepts.append(np.asarray(cache.concepts.position() - before))
        count += 1
    np.testing.assert_allclose(scores, case.whole[[0, 1], count - 1], atol=2e-5)
    assert jax.tree.structure(cache.split()[0]) == frozen
    assert any(a != b for a, b in concepts)
    assert np.sum(concepts)


@pytest.mark.product
@pytest.mark.parametrize("case", params(CONCEPTS, SAMPLE_CONCEPTS[::6], "-".join), indirect=True)
def test_prefill_continues(case):
    """Law 2: a text read in two prefills, cut within a chunk or not, equals the text at once."""
    model, half = case.model, LENGTH // 2

    @jax.jit
    def read(weights, ids):
        cache = model.empty_cache(2, LENGTH, TAIL, EXACT.type)
        count = jnp.array([half, half - 1])
        _, cache = model.prefill(weights, cache, ids[:, :half], count, compute=EXACT)
        rest = jnp.stack([ids[0, half:], ids[1, half - 1 : -1]])
        count = jnp.array([LENGTH - half] * 2)
        return model.prefill(weights, cache, rest, count, fresh=False, compute=EXACT)[0]

    scores = read(model.unstack(case.weights), case.ids)
    np.testing.assert_allclose(scores, case.whole[[0, 1], [-1, -2]], atol=2e-5)


@over("gradient", every=2)
def test_every_weight_learns(case):
    """Law 3: each weight, in each layer, gets a gradient that is not zero."""
    for name, gradient in named(case.gradient).items():
        for layer in gradient if "stage" in name else [gradient]:
            assert float(np.abs(layer).max()) > 0, name


@over("forward")
def test_bytes_are_true(case):
    """Law 4: the bytes of the allocated cache are those computed without allocation."""
    for batch, length, tail in ((1, 2, 1), (3, LENGTH, 4)):
        cache = case.model.empty_cache(batch, length, tail, EXACT.type)
        assert cache.nbytes() == cache_bytes(case.model, batch, length, tail, EXACT.type)


@over("forward")
def test_packing_isolates(case):
    """Law 5: documents packed in one row equal the same documents alone; no chunk crosses."""
    for alone, start, stop in zip(case.alone, CUTS[:-1], CUTS[1:], strict=True):
        np.testing.assert_allclose(case.packed[start:stop], alone[: stop - start], atol=2e-5)


@pytest.mark.product
@pytest.mark.parametrize("case", params(CONCEPTS, SAMPLE_CONCEPTS[::6], "-".join), indirect=True)
def test_ways_of_computing_agree(case):
    """Scan = unrolled, fused core = plain core, chunked loss = whole loss, in loss and
    gradients."""
    loss, gradient = matrix.loss_and_gradient(case.model, OTHER)(case.weights, case.ids)
    np.testing.assert_allclose(loss, case.loss, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(case.gradient), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-4)


ONE = {
    "fixed": Fixed(size=1),
    "learned": Learned(ratio=2.0, room=1, span=1),
}


@pytest.mark.product
@pytest.mark.parametrize(
    ("chunker", "pool"), [*(("fixed", pool) for pool in matrix.POOLS), ("learned", "select")]
)
def test_concepts_of_one_token_without_local_layers_are_a_decoder(chunker, pool):
    """Law 10: with the identity between the two widths the logits are bit-equal."""
    plain = matrix.build("gqa", "rope", "plain")
    model = replace(
        matrix.concept(chunker, "select", "residual"),
        pool=matrix.POOLS[pool],
        chunker=ONE[chunker],
        concepts=Concepts(plan=plain.plan),
        encoder=(),
        decoder=(),
    )
    known = matrix.weights(plain)
    weights, same = matrix.weights(model), np.eye(matrix.D_MODEL, dtype=np.float32)
    weights |= {name: known[name] for name in ("embedding", "final_norm", "readout")}
    weights["concepts"] = {"stage0": known["stage0"]}
    weights["give"], weights["pool"]["enter"] = {"give": same}, same
    weights["injection"] = {"skip": np.zeros(matrix.D_MODEL, np.float32)}
    if "narrow" in weights["pool"]:
        weights["pool"]["narrow"] *= 0
    if "places" in weights["pool"]:
        weights["pool"]["places"] = np.ones(1, np.float32)
    if chunker == "learned":
        # Queries and keys have opposite directions, so that every token is a border.
        weights["chunker"] = {"now": 1 - same, "before": -1 - same}
        weights["embedding"] = known["embedding"] = np.abs(known["embedding"])
    ids, place = matrix.tokens(2), np.tile(np.arange(LENGTH), (2, 1))
    segment = np.zeros_like(ids)
    one = matrix.logits(model)(weights, ids, place, segment)
    two = matrix.logits(plain)(known, ids, place, segment)
    np.testing.assert_allclose(one, two, atol=1e-6 if chunker == "fixed" else 2e-5)


READ = {"cross": (Cross(), "rope"), "prefix": (Prefix(slots=1), "nope")}


@pytest.mark.product
@pytest.mark.parametrize("read", READ)
def test_concepts_of_one_token_that_are_read_are_an_attention(read):
    """Law 10: if global layers add nothing, concepts of one token are read like a decoder's
    attention. Cross attention is that attention before a local MLP; prefixes repeat every token in
    the row, which without positions changes no mean."""
    injection, position = READ[read]
    plain = replace(matrix.build("gqa", position, "plain"), plan=(Stage(),))
    model = replace(
        matrix.concept("fixed", "select", "residual"),
        attention=plain.attention,
        chunker=ONE["fixed"],
        concepts=Concepts(),
        encoder=(),
        injection=injection,
        decoder=(Stage((Layer(window=2 * LENGTH),)),),
    )
    known = matrix.weights(plain)
    (layer,) = plain.unstack(known)["layers"]
    weights, same = matrix.weights(model), np.eye(matrix.D_MODEL, dtype=np.float32)
    weights |= {name: known[name] for name in ("embedding", "final_norm", "readout")}
    weights["pool"]["enter"] = same
    silent = weights["concepts"]["stage0"]["slot0"]
    silent["read"]["output"] *= 0
    silent["mlp"]["down"] *= 0
    weights["decoder"] = {"stage0": known["stage0"]}
    if isinstance(injection, Prefix):
        weights["give"] = {"give": same[:, None]}
    else:
        norm = layer["attention_norm"]
        weights["give"] = {"norm": norm, "write": layer["write"]}
        weights["injection"] = {"norm": norm, "read": layer["read"]}
        own = known["stage0"]["slot0"]
        deaf = own | {"read": own["read"] | {"output": 0 * own["read"]["output"]}}
        weights["decoder"] = {"stage0": {"slot0": deaf}}
    ids, place = matrix.tokens(2), np.tile(np.arange(LENGTH), (2, 1))
    segment = np.zeros_like(ids)
    one = matrix.logits(model)(weights, ids, place, segment)
    two = matrix.logits(plain)(known, ids, place, segment)
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.product
def test_delimiters_at_equal_distances_are_fixed_chunks():
    """Law 10: delimiters at equal distances give logits bit-equal to those of fixed chunks."""
    fixed = matrix.concept("fixed", "weighted", "cross")
    size = fixed.chunker.pace
    delimited = replace(fixed, chunker=Delimiter(delimiters=(0,), room=size, span=size))
    ids = np.maximum(matrix.tokens(2), 1)
    ids[:, size - 1 :: size] = 0
    place, segment = np.tile(np.arange(LENGTH), (2, 1)), np.zeros_like(ids)
    one, two = (
        matrix.logits(model)(matrix.weights(fixed), ids, place, segment)
        for model in (fixed, delimited)
    )
    np.testing.assert_array_equal(one, two)


def test_taps_have_the_numbers_of_layers():
    """Taps of every attention, that over concepts too, have the layer number of `describe`."""
    model = matrix.concept("fixed", "select", "cross")

    def look(weights, ids):
        with capture() as taps:
            model.forward(weights, ids, compute=EXACT)
        return taps

    taps = jax.eval_shape(look, matrix.weights(model), matrix.tokens(2))
    scopes = {name.split(".")[0] for name in taps if name.endswith("logits")}
    assert scopes == {f"layer{number}" for number in range(5)}


MESHES = [{"data": 2, "tensor": 2, "accumulate": 2}, {"data": 2, "context": 2}]


@pytest.mark.product
@pytest.mark.parametrize(
    "combination",
    params(SAMPLE_CONCEPTS, [row for row in SAMPLE_CONCEPTS if row[0] == "learned"][:1], "-".join),
)
@pytest.mark.parametrize("mesh", params(MESHES, MESHES[:1]))
def test_sharding_is_invisible(combination, mesh):
    """Law 6: four devices, with half of the rows and half of the heads or tokens on each, equal one
    device."""
    model = matrix.concept(*combination, vocab_size=32)
    (state, metrics), (sharded, seen) = (
        run(trainer(model, learning_rate=1e-3, **split), 2) for split in ({}, mesh)
    )
    for one, four in zip(metrics, seen, strict=True):
        np.testing.assert_allclose(four.loss, one.loss, rtol=2e-5)
        np.testing.assert_allclose(four.gradient_norm, one.gradient_norm, rtol=2e-5)
        assert {name: float(n) for name, n in four.counts.items()} == pytest.approx(
            {name: float(n) for name, n in one.counts.items()}
        )
    for one, four in zip(
        jax.tree.leaves(state.weights), jax.tree.leaves(sharded.weights), strict=True
    ):
        assert np.sqrt(np.mean((np.asarray(four) - np.asarray(one)) ** 2)) < 2e-5


@pytest.mark.product
def test_resume_is_bit_equal(tmp_path):
    """Law 8: a stopped and resumed run ends with bit-equal weights."""
    model = matrix.concept("learned", "weighted", "prefix")
    assert_same_bits(*whole_and_resumed(model, 2, tmp_path))


@pytest.mark.product
def test_borders_that_come_too_early_are_refused_and_counted():
    """There are at most (p + 1) // room concepts at place p, and refused borders are counted."""
    model = matrix.concept("delimiter", "select", "residual")
    model = replace(model, chunker=replace(model.chunker, delimiters=tuple(range(0, VOCAB, 2))))
    early = np.tile([1, 0], (1, LENGTH))[:, :LENGTH].astype(np.int32)
    ids = np.concatenate([early, np.ones_like(early)])
    for room, made in ((2, LENGTH // 2), (4, LENGTH // 4)):
        model = replace(model, chunker=replace(model.chunker, room=room))
        counts = jax.jit(lambda w, i, m=model: m.forward(w, i, compute=EXACT).counts)(
            matrix.weights(model), ids
        )
        assert counts["concepts_per_token"].tolist() == [made, 0]
        assert counts["refused_borders_per_token"].tolist() == [LENGTH // 2 - made, 0]
