"""Compare what layers remember: bytes per token and fixed bytes, and the time of a step.

    python benchmarks/memories.py                 # bytes at 1,024, 8,192 and 131,072 tokens
    python benchmarks/memories.py --speed         # also training and decoding, at 2k, 8k and 32k

Each kind is all 12 layers of one model (d_model 768, 12 heads of 64, windows of 128 tokens, cache
entries in bfloat16, states in float32). Bytes are those of the allocated cache without its tail; no
array is made. The break-even length is that from which the cache is smaller than that of MQA. Times
are of one layer, as in `delta_rule.py`, in rounds that alternate between all kinds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from delta_rule import alternating, decoding, training
from rich.console import Console
from rich.table import Table

from mukv.attention import (
    CSA,
    HCA,
    AnyAttention,
    GatedDelta,
    Grouped,
    GroupedTied,
    Indexer,
    KimiDelta,
    Latent,
    SharedKV,
    TensorProduct,
)
from mukv.model import Decoder, Stage
from mukv.position import RoPE

D_MODEL, HEADS, WIDTH, LAYERS, WINDOW = 768, 12, 64, 12, 128
PLACE = RoPE()
INDEXER = Indexer(heads=16, width=64, top_k=512)
LATENT: dict[str, Any] = {"heads": HEADS, "rank": 128, "head_dim": WIDTH, "rope_dim": 32}
COMPRESSED: dict[str, Any] = {
    **{"heads": HEADS, "head_dim": 512, "rope_dim": WIDTH, "query_rank": 256},
    **{"window": WINDOW, "groups": 2, "output_rank": 256, "sinks": "learned"},
}
KINDS: dict[str, AnyAttention] = {
    "MHA": Grouped(PLACE, heads=HEADS, kv_heads=HEADS, head_dim=WIDTH),
    "GQA, 4 KV heads": Grouped(PLACE, heads=HEADS, kv_heads=4, head_dim=WIDTH),
    "MQA": Grouped(PLACE, heads=HEADS, kv_heads=1, head_dim=WIDTH),
    "shared KV, 4 heads": SharedKV(PLACE, heads=HEADS, kv_heads=4, head_dim=WIDTH),
    "grouped tied, 4 heads": GroupedTied(PLACE, heads=HEADS, kv_heads=4, head_dim=WIDTH),
    "tensor product, rank 1": TensorProduct(PLACE, heads=HEADS, head_dim=WIDTH, rank=1),
    "MLA, 128 + 32": Latent(PLACE, **LATENT),
    "DSA, 128 + 32 + 64": Latent(PLACE, **LATENT, query_rank=256, indexer=INDEXER),
    "HCA, an entry per 128": HCA(PLACE, **COMPRESSED, every=128),
    "CSA, an entry per 4": CSA(PLACE, **COMPRESSED, every=4, indexer=INDEXER),
    "Gated DeltaNet": GatedDelta(heads=HEADS, head_dim=WIDTH),
    "Kimi Delta Attention": KimiDelta(heads=HEADS, head_dim=WIDTH),
}
BASE = "MQA"
LENGTHS, TIMED = "1024,8192,131072", "2048,8192,32768"
MOST = 1 << 40
"""Length up to which a break-even is looked for, in tokens."""


def cache_bytes(layer: AnyAttention, length: int) -> int:
    """Return the bytes of the bodies and states of all layers at this length."""
    plan = (Stage(repeats=LAYERS),)
    model = Decoder(vocab_size=8, d_model=D_MODEL, attention=layer, plan=plan)
    cache = jax.eval_shape(lambda: model.empty_cache(1, length, 1, jnp.dtype("bfloat16")))
    held = [slot.body for slot in cache.slots], cache.states
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))


def remembered(name: str, lengths: list[int]) -> dict[str, Any]:
    """Return the bytes of one kind at each length, per token and fixed, and its break-even."""
    layer = KINDS[name]
    known = {length: cache_bytes(layer, length) for length in lengths}
    # A multiple of every rate, beyond every window.
    unit = 1 << 12
    first, second = cache_bytes(layer, unit), cache_bytes(layer, 2 * unit)
    per_token = (second - first) / unit
    constant = round(first - unit * per_token)
    base = cache_bytes(KINDS[BASE], unit) / unit
    return {
        "kind": name,
        "cache_bytes": {str(length): size for length, size in known.items()},
        "cache_bytes_per_token": per_token,
        "cache_bytes_constant": constant,
        "break_even": break_even(per_token, constant, base),
    }


def break_even(per_token: float, constant: float, base: float) -> int | None:
    """Return the length from which `per_token` n + `constant` is at most `base` n; None for
    none.
    """
    if per_token >= base:
        return None
    length = round(constant / (base - per_token))
    return length if length < MOST else None


def timed(length: int, rounds: int) -> list[dict[str, Any]]:
    """Return the seconds of a training step and of a decoding step of each kind."""
    rows = []
    for what, make in (("train", training), ("decode", decoding)):
        made = {name: make(layer, length) for name, layer in KINDS.items()}
        seconds = alternating({name: run for name, (run, _) in made.items()}, rounds)
        for name, times in seconds.items():
            rows.append(
                {
                    "what": what,
                    "length": length,
                    "kind": name,
                    "seconds": [own for own, _ in times],
                    **{
                        f"of_{peer}": sorted(
                            mine / theirs
                            for (mine, _), (theirs, _) in zip(times, seconds[peer], strict=True)
                        )[rounds // 2]
                        for peer in ("MHA", "MQA", "MLA, 128 + 32")
                    },
                }
            )
    return rows


def show_bytes(console: Console, rows: list[dict[str, Any]], lengths: list[int]) -> None:
    columns = (f"{length:,} tokens" for length in lengths)
    table = Table("kind", "bytes/token", "fixed bytes", *columns, "break-even with MQA")
    for row in rows:
        sizes = (f"{row['cache_bytes'][str(length)]:,}" for length in lengths)
        even = "-" if row["break_even"] is None else f"{row['break_even']:,}"
        fixed = f"{row['cache_bytes_constant']:,}"
        table.add_row(row["kind"], f"{row['cache_bytes_per_token']:,g}", fixed, *sizes, even)
    console.print(table)


def show_times(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("step", "tokens", "kind", "of MHA", "of MQA", "of MLA")
    for row in rows:
        shares = (f"{row[f'of_{peer}']:.2f}" for peer in ("MHA", "MQA", "MLA, 128 + 32"))
        table.add_row(row["what"], f"{row['length']:,}", row["kind"], *shares)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default=LENGTHS, help="lengths at which bytes are counted")
    parser.add_argument("--speed", action="store_true", help="also measure times")
    parser.add_argument("--timed", default=TIMED, help="lengths at which times are measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="results as JSON")
    given = parser.parse_args()
    lengths = [int(length) for length in given.lengths.split(",")]
    console = Console(width=130)
    found: dict[str, Any] = {"bytes": [remembered(name, lengths) for name in KINDS]}
    show_bytes(console, found["bytes"], lengths)
    if given.speed:
        found["speed"] = []
        for length in map(int, given.timed.split(",")):
            found["speed"] += timed(length, given.rounds)
            if given.out:
                given.out.write_text(json.dumps(found, indent=2) + "\n")
        show_times(console, found["speed"])
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
