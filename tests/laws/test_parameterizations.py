"""Law 9: parameterisations agree at the base width, and away from it follow their table."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.core.params import Param, map_params, named
from mukv.model.width import widened
from mukv.scaling.optimizers import OPTIMIZERS, AdamAtan2, AdamW, Muon
from mukv.scaling.parameterization import Constants, Scaling, widths
from mukv.scaling.rows import EXPONENTS, LEARNING_RATES
from tests.laws import matrix
from tests.laws.matrix import D_MODEL, SAMPLE, SAMPLE_CONCEPTS
from tests.pairs import pairs, params
from tests.training import batch, run, trainer

KINDS = list(EXPONENTS)
MODEL = matrix.build("gqa", "rope", "plain")
MODELS = {"-".join(parts): functools.partial(matrix.build, *parts) for parts in SAMPLE}
MODELS |= {"-".join(parts): functools.partial(matrix.concept, *parts) for parts in SAMPLE_CONCEPTS}


def scaled(model, **fields):
    return dataclasses.replace(model, scaling=dataclasses.replace(model.scaling, **fields))


@functools.cache
def losses(kind, ratio=1, optimizer=None, **fields):
    optimizer = optimizer or AdamAtan2(weight_decay=0.1)
    model = widened(scaled(MODEL, kind=kind, **fields), D_MODEL * ratio)
    train = trainer(model, optimizer=optimizer, clip_norm=None, learning_rate=0.02)
    state, seen = run(train, 6)
    assert int(state.step) == 6
    return np.asarray([metrics.loss for metrics in seen])


AXES = {"name": MODELS, "kind": KINDS, "alignment": ["full", "none", "ignored"]}


@pytest.mark.parametrize(
    tuple(AXES), params(itertools.product(*AXES.values()), pairs(AXES)[::4], unpack=True)
)
def test_all_agree_at_the_base_width(name, kind, alignment):
    """All resolve every weight to bit-equal deviations, multipliers and learning rates."""
    model = MODELS[name]()
    chosen = widened(scaled(model, kind=kind, alignment=alignment), model.d_model)
    for optimizer in OPTIMIZERS.values():
        assert chosen.resolved(optimizer.family) == model.resolved(optimizer.family)
    assert [each.attention for each in chosen.layers] == [each.attention for each in model.layers]


@pytest.mark.parametrize("model", params(MODELS, [*MODELS][::2]))
@pytest.mark.parametrize("kind", KINDS)
def test_powers_of_each_weight_are_the_table_s(model, kind):
    narrow = scaled(MODELS[model](), kind=kind)
    wide, base = widened(narrow, 4 * D_MODEL), widened(narrow, D_MODEL)
    rows = zip(("embedding", "hidden", "readout"), EXPONENTS[kind], strict=True)
    exponents = dict(rows)
    rates = dict(zip(exponents, LEARNING_RATES["adam", "full"][kind], strict=True))
    exponents["router"], rates["router"] = (0.0, 0.5), -1.0
    pairs = zip(named(wide.resolved()).items(), named(base.resolved()).values(), strict=True)
    declared = zip(named(wide.params()).values(), named(base.params()).values(), strict=True)
    grown = 0
    for ((name, big), small), (param, before) in zip(pairs, declared, strict=True):
        ratio = math.prod(param.dims[axis] / before.dims[axis] for axis in widths(param))
        a, b = exponents.get(param.role, (0, 0))
        found = (
            big.multiplier / small.multiplier,
            big.deviation / small.deviation,
            big.learning_rate / small.learning_rate,
        )
        expected = (ratio**-a, ratio**-b, ratio ** rates.get(param.role, 0))
        assert found == pytest.approx(expected), name
        grown += ratio > 1
    assert grown >= 5


ALIKE = [("sp", "ntk"), ("mup", "mean_field")]


@pytest.mark.product
@pytest.mark.parametrize("pair", params(ALIKE, ALIKE[1:]))
@pytest.mark.parametrize("ratio", params([4, 16], [4]))
def test_symmetric_ones_train_the_same_without_epsilon(pair, ratio):
    """Training is the same up to rounding if the ratio of widths is a power of four, since all
    factors are then powers of two."""
    one, other = (losses(kind, ratio) for kind in pair)
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.product
def test_epsilon_breaks_the_symmetry_unless_it_is_by_layer():
    def gap(**fields):
        optimizer = AdamW(epsilon=1e-3, **fields)
        return np.abs(losses("mup", 4, optimizer) - losses("mean_field", 4, optimizer)).max()

    assert gap() > 1e-3
    assert gap(epsilon_by="layer") < 1e-5


@pytest.mark.product
def test_muon_moves_matrices_alike_under_all():
    """Muon gives equal losses under SP and NTK: its update does not depend on how the scale of a
    hidden matrix is split between multiplier and deviation."""
    optimizer = Muon(weight_decay=0.0)
    one, other = losses("sp", 4, optimizer), losses("ntk", 4, optimizer)
    np.testing.assert_allclose(one, other, atol=2e-3)


@pytest.mark.product
def test_everything_else_changes_training():
    kinds = {kind: losses(kind, 4) for kind in ("sp", "mup")}
    ignored = losses("sp", 4, alignment="ignored")
    assert not np.array_equal(kinds["sp"], kinds["mup"])
    assert not np.array_equal(kinds["sp"], ignored)


def test_depth_follows_completep():
    """With alpha = 1 branches are multiplied by 1 / depth and their learning rates stay (CompleteP,
    table 1)."""
    base = {**_base(MODEL), "layer": 1}
    one = scaled(MODEL, base=base, depth=1.0)
    half = scaled(MODEL, base=base, depth=0.5)
    for model, alpha in ((one, 1.0), (half, 0.5)):
        found = named(model.resolved())
        for name, param in named(model.params()).items():
            inside = "layer" in param.dims
            ends = name.endswith(("output", "down"))
            assert found[name].multiplier == pytest.approx(2**-alpha if ends else 1)
            assert found[name].learning_rate == pytest.approx(2 ** (alpha - 1) if inside else 1)
            assert found[name].epsilon == pytest.approx(2**-alpha if inside else 1)


def normed(kind):
    attention = dataclasses.replace(MODEL.attention, norm=RMSNorm())
    return scaled(dataclasses.replace(MODEL, attention=attention), kind=kind)


@pytest.mark.parametrize(("kind", "power"), [("sp", -0.5), ("mup", -1.0), ("mean_field", -1.0)])
def test_epsilon_of_gains_follows_their_gradients(kind, power):
    """That of a gain shrinks as the gradient of its activation; the gain of a QK norm is shared by
    all heads, whose number grows (Complete(d)P, table of AdamW's epsilon)."""
    found = named(widened(normed(kind), 4 * D_MODEL).resolved())
    for name, param in named(widened(normed(kind), 4 * D_MODEL).params()).items():
        if param.role == "vector":
            expected = 1.0 if name.endswith(("query_norm.gain", "key_norm.gain")) else 4**power
            assert found[name].epsilon == pytest.approx(expected), name


@pytest.mark.product
@pytest.mark.parametrize("kind", KINDS)
def test_epsilon_follows_measured_gradients(kind):
    """The gradient of each weight but those of QK norms, whose heads disagree at the start."""

    def sizes(ratio):
        train = trainer(widened(normed(kind), D_MODEL * ratio))
        with jax.set_mesh(train.mesh):
            state, put = train.initial_state(), train.put(batch(0))
            gradient = jax.jit(lambda *given: train._gradient(*given, None)[1])(state.weights, put)
        found, rms = named(train.resolved), lambda leaf: np.sqrt(np.mean(np.asarray(leaf) ** 2))
        return {name: rms(leaf) / found[name].epsilon for name, leaf in named(gradient).items()}

    narrow, wide = sizes(2), sizes(16)
    for name in narrow:
        if "query" not in name and "key" not in name:
            assert abs(np.log2(wide[name] / narrow[name])) / 3 < 0.3, name


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_muon_s_updates_shrink_with_depth(alpha):
    """Muon replaces Adam's width factors; the change of all branches together must still not grow
    with the number of layers, so that a deeper model's update is (depth ratio) ** -1 as large where
    a branch ends, and (depth ratio) ** (alpha - 1) elsewhere."""
    param = Param({"embed": 8, "hidden": 12}, fan_in=("embed",))
    declared = {
        name: dataclasses.replace(param, ends_branch=ends).stacked(2)
        for name, ends in (("in", False), ("out", True))
    }
    scaling = Scaling(base={"embed": 8, "hidden": 12, "layer": 1}, depth=alpha, kind="ntk")
    slopes = map_params(lambda p: jax.random.normal(jax.random.key(0), p.shape), declared)

    def update(layers):
        resolved = scaling.resolve(declared, layers)
        transform = Muon(weight_decay=0.0).transform(declared, resolved)
        moved, _ = transform.update(slopes, transform.init(slopes), slopes)
        return {name: moved[name] * resolved[name].multiplier for name in declared}

    shallow, deep = update(1), update(4)
    np.testing.assert_allclose(deep["in"], shallow["in"] * 4 ** (alpha - 1), rtol=1e-5)
    np.testing.assert_allclose(deep["out"], shallow["out"] / 4, rtol=1e-5)


def test_zeros_and_constants():
    model = scaled(MODEL, zeros=("query", "readout"), rate=Constants(embedding=5.0))
    weights = named(jax.device_get(trainer(model).initial_state().weights))
    zero = {name for name, leaf in weights.items() if not leaf.any()}
    assert zero == {"readout", "stage0.slot0.read.query"}
    assert named(model.resolved())["embedding"].learning_rate == 5


def test_scale_of_wider_heads_under_full_alignment():
    """Logits are scaled by 1 / head_dim beyond the base width, and by 1 / sqrt(head_dim) without
    alignment."""
    attention = dataclasses.replace(MODEL.attention, head_dim=16)
    wide = dataclasses.replace(
        MODEL, attention=attention, scaling=Scaling(kind="mup", base=_base(MODEL))
    )
    assert wide.layers[0].attention.scale == pytest.approx(8**0.5 / 16)
    loose = scaled(wide, alignment="none")
    assert loose.layers[0].attention.scale is None


def _base(model):
    return widened(model, model.d_model).scaling.base


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": {"embed": 8}}, r"base: .*lacks hidden: needs embed.*heads"),
        ({"base": {**_base(MODEL), "wide": 3}}, r"base\.wide"),
        ({"base": {**_base(MODEL), "embed": 0}}, r"base\.embed: got 0"),
        ({"base": _base(MODEL), "depth": 1.0}, "lacks layer"),
        ({"kind": "custom"}, "exponents"),
        ({"kind": "sp", "exponents": {"hidden": (0.0, 0.5)}}, "exponents"),
        ({"kind": "custom", "exponents": {"hidden": (0.0, 0.5)}}, "of embedding"),
        ({"depth": 0.2}, "depth: got 0.2"),
    ],
)
def test_bad_scaling_is_refused(fields, message):
    with pytest.raises(BadInput, match=message):
        scaled(MODEL, **fields)


def test_widths_that_break_sizes_are_refused():
    with pytest.raises(
        BadInput, match=r"widths: got 20; kv_heads would be 2\.5: needs a multiple of 8"
    ):
        widened(MODEL, 20)
