"""One decoding step of multi-head latent attention: absorbed against an expanded cache.

    python benchmarks/latent.py [--context 8192]

The peer is the same model whose cache holds every head's key and value, as a plain
implementation of the paper's equations keeps them. Both give the same output; rounds alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from mukv.attention import Entries, Latent, Mask
from mukv.attention.base import Attention
from mukv.attention.recalled import Dense
from mukv.core.compute import Compute
from mukv.core.params import map_params
from mukv.core.typing import Weights
from mukv.position import RoPE

STEPS = 20


@dataclass(frozen=True)
class ExpandedCache(Latent):
    """The same attention; what is kept is what each head multiplies with."""

    def recall(self, weights: Weights, entries: Entries) -> Dense:
        tensors = entries.tensors
        return Dense((tensors["key_still"], tensors["key"]), tensors["value"])

    def expand(self, weights: Weights, entries: Entries) -> dict[str, jax.Array]:
        recalled = super().recall(weights, entries)
        return {
            "key_still": recalled.keys[0],
            "key": recalled.keys[1],
            "value": recalled.value,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="rows as JSON")
    given = parser.parse_args()

    numbers: dict[str, Any] = {"heads": 16, "rank": 256, "head_dim": 64, "rope_dim": 32}
    latent = Latent(RoPE(), **numbers)
    expanded = ExpandedCache(RoPE(), **numbers)
    d_model, dtype = 1024, jnp.dtype("bfloat16" if jax.default_backend() != "cpu" else "float32")
    key = jax.random.key(0)
    write, read = (
        map_params(
            lambda p: (p.fan_in_size**-0.5 * jax.random.normal(key, p.shape)).astype(dtype), d
        )
        for d in (latent.write_params(d_model), latent.read_params(d_model))
    )
    place = jnp.tile(jnp.arange(given.context), (given.batch, 1))
    x = jax.random.normal(key, (given.batch, given.context, d_model), dtype)
    kept = Entries(jax.jit(latent.write)(write, x, place), place[:, None])
    wide = Entries(jax.jit(expanded.expand)(read, kept), place[:, None])
    here = jnp.full((given.batch, 1), given.context)
    query = jax.random.normal(jax.random.key(1), (given.batch, 1, d_model), dtype)

    def steps(attention: Latent) -> Any:
        """Several steps in one program, each fed by the one before it."""

        def run(read: Any, query: jax.Array, entries: Entries) -> jax.Array:
            def one(query: jax.Array, _: None) -> tuple[jax.Array, None]:
                out, _ = Attention.read(attention, read, query, here, (entries,), Mask(), Compute())
                return query + out, None

            return jax.lax.scan(one, query, length=STEPS)[0]

        return jax.jit(run)

    forms = {"absorbed": (steps(latent.decoding()), kept), "expanded": (steps(expanded), wide)}
    outputs = {name: step(read, query, entries) for name, (step, entries) in forms.items()}
    difference = float(jnp.abs(outputs["absorbed"] - outputs["expanded"]).max())
    scale = float(jnp.abs(outputs["expanded"]).max())
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(given.rounds):
        for name, (step, entries) in forms.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(read, query, entries))
            seconds[name].append((time.perf_counter() - begin) / STEPS)
    rows = {
        name: {
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "cache_bytes_per_token": sum(
                int(np.prod(leaf.shape[1:2] + leaf.shape[3:])) * leaf.dtype.itemsize
                for leaf in entries.tensors.values()
            ),
        }
        for name, (_, entries) in forms.items()
    }
    table = Table(
        "",
        "ms per step and layer",
        "cache bytes per token and layer",
        title=f"{jax.devices()[0].device_kind}, {dtype}, {given.context:,} tokens of context, "
        f"batch {given.batch}",
        caption=f"largest difference {difference:.1e} of {scale:.1f}",
    )
    for name, row in rows.items():
        table.add_row(name, f"{row['milliseconds']:.2f}", f"{row['cache_bytes_per_token']:,}")
    ratios = (
        rows["expanded"][key] / rows["absorbed"][key]
        for key in ("milliseconds", "cache_bytes_per_token")
    )
    table.add_row("ratio", *(f"{ratio:.1f}" for ratio in ratios))
    Console().print(table)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
