"""Experts equal a loop over all experts, drop tokens beyond their capacity, and report the balance
of their load."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape, batch_sharding, weight_shardings
from mukv.core.params import active, count, named
from mukv.core.typing import Array
from mukv.model import Decoder, Layer, Stage
from mukv.model.counting import flops_per_token
from mukv.model.experts import Experts
from mukv.model.feedforward import Gated
from mukv.model.width import widened
from mukv.runs import config
from mukv.scaling.optimizers import OPTIMIZERS
from mukv.scaling.parameterization import Scaling
from tests.laws import matrix

WIDTH, ROWS, LENGTH = 16, 3, 10
PART = Experts(experts=5, top_k=2, hidden=12)
KINDS = {
    "plain": PART,
    "one": replace(PART, top_k=1, normalise=False),
    "all": replace(PART, top_k=5),
    "sigmoid": replace(PART, router="sigmoid", activation="gelu"),
    "raw": replace(PART, normalise=False),
    "shared": replace(PART, shared=2),
    "grouped": replace(
        PART,
        experts=8,
        top_k=3,
        router="sigmoid",
        groups=4,
        top_groups=2,
        choice_bias=True,
        scale=2.5,
        shared=1,
    ),
    "grouped softmax": replace(PART, experts=6, groups=2, group_best=1, normalise=False, scale=0.5),
    "scaled": replace(PART, expert_scale=True),
    "clamped": replace(PART, activation="quick_gelu", limit=0.5, up_offset=1.0, biases=True),
}


def weights(part: Experts, seed: int = 0, lean: float = 0.0) -> dict:
    """Draw random weights. lean: what is added to the router's weights of the first expert."""
    rng = np.random.default_rng(seed)
    drawn = {
        name: rng.normal(size=param.shape).astype(np.float32) * max(param.fan_in_size, 1) ** -0.5
        for name, param in named(part.params(WIDTH)).items()
    }
    drawn["router"][:, 0] += lean
    if part.choice_bias:
        drawn["choice_bias"] *= 0.1  # the scores and the numbers both count
    nested = {name: leaf for name, leaf in drawn.items() if "." not in name}
    if part.shared:
        nested["shared"] = {name: drawn[f"shared.{name}"] for name in ("gate", "up", "down")}
    return nested


def inputs(rows: int = ROWS, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, LENGTH, WIDTH)).astype(np.float32)


def applied(part: Experts, own: dict, x: np.ndarray, counted: np.ndarray | None = None) -> tuple:
    return jax.jit(part.apply)(own, x, counted)


def biased(x: Array, own: dict, name: str) -> Array:
    return x + own[f"{name}_bias"][None, None] if f"{name}_bias" in own else x


def dense(part: Experts, own: dict, x: Array) -> Array:
    """Compute every expert for every token, then a sum with one-hot weights."""
    logits = biased(x @ own["router"], own, "router")
    scores = jax.nn.softmax(logits) if part.router == "softmax" else jax.nn.sigmoid(logits)
    wanted = biased(scores, own, "choice")
    if part.groups > 1:
        groups = wanted.reshape(*wanted.shape[:-1], part.groups, -1)
        best = jnp.sort(groups)[..., -part.group_best :].sum(-1)
        eligible = best >= jnp.sort(best)[..., -part.top_groups, None]
        wanted = jnp.where(eligible[..., None], groups, -jnp.inf).reshape(wanted.shape)
    kept = jnp.where(wanted >= jnp.sort(wanted)[..., -part.top_k, None], scores, 0)
    if part.normalise:
        kept = kept / kept.sum(-1, keepdims=True)
    kept = part.scale * kept * jnp.reshape(own.get("expert_scale", 1), (1, 1, -1))
    act = {
        "silu": jax.nn.silu,
        "gelu": lambda g: jax.nn.gelu(g, approximate=True),
        "quick_gelu": lambda g: g / (1 + jnp.exp(-1.702 * g)),
    }[part.activation]

    def mlp(expert: dict) -> Array:
        gate, up = (biased(x @ expert[name], expert, name) for name in ("gate", "up"))
        if part.limit:
            gate, up = jnp.minimum(gate, part.limit), jnp.clip(up, -part.limit, part.limit)
        return biased((act(gate) * (up + part.up_offset)) @ expert["down"], expert, "down")

    others = ("router", "router_bias", "choice_bias", "expert_scale", "shared")
    out = jax.vmap(mlp)({name: leaf for name, leaf in own.items() if name not in others})
    total = jnp.einsum("ebtd,bte->btd", out, kept)
    return total + (mlp(own["shared"]) if part.shared else 0)


