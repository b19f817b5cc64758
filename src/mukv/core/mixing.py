"""Counter-based random numbers: pure functions of a key and a counter, without state.

`mixed` is the finaliser of SplitMix64 (Steele, Lea, Flood 2014). `permuted` is a Feistel network
over the next power of four, applied repeatedly until the result is in range (cycle walking; Black
and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 4


def mixed(x: np.ndarray | np.uint64) -> np.ndarray:
    """Hash 64-bit numbers; the hash is a bijection. Returns a uint64 array."""
    x = np.atleast_1d(x) + GOLDEN  # overflow is intended
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def permuted(
    place: Int[np.ndarray, " row"], epoch: Int[np.ndarray, " row"], size: int, seed: int
) -> Int[np.ndarray, " row"]:
    """Return the values at these places of a random permutation of 0 to size - 1.

    place: indices into the permutation, 0 <= place < size. epoch: number of the permutation, for
        each place. seed: key of all permutations.
    """
    half = np.uint64(max(1, (size - 1).bit_length() + 1 >> 1))
    low = np.uint64((1 << int(half)) - 1)
    key = mixed(mixed(np.uint64(seed % 2**64)) ^ epoch.astype(np.uint64))
    found = place.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right, keys = found[outside] >> half, found[outside] & low, key[outside]
        for number in range(ROUNDS):
            hashed = mixed(keys + np.uint64(number) ^ right << np.uint64(32))
            left, right = right, left ^ hashed & low
        found[outside] = left << half | right
        outside = found >= np.uint64(size)
    return found.astype(np.int64)
