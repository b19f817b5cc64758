"""Laws of models whose weights are stored in few bits."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mukv as package
from mukv.core.compact import GROUPS, any_compact, is_compact
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.params import map_params, named
from mukv.infer.decode import decoding_weights, generate
from mukv.scaling.parameterization import Scaling
from mukv.storage.compact import Converter, nbytes
from mukv.storage.weights import load_weights, save_weights
from tests.laws import matrix
from tests.pairs import params

SMALL = {"embed": 4, "hidden": 6, "heads": 1, "value_dim": 8, "head_dim": 8}
SCALING = Scaling("mup", SMALL)
MODELS = {
    "grouped": matrix.build("gqa", "rope", "plain"),
    "tied": matrix.build("gqa", "rope", "plain", readout="tied"),
    "latent": matrix.build("latent", "rope", "plain"),
    "tensor_product": matrix.build("tensor-product", "rope", "plain"),
    "concept": matrix.concept("fixed", "attention", "prefix"),
    "experts": matrix.build("gqa", "rope", "experts"),
    "inputs": matrix.build("shared-kv", "rope", "plain"),
    "scaled": matrix.build("gqa", "rope", "plain", scaling=SCALING),
}
ROWS = [(name, kind) for name in MODELS for kind in GROUPS]
QUICK = [("tied", "int4"), ("scaled", "bfloat16")]
LEAST = {"int8": 25.0, "int4": 2.5, "bfloat16": 100.0}
"""Least ratio of the size of the logits to their root mean square error. Rounding normal weights to
half a step gives an error of 0.7 %, 8 % and 0.2 % of their size; some ten matrices add up."""


def converted(model, weights, kind):
    converter = Converter(kind, "weights")
    declared = named(model.params())
    found = [
        converter(name, declared[name], lambda cut, leaf=leaf: np.asarray(leaf[cut]))
        for name, leaf in named(weights).items()
    ]
    return jax.tree.structure(weights).unflatten(found)


def restored(small, weights):
    """Return the dequantised weights as ordinary arrays."""

    def whole(leaf, like):
        layers = getattr(leaf, "layers", None)
        if layers is not None:
            return jnp.stack([layer.whole() for layer in layers])
        return leaf.whole() if is_compact(leaf) else jnp.asarray(leaf).reshape(like.shape)

    return jax.tree.map(whole, small, weights, is_leaf=is_compact)


@pytest.mark.product
@pytest.mark.parametrize(("name", "kind"), params(ROWS, QUICK, "-".join, unpack=True))
def test_a_model_runs_on_few_bits(name, kind):
    """Logits equal those of the dequantised weights, and are close to those of the original ones;
    greedy decoding takes the tokens of the dequantised weights."""
    model, compute = MODELS[name], Compute("float32", "float32")
    weights = model.init(1)
    small = converted(model, weights, kind)
    assert any_compact(small)
    assert nbytes(small) < nbytes(weights)
    same = restored(small, weights)
    tokens = np.random.default_rng(0).integers(5, model.vocab_size, (1, 12))
    logits = jax.jit(model.__call__)
    found, expected = logits(small, tokens), logits(same, tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.std(expected)) + 1e-6)
    original = logits(weights, tokens)
    error = float(jnp.sqrt(jnp.mean(jnp.square(found - original))))
    assert float(jnp.std(original)) > LEAST[kind] * error
    ready = decoding_weights(model, small, compute)
    owned = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(small)}
    more = sum(x.nbytes for x in jax.tree.leaves(ready) if x.unsafe_buffer_pointer() not in owned)
    vectors = sum(x.nbytes for x in jax.tree.leaves(small, is_leaf=is_compact) if not is_compact(x))
    if name != "scaled":  # multipliers make new steps
        assert more <= vectors
    made = [
        generate(model, each, tokens.tolist(), 4, compute=compute).tokens
        for each in (ready, decoding_weights(model, same, compute))
    ]
    assert made[0] == made[1]


@pytest.mark.product
def test_representable_weights_give_the_same_logits():
    """Weights on the levels of int8 are stored without loss, so that the logits are the same."""
    model, random = MODELS["tied"], np.random.default_rng(0)

    def on_levels(param):
        codes = random.integers(-127, 128, param.shape)
        # The first input of every output has the largest level.
        inputs = param.fan_in or tuple(param.dims)[-1:]
        codes[tuple(0 if axis in inputs else slice(None) for axis in param.dims)] = 127
        return jnp.asarray(codes, jnp.float32) / 1024

    weights = map_params(on_levels, model.params())
    small = converted(model, weights, "int8")
    jax.tree.map(np.testing.assert_array_equal, restored(small, weights), weights)
    tokens = np.arange(5, 12)[None]
    found, expected = model(small, tokens), model(weights, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * float(jnp.std(expected)))


@pytest.mark.product
def test_both_kinds_of_folder_are_converted_while_they_are_read(trained, exported):
    for source in (trained, exported):
        whole = package.load(source)
        small = package.load(source, weights="int8")
        expected = converted(whole.network, whole.weights, "int8")
        jax.tree.map(np.testing.assert_array_equal, small.weights, expected)
        assert small.converted
        assert small.weights_bytes < 0.4 * whole.weights_bytes
        ids = small.encode("Déjà vu")
        np.testing.assert_allclose(small.logits(ids), whole.logits(ids), atol=0.2)
        assert len(small.generate("Déjà", 3).token_ids) <= 3


def test_a_run_without_exported_weights(trained, tmp_path):
    """The weights of the latest checkpoint are converted."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "weights")
    small, expected = package.load(run, weights="int4"), package.load(trained, weights="int4")
    jax.tree.map(np.testing.assert_array_equal, small.weights, expected.weights)


def test_what_is_refused(trained, tmp_path, mukv):
    for given, words in (
        ({"weights": "int7"}, ["int7", "int8"]),
        ({"weights": "int8", "allow_nonfinite": True}, ["int8", "finite"]),
        ({"weights": "int8", "mesh": package.MeshShape(data=2)}, ["int8", "one device"]),
    ):
        with pytest.raises(BadInput) as told:
            package.load(trained, **given)
        assert all(word in str(told.value) for word in words)
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    tree, metadata = load_weights(run / "weights")
    tree["embedding"][0, 0] = np.nan
    save_weights(run / "weights", tree, metadata)
    with pytest.raises(BadInput, match="embedding"):
        package.load(run, weights="int8")
    from mukv.runs.exchange import export_model

    small = package.load(trained, weights="int8")
    with pytest.raises(BadInput, match="without `weights`"):
        export_model(small, trained, tmp_path / "out")
    done = mukv("eval", trained, "--text", trained / "config.yaml", "--weights", "int9")
    assert done.returncode == 2
    assert "--weights" in done.stderr
    assert "int9" in done.stderr
    done = mukv("bench", "tiny", "--weights", "int8", "--out", tmp_path / "bench")
    assert done.returncode == 2
    assert "--weights" in done.stderr
    done = mukv("train", trained, "--weights", "int8")
    assert done.returncode == 2


@pytest.mark.product
def test_commands_take_compact_weights(trained, mukv):
    done = mukv(
        "generate", trained, "--prompt", "a", "--max-tokens", "3", "--weights", "int8", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = package.load(trained, weights="int8")
    assert f'"weights_bytes": {found.weights_bytes}' in done.stdout
