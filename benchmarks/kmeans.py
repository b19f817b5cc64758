"""Compare k-means of 8 heads x 4,096 keys x 64 dimensions, 64 clusters, with scikit-learn's.

    python benchmarks/kmeans.py [--rounds 5]

Keys are drawn from mixtures, as those of real heads are: 200 centres of unequal weight, and noise.
scikit-learn runs with its defaults. The script prints seconds (median, without compilation), their
ratio, the sums of squares, and mukv's time for more heads and layers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mukv.cache import kmeans

HEADS, KEYS, WIDTH, CLUSTERS = 8, 4096, 64, 64


def keys(sets: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((sets, 200, WIDTH))
    share = random.dirichlet(np.ones(200), sets)
    chosen = np.stack([random.choice(200, KEYS, p=each) for each in share])
    noise = random.standard_normal((sets, KEYS, WIDTH))
    return (np.take_along_axis(centres, chosen[..., None], 1) + 0.7 * noise).astype(np.float32)


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median time of several rounds after a first one, which compiles."""
    work()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    from sklearn.cluster import KMeans

    points = keys(HEADS)
    inertia: dict[str, float] = {}

    def theirs() -> None:
        fits = [KMeans(CLUSTERS, random_state=0).fit(each) for each in points]
        inertia["scikit-learn"] = float(sum(fit.inertia_ for fit in fits))
        inertia["their iterations"] = float(np.mean([fit.n_iter_ for fit in fits]))

    device = jax.device_put(points)

    def ours() -> None:
        found = jax.block_until_ready(kmeans.fit(device, CLUSTERS))
        inertia["mukv"] = float(found.inertia.sum())
        inertia["our iterations"] = int(found.iterations)

    slow, fast = seconds(theirs, given.rounds), seconds(ours, given.rounds)
    rows = {}
    for sets in (8, 16, 32, 64):
        more = jax.device_put(keys(sets))
        work = lambda more=more: jax.block_until_ready(kmeans.fit(more, CLUSTERS))  # noqa: E731
        rows[sets] = seconds(work, max(given.rounds // 2, 1))
    worse = inertia["mukv"] / inertia["scikit-learn"] - 1
    table = Table("", "seconds", "sum of squares", "iterations")
    table.add_row(
        "scikit-learn",
        f"{slow:.3f}",
        f"{inertia['scikit-learn']:,.0f}",
        f"{inertia['their iterations']:.0f}",
    )
    table.add_row("mukv", f"{fast:.3f}", f"{inertia['mukv']:,.0f}", f"{inertia['our iterations']}")
    console = Console()
    console.print(table)
    console.print(f"{slow / fast:.2f} times as fast; sum of squares {worse:+.2%}")
    table = Table("heads x layers", "seconds", "seconds per head")
    for sets, taken in rows.items():
        table.add_row(f"{sets}", f"{taken:.3f}", f"{taken / sets:.4f}")
    console.print(table)
    facts = {
        "seconds": {"scikit-learn": slow, "mukv": fast},
        "ratio": slow / fast,
        "inertia": inertia,
        "by_sets": rows,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
