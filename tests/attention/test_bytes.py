"""Cache bytes per token of a 12-layer model (d_model 768, 12 heads of 64, bfloat16), measured from
the allocation, against the closed formulas and the table in docs/memory.md."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mukv.attention import (
    CSA,
    HCA,
    GatedDelta,
    Grouped,
    GroupedTied,
    Indexer,
    KimiDelta,
    Latent,
    SharedKV,
    TensorProduct,
)
from mukv.model import Decoder, Layer, Stage

H, G, D, L, BYTES = 12, 4, 64, 12, 2
PLAIN = (Stage(repeats=L),)
GQA, MQA = Grouped(heads=H, kv_heads=G, head_dim=D), Grouped(heads=H, kv_heads=1, head_dim=D)
W = 32
PAIR = (Layer(window=W), Layer(window=W, reads=-1))

ROWS = {
    "MHA": (Grouped(heads=H, kv_heads=H, head_dim=D), PLAIN, 2 * H * D * BYTES * L, 0),
    "GQA, 4 KV heads": (GQA, PLAIN, 2 * G * D * BYTES * L, 0),
    "MQA": (MQA, PLAIN, 2 * D * BYTES * L, 0),
    "MLA, 256 + 32": (
        Latent(heads=H, rank=256, head_dim=D, rope_dim=32), PLAIN, 288 * BYTES * L, 0,
    ),
    "MLA, 128 + 32": (
        Latent(heads=H, rank=128, head_dim=D, rope_dim=32), PLAIN, 160 * BYTES * L, 0,
    ),
    "DSA, 128 + 32 + 64": (
        Latent(
            heads=H, rank=128, head_dim=D, rope_dim=32, query_rank=64, indexer=Indexer(width=64)
        ),
        PLAIN, 224 * BYTES * L, 0,
    ),
    "shared KV, 4 heads": (
        SharedKV(heads=H, kv_heads=G, head_dim=D), PLAIN, G * D * BYTES * L, 0,
    ),
    "grouped tied, 4 heads": (
        GroupedTied(heads=H, kv_heads=G, head_dim=D), PLAIN, (G * D + D // 2) * BYTES * L, 0,
    ),
    "tensor product, rank 1": (
        TensorProduct(heads=H, head_dim=D, rank=1), PLAIN, 2 * (H + D) * BYTES * L, 0,
    ),
    "tensor product, rank 2": (
        TensorProduct(heads=H, head_dim=D, rank=2), PLAIN, 4 * (H + D) * BYTES * L, 0,
    ),
    "HCA, an entry per 16": (
        HCA(heads=H, head_dim=512, rope_dim=D, window=W, every=16),
        PLAIN, 512 * BYTES * L // 16, 512 * BYTES * L,
    ),
    "CSA, an entry per 4": (
        CSA(heads=H, head_dim=512, rope_dim=D, window=W, every=4, indexer=Indexer(width=128)),
        PLAIN, (512 + 128) * BYTES * L // 4, 512 * BYTES * L,
    ),
    "cross-layer, pairs (GQA)": (
        GQA, (Stage((Layer(), Layer(reads=-1)), repeats=L // 2),), 2 * G * D * BYTES * L // 2, 0,
    ),
    "cross-layer, pairs (MQA)": (
        MQA, (Stage((Layer(), Layer(reads=-1)), repeats=L // 2),), 2 * D * BYTES * L // 2, 0,
    ),
    "MixAttention (GQA)": (
        GQA,
        (Stage((Layer(), *PAIR, *PAIR, *PAIR, *PAIR, *PAIR, Layer(reads=0))),),
        2 * G * D * BYTES, 5 * 2 * G * D * BYTES,
    ),
    "YOCO (GQA)": (
        GQA,
        (Stage((Layer(window=W),), repeats=6), Stage(), Stage((Layer(reads=6),), repeats=5)),
        2 * G * D * BYTES, 6 * 2 * G * D * BYTES,
    ),
    "5 local : 1 global (GQA)": (
        GQA,
        (Stage((*(Layer(window=W),) * 5, Layer()), repeats=2),),
        2 * 2 * G * D * BYTES, 10 * 2 * G * D * BYTES,
    ),
}  # fmt: skip


STATES = {
    "Gated DeltaNet": (GatedDelta(heads=H, head_dim=D), 4 * L * (H * D * D + 3 * 3 * H * D)),
    "Kimi Delta Attention": (KimiDelta(heads=H, head_dim=D), 4 * L * (H * D * D + 3 * 3 * H * D)),
}


def bytes_of(model: Decoder, length: int) -> int:
    """Return the bytes of the allocated cache bodies."""
    cache = model.empty_cache(1, length, tail=1, dtype=jnp.dtype("bfloat16"))
    return sum(leaf.nbytes for slot in cache.slots for leaf in jax.tree.leaves(slot.body))


@pytest.mark.parametrize("name", ROWS)
def test_bytes(name):
    attention, plan, per_token, per_window_token = ROWS[name]
    model = Decoder(vocab_size=8, d_model=768, attention=attention, plan=plan)
    short, long = bytes_of(model, 2 * W), bytes_of(model, 3 * W)
    assert (long - short) / W == per_token
    assert short - 2 * W * per_token == W * per_window_token
    documented = re.search(
        rf"^\| {re.escape(name)} \|.*\| ([\d,]+)(?: \+ ([\d,]+) W)? \|$",
        Path("docs/memory.md").read_text(),
        re.MULTILINE,
    )
    assert documented, name
    token, window = (int((group or "0").replace(",", "")) for group in documented.groups())
    assert (token, window) == (per_token, per_window_token)


@pytest.mark.parametrize("name", STATES)
def test_states(name):
    """States take the same bytes at every length; the documented length is that at which MQA takes
    as many bytes."""
    attention, expected = STATES[name]
    model = Decoder(vocab_size=8, d_model=768, attention=attention, plan=PLAIN)
    for length in (W, 64 * W):
        cache = model.empty_cache(1, length, tail=1, dtype=jnp.dtype("bfloat16"))
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.states)) == expected
        assert not cache.slots
    row = re.search(
        rf"^\| {re.escape(name)} \|.*\| ([\d,]+) \| ([\d,]+) \|$",
        Path("docs/memory.md").read_text(),
        re.MULTILINE,
    )
    assert row, name
    told, length = (int(group.replace(",", "")) for group in row.groups())
    assert (told, length) == (expected, round(expected / ROWS["MQA"][2]))
