"""Public Python names: every part is public, networks are pure, models give attention weights."""

from __future__ import annotations

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mukv

TINY = {"d_model": 32, "vocab_size": 64, "mlp": mukv.Gated(hidden=48)}


def network(**changes) -> mukv.Decoder:
    attention = mukv.Grouped(heads=4, kv_heads=2, head_dim=8, position=mukv.RoPE())
    plan = (mukv.Stage(repeats=2),)
    return mukv.Decoder(**{**TINY, "attention": attention, "plan": plan, **changes})


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(mukv.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == mukv._PLACES
    assert set(mukv.__all__) == {*seen, "__version__"} <= set(dir(mukv))


def test_every_public_name_is_its_own():
    for name in mukv._PLACES:
        assert getattr(mukv, name).__name__ == name


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'Groupped'"):
        mukv.Groupped  # noqa: B018


def test_every_part_that_yaml_names_is_public():
    from mukv.cache.tables import TABLES as POLICY
    from mukv.schema.reference import sections
    from tests.laws.test_matrix import TABLES

    found = {cls for (_, cls), _ in sections(mukv.Run)}
    found |= {cls for table in POLICY for cls in table.values()}
    assert len(found) > 60
    for cls in (*found, *(table.base for table in TABLES)):
        assert getattr(mukv, cls.__name__) is cls


@pytest.mark.product
def test_a_network_is_the_forward_pass_of_its_stored_weights():
    net = network(scaling=mukv.Scaling(kind="mup", base={**BASE, "embed": 16}))
    weights, tokens = net.init(seed=1), np.array([[1, 2, 3], [4, 5, 6]])
    scaled = net.scaled(weights)
    expected = net.logits(scaled, net.hidden(scaled, jnp.asarray(tokens)))
    np.testing.assert_array_equal(net(weights, tokens), expected)
    assert not np.allclose(expected, net.logits(weights, net.hidden(weights, jnp.asarray(tokens))))
    assert expected.dtype == jnp.float32


BASE = {"embed": 32, "head_dim": 8, "heads": 4, "value_dim": 8, "hidden": 48}


@pytest.mark.product
def test_init_draws_what_training_begins_with():
    from mukv.train.step import Trainer

    net = network()
    trainer = Trainer(net, mukv.Training(seed=5), mukv.MeshShape().build())
    drawn, begun = net.init(5), trainer.initial_state().weights
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), drawn, begun)


@pytest.mark.product
def test_a_network_works_under_jit_grad_and_vmap():
    net, tokens = network(), jnp.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    weights = net.init()
    plain = net(weights, tokens)
    assert plain.shape == (3, 4, 64)
    np.testing.assert_allclose(jax.jit(net)(weights, tokens), plain, atol=1e-5)
    rows = jax.vmap(net, in_axes=(None, 0))(weights, tokens)
    np.testing.assert_allclose(rows, plain, atol=1e-5)
    np.testing.assert_allclose(net(weights, [1, 2, 3, 4]), plain[0], atol=1e-5)
    gradient = jax.grad(lambda weights: net(weights, tokens).std())(weights)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 64]], "token ids go from 0 to 63"),
        ([-1], "token ids go from 0 to 63"),
        ([0.5], "whole numbers"),
        ([[[1]]], r"\[token\] or \[batch token\]"),
    ],
)
def test_a_network_refuses_other_tokens(tokens, message):
    with pytest.raises(mukv.BadInput, match=message):
        network()(network().init(), tokens)


def test_traced_tokens_are_checked_by_shape_and_type():
    with pytest.raises(mukv.BadInput, match="integers of shape"):
        jax.jit(network())(network().init(), jnp.ones(3))


def test_attention_weights_of_a_model(trained):
    model = mukv.load(trained)
    found = model.attention("a text")
    length = len(model.encode("a text"))
    assert list(found) == [0, 1]
    for weights in found.values():
        assert weights.shape == (2, length, length)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        assert not np.triu(weights, 1).any()
    np.testing.assert_array_equal(model.attention(model.encode("a text"))[1], found[1])
    with pytest.raises(mukv.BadInput, match="token ids go from 0 to"):
        model.attention([1, 1 << 20])
    with pytest.raises(mukv.BadInput, match="text: got '2 rows'"):
        model.attention([[1, 2], [3, 4]])


@pytest.mark.product
def test_attention_weights_are_softmax_of_the_products(trained):
    """Attention weights of the first layer equal the softmax of projected, rotated queries and
    keys."""
    model = mukv.load(trained)
    net, ids = model.network, jnp.asarray([model.encode("some words")])
    layer, weights = net.layers[0], jax.tree.map(lambda leaf: leaf[0], model.scaled["stage0"])
    weights, position = weights["slot0"], jnp.arange(ids.shape[1])[None]
    normed = net.norm.apply(weights["attention_norm"], model.scaled["embedding"][ids])
    query = layer.attention.query(weights["read"], normed, position)
    key = layer.attention.write(weights["write"], normed, position)["key"]
    logits = jnp.einsum("bhgqd,bhkd->bhgqk", query, key) / layer.attention.head_dim**0.5
    logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
    expected = jax.nn.softmax(logits, axis=-1)[0].reshape(-1, *logits.shape[-2:])
    np.testing.assert_allclose(model.attention(ids)[0], expected, atol=1e-5)
