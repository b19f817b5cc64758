"""Laws of low-rank adapters: merged and unmerged models agree, and only adapters are trained."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.compute import Compute
from mukv.core.linear import project
from mukv.core.low_rank import LowRank, added, factors
from mukv.core.params import Param, named
from mukv.model import Stage
from mukv.model.block import Gated
from mukv.model.loss import summed_loss
from mukv.model.width import widened
from mukv.scaling.optimizers import OPTIMIZERS, Muon
from mukv.scaling.parameterization import Scaling
from mukv.storage.checkpoint import Checkpoints
from mukv.train.adapter import Adapter
from tests.laws import matrix
from tests.laws.test_resume import assert_same_bits
from tests.pairs import params
from tests.training import batch, run, steps, trainer

ADAPTER = Adapter(rank=2, alpha=3.0)
MODELS = {"-".join(parts): functools.partial(matrix.build, *parts) for parts in matrix.SAMPLE}
MODELS |= {
    "-".join(parts): functools.partial(matrix.concept, *parts) for parts in matrix.SAMPLE_CONCEPTS
}
PLAIN = matrix.build("gqa", "rope", "plain")
SCANNED = Compute("float32", "float32", unroll=False)
QUICK = list(MODELS)[:1]


def adapter_of(model):
    """Return an adapter for every matrix of the model, of the largest rank that all of them
    have."""
    ranks = [2, 1]
    for rank in ranks:
        adapter = Adapter(rank, 3.0, ("*",))
        try:
            adapter.chosen(model.params())
        except ValueError:
            continue
        return adapter
    raise AssertionError


def thin(adapter, model, seed=0):
    """Draw random thin weights, neither of them zero."""
    random = np.random.default_rng(seed)

    def draw(param: Param) -> np.ndarray:
        size = (param.fan_in_size or 1) ** -0.5
        return (size * random.standard_normal(param.shape)).astype(np.float32)

    return jax.tree.map(
        draw, adapter.params(model.params()), is_leaf=lambda leaf: isinstance(leaf, Param)
    )


def forward(model, compute):
    """Compile (weights as the forward pass takes them, tokens) -> logits."""
    return jax.jit(
        lambda tree, ids: model.logits(tree, model.hidden(tree, ids, compute=compute), compute)
    )


@pytest.mark.product
@pytest.mark.parametrize("name", params(MODELS, [n for n in MODELS if n in QUICK]))
def test_initial_adapters_change_nothing(name):
    """Initial logits are those of the base, since the second thin weight is initialised with zeros.

    They are equal to the bit but where XLA fuses the two programs differently."""
    model = MODELS[name]()
    adapter, base = adapter_of(model), matrix.weights(model)
    train = trainer(model, adapter=adapter)
    own = train.initial_state().weights
    assert named(own).keys() == named(adapter.params(model.params())).keys()
    run = forward(model, matrix.EXACT)
    ids = matrix.tokens()
    whole = jax.jit(lambda: adapter.attached(model, base, own))()
    expected = run(model.scaled(base), ids)
    np.testing.assert_allclose(
        run(whole, ids), expected, atol=2e-6 * float(jnp.abs(expected).max())
    )
    merged = jax.jit(lambda: adapter.merged(model, base, own))()
    jax.tree.map(np.testing.assert_array_equal, merged, base)


@pytest.mark.parametrize("name", params(MODELS, [n for n in MODELS if n in QUICK]))
def test_merged_is_unmerged(name):
    """Merged and unmerged weights give equal logits, for every kind of layer, unrolled and
    scanned."""
    model = MODELS[name]()
    adapter, base = adapter_of(model), matrix.weights(model)
    own, ids = thin(adapter, model), matrix.tokens()
    merged = model.scaled(adapter.merged(model, base, own))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (merged, base)), strict=True))
    for compute in (matrix.EXACT, matrix.OTHER):
        run = forward(model, compute)
        apart, together = run(adapter.attached(model, base, own), ids), run(merged, ids)
        np.testing.assert_allclose(apart, together, atol=5e-5 * float(jnp.abs(together).max()))
        assert float(jnp.abs(together - run(model.scaled(base), ids)).max()) > 1e-2


@pytest.mark.parametrize("kind", params(["sp", "ntk", "mup", "mean_field"], ["sp", "mean_field"]))
def test_multipliers_are_those_of_the_weight(kind):
    """Merged and unmerged logits agree away from the base width and depth, so that adapters have
    the multipliers of their weights."""
    base = {**widened(PLAIN, PLAIN.d_model).scaling.base, "layer": 1}
    base |= {"embed": 8, "hidden": 6}
    model = dataclasses.replace(PLAIN, scaling=Scaling(kind=kind, base=base, depth=1.0))
    adapter, weights = adapter_of(model), matrix.weights(model)
    own, ids = thin(adapter, model), matrix.tokens()
    run = forward(model, matrix.EXACT)
    together = run(model.scaled(adapter.merged(model, weights, own)), ids)
    np.testing.assert_allclose(
        run(adapter.attached(model, weights, own), ids), together, rtol=1e-5, atol=1e-5
    )


@pytest.mark.product
def test_gradients_are_those_of_the_product():
    """Gradients follow by the chain rule from the gradient of the merged weights."""
    model, adapter = PLAIN, Adapter(rank=2, alpha=3.0)
    base, own = matrix.weights(model), thin(adapter, model)
    ids = jnp.asarray(matrix.tokens())

    def loss(tree):
        ones, targets = jnp.ones(ids.shape), jnp.roll(ids, -1, axis=1)
        return summed_loss(model, tree, ids, targets, ones, compute=matrix.EXACT).objective

    whole = jax.jit(jax.grad(loss))(adapter.merged(model, base, own))
    found = jax.jit(jax.grad(lambda own: loss(adapter.attached(model, base, own))))(own)
    parts, gradients, slopes = named(own), named(found), named(whole)
    for name, param in adapter.chosen(model.params()).items():
        a, b = parts[f"{name}.a"], parts[f"{name}.b"]
        zero = jnp.zeros(param.shape)
        _, back = jax.vjp(lambda a, b, param=param, zero=zero: added(param, zero, a, 1.5 * b), a, b)
        for part, expected in zip("ab", back(slopes[name]), strict=True):
            error = jnp.linalg.norm(gradients[f"{name}.{part}"] - expected)
            assert error < 1e-4 * jnp.linalg.norm(expected), name


@pytest.mark.product
def test_only_thin_weights_train():
    train = trainer(PLAIN, adapter=ADAPTER, learning_rate=0.02)
    state = train.initial_state()
    before = jax.tree.map(np.asarray, train.frozen), jax.tree.map(np.asarray, state.weights)
    state, seen = steps(train, state, 0, 4)
    assert_same_bits(train.frozen, before[0])
    changed = [
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (state.weights, before[1])), strict=True)
    ]
    assert all(changed)
    assert seen[-1].loss < seen[0].loss


@pytest.mark.product
@pytest.mark.parametrize("kind", params(sorted(OPTIMIZERS), ["adamw"]))
def test_optimizer_state_is_that_of_the_adapters(kind):
    """The optimizer state grows with the rank, not with the width of the model."""
    wide = matrix.build("gqa", "rope", "plain", d_model=256)

    def held(adapter):
        train = trainer(wide, adapter=adapter, optimizer=OPTIMIZERS[kind]())
        leaves = jax.tree.leaves(train.abstract_state().optimizer)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    one, two, whole = held(Adapter(1)), held(Adapter(2)), held(None)
    assert two < 0.1 * whole or kind == "adafactor"
    if kind != "adafactor":  # adafactor keeps sums over rows and columns of large weights
        assert two - 4 == pytest.approx(2 * (one - 4), rel=0.01)
    state, _ = run(trainer(PLAIN, adapter=ADAPTER, optimizer=OPTIMIZERS[kind]()), 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.product
def test_gradients_of_frozen_weights_are_not_computed():
    """The gradient of the adapters takes less memory than the adapted weights, and less than three
    quarters of the operations of the full gradient."""
    sizes = {"d_model": 128, "mlp": Gated(hidden=1024), "plan": (Stage(repeats=4),)}
    model = dataclasses.replace(PLAIN, **sizes)
    found = []
    for adapter in (None, Adapter(2)):
        train = trainer(model, adapter=adapter, batch=1, compute=SCANNED)
        with jax.set_mesh(train.mesh):
            given = train.abstract_state().weights, train.put(batch(0, 1)), train.frozen
            made = jax.jit(train._gradient).lower(*given).compile()
        memory = made.memory_analysis()
        taken = memory.temp_size_in_bytes + memory.output_size_in_bytes
        found.append((taken, made.cost_analysis()["flops"]))
    (most, flops), (taken, fewer) = found
    weights = 4 * sum(param.size for param in Adapter(2).chosen(model.params()).values())
    assert taken < weights < most
    assert fewer < 0.75 * flops


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_full_rank_expresses_any_update(shape):
    """Full-rank adapters of an update's singular vectors equal it, and gradient descent finds
    it."""
    random = np.random.default_rng(0)
    param = Param({"rows": shape[0], "columns": shape[1]}, fan_in=("rows",))
    base, update = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
    left, sizes, right = np.linalg.svd(update, full_matrices=False)
    np.testing.assert_allclose(added(param, base, left * sizes, right), base + update, atol=1e-5)
    x = random.standard_normal((32, shape[0])).astype(np.float32)
    wanted = x @ (base + update)

    def loss(parts):
        return jnp.mean((project(x, LowRank(base, *parts)) - wanted) ** 2)

    @jax.jit
    def descend(parts):
        def one(parts, _):
            slope = jax.grad(loss)(parts)
            return jax.tree.map(lambda part, s: part - 0.05 * s, parts, slope), None

        return jax.lax.scan(one, parts, length=10_000)[0]

    left_over = {}
    for rank in (1, 4):
        a, b = factors(param, rank)
        begin = jnp.asarray(random.standard_normal(a.shape), jnp.float32), jnp.zeros(b.shape)
        left_over[rank] = float(loss(descend(begin)))
    assert left_over[4] < 1e-5 < 0.1 < left_over[1]


LAST = 4


@pytest.mark.product
@pytest.mark.parametrize("stop", params(range(1, LAST), [2]))
def test_resume_is_bit_equal(stop, tmp_path):
    whole, _ = run(trainer(PLAIN, adapter=ADAPTER), LAST)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(stop, run(trainer(PLAIN, adapter=ADAPTER), stop)[0])
    fresh = trainer(PLAIN, adapter=ADAPTER)
    fresh.initial_state()  # reads or draws the frozen weights
    with Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(None, fresh.abstract_state())
    assert_same_bits(steps(fresh, state, stop, LAST)[0], whole)


MESHES = {"data": (4, 1, 1), "both": (2, 4, 2)}
RATE = 1e-3
SPLIT = [("gqa", "rope", "plain"), ("latent", "rope", "experts-both"), ("hca", "rope", "mixed")]


@pytest.mark.product
@pytest.mark.parametrize("mesh", params(MESHES, ["both"]))
@pytest.mark.parametrize("combination", params(SPLIT, SPLIT[:1], "-".join))
def test_sharding_is_invisible(mesh, combination):
    """Sharded training equals that on one device, within the bounds of test_sharding.py; frozen
    weights are sharded as well."""
    model = matrix.build(*combination, vocab_size=32)
    data, tensor, accumulate = MESHES[mesh]
    common = {"adapter": ADAPTER, "learning_rate": RATE}
    (alone, metrics), split = (
        run(trainer(model, **common), 3),
        trainer(model, data, tensor, accumulate=accumulate, **common),
    )
    sharded, seen = run(split, 3)
    for one, eight in zip(metrics, seen, strict=True):
        np.testing.assert_allclose(eight.loss, one.loss, rtol=2e-5)
        np.testing.assert_allclose(eight.gradient_norm, one.gradient_norm, rtol=2e-5)
    for one, eight in zip(*map(jax.tree.leaves, (alone.weights, sharded.weights)), strict=True):
        assert np.sqrt(np.mean((np.asarray(eight) - np.asarray(one)) ** 2)) < 0.02 * RATE
    largest = max(jax.tree.leaves(split.frozen), key=lambda leaf: leaf.size)
    assert largest.addressable_shards[0].data.size < largest.size


@pytest.mark.parametrize("kind", ["sp", "ntk", "mup", "mean_field"])
def test_rates_are_those_of_lora_plus(kind):
    """Under Adam the first thin weight's rate falls as 1 / width as the forward pass sees it, and
    the second one's is equal at all widths (Hayou et al. 2024)."""
    narrow = dataclasses.replace(PLAIN, scaling=Scaling(kind=kind))
    for ratio in (4, 16):
        wide = widened(narrow, ratio * PLAIN.d_model)
        found = named(Adapter(2, ratio=5.0).resolved(wide))
        for name in Adapter(2).chosen(wide.params()):
            a, b = found[f"{name}.a"], found[f"{name}.b"]
            assert a.learning_rate * a.multiplier == pytest.approx(1 / ratio)
            assert b.learning_rate * b.multiplier == pytest.approx(5.0)
            assert a.deviation * a.multiplier == pytest.approx(_inputs(wide, name) ** -0.5)
            assert b.deviation == 0


def _inputs(model, name):
    return named(model.params())[name].fan_in_size


@pytest.mark.product
def test_muon_moves_both_as_matrices():
    """The first update of the second thin weight has singular values near sqrt(columns / rank)."""
    train = trainer(PLAIN, adapter=ADAPTER, optimizer=Muon(weight_decay=0.0), clip_norm=None)
    before = jax.device_get(train.initial_state().weights)
    state, _ = run(train, 1)
    rate = float(train.learning_rate(jnp.zeros((), jnp.int32)))
    for name, leaf in named(state.weights).items():
        if name.endswith("up.b"):
            moved = (np.asarray(leaf) - named(before)[name])[0] / rate
            sizes = np.linalg.svd(moved, compute_uv=False)
            np.testing.assert_allclose(sizes, (24 / 2) ** 0.5, rtol=0.35)
            return
    raise AssertionError
