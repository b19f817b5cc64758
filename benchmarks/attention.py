"""Compare the fused attention core with the plain one: time and memory of a layer's gradient.

    python benchmarks/attention.py                      # RoPE, ALiBi and CoPE at 1,024 to 8,192

Memory is what the compiler plans for temporaries and, where it fits the machine, the peak of a
process that does nothing else; cases that do not fit are not run. Both cores compute the same
result (tests/laws). Rounds alternate between them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from mukv.attention import Entries, Grouped, Mask
from mukv.core.compute import Compute
from mukv.core.errors import unknown_name
from mukv.core.params import map_params
from mukv.position import POSITIONS

D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 512, 8, 2, 64
CORES = ("plain", "fused")


def layer(position: str, length: int, core: str) -> tuple[Any, tuple[Any, ...]]:
    """Compile the gradient of one attention layer; return it and its arguments."""
    attention = Grouped(POSITIONS[position](), heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    declared = (attention.write_params(D_MODEL), attention.read_params(D_MODEL))
    key = jax.random.key(0)
    weights = map_params(lambda p: 0.02 * jax.random.normal(key, p.shape), declared)
    x = jax.random.normal(key, (1, length, D_MODEL))
    place = jnp.arange(length)[None]
    compute = Compute(operands="float32", fused=core == "fused")

    def loss(weights: Any, x: jax.Array) -> jax.Array:
        write, read = weights
        entries = Entries(attention.write(write, x, place), place[:, None])
        read_out, _ = attention.read(read, x, place, (entries,), Mask(aligned=True), compute)
        return jnp.sum(read_out**2)

    return jax.jit(jax.grad(loss, (0, 1))).lower(weights, x).compile(), (weights, x)


def measure(position: str, length: int, rounds: int) -> dict[str, Any]:
    """Measure each core that fits: medians of alternating rounds, and bytes."""
    compiled = {core: layer(position, length, core) for core in CORES}
    row: dict[str, Any] = {"position": position, "length": length}
    for core, (step, _) in compiled.items():
        row[f"{core}_planned_bytes"] = step.memory_analysis().temp_size_in_bytes
    fitting = [core for core in CORES if row[f"{core}_planned_bytes"] < 0.6 * free_bytes()]
    seconds: dict[str, list[float]] = {core: [] for core in fitting}
    for number in range(rounds + 1):
        for core in fitting:
            step, arguments = compiled[core]
            begin = time.perf_counter()
            jax.block_until_ready(step(*arguments))
            if number:
                seconds[core].append(time.perf_counter() - begin)
    for core, times in seconds.items():
        row[f"{core}_seconds"] = statistics.median(times)
        row[f"{core}_resident_bytes"] = resident(position, length, core)
    return row


def free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def resident(position: str, length: int, core: str) -> int:
    """Measure the peak resident bytes that one gradient adds to a fresh process."""
    command = [sys.executable, __file__, "--resident", position, str(length), core]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def report_resident(position: str, length: int, core: str) -> None:
    step, arguments = layer(position, length, core)
    # Writing 5 resets the peak so far, which is that of the compiler.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    jax.block_until_ready(step(*arguments))
    print(memory("VmHWM") - before)


def memory(field: str) -> int:
    """Return bytes of this process from the kernel's statistics."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def show(rows: list[dict[str, Any]]) -> None:
    columns = (
        "tokens",
        "plain s",
        "fused s",
        "speed",
        "plain MiB",
        "fused MiB",
        "resident",
        "memory",
    )
    table = Table("", *columns, title=f"{jax.devices()[0].device_kind}: gradient of one layer")

    def both(row: dict[str, Any], what: str, form: str, unit: float = 1) -> list[str]:
        found = [row.get(f"{core}_{what}") for core in CORES]
        return ["-" if number is None else format(number / unit, form) for number in found]

    for row in rows:
        planned = [row[f"{core}_planned_bytes"] for core in CORES]
        faster = row["plain_seconds"] / row["fused_seconds"] if "plain_seconds" in row else None
        table.add_row(
            row["position"],
            f"{row['length']:,}",
            *both(row, "seconds", ".3f"),
            f"{faster:.1f} x" if faster else "-",
            *both(row, "planned_bytes", ",.0f", 2**20),
            " / ".join(both(row, "resident_bytes", ",.0f", 2**20)),
            f"1 / {planned[0] / planned[1]:.1f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", default="rope,alibi,cope")
    parser.add_argument("--lengths", default="1024,4096,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="rows as JSON")
    parser.add_argument("--resident", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.resident:
        position, length, core = given.resident
        report_resident(position, int(length), core)
        return
    rows = []
    for position in given.positions.split(","):
        if position not in POSITIONS:
            raise SystemExit(f"error: {unknown_name('--positions', position, POSITIONS)}")
        for length in map(int, given.lengths.split(",")):
            rows.append(measure(position, length, given.rounds))
            Console(stderr=True).print(f"[dim]{position} at {length:,}: done[/]")
    show(rows)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
