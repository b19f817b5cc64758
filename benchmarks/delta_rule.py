"""Time layers with a delta rule, with chunks of several sizes, against grouped-query attention.

    python benchmarks/delta_rule.py                      # training and decoding at 2,048 and 8,192

Training is the forward pass and the gradient of one layer (d_model 512, 8 heads of 64; attention
with RoPE has 2 KV heads), by its weights and its input. Decoding is one greedy step of a model with
this layer alone, in a loop over a cache of that length. Rounds alternate between the contenders;
the ratio to attention is the median over rounds. On a CPU the time is that of all its threads,
which other programs change little; "elapsed" is the shortest time on the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from mukv.attention import DIRECT, AnyAttention, GatedDelta, Grouped, KimiDelta, Mask, delta_layer
from mukv.attention.delta_rule import CHUNK, delta_rule
from mukv.core.compute import Compute
from mukv.core.params import map_params
from mukv.model import Decoder, Stage
from mukv.model.block import Gated
from mukv.position import RoPE

D_MODEL, HEADS, WIDTH = 512, 8, 64
STEPS = 32
ATTENTION = "attention"
LAYERS: dict[str, AnyAttention] = {
    ATTENTION: Grouped(RoPE(), heads=HEADS, kv_heads=2, head_dim=WIDTH),
    "gated_delta": GatedDelta(heads=HEADS, head_dim=WIDTH),
    "kimi_delta": KimiDelta(heads=HEADS, head_dim=WIDTH),
}
Run = Callable[[], Any]


def training(layer: AnyAttention, length: int, chunk: int = CHUNK) -> tuple[Run, int]:
    """Compile the gradient of one layer; return it and the bytes of its temporaries."""
    declared = (layer.write_params(D_MODEL), layer.read_params(D_MODEL))
    key = jax.random.key(0)
    weights = map_params(lambda p: 0.04 * jax.random.normal(key, p.shape), declared)
    x = jax.random.normal(key, (1, length, D_MODEL))
    place = jnp.arange(length)[None]

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        write, read = weights
        written = layer.by_store(layer.write(write, x, place))
        bags = [bag.entries(written[name], place) for name, bag in layer.bags.items()]
        given = (bags, Mask(aligned=True), Compute(), written.get(DIRECT))
        return jnp.sum(layer.read(read, x, place, *given)[0] ** 2)

    with mock.patch.object(delta_layer, "delta_rule", partial(delta_rule, chunk=chunk)):
        step = jax.jit(jax.grad(loss, (0, 1))).lower(weights, x).compile()
    return partial(step, weights, x), step.memory_analysis().temp_size_in_bytes


def decoding(layer: AnyAttention, length: int) -> tuple[Run, int]:
    """Compile `STEPS` decoding steps after `length` tokens; return them and the cache's bytes."""
    plan, mlp = (Stage(),), Gated(hidden=8)
    model = Decoder(vocab_size=8, d_model=D_MODEL, attention=layer, mlp=mlp, plan=plan)
    weights = model.unstack(model.scaled(model.init()))
    cache = model.empty_cache(1, length, STEPS)
    frozen, live = replace(cache, length=jnp.full(1, length)).split()

    def steps(weights: Any, frozen: Any, live: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            live, token = carry
            logits, after = model.step(weights, model.cache_class.join(frozen, live), token)
            return after.split()[1], jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, STEPS, step, (live, jnp.zeros(1, jnp.int32)))

    return partial(jax.jit(steps), weights, frozen, live), cache.nbytes()


def alternating(runs: dict[str, Run], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Measure each run in rounds that alternate between them, after one to warm up.

    Returns seconds of the threads (of the clock, on an accelerator) and of the clock.
    """
    own = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin, start = own(), time.perf_counter()
            jax.block_until_ready(run())
            if number:
                seconds[name].append((own() - begin, time.perf_counter() - start))
    return seconds


def measured(what: str, length: int, made: dict[str, tuple[Run, int]], rounds: int) -> list[Any]:
    """Measure each contender and return its row. made: runs and bytes by name, also of
    attention."""
    seconds = alternating({name: run for name, (run, _) in made.items()}, rounds)
    rows = []
    for name, times in seconds.items():
        pairs = zip(times, seconds[ATTENTION], strict=True)
        unit = 1e3 / (STEPS if what == "decode" else 1)
        row = {"what": what, "length": length, "layer": name, "bytes": made[name][1]}
        row["milliseconds"] = unit * statistics.median(own for own, _ in times)
        row["elapsed"] = unit * min(elapsed for _, elapsed in times)
        row["of_attention"] = statistics.median(mine / theirs for (mine, _), (theirs, _) in pairs)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--chunks", default="16,32,64,128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="rows as JSON")
    given = parser.parse_args()
    console, rows = Console(width=100), []
    for length in map(int, given.lengths.split(",")):
        made = {ATTENTION: training(LAYERS[ATTENTION], length)}
        for name, layer in LAYERS.items():
            if name != ATTENTION:
                for chunk in map(int, given.chunks.split(",")):
                    made[f"{name}, chunks of {chunk}"] = training(layer, length, chunk)
        rows += measured("train", length, made, given.rounds)
        steps = {name: decoding(layer, length) for name, layer in LAYERS.items()}
        rows += measured("decode", length, steps, given.rounds)
        show(console, [row for row in rows if row["length"] == length])
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    columns = ("tokens", "layer", "ms", "elapsed", "of attention", "MiB")
    table = Table("", *columns, title=f"{jax.devices()[0].device_kind}: one layer, batch 1")
    for row in rows:
        times = (f"{row[name]:,.3g}" for name in ("milliseconds", "elapsed"))
        cells = *times, f"{row['of_attention']:.2f}"
        size = f"{row['bytes'] / 2**20:.2f}"
        table.add_row(row["what"], f"{row['length']:,}", row["layer"], *cells, size)
    console.print(table)


if __name__ == "__main__":
    main()
