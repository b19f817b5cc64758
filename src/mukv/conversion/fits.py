"""Least-squares fits and principal components, float64."""

from __future__ import annotations

import numpy as np

from mukv.core.typing import Float

RIDGE = 1e-9
"""Share of its mean that is added to the diagonal of a Gram matrix, for unused directions."""
FLOOR = 1e-6
"""Least eigenvalue of a metric, as a share of their mean."""
Matrix = Float[np.ndarray, "rows columns"]


def fit(x: Matrix, y: Matrix) -> Matrix:
    """Return the matrix R with the least squared error of x R = y over the rows."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    gram = x.T @ x
    ridge = RIDGE * max(np.trace(gram) / len(gram), np.finfo(float).tiny) if len(gram) else 0.0
    return np.linalg.solve(gram + ridge * np.eye(len(gram)), x.T @ y)


def rotation(x: Matrix, y: Matrix) -> Matrix:
    """Return the orthogonal R with the least squared error of x R = y (orthogonal Procrustes)."""
    left, _, right = np.linalg.svd(x.T.astype(np.float64) @ y)
    return left @ right


def components(x: Matrix, metric: Matrix, count: int) -> tuple[Matrix, Matrix]:
    """Return matrices (down, up) of inner width `count` with least squared error of x down up = x.

    metric: symmetric and positive; its quadratic form measures the error of a row
    """
    x, half = x.astype(np.float64), root(metric)
    _, vectors = np.linalg.eigh(half @ (x.T @ x) @ half)
    largest = vectors[:, ::-1][:, :count]
    return half @ largest, largest.T @ np.linalg.inv(half)


def root(metric: Matrix) -> Matrix:
    """Return the symmetric root of a positive matrix; eigenvalues are raised to at least FLOOR of
    their mean, so that the root has an inverse."""
    values, vectors = np.linalg.eigh(metric)
    floor = max(FLOOR * values.mean(), np.finfo(float).tiny)
    return (vectors * np.sqrt(np.maximum(values, floor))) @ vectors.T
