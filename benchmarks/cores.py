"""Compare the attention cores that a device has with plain attention in float32: errors and time.

Run: python benchmarks/cores.py [--length 4096] [--cases packed,window] [--rounds 5]

Each case is one layer's attention, forward and backward, over rows that are packed, windowed,
capped or have sinks. An error is |x - y| / |y| in the Euclidean norm, of the output and of the
gradient with respect to queries, keys, values and sinks; y is what the plain core computes from the
same numbers in float32. A core that is made for another platform is not compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from mukv.attention import Entries, Mask
from mukv.attention.cores import CORES, Part, Plain, Scores
from mukv.attention.cores.base import KernelCore
from mukv.attention.recalled import Dense
from mukv.position import NoPE


@dataclass(frozen=True)
class Case:
    """One layer's attention.

    cuts: fractions of the row at which documents begin
    padding: fraction of the row, at its end, that is padding
    window: fraction of the row that a query sees; None for all of it
    widths: widths of keys and of values
    """

    cuts: tuple[float, ...] = (0.0,)
    padding: float = 0.0
    window: float | None = None
    softcap: float | None = None
    sinks: bool = False
    kv_heads: int = 2
    group: int = 2
    widths: tuple[int, int] = (64, 64)

    def narrow(self, width: int) -> Case:
        """Return the same case with narrower keys and values. width: of those that had 64"""
        key, value = (width * one // 64 for one in self.widths)
        return Case(**{**vars(self), "widths": (key, value)})


CASES: Mapping[str, Case] = {
    "plain": Case(),
    "padding": Case(cuts=(0, 0.14), padding=0.2),
    "packed": Case(cuts=(0, 0.14, 0.141, 0.6)),
    "window": Case(window=0.11, group=3),
    "capped": Case(softcap=1.5, window=0.47, cuts=(0, 0.22, 0.43)),
    "sinks": Case(sinks=True, widths=(96, 160), kv_heads=1, cuts=(0, 0.44)),
}
ROWS = 2


class Attended:
    """A case with random arrays; `both(core)` computes the output and the gradient."""

    def __init__(self, case: Case, length: int, kind: str = "float32"):
        """length: tokens of a row. kind: type of queries, keys and values"""
        random, place = np.random.default_rng(0), np.arange(length)
        heads, (width, value_width) = (case.kv_heads, case.group), case.widths
        cuts = sorted({int(cut * length) for cut in case.cuts})
        document = np.searchsorted(cuts, place, side="right")
        position = place - np.take(cuts, document - 1)
        padded = place >= length - int(case.padding * length)
        self.at = jnp.asarray(np.tile(position, (ROWS, 1)))
        segment, valid = None, None
        if len(cuts) > 1:
            # Padding is document -1, and its keys are not valid.
            segment = jnp.asarray(np.tile(np.where(padded, -1, document), (ROWS, 1)))
        if case.padding:
            valid = jnp.asarray(np.tile(~padded, (ROWS, 1, 1)))
        own = None if segment is None else segment[:, None]
        window = None if case.window is None else int(case.window * length)
        self.entries = Entries({}, self.at[:, None], valid, own)
        self.mask = Mask(segment, window, aligned=True)
        self.softcap = case.softcap

        def draw(*shape: int, scale: float = 1.0) -> jax.Array:
            drawn = random.standard_normal(shape, np.float32) * scale
            return jnp.asarray(drawn, jnp.float32).astype(kind)

        self.moving = {
            "query": draw(ROWS, *heads, length, width, scale=width**-0.5),
            "key": draw(ROWS, heads[0], length, width),
            "value": draw(ROWS, 1, length, value_width),
            "sinks": draw(*heads).astype(jnp.float32) if case.sinks else None,
        }
        self.direction = draw(ROWS, *heads, length, value_width).astype(jnp.float32)

    def both(self, core: Any) -> Any:
        """Return the compiled function from `moving` to ((total, output), gradient)."""

        def read(moving: Any) -> Any:
            scores = Scores(None, self.at, {}, moving["sinks"], NoPE(), 1.0, self.softcap)
            part = Part(Dense((moving["key"],), moving["value"]), self.entries, self.mask)
            out = core.apply((moving["query"],), [part], scores).astype(jnp.float32)
            return jnp.sum(out * self.direction), out

        return jax.jit(jax.value_and_grad(read, has_aux=True))

    def expected(self) -> Any:
        """Return what the plain core computes in float32."""
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), self.moving)
        with jax.default_matmul_precision("highest"):
            return jax.block_until_ready(self.both(Plain())(exact))


def error(found: Any, expected: Any) -> float:
    """Return the relative distance of two trees of arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    squares = np.sum([[np.sum((x - y) ** 2), np.sum(y**2)] for x, y in pairs], axis=0)
    return float(np.sqrt(squares[0] / squares[1]))


def on_this_device() -> dict[str, Any]:
    """Return the cores of whole rows, other than the plain one, that this device runs; on a CPU
    kernels are interpreted."""
    platform = jax.default_backend()
    found: dict[str, Any] = {}
    for name, core in CORES.items():
        if core is Plain or core.steps is True:
            continue
        kernel = issubclass(core, KernelCore)
        if platform == "cpu" and kernel:
            found[name] = core(interpret=True)
        elif core.platforms is None or platform in core.platforms:
            found[name] = core()
    return found


def measure(
    name: str, core: Any, length: int, kind: str, rounds: int, width: int = 64
) -> dict[str, Any]:
    """Compare one core in one case. name: key of CASES. width: of keys"""
    attended = Attended(CASES[name].narrow(width), length, kind)
    (_, out), gradient = attended.expected()
    run = attended.both(core)
    (_, own_out), own_gradient = jax.block_until_ready(run(attended.moving))
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(attended.moving))
        taken.append(time.perf_counter() - start)
    return {
        "output_error": error(own_out, out),
        "gradient_error": error(own_gradient, gradient),
        "seconds": statistics.median(taken),
    }


def main() -> int:
    assert __doc__
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--length", type=int, default=4096)
    options.add_argument("--cases", default=",".join(CASES))
    options.add_argument("--type", default="bfloat16", choices=("bfloat16", "float32"))
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    names = given.cases.split(",")
    for name in names:
        if name not in CASES:
            options.error(f"--cases: {name!r}; allowed: {', '.join(CASES)}")
    columns = ("case", "core", "error of output", "of gradient", "ms")
    table = Table(*columns, title=f"{given.length} tokens, {jax.devices()[0].device_kind}")
    for name in names:
        for core_name, core in on_this_device().items():
            row = measure(name, core, given.length, given.type, given.rounds)
            errors = (f"{row[key]:.1e}" for key in ("output_error", "gradient_error"))
            table.add_row(name, core_name, *errors, f"{1e3 * row['seconds']:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
