"""Linear maps of keys that commute with their rotation, and their fits to examples.

A rotary encoding multiplies each pair of dimensions, read as a complex number, by a phase. A map
that multiplies each pair by a complex number of its own commutes with that, and so does any map of
the dimensions that are not rotated. Such a map moves from keys to queries: (k C) . q = k . (q C').
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mukv.conversion.fits import Matrix, fit, rotation
from mukv.core.typing import Float
from mukv.position import AnyPosition, RoPE

ROUNDS = 10
"""Iterations in which heads are rotated to their mean, which converges within five."""
FitMap = Callable[[Matrix, Matrix], Matrix]
"""A function from (rows x, rows y) to the matrix R of x R = y."""


@dataclass(frozen=True)
class RotatedPairs:
    """Dimensions of a key that form rotated pairs, and dimensions that are not rotated.

    first, second: of each pair. rest: all others.
    """

    first: np.ndarray
    second: np.ndarray
    rest: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """All dimensions: the first of each pair, the second of each pair, the rest."""
        return np.concatenate([self.first, self.second, self.rest])

    def complex(self, x: Float[np.ndarray, "*batch width"]) -> np.ndarray:
        """Return the pairs as complex numbers: complex128 [*batch pair]."""
        return x[..., self.first].astype(np.float64) + 1j * x[..., self.second]

    def real(self, pairs: np.ndarray, rest: np.ndarray) -> Float[np.ndarray, "*batch width"]:
        """Invert `complex`. rest: the dimensions that are not rotated."""
        made = np.concatenate([np.real(pairs), np.imag(pairs), rest], axis=-1)
        return made[..., np.argsort(self.order)]

    def matrix(self, factor: np.ndarray, rest: Matrix) -> Matrix:
        """Return the matrix, multiplied from the right, that multiplies pairs by complex factors
        and the rest by a matrix."""
        made = np.zeros((len(self.order), len(self.order)))
        made[self.first, self.first] = made[self.second, self.second] = np.real(factor)
        made[self.first, self.second] = np.imag(factor)
        made[self.second, self.first] = -np.imag(factor)
        made[np.ix_(self.rest, self.rest)] = rest
        return made


def pairs_of(position: AnyPosition, width: int) -> RotatedPairs:
    """Return the pairs of a head of this width; none if the position encoding does not rotate."""
    every = np.arange(width)
    if not isinstance(position, RoPE):
        return RotatedPairs(every[:0], every[:0], every)
    count = len(position.frequencies(width))
    if position.pairing == "half":
        first, second = every[:count], every[count : 2 * count]
    else:
        first, second = every[: 2 * count : 2], every[1 : 2 * count : 2]
    return RotatedPairs(first, second, every[2 * count :])


def commuting_fit(pairs: RotatedPairs, x: Matrix, y: Matrix) -> Matrix:
    """Fit as `fit`, among the maps that commute with the rotation of the positions."""
    one, other = pairs.complex(x), pairs.complex(y)
    size = np.sum(np.abs(one) ** 2, axis=0)
    factor = np.sum(one.conj() * other, axis=0) / np.maximum(size, np.finfo(float).tiny)
    return pairs.matrix(factor, fit(x[:, pairs.rest], y[:, pairs.rest]))


def commuting_rotation(pairs: RotatedPairs, x: Matrix, y: Matrix) -> Matrix:
    """Fit as `rotation`, among the maps that commute with the rotation of the positions."""
    product = np.sum(pairs.complex(x).conj() * pairs.complex(y), axis=0)
    size = np.abs(product)
    factor = np.where(size > 0, product / np.where(size > 0, size, 1), 1)
    return pairs.matrix(factor, rotation(x[:, pairs.rest], y[:, pairs.rest]))


def cosine(pairs: RotatedPairs | None, x: Matrix, y: Matrix) -> float:
    """Return the cosine of two heads, as rows of examples, maximised over rotations of one of them.

    pairs: allow only rotations that commute with that of the positions; None for all
    """
    size = np.linalg.norm(x) * np.linalg.norm(y)
    if not size:
        return 0.0
    if pairs is None:
        return float(np.linalg.norm(x.T @ y, "nuc") / size)
    products = np.sum(pairs.complex(x).conj() * pairs.complex(y), axis=0)
    rest = x[:, pairs.rest].T @ y[:, pairs.rest]
    total = np.abs(products).sum() + (np.linalg.norm(rest, "nuc") if rest.size else 0.0)
    return float(total / size)


@dataclass(frozen=True)
class Maps:
    """Fits of maps of keys or values that queries or outputs can invert.

    turn: function that fits a rotation from rows to rows, which by itself changes no result
    fit: function that fits the map from rows to rows with the least squared error
    """

    turn: FitMap
    fit: FitMap

    def turns(self, members: Sequence[Matrix]) -> list[Matrix]:
        """Return the rotations of heads to their mean, which is the mean of the rotated heads
        (generalised Procrustes analysis)."""
        mean = members[0]
        turns = [np.eye(mean.shape[1])] * len(members)
        for _ in range(ROUNDS if len(members) > 1 else 0):
            turns = [self.turn(member, mean) for member in members]
            mean = np.mean([x @ t for x, t in zip(members, turns, strict=True)], axis=0)
        return turns


def _identity(x: Matrix, y: Matrix) -> Matrix:
    return np.eye(x.shape[1])


NONE = Maps(_identity, _identity)
"""For layers in which any map would change the result."""
ANY = Maps(rotation, fit)


def commuting(pairs: RotatedPairs) -> Maps:
    """Return the maps that commute with the rotation of the positions."""
    return Maps(partial(commuting_rotation, pairs), partial(commuting_fit, pairs))
