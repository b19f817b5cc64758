"""The kernel that reads caches in their stored form equals the plain core (laws 2 and 13)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import Entries, Grouped, Mask
from mukv.attention.cores import Demand, FlashDecode, Part, Plain, Scores, choose, unread
from mukv.attention.recalled import Dense, Recalled
from mukv.cache import Policy
from mukv.cache.shelf import Shelf
from mukv.cache.tables import STORES
from mukv.core.compute import Compute
from mukv.position import POSITIONS, NoPE
from mukv.runs import config
from mukv.runs.describe import describe
from tests.laws import matrix
from tests.pairs import params

GPU = Compute(platform="gpu")
BATCH, HEADS, GROUP, WIDTH = 2, 2, 3, 32
CASES = [
    ("exact", 96, None, False),
    ("exact", 600, 20, True),
    ("int8", 1024, 5, False),
    ("int4", 640, None, True),
    ("int4", 1024, 20, False),
    ("fp8", 520, None, False),
]
"""Store, slots, window and whether there are soft caps and sinks. The kernel visits blocks of 256
slots; stores whose slots do not fill the last one, or that have fewer, are among them."""


def recall(entries: Entries) -> Dense:
    return Dense((entries.tensors["key"],), entries.tensors["value"])


class Drawn:
    """A body with empty slots, a tail, and one query per row."""

    def __init__(self, store: str, slots: int, window: int | None, dressed: bool):
        self.random = np.random.default_rng(0)
        encoding, shape = STORES[store](), (BATCH, HEADS, slots, WIDTH)
        used = self.random.random((BATCH, 1, slots)) < 0.9
        self.position = jnp.asarray(np.where(used, np.arange(slots), -1))
        there = self.position != -1
        stored = {
            "key": encoding.encode(True, self.draw(*shape), there),
            "value": encoding.encode(False, self.draw(*shape), there),
        }
        widths = (("key", WIDTH), ("value", WIDTH))
        self.shelf = Shelf(stored, self.position, None, encoding, widths, ("key",), HEADS)
        tensors = {name: self.draw(BATCH, HEADS, 40, WIDTH) for name in ("key", "value")}
        place = jnp.broadcast_to(jnp.arange(40), (BATCH, 1, 40))
        self.tail = Entries(tensors, slots + place, place < 17)
        self.query = (2 * WIDTH**-0.5 * self.draw(BATCH, HEADS, GROUP, 1, WIDTH),)
        sinks, cap = (self.draw(HEADS, GROUP), 2.0) if dressed else (None, None)
        at = jnp.full((BATCH, 1), slots + 16)
        self.scores = Scores(None, at, {}, sinks, NoPE(), 1.0, cap)
        self.mask = Mask(window=window)

    def draw(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.random.standard_normal(shape), jnp.float32)

    def agree(self, recalled: Recalled, entries: Entries) -> None:
        """Compare the cores on the body and the tail."""
        bags = (recalled, entries), (recall(self.tail), self.tail)
        parts = [Part(keys, held, self.mask) for keys, held in bags]
        assert unread(self.query[0].shape, parts, GPU) is None
        found, expected = (
            core.apply(self.query, parts, self.scores)
            for core in (FlashDecode(interpret=True), Plain())
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("case", params(CASES, [CASES[4]], str))
def test_stores_are_read_as_by_the_plain_core(case):
    drawn = Drawn(*case)
    drawn.agree(*drawn.shelf.whole(recall))


@pytest.mark.parametrize("store", params(["exact", "int4"], ["int4"]))
def test_chosen_pages_are_read_as_by_the_plain_core(store):
    """Each KV head reads other pages."""
    drawn = Drawn(store, 1024, None, False)
    pages = [
        [np.sort(drawn.random.permutation(64)[:20]) for _ in range(HEADS)] for _ in range(BATCH)
    ]
    position = jnp.repeat(drawn.position, HEADS, axis=1)
    shelf = dataclasses.replace(drawn.shelf, position=position)
    drawn.agree(*shelf.read_runs(jnp.asarray(pages), 16, recall))


@pytest.mark.product
def test_a_row_that_sees_nothing_yields_zeros():
    drawn = Drawn("exact", 96, 1, False)
    hidden = jnp.zeros((BATCH, 1, 40), bool)
    tail = dataclasses.replace(drawn.tail, valid=hidden)
    parts = [Part(*drawn.shelf.whole(recall), drawn.mask), Part(recall(tail), tail, drawn.mask)]
    out = FlashDecode(interpret=True).apply(drawn.query, parts, drawn.scores)
    np.testing.assert_array_equal(out, 0)


@pytest.mark.product
@pytest.mark.parametrize("attention", ["grouped", "latent", "tied"])
@pytest.mark.parametrize("policy", ["full", "int8", "int4", "pages:0.5", "snapkv:0.5+int4+pages"])
def test_steps_with_the_kernel_give_the_same_logits(attention, policy, monkeypatch):
    """A step whose layers read by the kernel, a window included, equals one by the plain core."""
    changes = {
        "grouped": Grouped(heads=4, kv_heads=2, head_dim=16),
        "latent": dataclasses.replace(
            matrix.ATTENTIONS["latent"], rank=32, head_dim=24, rope_dim=16, head_value_dim=16
        ),
        "tied": dataclasses.replace(matrix.ATTENTIONS["tied"], head_dim=32),
    }
    model = dataclasses.replace(
        matrix.build("gqa", "rope", "plain"),
        attention=dataclasses.replace(changes[attention], position=matrix.POSITIONS["rope"]),
    )
    applied, apply = [], FlashDecode.apply

    def watched(self, *given):
        applied.append(self)
        return apply(dataclasses.replace(self, interpret=True), *given)

    monkeypatch.setattr(FlashDecode, "apply", watched)
    weights, ids = model.unstack(matrix.weights(model)), jnp.asarray(matrix.tokens(2, 520))
    cache = model.empty_cache(2, 544, 16, jnp.dtype("float32"), Policy.parse(policy))
    count = jnp.array([500, 300])
    _, cache = model.prefill(weights, cache, ids[:, :500], count, compute=matrix.EXACT)
    logits = []
    for platform in ("cpu", "gpu"):
        compute, own = dataclasses.replace(matrix.EXACT, platform=platform), cache
        for place in range(500, 502):
            found, own = model.step(weights, own, ids[:, place], compute=compute)
            logits.append(found)
    assert applied
    np.testing.assert_allclose(logits[:2], logits[2:], atol=3e-5)


def test_a_step_takes_the_kernel_on_a_gpu_or_says_why_not():
    step = Demand(1, unread=None)
    assert choose(step, GPU).name == "flash_decode"
    assert choose(step, Compute(platform="tpu")).name == "plain"
    for demand, compute, words in (
        (Demand(1), GPU, "not known"),
        (dataclasses.replace(step, position=POSITIONS["alibi"]()), GPU, "alibi adds a bias"),
        (dataclasses.replace(step, shows="a tap captures them"), GPU, "a tap captures them"),
        (step, dataclasses.replace(GPU, fused=False), "compute.fused is false"),
    ):
        chosen = choose(demand, compute)
        assert chosen.name == "plain"
        assert words in chosen.refused["flash_decode"]
    assert "flash_decode" not in choose(Demand(8), GPU).refused
    drawn = Drawn("exact", 96, None, False)
    narrow = Dense((jnp.zeros((1, 2, 5, 24)),), jnp.zeros((1, 2, 5, 16)))
    part = Part(narrow, drawn.tail, drawn.mask)
    assert "not 24" in str(unread((1, 2, 3, 1, 24), [part], GPU))
    wide = part._replace(recalled=recall(drawn.tail))
    assert "heads of one KV head" in str(unread((1, 2, 2048, 1, WIDTH), [wide], GPU))
    rotated = dataclasses.replace(drawn.shelf, store=STORES["rotated"]())
    assert "rotated is not decoded" in str(rotated.form(recall))

    def doubled(entries: Entries) -> Dense:
        return Dense((2 * entries.tensors["key"],), entries.tensors["value"])

    read = drawn.shelf.form(doubled)
    assert "computed" in str(read)


def test_describe_shows_the_core_of_a_step():
    facts = describe(config.load("tiny", ["train.compute.platform=gpu"]))
    assert {layer["step_core"] for layer in facts["layers"]} == {"flash_decode"}
    changes = ["train.compute.platform=gpu", "model.attention.head_dim=24"]
    (layer, *_) = describe(config.load("tiny", changes))["layers"]
    assert layer["step_core"] == "plain"
    assert "not 24" in layer["step_cores_refused"]["flash_decode"]