@pytest.mark.product
@pytest.mark.parametrize("lean", [0.0, 9.0])
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_products_are_the_dense_sum(kind, lean):
    """Outputs and gradients equal the dense sum, with experts evenly used or nearly all tokens in
    one."""
    part, x = KINDS[kind], np.abs(inputs())
    own = weights(part, lean=lean)
    look = jnp.asarray(inputs(seed=2))

    def value(function):
        return jax.jit(
            jax.value_and_grad(lambda own, x: jnp.sum(function(own, x) * look), argnums=(0, 1))
        )(own, x)

    np.testing.assert_allclose(applied(part, own, x)[0], dense(part, own, x), atol=2e-5)
    found, expected = (
        value(lambda own, x: part.apply(own, x)[0]),
        value(lambda own, x: dense(part, own, x)),
    )
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=3e-4, rtol=1e-4)


def chosen_by_hand(part: Experts, own: dict, x: np.ndarray) -> tuple[set, dict]:
    """Return the experts of one token and their weights, by the formulas of DeepSeek-V3."""
    score = 1 / (1 + np.exp(-(x @ own["router"]).astype(np.float64)))
    wanted = score + own["choice_bias"]
    size = part.experts // part.groups
    members = [range(g * size, (g + 1) * size) for g in range(part.groups)]
    best = [sum(sorted(wanted[list(each)])[-2:]) for each in members]
    eligible = [e for g in np.argsort(best)[-part.top_groups :] for e in members[g]]
    found = sorted(eligible, key=lambda e: wanted[e])[-part.top_k :]
    total = sum(score[e] for e in found)
    return set(found), {e: part.scale * score[e] / total for e in found}


def test_groups_and_the_choice_bias_choose_but_do_not_weigh():
    """The choice is that of the formulas; the bias is not in the weights, and other groups than
    those of the best experts are left out."""
    part, x = KINDS["grouped"], inputs()
    own = weights(part)
    _, _, chosen, weight = map(np.asarray, part.route(own, jnp.asarray(x)))
    free = replace(part, top_groups=part.groups).route(own, jnp.asarray(x)).chosen
    unbiased = part.route({**own, "choice_bias": 0 * own["choice_bias"]}, jnp.asarray(x)).chosen
    for row, t in np.ndindex(x.shape[:2]):
        found, shares = chosen_by_hand(part, own, x[row, t])
        assert set(chosen[row, t]) == found
        for expert, share in zip(chosen[row, t], weight[row, t], strict=True):
            assert share == pytest.approx(shares[expert], rel=1e-5)
    for other in (free, unbiased):
        rows = zip(chosen.reshape(-1, 3), np.asarray(other).reshape(-1, 3), strict=True)
        assert any(set(one) != set(two) for one, two in rows)


def test_scores_of_zero_are_weights_of_zero():
    """A choice bias may choose experts whose scores are all zero; nothing is divided by zero."""
    part, own, x = KINDS["grouped"], weights(KINDS["grouped"]), np.abs(inputs())
    own["router"][:] = -100
    y, told = applied(part, own, x, np.ones(x.shape[:2], bool))
    assert np.isfinite(y).all()
    assert np.isfinite(told["expert_balance"]).all()


