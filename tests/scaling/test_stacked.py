"""Layers given as `repeats: 4` or as a pattern of four have equal updates, most of them to the bit;
each expert is updated like a weight of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.params import Param, map_params
from mukv.scaling.adafactor import factored
from mukv.scaling.optimizers import OPTIMIZERS
from mukv.scaling.parameterization import Resolved
from mukv.scaling.updates import global_norm
from tests.pairs import params

LAYERS = 4
ONE = {
    "up": Param({"embed": 160, "hidden": 200}, fan_in=("embed",)),
    "query": Param({"embed": 160, "heads": 4, "head_dim": 40}, fan_in=("embed",)),
    "output": Param({"heads": 4, "head_dim": 40, "embed": 160}, fan_in=("heads", "head_dim")),
    "narrow": Param({"embed": 160, "rank": 8}, fan_in=("embed",)),
    "experts": Param(
        {"experts": 3, "embed": 160, "hidden": 136}, fan_in=("embed",), batch=("experts",)
    ),
    "gain": Param({"embed": 160}, role="vector", init="ones"),
    "bias": Param({"heads": 4, "head_dim": 40}, role="vector", init="zeros"),
}
STACKED = {name: param.stacked(LAYERS) for name, param in ONE.items()}
APART = {f"slot{layer}": ONE for layer in range(LAYERS)}


def apart(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"slot{i}": {name: leaf[i] for name, leaf in tree.items()} for i in range(LAYERS)}


def drawn(seed: int, scale: float) -> dict[str, Any]:
    """Draw numbers that are ten times as large in the last layer."""
    rng, sizes = np.random.default_rng(seed), np.array([1, 1, 1, 10], np.float32)
    return {
        name: jnp.asarray(
            scale
            * rng.normal(size=param.shape).astype(np.float32)
            * sizes.reshape(-1, *[1] * (len(param.shape) - 1)),
            jnp.float32,
        )
        for name, param in STACKED.items()
    }


ROUNDED = ("adafactor", "muonh")
"""Optimizers with sums over a matrix that XLA orders otherwise in a stack."""


def same(one: Any, other: Any, exact: bool = True) -> None:
    """Assert that two trees are equal, or equal up to rounding unless `exact`."""

    def compare(one: Any, other: Any) -> None:
        within = 0.0 if exact else 3e-7
        size = max(float(np.abs(other).max()), 1e-30)
        np.testing.assert_allclose(one, other, rtol=within, atol=within * size)

    jax.tree.map(compare, jax.device_get(one), jax.device_get(other))


compiled = partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})
"""Compile with XLA's optimisations, which tests/conftest.py turns off, since bit-equality is a
question about the compiler too."""


@pytest.mark.product
@pytest.mark.parametrize("kind", params(OPTIMIZERS, ["adamw", "muon", "adafactor"]))
@pytest.mark.parametrize("decay", params(["independent", "coupled"], ["coupled"]))
def test_a_stack_is_its_layers(kind, decay):
    optimizer = OPTIMIZERS[kind](weight_decay=0.1, decay=decay)
    equal = partial(same, exact=kind not in ROUNDED)

    def functions(declared: Any) -> Any:
        resolved = map_params(lambda _: Resolved(1.0, 1.0, 0.5, 0.25, True), declared)
        transform = optimizer.transform(declared, resolved)
        return transform, compiled(transform.update), compiled(partial(apply, declared, resolved))

    def apply(*given: Any) -> Any:
        return optimizer.apply(*given, rate=0.1)

    stacked, update, applied = functions(STACKED)
    separate, update_each, applied_each = functions(APART)
    weights = drawn(0, 1.0)
    states = stacked.init(weights), separate.init(apart(weights))
    for step in range(3):
        slopes = drawn(step + 1, 0.01)
        moved, one = update(slopes, states[0], weights)
        expected, four = update_each(apart(slopes), states[1], apart(weights))
        equal(apart(moved), expected)
        states, before = (one, four), weights
        weights = applied(before, moved)
        equal(apart(weights), applied_each(apart(before), expected))


@pytest.mark.product
@pytest.mark.parametrize("fan_in", ["embed", "hidden"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_expert_is_a_matrix_of_its_own(kind, fan_in):
    """Updates equal a loop over experts, one of which has gradients ten times as large."""
    optimizer = OPTIMIZERS[kind](weight_decay=0.1)
    together = {"e": Param(ONE["experts"].dims, fan_in=(fan_in,), batch=("experts",))}
    apart = {f"e{i}": Param({"embed": 160, "hidden": 136}, fan_in=(fan_in,)) for i in range(3)}

    def updates(declared: Any, weights: Any, slopes: list[Any]) -> Any:
        resolved = map_params(lambda _: Resolved(1.0, 1.0, 0.5, 0.25, True), declared)
        transform = optimizer.transform(declared, resolved)
        state, found = transform.init(weights), []
        for slope in slopes:
            moved, state = jax.jit(transform.update)(slope, state, weights)
            found.append(moved)
        return found

    rng, sizes = np.random.default_rng(0), np.array([1, 1, 10]).reshape(3, 1, 1)
    whole = [sizes * rng.normal(size=together["e"].shape) for _ in range(3)]
    whole = [jnp.asarray(each, jnp.float32) for each in whole]
    split = [{name: each[i] for i, name in enumerate(apart)} for each in whole]
    one = updates(together, {"e": whole[0]}, [{"e": each} for each in whole[1:]])
    three = updates(apart, split[0], split[1:])
    for moved, expected in zip(one, three, strict=True):
        for i, name in enumerate(apart):
            size = float(np.abs(expected[name]).max())
            np.testing.assert_allclose(moved["e"][i], expected[name], rtol=1e-5, atol=2e-6 * size)


def test_the_norm_of_a_gradient():
    slopes = drawn(0, 0.01)
    norm = jax.jit(lambda tree: global_norm(STACKED, tree))(slopes)
    same(norm, jax.jit(lambda tree: global_norm(APART, tree))(apart(slopes)))
    exact = np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in slopes.values()))
    np.testing.assert_allclose(norm, exact, rtol=1e-6)


def test_what_adafactor_sees_as_a_matrix():
    assert all(factored(ONE[name]) for name in ("up", "query", "output", "experts"))
    assert not any(factored(ONE[name]) for name in ("narrow", "gain", "bias"))
    # An embedding that is also the readout contracts its last axis.
    tied = Param({"vocab": 264, "embed": 128}, role="embedding", fan_in=("embed",))
    state = (
        OPTIMIZERS["adafactor"]().direction({"e": tied}, None).init({"e": jnp.zeros(tied.shape)})
    )
    assert state.rows["e"].shape == (264,)
    assert state.columns["e"].shape == (128,)


def test_adafactor_is_optax_where_a_matrix_is_an_array():
    """The first step on plain matrices equals that of optax."""
    import optax

    declared = {"up": ONE["up"], "gain": ONE["gain"]}
    rng = np.random.default_rng(0)
    weights = {k: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for k, p in declared.items()}
    optimizer = OPTIMIZERS["adafactor"]()
    theirs = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    ours = optimizer.direction(declared, None)
    mine, other = ours.init(weights), theirs.init(weights)
    for _ in range(3):
        slopes = {
            k: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for k, p in declared.items()
        }
        moved, mine = ours.update(slopes, mine, weights)
        expected, other = theirs.update(slopes, other, weights)
        for name in declared:
            np.testing.assert_allclose(moved[name], expected[name], rtol=2e-5)
