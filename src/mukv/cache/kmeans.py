"""k-means of many independent sets of points at once, compiled, with the sets along a leading axis.

Centres are initialised by greedy k-means++ (Arthur and Vassilvitskii 2007; of a few candidates, the
one that reduces the sum of squares most) and refined by Lloyd's iterations. Further points update
them in mini-batches with one learning rate per centre (Sculley 2010). Assignments are products and
comparisons, without arg-reductions and scatters, which are slow on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mukv.core.broadcast import with_rank
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int

START_POINTS = 16
"""Points per cluster in the sample that the initial centres are fitted to. This many give a sum of
squares within a percent of that of all points.
"""

Points = Float[Array, "sets point width"]
Centroids = Float[Array, "sets cluster width"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fit:
    """Result of k-means.

    centres: float32 [sets cluster width]
    counts: number of points assigned to each centre
    inertia: sum of squared distances of each set's points to the centres before the last update
    iterations: number of iterations made
    """

    centres: Centroids
    counts: Float[Array, "sets cluster"]
    inertia: Float[Array, " sets"]
    iterations: Int[Array, ""]


def fit(
    points: Points,
    clusters: int,
    seed: int = 0,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> Fit:
    """Cluster each set.

    iterations: upper bound
    tolerance: stop once no set's sum of squares falls by more than this fraction in an iteration

    Raises BadInput for more clusters than points.
    """
    if not 1 <= clusters <= points.shape[1]:
        raise BadInput("clusters", clusters, f"1 to the number of points ({points.shape[1]})")
    return _fit(points, clusters, jax.random.key(seed), iterations, tolerance)


@partial(jax.jit, static_argnames=("clusters", "iterations", "tolerance"))
def _fit(points: Points, clusters: int, key: Array, iterations: int, tolerance: float) -> Fit:
    points = points.astype(jnp.float32)
    draw, start = jax.random.split(key)
    count = min(points.shape[1], START_POINTS * clusters)
    sample = jax.random.permutation(draw, points.shape[1])[:count]
    few = points[:, sample]
    near = lloyd(few, plus_plus(few, clusters, start), iterations, tolerance)
    return lloyd(points, near.centres, iterations, tolerance)


def plus_plus(points: Points, clusters: int, key: Array) -> Centroids:
    """Choose initial centres one by one, far from one another (greedy k-means++)."""
    sets, count, _ = points.shape
    tries = 2 + int(math.log(clusters))
    squares = jnp.sum(points**2, axis=-1)

    def choose(number: Array, weights: Array, candidates: int) -> Array:
        """Draw points of each set in proportion to their weights, by an exponential race."""
        race = jax.random.exponential(jax.random.fold_in(key, number), (sets, candidates, count))
        race = jnp.where(weights[:, None] > 0, race / weights[:, None], jnp.inf)
        return jnp.argmin(race, axis=-1)

    def take(index: Array) -> Array:
        return jnp.take_along_axis(points, index[..., None], axis=1)

    def step(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, distance = state
        candidates = take(choose(number, distance, tries))
        own = jnp.sum(candidates**2, axis=-1)[..., None] + squares[:, None]
        new = own - 2 * jnp.einsum("scd,spd->scp", candidates, points)
        lower = jnp.minimum(jnp.maximum(new, 0.0), distance[:, None])
        best = jnp.argmin(jnp.sum(lower, axis=-1), axis=-1)[:, None]
        centre = jnp.take_along_axis(candidates, best[..., None], axis=1)
        chosen = jnp.take_along_axis(lower, best[..., None], axis=1)[:, 0]
        return jax.lax.dynamic_update_slice_in_dim(centres, centre, number, axis=1), chosen

    first = take(choose(jnp.zeros((), jnp.int32), jnp.ones((sets, count)), 1))
    distance = jnp.sum((points - first) ** 2, axis=-1)
    centres = jnp.zeros((sets, clusters, points.shape[2])).at[:, :1].set(first)
    return jax.lax.fori_loop(1, clusters, step, (centres, distance))[0]


def lloyd(points: Points, centres: Centroids, iterations: int, tolerance: float) -> Fit:
    """Iterate Lloyd's algorithm. A centre without points is unchanged."""
    squares = jnp.sum(points**2, axis=(1, 2))

    def step(state: tuple[Fit, Array]) -> tuple[Fit, Array]:
        old, _ = state
        sums, counts, least = gathered(points, old.centres)
        means = sums / jnp.maximum(counts, 1.0)[..., None]
        centres = jnp.where(counts[..., None] > 0, means, old.centres)
        inertia = least + squares
        fallen = jnp.max((old.inertia - inertia) / jnp.maximum(inertia, 1e-30))
        return Fit(centres, counts, inertia, old.iterations + 1), fallen

    def goes_on(state: tuple[Fit, Array]) -> Array:
        return (state[0].iterations < iterations) & (state[1] > tolerance)

    zeros = jnp.zeros(centres.shape[:2])
    start = Fit(centres, zeros, jnp.full(len(points), jnp.inf), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(goes_on, step, (start, jnp.asarray(jnp.inf)))[0]


def gathered(points: Points, centres: Centroids) -> tuple[Any, Any, Any]:
    """Sum the points nearest to each centre.

    Returns sums [sets cluster width], numbers [sets cluster] and the sum of squared distances
    [sets] without the points' own squares.
    """
    far = distances(points, centres)
    least = jnp.min(far, axis=-1, keepdims=True)
    own = (far <= least).astype(jnp.float32)
    sums = jnp.einsum("spc,spd->scd", own, points)
    return sums, jnp.sum(own, axis=1), jnp.sum(least, axis=(1, 2))


def distances(
    points: Float[Array, "*sets point width"], centres: Float[Array, "*some cluster width"]
) -> Float[Array, "*sets point cluster"]:
    """Compute squared distances without the points' own squares, which do not change
    their order.
    """
    products = jnp.einsum("...pd,...cd->...pc", points, centres, preferred_element_type=jnp.float32)
    squares = jnp.sum(centres**2, axis=-1)[..., None, :]
    return with_rank(squares, products.ndim) - 2 * products


def nearest(
    points: Float[Array, "*sets point width"], centres: Float[Array, "*some cluster width"]
) -> Int[Array, "*sets point"]:
    """Return the index of the nearest centre."""
    return jnp.argmin(distances(points, centres), axis=-1).astype(jnp.int32)


@jax.jit
def absorb(known: Fit, points: Points) -> Fit:
    """Update centres with further points, so that each is the mean of all points ever assigned to
    it.
    """
    points = points.astype(jnp.float32)
    sums, counts, least = gathered(points, known.centres)
    total = known.counts + counts
    moved = (known.centres * known.counts[..., None] + sums) / jnp.maximum(total, 1.0)[..., None]
    centres = jnp.where(counts[..., None] > 0, moved, known.centres)
    inertia = known.inertia + least + jnp.sum(points**2, axis=(1, 2))
    return replace(known, centres=centres, counts=total, inertia=inertia)
