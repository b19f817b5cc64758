"""Batches are a pure function of (seed, step, row), and contain every token once an epoch."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mukv.core.errors import BadInput
from mukv.core.mixing import permuted
from mukv.data.batches import Batch, Batches, Prefetch
from mukv.data.tokens import TokenFile


def rows(batch: Batch) -> list[bytes]:
    return [b"".join(part[row].tobytes() for part in batch) for row in range(len(batch.tokens))]


def together(parts: list[Batch]) -> list[bytes]:
    return [row for part in parts for row in rows(part)]


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 2**40))
def test_permuted_is_a_permutation(size: int, seed: int, epoch: int):
    found = permuted(np.arange(size), np.full(size, epoch), size, seed)
    assert sorted(found) == list(range(size))


def test_permutations_are_shuffled_and_differ_by_seed_and_epoch():
    size = 4096
    place = np.arange(size)
    found = {
        (seed, epoch): permuted(place, np.full(size, epoch), size, seed)
        for seed in range(4)
        for epoch in range(4)
    }
    for order in found.values():
        # Expected for independent draws: correlation 1/64, one fixed point, one kept neighbour.
        assert abs(np.corrcoef(place, order)[0, 1]) < 6 / 64
        assert (order == place).sum() < 10
        assert (np.abs(np.diff(order)) == 1).sum() < 15
    orders = list(found.values())
    assert all((a == b).sum() < 10 for i, a in enumerate(orders) for b in orders[:i])


def test_small_permutations_take_all_orders_alike():
    orders = permuted(np.tile(np.arange(3), 6000), np.repeat(np.arange(6000), 3), 3, seed=1)
    _, counts = np.unique(orders.reshape(-1, 3), axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 850


def test_batches_are_a_pure_function_of_seed_and_step(corpus: TokenFile):
    make = {"batch": 4, "length": 32}
    one, two = Batches(corpus, seed=1, **make), Batches(corpus, seed=1, **make)
    assert rows(one.at(7)) == rows(two.at(7))
    assert rows(one.at(7)) != rows(one.at(8))
    assert rows(one.at(7)) != rows(Batches(corpus, seed=2, **make).at(7))


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_share_the_same_batch(corpus: TokenFile, hosts: int):
    batches = Batches(corpus, seed=1, batch=6, length=32)
    parts = [batches.at(5, host, hosts) for host in range(hosts)]
    assert together(parts) == rows(batches.at(5))
    windows = [list(batches.once(3, host, hosts)) for host in range(hosts)]
    for whole, *shares in zip(batches.once(3), *windows, strict=True):
        assert together(shares) == rows(whole)
    with pytest.raises(BadInput, match="multiple"):
        batches.at(0, 0, 4)


@pytest.mark.parametrize("length", [5, 32, 100, 10**5])
def test_an_epoch_has_every_window_once(corpus: TokenFile, length: int):
    batches = Batches(corpus, seed=3, batch=1, length=length)
    for epoch in range(2):
        first = epoch * batches.windows
        seen = [rows(batches.at(step))[0] for step in range(first, first + batches.windows)]
        assert sorted(seen) == sorted(row for batch in batches.once() for row in rows(batch))


@pytest.mark.parametrize("packing", ["packed", "contiguous"])
@pytest.mark.parametrize(("batch", "length"), [(1, 7), (5, 64), (3, 10**5)])
def test_once_predicts_every_byte_once(corpus: TokenFile, packing, batch: int, length: int):
    batches = Batches(corpus, 0, batch, length, "validation", packing)
    token_bytes, found = corpus.token_bytes(), list(batches.once())
    assert all(part.shape == (batch, length) for each in found for part in each)
    learned = np.concatenate([each.targets[each.weight > 0] for each in found])
    assert token_bytes[learned].sum() == corpus.validation.bytes
    assert np.array_equal(learned, corpus.validation.tokens[corpus.validation.tokens < 256])


def test_once_with_a_limit_is_spread_over_the_stream(corpus: TokenFile):
    batches = Batches(corpus, 0, 2, 16, "train")
    everything = [row for batch in batches.once() for row in rows(batch)]
    some = [row for batch in batches.once(4) for row in rows(batch)]
    assert some == [everything[number * batches.windows // 8] for number in range(8)]
    assert len(list(batches.once(10**6))) == len(list(batches.once()))


def test_packed_rows_keep_documents_apart(corpus: TokenFile):
    for batch in Batches(corpus, 0, 3, 50).once():
        begins = batch.tokens == 256
        begins[:, 0] = True
        real = batch.segment > 0
        assert np.array_equal(batch.segment[real], np.cumsum(begins, axis=1)[real])
        assert np.all(batch.position[begins] == 0)
        steps = np.diff(batch.position, axis=1)
        assert np.all(steps[real[:, 1:] & ~begins[:, 1:]] == 1)
        assert np.array_equal(batch.weight > 0, real & (batch.targets != 256) & _has_target(batch))


def test_contiguous_rows_are_one_segment(corpus: TokenFile):
    for packed, batch in zip(
        Batches(corpus, 0, 3, 50).once(),
        Batches(corpus, 0, 3, 50, packing="contiguous").once(),
        strict=True,
    ):
        assert np.array_equal(batch.segment, packed.segment > 0)
        assert np.array_equal(batch.position, np.broadcast_to(np.arange(50), (3, 50)))
        for part in ("tokens", "targets", "weight"):
            assert np.array_equal(getattr(batch, part), getattr(packed, part))


def _has_target(batch: Batch) -> np.ndarray:
    """Return which tokens have a target: all but the last one of the stream."""
    return np.pad(batch.segment > 0, ((0, 0), (0, 1)), constant_values=True)[:, 1:]


@pytest.mark.parametrize(
    ("field", "value"), [("batch", 0), ("length", 0), ("split", "test"), ("packing", "pack")]
)
def test_bad_fields(corpus: TokenFile, field: str, value: object):
    with pytest.raises(BadInput, match=field):
        Batches(**({"tokens": corpus, "seed": 0, "batch": 2, "length": 8} | {field: value}))


def test_prefetch_keeps_the_order_and_works_ahead():
    made = threading.Semaphore(0)

    def make(step: int) -> int:
        made.release()
        return step * step

    with Prefetch(make, range(5), depth=3) as prefetch:
        coming = iter(prefetch)
        assert next(coming) == 0
        # Three more were made although one was asked for.
        assert all(made.acquire(timeout=10) for _ in range(3))
        assert list(coming) == [1, 4, 9, 16]


def test_prefetch_measures_waiting():
    with Prefetch(lambda _: time.sleep(0.02), range(3)) as prefetch:
        list(prefetch)
    assert prefetch.wait_seconds > 0.02


def test_prefetch_raises_where_the_batch_would_have_come():
    def make(step: int) -> int:
        if step == 1:
            raise BadInput("data", step, "good data")
        return step

    before = threading.active_count()
    with Prefetch(make, range(10**9)) as prefetch:
        coming = iter(prefetch)
        assert next(coming) == 0
        with pytest.raises(BadInput, match="good data"):
            next(coming)
    assert threading.active_count() == before
