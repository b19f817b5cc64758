"""k-means: each step equals its definition, starting centres are spread, mini-batches average."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.cache import kmeans
from mukv.core.errors import BadInput

RANDOM = np.random.default_rng(0)
CENTRES = RANDOM.standard_normal((2, 6, 4)) * 10


def blobs(count: int, seed: int = 0) -> jnp.ndarray:
    """Return two sets of points with six well separated clusters each."""
    random = np.random.default_rng(seed)
    chosen = random.integers(0, 6, (2, count))
    noise = random.standard_normal((2, count, 4))
    return jnp.asarray(np.take_along_axis(CENTRES, chosen[..., None], 1) + 0.1 * noise, jnp.float32)


def squares(points, centres) -> np.ndarray:
    far = ((np.asarray(points)[:, :, None] - np.asarray(centres)[:, None]) ** 2).sum(-1)
    return far.min(axis=-1).sum(axis=-1)


def test_clusters_that_are_there_are_found():
    found = kmeans.fit(blobs(300), 6)
    for own, true in zip(found.centres, CENTRES, strict=True):
        far = np.linalg.norm(np.asarray(own)[:, None] - true[None], axis=-1)
        assert sorted(far.argmin(axis=1)) == list(range(6))
        assert far.min(axis=1).max() < 0.1
    np.testing.assert_allclose(found.counts.sum(axis=1), 300)
    np.testing.assert_allclose(found.inertia, squares(blobs(300), found.centres), rtol=3e-3)


def test_an_iteration_is_the_mean_of_the_nearest_points():
    points = jnp.asarray(RANDOM.standard_normal((2, 50, 4)), jnp.float32)
    centres = points[:, :5]
    one = kmeans.lloyd(points, centres, 1, 0.0)
    for s in range(2):
        near = ((points[s][:, None] - centres[s][None]) ** 2).sum(-1).argmin(axis=1)
        for c in range(5):
            mine = np.asarray(points[s])[np.asarray(near) == c]
            np.testing.assert_allclose(one.centres[s, c], mine.mean(axis=0), atol=1e-5)
            assert one.counts[s, c] == len(mine)
    more = kmeans.lloyd(points, centres, 30, 0.0)
    assert (squares(points, more.centres) < squares(points, one.centres)).all()


def test_starting_centres_are_spread_points():
    points = blobs(120)
    start = kmeans.plus_plus(points, 6, jax.random.key(1))
    for own, all_points, true in zip(start, points, CENTRES, strict=True):
        assert all((np.asarray(all_points) == np.asarray(c)).all(-1).any() for c in own)
        far = np.linalg.norm(np.asarray(own)[:, None] - true[None], axis=-1)
        assert len(set(far.argmin(axis=1))) == 6


def test_mini_batches_are_one_running_mean():
    """While assignments don't change, absorbing batches one by one gives the mean of all points."""
    first, second = blobs(200, 1), blobs(200, 2)
    known = kmeans.fit(first, 6)
    grown = kmeans.absorb(known, second)
    np.testing.assert_allclose(grown.counts.sum(axis=1), 400)
    both = jnp.concatenate([first, second], axis=1)
    exact = kmeans.lloyd(both, known.centres, 1, 0.0)
    np.testing.assert_allclose(grown.centres, exact.centres, atol=1e-3)


def test_sets_are_independent():
    points = blobs(100)
    start = points[:, :6]
    alone = kmeans.lloyd(points[:1], start[:1], 5, 0.0)
    np.testing.assert_allclose(kmeans.lloyd(points, start, 5, 0.0).centres[:1], alone.centres)


def test_more_clusters_than_points():
    with pytest.raises(BadInput, match="number of points"):
        kmeans.fit(blobs(5), 6)
