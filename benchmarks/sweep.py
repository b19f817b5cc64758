"""Train sixteen learning rates in one program, and as sixteen runs one after the other.

    python benchmarks/sweep.py [--widths 64,128,256] [--points 16] [--steps 40]

"alone" is one `Together` per point, in one process that has started JAX and finds nothing in the
compilation cache; a loop over `mukv train` would also take the start of a process each. Losses are
compared and must agree.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="64,128,256")
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    launch.prepare()
    # Compile each time: a compilation cache would hide the savings.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_enable_compilation_cache", False)
    device = jax.devices()[0]
    title = f"{given.points} points of {given.steps} steps, {device.device_kind}, seconds"
    columns = ("alone", "one after the other inside", "vmap", "best ratio", "largest difference")
    table = Table("width", *columns, title=title)
    for width in map(int, given.widths.split(",")):
        feed, chosen = points(width, given.points, given.steps)
        alone, _, expected = losses([Together([point], feed) for point in chosen])
        mapped, _, first = losses([Together(chosen, feed, across="map")])
        vmapped, _, second = losses([Together(chosen, feed, across="vmap")])
        gap = max(np.abs(np.array(each) - expected).max() for each in (first, second))
        table.add_row(
            str(width),
            *(f"{seconds:.1f}" for seconds in (alone, mapped, vmapped)),
            f"{alone / min(mapped, vmapped):.2f} x",
            f"{gap:.1e} nats",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