def test_the_choice_bias_learns_from_the_load_alone():
    """Its gradient is the share of a row's choices minus the mean, whatever `balance` is; the
    output has none, and the penalty stays what it is without a bias. AdamW then lowers the
    numbers of the experts with more tokens than the mean."""
    part, x = KINDS["grouped"], inputs()
    own, counted = weights(part), np.ones((ROWS, LENGTH), bool)
    counted[0, 6:] = False
    chosen = np.asarray(part.route(own, jnp.asarray(x)).chosen)
    load = [
        np.bincount(chosen[row][counted[row]].reshape(-1), minlength=8) / (3 * counted[row].sum())
        for row in range(ROWS)
    ]
    for balance in (0.0, 0.5):
        same = replace(part, balance=balance)

        def penalties(bias, same=same):
            given = {**own, "choice_bias": bias}
            return same.apply(given, jnp.asarray(x), jnp.asarray(counted))[1]["penalty"]

        slopes = jax.jacrev(penalties)(jnp.asarray(own["choice_bias"]))
        np.testing.assert_allclose(slopes, np.stack(load) - 1 / 8, atol=1e-6)
        told = applied(same, own, x, counted)[1]
        np.testing.assert_allclose(told["penalty"], balance * told["expert_balance"], atol=1e-6)
    output = jax.grad(
        lambda bias: jnp.sum(part.apply({**own, "choice_bias": bias}, jnp.asarray(x))[0])
    )
    assert not np.any(output(jnp.asarray(own["choice_bias"])))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_training_evens_the_load(kind):
    """Steps of an optimizer on the choice bias alone even out the load of a router that leans to
    one expert."""
    part = replace(KINDS["grouped"], balance=0.0, shared=0, groups=1, top_groups=1)
    own, x = weights(part, lean=0.3), jnp.asarray(np.abs(inputs(rows=8)))
    own = {name: jnp.asarray(leaf) for name, leaf in own.items()}
    own["choice_bias"] = jnp.zeros(8)
    counted = jnp.ones(x.shape[:2], bool)
    declared = {"choice_bias": part.params(WIDTH)["choice_bias"]}
    resolved = Scaling().resolve(declared, 1)
    optimizer = OPTIMIZERS[kind]()
    update = optimizer.transform(declared, resolved)
    bias = {"choice_bias": jnp.asarray(own["choice_bias"])}
    state = update.init(bias)

    @jax.jit
    def step(bias, state):
        slope = jax.grad(lambda b: jnp.mean(part.apply({**own, **b}, x, counted)[1]["penalty"]))
        change, state = update.update(slope(bias), state, bias)
        return optimizer.apply(declared, resolved, bias, change, 0.01), state

    def spread(bias):
        chosen = part.route({**own, **bias}, x).chosen
        return np.bincount(np.asarray(chosen).reshape(-1), minlength=8).std()

    before = spread(bias)
    for _ in range(60):
        bias, state = step(bias, state)
    assert spread(bias) < 0.4 * before


