"""Compare training sixteen learning rates in one program with sixteen runs one after the other.

    python benchmarks/sweep.py [--widths 64,128,256] [--points 16] [--steps 40]

"alone" is one `Together` per point, in one process that has started JAX, with an empty compilation
cache; a loop over `mukv train` would also start a process for each point. Losses are compared and
must agree.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mukv.cli import launch
from mukv.data.feed import Feed
from mukv.runs import config
from mukv.runs.resolve import open_feed
from mukv.tuning.together import Point, Together


def points(width: int, count: int, steps: int) -> tuple[Feed, list[Point]]:
    run = config.load(
        "tiny",
        [
            f"model.d_model={width}",
            f"model.attention.heads={width // 32}",
            f"model.attention.kv_heads={width // 32}",
            f"model.mlp.hidden={3 * width}",
            f"train.steps={steps}",
            "train.compute.dtype=float32",
            "train.compute.operands=float32",
            "train.validation_batches=2",
        ],
    )
    rates = 2.0 ** np.linspace(-11, -7, count)
    trainings = [replace(run.train, learning_rate=float(rate)) for rate in rates]
    return open_feed(run)[1], [Point(run.model, training) for training in trainings]


def losses(groups: Sequence[Together]) -> tuple[float, float, list[float]]:
    """Return seconds with and without compilation, and final validation losses."""
    found: list[float] = []
    whole = training = 0.0
    for group in groups:
        jax.clear_caches()
        began = time.monotonic()
        group.compiled.memory_analysis()
        compiled = time.monotonic()
        *_, last = group.run()
        ended = time.monotonic()
        whole, training = whole + ended - began, training + ended - compiled
        found += [row["validation_loss"] for row in last.numbers]
    return whole, training, found


def compare(width: int, count: int, steps: int) -> dict[str, Any]:
    """Train the points of one width in all three ways.

    Returns seconds by way ("alone", "map", "vmap"), compilation included, and the largest
    difference of a final loss from that of the point alone, in nats.
    """
    feed, chosen = points(width, count, steps)
    seconds: dict[str, float] = {}
    seconds["alone"], _, expected = losses([Together([point], feed) for point in chosen])
    gap = 0.0
    for across in ("map", "vmap"):
        seconds[across], _, found = losses([Together(chosen, feed, across=across)])
        gap = max(gap, float(np.abs(np.array(found) - expected).max()))
    return {"seconds": seconds, "largest_difference": gap}


def compile_each_time() -> None:
    """Turn the compilation cache off, since it would hide the savings."""
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_enable_compilation_cache", False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    launch.prepare()
    compile_each_time()
    device = jax.devices()[0]
    title = f"{given.points} points of {given.steps} steps, {device.device_kind}, seconds"
    columns = ("alone", "one after the other inside", "vmap", "best ratio", "largest difference")
    table = Table("width", *columns, title=title)
    for width in map(int, given.widths.split(",")):
        row = compare(width, given.points, given.steps)
        seconds = row["seconds"]
        table.add_row(
            str(width),
            *(f"{taken:.1f}" for taken in seconds.values()),
            f"{seconds['alone'] / min(seconds['map'], seconds['vmap']):.2f} x",
            f"{row['largest_difference']:.1e} nats",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
