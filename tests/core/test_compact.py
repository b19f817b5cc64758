"""Weights in few bits are close to the originals, and products with them are products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core import compact
from mukv.core.compact import GROUPS, Compact, compacted
from mukv.core.linear import look_up, project, project_each
from mukv.core.params import Param

HIDDEN = Param({"embed": 70, "heads": 3, "head_dim": 7}, fan_in=("embed",))
EXPERTS = Param({"experts": 3, "embed": 6, "hidden": 5}, fan_in=("embed",), batch=("experts",))
OUTPUT = Param({"heads": 3, "head_dim": 33, "embed": 40}, fan_in=("heads", "head_dim"))
TABLE = Param({"vocab": 50, "embed": 65}, role="embedding", fan_in=("embed",))
DECLARED = {"hidden": HIDDEN, "output": OUTPUT, "table": TABLE}
DECLARED["experts"] = EXPERTS


def drawn(param: Param, seed: int = 0) -> jax.Array:
    """Draw numbers of very different sizes, some groups of zeros, and numbers far from zero."""
    random = np.random.default_rng(seed)
    size = 10.0 ** random.integers(-3, 3, param.shape[-1])
    found = random.standard_normal(param.shape) * size
    found[..., 0], found[..., 1] = 0, 7 + found[..., 1] / 100
    return jnp.asarray(found, jnp.float32)


def by_output(param: Param, weight: jax.Array) -> np.ndarray:
    """Return a weight as [leading output input]."""
    leading = len(param.leading)
    if param.role == "embedding":
        return np.asarray(weight)
    inner = np.asarray(weight).reshape(*weight.shape[:leading], param.fan_in_size, -1)
    return inner.swapaxes(-1, -2)


@pytest.mark.product
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", DECLARED)
def test_each_weight_is_within_half_a_step(name, kind):
    param = DECLARED[name]
    weight = drawn(param)
    small = compacted(param, weight, kind)
    assert small.shape == weight.shape
    exact, near = by_output(param, weight), by_output(param, small.whole())
    if kind == "bfloat16":
        np.testing.assert_array_equal(near, exact.astype(jnp.bfloat16).astype(np.float32))
        return
    width, levels = exact.shape[-1], compact.LEVELS[kind]
    group = min(GROUPS[kind], width + width % 2)
    for start in range(0, width, group):
        part, other = (a[..., start : start + group] for a in (exact, near))
        low, high = part.min(-1), part.max(-1)
        span = np.abs(part).max(-1) if kind == "int8" else high - low
        # bfloat16 numbers are 2**-7 apart: the step may be that much larger, and the minimum that
        # much lower, than the exact one.
        margin = 0 if kind == "int8" else np.abs(low) / 128
        half = ((span + margin) / levels * (1 + 1 / 128) / 2)[..., None]
        slack = 1e-6 * np.abs(part)
        assert np.all(np.abs(part - other) <= half + slack)


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("rows", [1, 40])
def test_products_are_those_of_the_dequantised_weight(kind, rows, monkeypatch):
    # Blocks are so small that there are several; the last one overlaps.
    monkeypatch.setattr(compact, "BLOCKS", {True: 400, False: 800})
    random = np.random.default_rng(1)
    for name, contracted in (("hidden", 1), ("output", 2), ("table", 1)):
        param = DECLARED[name]
        small = compacted(param, drawn(param), kind)
        weight = small.whole()
        if name == "table":
            small, weight = small.T, weight.T
        x = jnp.asarray(random.standard_normal((rows, *weight.shape[:contracted])), jnp.float32)
        expected = jnp.tensordot(x, weight, contracted)
        assert small.shape == weight.shape
        found = jax.jit(project, static_argnums=2)(x, small, contracted)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", GROUPS)
def test_experts_and_rows(kind):
    experts = compacted(EXPERTS, drawn(EXPERTS), kind)
    inputs = jnp.ones((3, 2, 6))
    found = project_each(inputs, experts)
    np.testing.assert_allclose(found, inputs @ experts.whole(), rtol=1e-6)
    table = compacted(TABLE, drawn(TABLE), kind)
    index = jnp.asarray([[3, 49], [0, 3]])
    np.testing.assert_array_equal(look_up(table, index), table.whole()[index])


@pytest.mark.parametrize("kind", GROUPS)
def test_representable_weights_are_kept(kind):
    """Weights that lie on the levels of a format are stored without loss."""
    random = np.random.default_rng(2)
    low, high = {"int8": (-127, 127), "int4": (0, 15), "bfloat16": (-255, 255)}[kind]
    codes = random.integers(low, high + 1, HIDDEN.shape)
    codes[::8], codes[1::8] = low, high  # every group has both ends
    weight = jnp.asarray(codes, jnp.float32) / 64
    np.testing.assert_array_equal(compacted(HIDDEN, weight, kind).whole(), weight)


@pytest.mark.parametrize("kind", GROUPS)
def test_a_factor_multiplies_the_steps(kind):
    small = compacted(HIDDEN, drawn(HIDDEN), kind)
    np.testing.assert_allclose((small * 0.3).whole(), small.whole() * 0.3, rtol=1e-5, atol=1e-7)
    assert (small * 0.3).codes is small.codes


def test_compact_weights_behave_as_arrays():
    small = compacted(OUTPUT, drawn(OUTPUT), "int8")
    assert isinstance(small, Compact)
    found = jnp.einsum("hde->ed", small.astype("bfloat16"))
    assert found.dtype == jnp.bfloat16


def test_which_weights_are_compacted():
    gain = Param({"embed": 4}, role="vector")
    router = Param({"embed": 4, "experts": 2}, role="router", fan_in=("embed",))
    bias = Param({"every": 4, "head_dim": 4}, role="vector")
    curve = Param({"scalar": 4, "heads": 2}, fan_in=("scalar",))
    untied = Param({"vocab": 4, "embed": 2}, role="embedding")
    for param in (*DECLARED.values(), untied, HIDDEN.stacked(3)):
        assert compact.fits("weight", param)
    for param in (gain, router, bias):
        assert not compact.fits("weight", param)
    assert not compact.fits("stage0.slot0.read.position.out", curve)
