"""Add leading axes explicitly: the tests run with JAX's implicit rank promotion forbidden."""

from __future__ import annotations

from jax import Array


def with_rank(x: Array, rank: int) -> Array:
    """Prepend axes of size 1 to an array, as NumPy's rank promotion does, until it has `rank` axes.

    Arrays with more axes are returned as they are.
    """
    return x.reshape(*(1,) * (rank - x.ndim), *x.shape)
