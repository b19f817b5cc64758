"""Time a decode step with the full cache and with cache policies, in one run.

Run: python benchmarks/compress.py [--contexts 8192,32768] [--policies pages,int8] [--budget 0.1]

Bodies are filled with random entries by the same code as after a prefill. Then single steps are
timed, with the policies in turn, so that other load affects all of them. The model has one layer,
whose weights are small compared with the cache at these lengths, as in a large model with a long
text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from mukv.attention import Grouped
from mukv.cache import Cache, Policy, Reader
from mukv.cache.reads import bytes_read
from mukv.core.compute import Compute, settled
from mukv.core.params import initialise
from mukv.infer.decode import decoding_weights
from mukv.model import Decoder, Stage
from mukv.model.block import Gated
from mukv.position import RoPE

NAMES = "streaming,snapkv,int8,int4,topk,sparq,pages,clusters,int8+pages"
TAIL, QUERIES, STEPS = 64, 128, 8


def model_of(layers: int, heads: int, head_dim: int) -> Decoder:
    attention = Grouped(heads=heads, kv_heads=heads // 2, head_dim=head_dim, position=RoPE())
    return Decoder(
        vocab_size=256,
        d_model=heads * head_dim,
        attention=attention,
        mlp=Gated(hidden=2 * heads * head_dim),
        plan=(Stage(repeats=layers),),
    )


def filled(
    model: Decoder, weights: Any, context: int, policy: Policy, compute: Compute, rows: int = 1
) -> Cache:
    """Make a cache of `context` random entries per row, with clustered keys as real texts have."""
    cache = model.empty_cache(rows, context, TAIL, compute.type, policy)
    attention = model.layers[0].attention
    heads, width = attention.kv_heads, attention.head_dim

    @jax.jit
    def drawn(key: Any) -> Any:
        keys = jax.random.split(key, 5)
        shape = rows, heads, context, width
        centres = jax.random.normal(keys[0], (128, width), compute.type)
        noise = jax.random.normal(keys[1], shape, compute.type) / 2
        new = {
            "key": centres[jax.random.randint(keys[2], shape[:3], 0, 128)] + noise,
            "value": jax.random.normal(keys[3], shape, compute.type),
        }
        asked = rows, heads, attention.heads // heads, QUERIES, width
        return new, jax.random.normal(keys[4], asked, compute.type)

    zero, count = jnp.zeros(rows, jnp.int32), jnp.full(rows, context)

    @jax.jit
    def body(empty: Any, own: Any, new: Any, queries: Any) -> Any:
        # Only the last queries are given, since no policy here uses more.
        padded = jnp.pad(queries, [(0, 0)] * 3 + [(context - QUERIES, 0), (0, 0)])
        reader = Reader(attention, own["read"], padded if empty.needs_queries else None)
        return empty.extended(new, zero, count, reader, fresh=True)

    slots, (new, queries) = [], drawn(jax.random.key(0))
    for slot, own in zip(cache.slots, weights["layers"], strict=True):
        slots.append(replace(slot, body=body(slot.body, own, new, queries)))
    return replace(cache, slots=tuple(slots), length=cache.length + context)


class Case:
    """A policy at one length: a compiled step, and its times."""

    def __init__(self, model: Decoder, weights: Any, context: int, name: str, budget: float):
        compute = settled(None)
        self.name, self.policy = name, Policy.parse(name, budget)
        self.weights = weights
        cache = filled(model, weights, context, self.policy, compute)
        self.bytes = cache.nbytes()

        def step(cache: Cache, weights: Any) -> Any:
            logits, cache = model.step(weights, cache, jnp.zeros(1, jnp.int32), compute=compute)
            return logits, cache.split()[1]

        self.read = bytes_read(step, cache, weights)
        # A few steps fill the tail, as in decoding; the loop carries only the tail.
        frozen, live = cache.split()

        def steps(frozen: Any, live: Any, weights: Any) -> Any:
            def one(live: Any, _: None) -> Any:
                logits, new = step(Cache.join(frozen, live), weights)
                return new, logits[:, 0]

            return jax.lax.scan(one, live, length=STEPS)[1]

        self.run = jax.jit(steps)
        self.arguments = frozen, live, weights
        jax.block_until_ready(self.run(*self.arguments))
        self.seconds: list[float] = []

    def round(self) -> None:
        start = time.perf_counter()
        jax.block_until_ready(self.run(*self.arguments))
        self.seconds.append((time.perf_counter() - start) / STEPS)


def compare(
    model: Decoder, context: int, names: Sequence[str], budget: float, rounds: int
) -> list[dict[str, Any]]:
    weights = decoding_weights(model, random_weights(model))
    cases = [Case(model, weights, context, name, budget) for name in ("full", *names)]
    for _ in range(rounds):
        for case in cases:
            case.round()
    full = cases[0]
    rows = []
    for case in cases:
        ratios = [a / b for a, b in zip(full.seconds, case.seconds, strict=True)]
        rows.append(
            {
                "context": context,
                "policy": case.name,
                "budget": case.policy.budget,
                "milliseconds": 1e3 * float(np.median(case.seconds)),
                "times_faster": float(np.median(ratios)),
                "bytes": case.bytes,
                "bytes_of_full": case.bytes / full.bytes,
                "read": case.read,
                "read_of_full": case.read / full.read,
            }
        )
    return rows


def random_weights(model: Decoder) -> Any:
    """Draw the weights of a model as before its training."""
    deviations = jax.tree.map(lambda each: each.deviation, model.resolved())
    return initialise(model.params(), deviations, jax.random.key(0))


def main() -> int:
    options = argparse.ArgumentParser(description="Speed of cache policies")
    options.add_argument("--contexts", default="8192,32768")
    options.add_argument("--policies", default=NAMES)
    options.add_argument("--budget", type=float, default=1 / 16)
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--heads", type=int, default=16)
    options.add_argument("--head-dim", type=int, default=64)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    console = Console(width=120)
    device = jax.devices()[0].device_kind
    model = model_of(chosen.layers, chosen.heads, chosen.head_dim)
    found = []
    for context in map(int, chosen.contexts.split(",")):
        names = chosen.policies.split(",")
        rows = compare(model, context, names, chosen.budget, chosen.rounds)
        found += rows
        table = Table(title=f"{context:,} tokens, {device}", box=None, title_justify="left")
        for column in ("policy", "budget", "ms/step", "x full", "bytes", "read"):
            table.add_column(column, justify="left" if column == "policy" else "right")
        for row in rows:
            table.add_row(
                row["policy"],
                f"{row['budget']:.4g}",
                f"{row['milliseconds']:.2f}",
                f"{row['times_faster']:.2f}",
                f"{row['bytes_of_full']:.3f}",
                f"{row['read_of_full']:.3f}",
            )
        console.print(table)
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