def test_products_are_those_of_ragged_dot():
    """The reference is JAX's grouped product over tokens sorted by expert."""
    part, x = PART, inputs()
    own = weights(part)
    _, _, chosen, weight = part.route(own, jnp.asarray(x))
    order = np.argsort(np.asarray(chosen).reshape(-1), kind="stable")
    sizes = jnp.bincount(chosen.reshape(-1), length=part.experts)
    tokens = jnp.asarray(x.reshape(-1, WIDTH)[order // part.top_k])
    gate, up = (jax.lax.ragged_dot(tokens, own[name], sizes) for name in ("gate", "up"))
    out = jax.lax.ragged_dot(jax.nn.silu(gate) * up, own["down"], sizes)
    total = np.zeros_like(x).reshape(-1, WIDTH)
    np.add.at(total, order // part.top_k, out * np.asarray(weight).reshape(-1)[order][:, None])
    np.testing.assert_allclose(applied(part, own, x)[0].reshape(-1, WIDTH), total, atol=1e-5)


def limited(part: Experts, own: dict, x: np.ndarray, counted: np.ndarray) -> tuple:
    """Compute experts with a capacity token by token: outputs, and the dropped share of each
    row."""
    _, _, chosen, weight = map(np.asarray, part.route(own, jnp.asarray(x)))
    assert part.capacity is not None
    room = math.ceil(part.capacity * part.top_k * LENGTH / part.experts)
    total, dropped, left = np.zeros_like(x), np.zeros(len(x)), [room]
    for row, t in np.ndindex(x.shape[:2]):
        if t == 0:
            left = [room] * part.experts
        for expert, share in zip(chosen[row, t], weight[row, t], strict=True):
            if counted[row, t] and left[expert]:
                left[expert] -= 1
                inner = np.asarray(jax.nn.silu(x[row, t] @ own["gate"][expert]))
                out = (inner * (x[row, t] @ own["up"][expert])) @ own["down"][expert]
                total[row, t] += share * out
            else:
                dropped[row] += counted[row, t]
    return total, dropped / (part.top_k * counted.sum(1))


@pytest.mark.parametrize("capacity", [0.5, 1.0, 9.0])
def test_a_capacity_drops_the_later_tokens_of_a_row(capacity):
    part, x, own = replace(PART, capacity=capacity), inputs(), weights(PART)
    counted = np.ones(x.shape[:2], bool)
    counted[0, :3] = counted[1, 5:] = False
    y, told = applied(part, own, x, counted)
    expected, dropped = limited(part, own, x, counted)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(told["expert_dropped"], dropped, atol=1e-6)
    assert (dropped.max() > 0) == (capacity < 9)
    # Without `counted`, where rows are not whole, no tokens are dropped.
    np.testing.assert_array_equal(applied(part, own, x)[0], applied(PART, own, x)[0])


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_even_routing_has_balance_one_and_padding_does_not_count(router):
    part = replace(PART, experts=4, router=router, balance=0.5, z_loss=0.25)
    own = weights(part)
    x = np.zeros((2, 8, WIDTH), np.float32)
    for t in range(8):
        x[:, t, [t % 4, (t + 1) % 4]] = 1  # each expert is chosen four times
    own["router"][:] = 0
    own["router"][:4] = 1e-4 * np.eye(4)
    x[1, 4:] = 5 * np.eye(WIDTH)[2] + 4 * np.eye(WIDTH)[3]
    counted = np.ones((2, 8), bool)
    told = applied(part, own, x, counted)[1]
    assert told["expert_balance"][0] == pytest.approx(1, abs=1e-3)
    assert told["expert_balance"][1] > 1
    counted[1, 4:] = False
    told = applied(part, own, x, counted)[1]
    np.testing.assert_allclose(told["expert_balance"], 1, atol=1e-3)
    np.testing.assert_allclose(
        told["penalty"], 0.5 * told["expert_balance"] + 0.25 * np.log(4) ** 2, atol=1e-3
    )
    assert applied(part, own, x)[1] is None


def test_balance_is_that_of_the_paper():
    """The penalty equals equations 4 to 6 of Switch Transformer, with the load over top_k
    choices."""
    own, x = weights(PART, lean=1.0), inputs()
    told = applied(PART, own, x, np.ones(x.shape[:2], bool))[1]
    logits = x @ own["router"]
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-share, axis=-1)[..., :2]
    for row in range(ROWS):
        load = np.bincount(best[row].reshape(-1), minlength=5) / (2 * LENGTH)
        assert told["expert_balance"][row] == pytest.approx(
            5 * np.sum(load * share[row].mean(0)), rel=1e-5
        )


def model(**changes) -> Decoder:
    return matrix.build("gqa", "rope", "plain", mlp=replace(KINDS["shared"], **changes))


def test_counts_of_weights_and_operations():
    """Counts equal those by hand: 2 layers, 5 experts of width 12 and a shared one of 24, 2 of 5
    used."""
    one, other = model(), matrix.build("gqa", "rope", "plain", mlp=Gated(hidden=1))
    rest = count(other.params()) - 2 * 3 * 16
    expert = 3 * 16 * 12
    always = rest + 2 * (16 * 5 + 2 * expert)
    assert count(one.params()) == always + 2 * 5 * expert
    assert active(one.params()) == always + 2 * 2 * expert
    more = flops_per_token(one, 8) - flops_per_token(other, 8)
    assert more == 6 * 2 * (16 * 5 + 4 * expert - 3 * 16)


@pytest.mark.product
def test_layers_may_differ_and_penalties_add_up_scanned_or_not():
    """Penalties of layers add up, scanned or not, after a dense first layer."""
    plan = (Stage((Layer(mlp=Gated(hidden=20)),)), Stage(repeats=3))
    told = replace(model(balance=0.5, capacity=1.0), plan=plan)
    tree, ids = matrix.weights(told), matrix.tokens(2)
    results = [
        jax.jit(partial(told.forward, compute=compute))(tree, ids)
        for compute in (matrix.EXACT, matrix.OTHER)
    ]
    for result in results:
        balance = result.counts["expert_balance"] / matrix.LENGTH
        np.testing.assert_allclose(result.penalty, 3 * 0.5 * balance, rtol=1e-5)
        assert set(result.counts) == {"expert_balance", "expert_dropped"}
    np.testing.assert_allclose(results[0].penalty, results[1].penalty, rtol=1e-5)
    np.testing.assert_allclose(results[0].hidden, results[1].hidden, atol=1e-5)


@pytest.mark.product
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_router_is_scaled_by_its_fan_in(kind):
    """The router's deviation and learning rate follow its fan-in under every parameterisation,
    since the number of experts does not grow with the width."""
    family = OPTIMIZERS[kind].family
    power = {"adam": -1.0, "sgd": -1.0, "adafactor": -0.5}[family]
    for scaling in ("sp", "mup", "ntk", "mean_field"):
        base = model()
        base = replace(base, scaling=replace(base.scaling, kind=scaling))
        narrow, wide = (
            named(widened(base, width).resolved(family))["stage0.slot0.mlp.router"]
            for width in (16, 64)
        )
        assert wide.learning_rate / narrow.learning_rate == pytest.approx(4**power)
        assert (wide.deviation, narrow.deviation) == pytest.approx((1 / 8, 1 / 4))
        assert wide.multiplier == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 6}, r"top_k: got 6; at most experts \(5\)"),
        ({"top_k": 1}, "normalise: got True; false with top_k 1"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"shared": -1}, "shared: got -1"),
        ({"balance": -1.0}, "balance"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"capacity": 0.0}, "capacity"),
        ({"scale": 0.0}, "scale: got 0.0; greater than 0"),
        ({"groups": 2}, r"groups: got 2; a number that divides experts \(5\)"),
        ({"groups": 5}, r"groups: got 5; at most 2: a group has at least group_best \(2\)"),
        ({"experts": 6, "groups": 3, "top_groups": 4}, r"top_groups: got 4; at most groups \(3\)"),
        (
            {"experts": 6, "groups": 3, "top_k": 3},
            r"top_groups: got 1; at least 2: top_k \(3\) experts in groups of 2",
        ),
    ],
)
def test_bad_experts_are_refused(fields, message):
    with pytest.raises(BadInput, match=message):
        replace(PART, **fields)


