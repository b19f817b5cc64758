"""Law 10 for grouped attention and layer plans: equivalent configurations give equal results."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import Grouped
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.model import Layer, Stage
from mukv.model.block import SandwichNorm
from mukv.model.layer_inputs import LayerInputs
from mukv.position import NoPE
from mukv.scaling.parameterization import Scaling
from tests.laws import matrix
from tests.laws.matrix import EXACT, LENGTH
from tests.pairs import params

IDS = matrix.tokens()
POLICIES = (False, True, "products", "offload")
"""Values of `Compute.rematerialise`."""


def trained(model, weights, shift=0):
    """Return the logits of the training forward pass."""
    position = np.tile(np.arange(LENGTH) + shift, (len(IDS), 1))
    out = matrix.logits(model)(weights, IDS, position, np.zeros_like(IDS))
    return np.asarray(out)


def decoded(model, weights):
    """Return logits of decoding: half of the tokens prefilled, the rest one by one."""

    @jax.jit
    def read(weights, ids):
        half = LENGTH // 2
        cache = model.empty_cache(len(ids), LENGTH, tail=2, dtype=EXACT.type)
        count = jnp.full(len(ids), half)
        scores, cache = model.prefill(weights, cache, ids[:, :half], count, compute=EXACT)
        found = [scores]
        for place in range(half, LENGTH):
            if (place - half) % 2 == 0:
                cache = model.fold(weights, cache)
            scores, cache = model.step(weights, cache, ids[:, place], compute=EXACT)
            found.append(scores)
        return jnp.stack(found, axis=1)

    return np.asarray(read(model.unstack(weights), IDS))


def assert_equal(one, two, tolerance=2e-5):
    for run in (trained, decoded):
        np.testing.assert_allclose(run(*one), run(*two), atol=tolerance)


@pytest.mark.product
@pytest.mark.parametrize(("few", "many"), params([(1, 2), (1, 4), (2, 4)], [(1, 4)], unpack=True))
def test_fewer_kv_heads_are_equal_kv_heads(few, many):
    """MQA is GQA whose keys and values are the same in every group, and GQA such MHA."""
    gqa = matrix.build("gqa", "rope", "plain")
    small, large = (
        replace(gqa, attention=replace(gqa.attention, kv_heads=number)) for number in (few, many)
    )
    weights = matrix.weights(small)
    copies = many // few
    write = weights["stage0"]["slot0"]["write"]
    assert all(leaf.shape[2] == few for leaf in write.values())
    tiled = {name: np.repeat(leaf, copies, axis=2) for name, leaf in write.items()}
    slot = {**weights["stage0"]["slot0"], "write": tiled}
    assert_equal((small, weights), (large, {**weights, "stage0": {"slot0": slot}}))


@pytest.mark.product
@pytest.mark.parametrize("window", params([LENGTH, LENGTH + 1, 10**6], [LENGTH]))
def test_a_window_of_the_whole_length_is_none(window):
    model = matrix.build("gqa", "rope", "plain")
    weights = matrix.weights(model)
    wide = replace(model, plan=(Stage((Layer(window=window),), repeats=2),))
    assert_equal((model, weights), (wide, weights))
    narrow = replace(model, plan=(Stage((Layer(window=LENGTH - 1),), repeats=2),))
    difference = np.abs(trained(model, weights) - trained(narrow, weights)).max(axis=(0, 2))
    assert (difference[:-1] == 0).all()
    assert difference[-1] > 1e-4


@pytest.mark.parametrize("position", params(["rope", "rope-llama3", "nope"], ["rope-llama3"]))
@pytest.mark.parametrize("plan", ["plain", "window", "reuse"])
def test_only_distances_matter(position, plan):
    model = matrix.build("gqa", position, plan)
    weights = matrix.weights(model)
    shifted = trained(model, weights, shift=1000)
    np.testing.assert_allclose(shifted, trained(model, weights), atol=1e-3)


def test_positions_matter():
    rope, nope = (matrix.build("gqa", name, "plain") for name in ("rope", "nope"))
    weights = matrix.weights(rope)
    difference = np.abs(trained(rope, weights) - trained(nope, weights)).max(axis=(0, 2))
    assert difference[0] < 1e-5  # with one entry all weights are 1
    assert difference[1:].min() > 1e-3


READS = [(-1, -1), (0, 0), (-1, 0), (0, -2)]


@pytest.mark.product
@pytest.mark.parametrize("reads", READS)
def test_reuse_by_distance_by_number_and_through_others(reads):
    model = matrix.build("gqa", "rope", "plain")
    plans = [
        (Stage((Layer(), Layer(reads=first), Layer(reads=second))),)
        for first, second in (reads, (-1, -1))
    ]
    weights = matrix.weights(replace(model, plan=plans[0]))
    assert_equal(*((replace(model, plan=plan), weights) for plan in plans))


@pytest.mark.product
def test_layers_written_out_are_repeats():
    model = matrix.build("gqa", "rope", "plain")
    weights = matrix.weights(model)
    plan = (Stage((Layer(), Layer())),)
    stacked = weights["stage0"]["slot0"]
    slots = {f"slot{n}": jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], stacked) for n in range(2)}
    assert_equal((model, weights), (replace(model, plan=plan), {**weights, "stage0": slots}))


@pytest.mark.product
def test_a_layer_with_its_own_position_is_a_model_with_it():
    model = matrix.build("gqa", "rope", "plain")
    weights = matrix.weights(model)
    other = replace(model, plan=(Stage((Layer(position=NoPE()),), repeats=2),))
    assert_equal((other, weights), (matrix.build("gqa", "nope", "plain"), weights))


@pytest.mark.product
def test_rematerialisation_changes_no_gradient():
    """Rematerialisation changes no gradient, and policies that store less have programs that take
    less memory. `offload` is exempt: its host memory is the same on a CPU."""
    model = matrix.build("gqa", "rope", "plain")
    weights, ids, found, taken = matrix.weights(model), jnp.asarray(IDS), [], []
    for policy in POLICIES:
        compute = replace(EXACT, unroll=False, rematerialise=policy)

        def objective(weights, compute=compute):
            return jnp.sum(jnp.sin(model.hidden(weights, ids, compute=compute)))

        program = jax.jit(jax.grad(objective)).lower(weights).compile()
        found.append(program(weights))
        taken.append(program.memory_analysis().temp_size_in_bytes)
    for other in found[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found[0], other)
    everything, stream, products, _ = taken
    assert stream < products < everything


@pytest.mark.product
def test_normed_shared_kv_is_grouped_attention_with_equal_projections():
    """Where keys and values have one projection, normalised values and keys are those of
    `shared_kv`, which stores the values alone."""
    shared = matrix.build("shared-kv-normed", "p-rope", "plain")
    fields = {name: getattr(shared.attention, name) for name in ("heads", "kv_heads", "head_dim")}
    fields |= {"norm": shared.attention.norm, "norm_values": True}
    position = shared.layers[0].softmax.position
    grouped = replace(shared, attention=Grouped(**fields, position=position))
    weights = matrix.weights(shared)
    slot = weights["stage0"]["slot0"]
    read = {name: leaf for name, leaf in slot["read"].items() if name != "key_norm"}
    value = slot["write"]["value"]
    write = {"key": value, "value": value, "key_norm": slot["read"]["key_norm"]}
    stage = {"slot0": {**slot, "read": read, "write": write}}
    assert_equal((shared, weights), (grouped, {**weights, "stage0": stage}))


@pytest.mark.product
def test_an_input_with_gain_zero_and_a_factor_of_one_change_nothing():
    dressed = matrix.build("shared-kv", "rope", "plain")
    plain = replace(dressed, layer_inputs=None, residual=SandwichNorm())
    weights = matrix.weights(dressed)
    slot = dict(weights["stage0"]["slot0"])
    inputs = slot.pop("inputs")
    scale = np.ones_like(slot.pop("layer_scale"))
    silent = {**inputs, "post_norm": {"gain": np.zeros_like(inputs["post_norm"]["gain"])}}
    own = {"slot0": {**slot, "inputs": silent, "layer_scale": scale}}
    without = {name: leaf for name, leaf in weights.items() if name != "layer_inputs"}
    assert_equal(
        (dressed, {**weights, "stage0": own}), (plain, {**without, "stage0": {"slot0": slot}})
    )
    assert not np.allclose(
        trained(dressed, weights), trained(plain, {**without, "stage0": {"slot0": slot}})
    )


def test_inputs_and_offsets_do_not_fit_depth_scaling():
    offset = {"norm": RMSNorm(stored="offset"), "layer_inputs": LayerInputs()}
    with pytest.raises(BadInput, match=r"scaling\.depth: got 0\.5; null with norm\.stored offset"):
        matrix.build("gqa", "rope", "plain", **offset, scaling=Scaling(depth=0.5))
