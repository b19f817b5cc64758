"""Law 13: all cores agree, forward and backward, on every combination that each supports."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cores
from mukv.attention import Entries, Mask
from mukv.attention.cores import (
    CORES,
    Chunked,
    Demand,
    Flash,
    Part,
    Plain,
    Scores,
    Splash,
    choose,
    over_context,
)
from mukv.attention.recalled import Dense
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape
from mukv.core.params import abstract, map_params
from mukv.position import POSITIONS, CoPE, NoPE
from mukv.runs import config
from tests.laws import matrix
from tests.pairs import params

BATCH, KV_HEADS, GROUP, WIDTH, QUERIES = 2, 2, 2, 4, 11
OLD = 6
"""Number of tokens before those of the queries."""


def bags(random: np.random.Generator, position: Any) -> tuple[list[Entries], list[Mask], Any]:
    """Draw bags of entries with their masks: old tokens or none, the tokens of the queries, and
    compressed entries. Also return the positions of the queries."""
    at = np.tile(OLD + np.arange(QUERIES), (BATCH, 1))
    documents = np.zeros((BATCH, QUERIES), int)
    if packed := bool(random.integers(2)):
        cut = random.integers(1, QUERIES)
        documents[:, cut:], at[:, :cut], at[:, cut:] = 1, np.arange(cut), np.arange(QUERIES - cut)
    segment = jnp.asarray(documents) if packed else None
    window = [None, 3, 5][random.integers(3)]
    found, masks = [], []
    if not packed and random.integers(3):
        wraps = not position.sequential and bool(random.integers(2))
        old = np.roll(np.arange(OLD), 2 if wraps else 0)
        valid = jnp.asarray(np.tile(old > 1, (BATCH, 1, 1)))
        place = jnp.asarray(np.tile(old, (BATCH, 1, 1)))
        if not position.sequential:
            # Each KV head has entries of its own.
            place = jnp.stack([place[:, 0], jnp.flip(place[:, 0], axis=-1)], axis=1)
            valid, wraps = jnp.concatenate([valid, valid[..., ::-1]], axis=1), True
        found.append(Entries({}, place, valid, ordered=not wraps))
        masks.append(Mask(window=window))
    if packed or not position.sequential:
        every = 3
        ends = np.arange(QUERIES // every) * every + every - 1
        if not position.sequential:
            document = None if segment is None else segment[:, None, ends]
            found.append(Entries({}, jnp.asarray(at[:, None, ends]), segment=document))
            masks.append(Mask(segment))
    new = None if segment is None else segment[:, None]
    found.append(Entries({}, jnp.asarray(at)[:, None], segment=new))
    masks.append(Mask(segment, window, aligned=True))
    return found, masks, jnp.asarray(at)


@pytest.mark.parametrize("seed", params(range(3), [0]))
@pytest.mark.parametrize("name", POSITIONS)
def test_cores_agree(name, seed):
    random = np.random.default_rng((seed, *name.encode()))
    position = CoPE(positions=4) if name == "cope" else POSITIONS[name]()

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    entries, masks, at = bags(random, position)
    declared = position.params(WIDTH, KV_HEADS * GROUP)
    moving = {
        "query": draw(BATCH, KV_HEADS, GROUP, QUERIES, WIDTH),
        "keys": [draw(BATCH, KV_HEADS, one.position.shape[-1], WIDTH) for one in entries],
        "values": [draw(BATCH, 1, one.position.shape[-1], 3) for one in entries],
        "weights": map_params(lambda param: 0.5 + 0.1 * draw(*param.shape), declared),
        "sinks": draw(KV_HEADS, GROUP) if random.integers(2) else None,
    }
    softcap = [None, 1.5][random.integers(2)]
    direction = draw(BATCH, KV_HEADS, GROUP, QUERIES, 3)

    def read(moving: Any, core: Any) -> Any:
        scores = Scores(
            moving["query"], at, moving["weights"], moving["sinks"], position, 1.0, softcap
        )
        parts = [
            Part(Dense((key,), value), entries, mask)
            for key, value, entries, mask in zip(
                moving["keys"], moving["values"], entries, masks, strict=True
            )
        ]
        out = core.apply((moving["query"],), parts, scores)
        return jnp.sum(out * direction), out

    def both(core: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda moving: read(moving, core), has_aux=True))(moving)

    ordered = all(one.ordered for one in entries)
    assert Chunked.supports(Demand(QUERIES, position, ordered), Compute()) is None
    one, two = both(Plain()), both(Chunked(int(random.integers(2, 6))))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), one, two)


ALIGNED = Mask(aligned=True)


MIXED = MeshShape(data=2, tensor=2, context=2)
KERNELS = [*itertools.product(cores.CASES, (Flash, Splash))]


@pytest.mark.parametrize(
    ("name", "core"),
    params(KERNELS, [row for row in KERNELS if row[1] is Flash] + KERNELS[:4], unpack=True),
)
def test_kernels_are_plain(name, core):
    """The interpreted kernels equal the plain core over several chunks and blocks, forward and
    backward."""
    attended = cores.Attended(cores.CASES[name].narrow(16), 150)
    one, two = attended.expected(), attended.both(core(interpret=True))(attended.moving)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4), one, two)


CONTEXT = [*itertools.product(cores.CASES, (Flash, Chunked), (MeshShape(context=4), MIXED))]


@pytest.mark.parametrize(
    ("name", "core", "mesh"),
    params(CONTEXT, [row for row in CONTEXT if row[2] is MIXED][:2], unpack=True),
)
@pytest.mark.parametrize("length", params([160, 148], [160]))
def test_queries_are_split_over_context(name, core, mesh, length):
    """Devices that attend from their own queries to all keys compute what one does, forward and
    backward, whether they exchange queries (160 tokens) or not (148)."""
    attended = cores.Attended(cores.CASES[name].narrow(16), length)
    applied = []

    class Watched(core):
        def apply(self, *given: Any) -> Any:
            applied.append(given)
            return super().apply(*given)

    made = Watched(interpret=True) if core is Flash else Watched()
    split = SimpleNamespace(apply=partial(over_context, made))
    expected = attended.expected()
    with jax.set_mesh(mesh.build()):
        found = attended.both(split)(attended.moving)
    compare = partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
    jax.tree.map(compare, jax.device_get(found), expected)
    ((query,), _, _), *_ = applied
    assert query.shape[3] == length // mesh.context


@pytest.mark.product
def test_flash_is_split_over_a_mesh():
    """Rows are split over `data` and KV heads over `tensor`; gradients of sinks are summed over
    both axes."""
    random = np.random.default_rng(0)
    shape, length = (4, 2, 2), 40
    query, direction = random.standard_normal((2, *shape, length, 16)).astype(np.float32)
    at = jnp.asarray(np.tile(np.arange(length), (4, 1)))
    keys = random.standard_normal((4, 2, length, 16)).astype(np.float32)

    def read(moving: Any) -> Any:
        scores = Scores(None, at, {}, moving["sinks"], NoPE(), 1.0, None)
        part = Part(Dense((moving["key"],), moving["key"]), Entries({}, at[:, None]), ALIGNED)
        return jnp.sum(Flash(interpret=True).apply((moving["query"],), [part], scores) * direction)

    moving = {"query": query, "key": keys, "sinks": np.ones((2, 2), np.float32)}
    whole = jax.jit(jax.value_and_grad(read))(moving)
    with jax.set_mesh(MeshShape(2, 2).build()):
        split = jax.jit(jax.value_and_grad(read))(moving)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-5), whole, split)


def test_a_step_is_lowered_to_the_kernels_of_a_tpu():
    """A TPU program has one forward and two backward kernels for each of the two layers in a
    pattern."""
    wide = ["model.d_model=32", "model.plan=[{repeats: 2, pattern: [{window: 16}, {}]}]"]
    run = config.load("tiny", [*wide, "train.compute.platform=tpu"])
    tokens = jax.ShapeDtypeStruct((2, 200), jnp.int32)

    def total(weights: Any, tokens: Any) -> Any:
        compute = run.train.compute.resolve("tpu")
        result = run.model.forward(weights, tokens, tokens, tokens, compute)
        return jnp.sum(result.hidden.astype(jnp.float32))

    traced = jax.jit(jax.grad(total)).trace(abstract(run.model.params()), tokens)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2 * 3


def test_a_core_asked_for_by_name():
    own = Demand(8, aligned=True)
    assert choose(own, Compute(platform="gpu", core="fused")).name == "fused"
    assert choose(Demand(1), Compute(platform="gpu", core="flash")).name == "plain"
    with pytest.raises(BadInput, match="splash, fused, plain can serve here; flash can't: it is"):
        choose(own, Compute(platform="tpu", core="flash"))
    biased = Demand(8, POSITIONS["alibi"](), aligned=True)
    with pytest.raises(BadInput, match="fused, plain can serve here; splash can't: alibi adds"):
        choose(biased, Compute(platform="tpu", core="splash"))


def test_chosen_cores_and_reasons_of_refusals():
    fast = choose(Demand(8), Compute())
    assert (fast.name, fast.refused) == ("fused", {})
    gpu = Compute(platform="gpu")
    assert choose(Demand(8, aligned=True), gpu).name == "flash"
    assert choose(Demand(8, aligned=True), Compute(platform="tpu")).name == "splash"
    assert "in one bag" in choose(Demand(8), gpu).refused["flash"]
    biased = choose(Demand(8, POSITIONS["alibi"](), aligned=True), gpu)
    assert biased.refused == {"flash": "alibi adds a bias to the logits"}
    dropped = choose(Demand(8, aligned=True, dropped=True), gpu)
    assert (dropped.name, "train.policy" in dropped.refused["flash"]) == ("fused", True)
    for demand, compute, words in (
        (Demand(8), Compute(fused=False), "compute.fused is false"),
        (Demand(1), Compute(), "one query"),
        (Demand(8, CoPE(), ordered=False), Compute(), "in the order of their positions"),
        (Demand(8, shows="a tap captures them"), Compute(), "a tap captures them"),
    ):
        chosen = choose(demand, compute)
        assert (chosen.name, list(chosen.refused)) == ("plain", ["fused"])
        assert words in chosen.refused["fused"]


@pytest.mark.product
def test_every_attention_reads_by_the_chosen_core(monkeypatch):
    """Training, prefill in pieces and single steps take the core that `Attention.core` names."""
    taken: list[str] = []
    for name, core in CORES.items():

        def apply(self: Any, *given: Any, name: str = name, inner: Any = core.apply) -> Any:
            taken.append(name)
            return inner(self, *given)

        monkeypatch.setattr(core, "apply", apply)
    # CSA and DSA read the entries that their indexers choose, without a core.
    for name in set(matrix.ATTENTIONS) - set(matrix.STATES) - {"csa", "latent-indexed"}:
        model = matrix.build(name, "rope", "plain")
        weights, ids = matrix.weights(model), matrix.tokens(1)
        cache = model.empty_cache(1, 2 * matrix.LENGTH, 4, matrix.EXACT.type)
        rows, count = model.unstack(weights), jnp.array([matrix.LENGTH])

        def every(weights, rows, cache, ids, model=model, count=count):
            model.hidden(weights, ids, compute=matrix.EXACT)
            _, cache = model.prefill(rows, cache, ids, count, compute=matrix.EXACT)
            _, cache = model.prefill(rows, cache, ids, count, fresh=False, compute=matrix.EXACT)
            model.step(rows, cache, ids[:, 0], compute=matrix.EXACT)

        taken.clear()
        jax.clear_caches()  # a layer that was traced before would not be traced again
        jax.eval_shape(every, weights, rows, cache, ids)
        # Two layers of training; the equal layers of a pass with a cache are traced once.
        assert taken == ["fused"] * 4 + ["plain"]
        attention = model.layers[0].attention
        assert attention.core(matrix.LENGTH, matrix.EXACT).name == "fused"
        assert attention.core(1, matrix.EXACT).name == "plain"
