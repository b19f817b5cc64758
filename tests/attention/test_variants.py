"""Attention variants equal their published formulas, and each other where they should."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import Entries, Grouped, GroupedTied, Latent, Mask, SharedKV, TensorProduct
from mukv.attention.base import Attention
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.core.params import map_params
from mukv.position import ALiBi, CoPE, NoPE, RoPE
from tests.pairs import params

D_MODEL, LENGTH = 16, 10
POSITION = jnp.arange(LENGTH)[None].repeat(2, axis=0)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def weights(attention: Attention, seed: int = 0) -> tuple[dict, dict]:
    random = np.random.default_rng(seed)

    def one(param):
        drawn = param.fan_in_size**-0.5 * random.standard_normal(param.shape)
        return jnp.asarray(drawn + (param.init == "ones"), jnp.float32)

    return (
        map_params(one, attention.write_params(D_MODEL)),
        map_params(one, attention.read_params(D_MODEL)),
    )


def run(attention: Attention, write: dict, read: dict, aligned=True, chunk=None) -> jax.Array:
    x = draw(2, LENGTH, D_MODEL, seed=9)
    entries = Entries(attention.write(write, x, POSITION), POSITION[:, None])
    compute = Compute(fused=chunk is not None, attention_chunk=chunk)
    return attention.read(read, x, POSITION, (entries,), Mask(aligned=aligned), compute)[0]


@pytest.mark.product
@pytest.mark.parametrize("position", [NoPE(), RoPE(), ALiBi(), CoPE(positions=4)])
@pytest.mark.parametrize("query_rank", params([None, 7], [7]))
def test_latent_absorbed_is_expanded(position, query_rank):
    latent = Latent(position, rank=12, head_dim=6, rope_dim=4, query_rank=query_rank)
    write, read = weights(latent)
    expanded = run(latent, write, read)
    np.testing.assert_allclose(run(latent, write, read, aligned=False), expanded, atol=1e-5)


@pytest.mark.product
def test_latent_is_the_published_formula():
    """Latent attention equals section 2.1 of DeepSeek-V2, computed for each head in numpy."""
    latent = Latent(heads=2, rank=5, head_dim=6, rope_dim=4, head_value_dim=3, query_rank=7)
    latent = dataclasses.replace(latent, position=RoPE(pairing="interleaved"))
    write, read = weights(latent)
    x = draw(2, LENGTH, D_MODEL, seed=9)

    def normed(array, gain):
        array = np.asarray(array)
        return array / np.sqrt((array**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(gain)

    rotate = latent.position.rotate
    c = normed(x @ write["latent"], write["norm"]["gain"])
    key = rotate((x @ write["key"])[:, None], POSITION[:, None])[:, 0]
    cq = normed(x @ read["query_latent"], read["query_norm"]["gain"])
    out = []
    for head in range(2):
        query = cq @ read["query"][:, head]
        still, turning = query[..., :6], rotate(query[:, None, :, 6:], POSITION[:, None])[:, 0]
        k, v = c @ read["key_up"][:, head], c @ read["value_up"][:, head]
        logits = (still @ k.swapaxes(1, 2) + turning @ key.swapaxes(1, 2)) / np.sqrt(10)
        seen = np.tril(np.ones((LENGTH, LENGTH), bool))
        share = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
        out.append(share @ v @ read["output"][head])
    np.testing.assert_allclose(run(latent, write, read), sum(out), atol=1e-5)


@pytest.mark.product
def test_shared_kv_is_grouped_with_equal_projections():
    numbers = {"heads": 4, "kv_heads": 2, "head_dim": 8, "position": RoPE()}
    shared, grouped = SharedKV(**numbers), Grouped(**numbers)
    write, read = weights(shared)
    twice = {"key": write["value"], "value": write["value"]}
    np.testing.assert_allclose(run(shared, write, read), run(grouped, twice, read), atol=1e-6)


@pytest.mark.product
def test_normed_shared_kv_is_gemma_4s():
    """SharedKV with a norm equals k = rope(norm(u) gain), v = norm(u), with normed queries."""
    shared = SharedKV(RoPE(p=0.25), heads=4, kv_heads=2, head_dim=8, norm=RMSNorm())
    write, read = weights(shared)
    x = draw(2, LENGTH, D_MODEL, seed=9)
    u = jnp.einsum("btd,dgh->bgth", x, write["value"])
    unit = u / jnp.sqrt(jnp.mean(u**2, -1, keepdims=True) + 1e-6)
    rotate = shared.position.rotate
    key = rotate(unit * read["key_norm"]["gain"][None, None, None], POSITION[:, None])
    query = jnp.einsum("btd,dgh->bgth", x, read["query"])
    query /= jnp.sqrt(jnp.mean(query**2, -1, keepdims=True) + 1e-6)
    query = rotate(query * read["query_norm"]["gain"][None, None, None], POSITION[:, None])
    query = query.reshape(2, 2, 2, LENGTH, 8)
    logits = jnp.einsum("bgrqd,bgkd->bgrqk", query, key) / np.sqrt(8)
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))
    share = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    out = jnp.einsum("bgrqk,bgkd->bqgrd", share, unit).reshape(2, LENGTH, 4, 8)
    expected = jnp.einsum("bqhd,hde->bqe", out, read["output"])
    np.testing.assert_allclose(run(shared, write, read), expected, atol=1e-5)


@pytest.mark.product
def test_tensor_product_is_attention_over_its_products():
    """The layer equals multi-head attention with the keys and values that the products give."""
    product = TensorProduct(RoPE(), heads=4, head_dim=8, query_rank=3, rank=2)
    write, read = weights(product)
    x = draw(2, LENGTH, D_MODEL, seed=9)
    factors = product.write(write, x, POSITION)
    key = jnp.einsum("brth,brtd->bhtd", factors["key_heads"], factors["key"]) / 2
    value = jnp.einsum("brth,brtd->bhtd", factors["value_heads"], factors["value"]) / 2
    query = product.query(read, x, POSITION)[:, :, 0]
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key) / np.sqrt(8)
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))
    out = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)) @ value
    expected = jnp.einsum("bhqd,hde->bqe", out, read["output"])
    np.testing.assert_allclose(run(product, write, read), expected, atol=1e-5)


def test_grouped_tied_is_grouped_with_joined_keys():
    tied = GroupedTied(RoPE(), heads=4, kv_heads=2, head_dim=8)
    write, read = weights(tied)
    x = draw(2, LENGTH, D_MODEL, seed=9)
    entries = tied.write(write, x, POSITION)
    shared = jnp.repeat(entries["key"], 2, axis=1)
    key = jnp.concatenate([entries["state"][..., :4], shared], axis=-1)
    query = tied.query(read, x, POSITION)
    logits = jnp.einsum("bgrqd,bgkd->bgrqk", query, key) / np.sqrt(8)
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))
    share = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    out = jnp.einsum("bgrqk,bgkd->bqgrd", share, entries["state"]).reshape(2, LENGTH, 4, 8)
    expected = jnp.einsum("bqhd,hde->bqe", out, read["output"])
    np.testing.assert_allclose(run(tied, write, read), expected, atol=1e-5)


def test_a_sink_is_a_key_with_a_value_of_zero():
    """A sink equals a key with that logit and a value of zero; a very low logit has no effect."""
    plain = Grouped(heads=4, kv_heads=2, head_dim=8)
    sunk = dataclasses.replace(plain, sinks="learned")
    write, read = weights(sunk)
    without = run(plain, write, read)
    low = read | {"sinks": jnp.full(4, -1e9)}
    np.testing.assert_allclose(run(sunk, write, low), without, atol=1e-6)
    # The first token sees only itself: its weight is sigmoid(logit - sink).
    high = read | {"sinks": jnp.full(4, 1e9)}
    assert not run(sunk, write, high).any()


def test_a_variant_may_choose_what_each_query_reads():
    """Choosing the entries less than three tokens back equals a window of three."""

    class Near(Grouped):
        def choose(self, weights, x, position, parts, mask, compute):
            return position[..., None] - jnp.arange(3)[None, None]  # negative places are none

    plain = Grouped(RoPE(), heads=4, kv_heads=2, head_dim=8)
    write, read = weights(plain)
    x = draw(2, LENGTH, D_MODEL, seed=9)
    entries = Entries(plain.write(write, x, POSITION), POSITION[:, None])
    window = Mask(window=3, aligned=True)
    expected, _ = plain.read(read, x, POSITION, (entries,), window, Compute())
    near = Near(RoPE(), heads=4, kv_heads=2, head_dim=8)
    np.testing.assert_allclose(run(near, write, read, chunk=4), expected, atol=1e-6)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_a_gate_multiplies_what_each_head_read(gate):
    """The output of each head is multiplied by sigmoid(x W) before the output projection."""
    gated = Grouped(heads=4, kv_heads=2, head_dim=8, gate=gate)
    write, read = weights(gated)
    x = draw(2, LENGTH, D_MODEL, seed=9)
    plain = dataclasses.replace(gated, gate=None)
    # Compute one head at a time, with zeros in the output weight of the others.
    heads = []
    for head in range(4):
        alone = np.zeros((4, 8, D_MODEL), np.float32)
        alone[head] = np.eye(8, D_MODEL)
        heads.append(run(plain, write, {**read, "output": jnp.asarray(alone)})[..., :8])
    share = 1 / (1 + np.exp(-np.einsum("btd,dh...->bth...", x, read["gate"])))
    share = share if gate == "channel" else share[..., None]
    expected = np.einsum("hbtv,bthv,hve->bte", np.stack(heads), share * np.ones(8), read["output"])
    np.testing.assert_allclose(run(gated, write, read), expected, atol=1e-5)


def test_latent_with_a_gate_absorbed_is_expanded():
    latent = Latent(RoPE(), rank=12, head_dim=6, rope_dim=4, head_value_dim=5, gate="channel")
    write, read = weights(latent)
    expanded = run(latent, write, read)
    np.testing.assert_allclose(run(latent, write, read, aligned=False), expanded, atol=1e-5)


def test_softcap_bounds_and_vanishes():
    plain = Grouped(heads=4, kv_heads=2, head_dim=8)
    write, read = weights(plain)
    loose = dataclasses.replace(plain, softcap=1e4)
    np.testing.assert_allclose(run(loose, write, read), run(plain, write, read), atol=1e-4)
    tight = dataclasses.replace(plain, softcap=1e-6)
    x = draw(2, LENGTH, D_MODEL, seed=9)
    value = jnp.einsum("btd,dgh->btgh", x, write["value"])
    mean = jnp.cumsum(value, 1) / (POSITION[..., None, None] + 1)
    expected = jnp.einsum("bthd,hde->bte", mean.repeat(2, axis=2), read["output"])
    np.testing.assert_allclose(run(tight, write, read), expected, atol=1e-4)


@pytest.mark.product
@pytest.mark.parametrize("chunk", params([1, 3, 4, 16], [3]))
@pytest.mark.parametrize("sinks", [None, "learned"])
@pytest.mark.parametrize("position", [RoPE(), CoPE(positions=4)])
def test_fused_core_is_plain_core(position, sinks, chunk):
    """The fused core equals the plain one in outputs and gradients, whether or not the chunk size
    divides the length."""
    grouped = Grouped(position, heads=4, kv_heads=2, head_dim=8, sinks=sinks)
    write, read = weights(grouped)

    def total(read, chunk):
        return jnp.sum(jnp.sin(run(grouped, write, read, chunk=chunk)))

    one, two = (jax.value_and_grad(total)(read, size) for size in (None, chunk))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grouped(heads=0), "heads: got 0"),
        (lambda: SharedKV(heads=4, kv_heads=3), "must divide heads"),
        (lambda: GroupedTied(head_dim=7), "half of each key is tied"),
        (lambda: GroupedTied(RoPE(), head_dim=6), "rotates pairs"),
        (lambda: Latent(RoPE(), rope_dim=3), "rotates pairs"),
        (lambda: Latent(query_rank=0), "query_rank: got 0"),
        (lambda: TensorProduct(rank=0), "rank: got 0"),
        (lambda: Grouped(softcap=0.0), "softcap: got 0"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()