def test_parity_with_qwen3_moe():
    """The layer equals that of transformers on random weights, to 1e-5 of the largest output."""
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    from transformers import Qwen3MoeConfig

    for normalise in (True, False):
        config = Qwen3MoeConfig(
            hidden_size=WIDTH,
            moe_intermediate_size=12,
            num_experts=5,
            num_experts_per_tok=2,
            norm_topk_prob=normalise,
        )
        block = qwen.Qwen3MoeSparseMoeBlock(config)
        own, x = weights(PART), inputs()
        with torch.no_grad():
            block.gate.weight.copy_(torch.tensor(own["router"].T))
            both = np.concatenate([own["gate"], own["up"]], axis=2).swapaxes(1, 2)
            block.experts.gate_up_proj.copy_(torch.tensor(both))
            block.experts.down_proj.copy_(torch.tensor(own["down"].swapaxes(1, 2)))
            expected = block(torch.tensor(x)).numpy()
            logits, _, _ = block.gate(torch.tensor(x))
        part = replace(PART, normalise=normalise)
        y, told = applied(part, own, x, np.ones(x.shape[:2], bool))
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
        # That of transformers is over the whole batch, and top_k at even routing: compare each row.
        for row, mine in enumerate(told["expert_balance"]):
            their = qwen.load_balancing_loss_func(
                (logits[row * LENGTH : (row + 1) * LENGTH],), 5, 2
            )
            assert mine == pytest.approx(float(their) / 2, rel=1e-5)


@pytest.mark.product
@pytest.mark.parametrize("capacity", [None, 1.0])
@pytest.mark.parametrize("fields", [{}, {"groups": 2, "choice_bias": True, "router": "sigmoid"}])
def test_sharded_experts_are_the_same(capacity, fields):
    """Law 6 of one layer, on 8 devices: experts sharded over data, and each over tensor."""
    part = replace(PART, experts=4, shared=1, capacity=capacity, **fields)
    declared, own = part.params(WIDTH), weights(part)
    x, counted = inputs(rows=8), np.ones((8, LENGTH), bool)
    alone = applied(part, own, x, counted)
    mesh = MeshShape(4, 2).build()
    shardings = weight_shardings(declared, mesh)
    assert shardings["gate"].spec == PartitionSpec("data", None, "tensor")
    assert shardings["down"].spec == PartitionSpec("data", "tensor", None)
    with jax.set_mesh(mesh):
        pieces = jax.device_put(own, shardings)
        x, counted = jax.device_put((x, counted), batch_sharding(mesh))
        y, told = applied(part, pieces, x, counted)
    np.testing.assert_allclose(y, alone[0], atol=1e-5)
    for name, value in alone[1].items():
        np.testing.assert_allclose(told[name], value, atol=1e-6)


def test_a_mapping_without_a_kind_is_a_gated_mlp():
    """Configurations without `kind` have a gated MLP, as before there were experts."""
    run = config.load("tiny", ["model.plan=[{pattern: [{mlp: {hidden: 8}}, {}]}]"])
    assert [layer.mlp for layer in run.model.layers] == [Gated(hidden=8), Gated(hidden=384)]
    with pytest.raises(BadInput, match=r"mlp.*kind: got 'expert'.*experts"):
        config.load("tiny", ["model.mlp={kind: expert}"])
