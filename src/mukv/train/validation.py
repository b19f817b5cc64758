"""Validation: nats per token and bits per byte of held-out text, by part if it is a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from mukv.data.feed import Source
from mukv.data.mixture import Mixture

Sums: TypeAlias = np.ndarray
"""Summed loss (nats), number of tokens and number of UTF-8 bytes: [3], or [3 point] of several runs
at once."""


def validation_metrics(sums: Sums) -> dict[str, np.ndarray]:
    """Compute the validation metrics [*point] from sums [3 *point]."""
    nats, tokens, read = sums
    return {
        "validation_loss": nats / np.maximum(tokens, 1),
        "validation_bits_per_byte": nats / math.log(2) / np.maximum(read, 1),
    }


def validated(
    sources: Sequence[Source],
    limit: int | None,
    summed: Callable[[Sequence[Source], int | None], Sums],
) -> dict[str, np.ndarray]:
    """Return the validation metrics; of a mixture those of each part as well, and as the total
    their mean with the weights of training.

    sources: validation batches of each seed; either none or all of them are mixtures of the same
        parts
    limit: largest number of batches of each source; None means all
    summed: sums over at most so many batches of each of some sources
    """
    mixtures = [source for source in sources if isinstance(source, Mixture)]
    if not mixtures:
        return validation_metrics(summed(sources, limit))
    first = mixtures[0]
    found: dict[str, np.ndarray] = {}
    every: list[Sums] = []
    for name in first.parts:
        every.append(summed([each.parts[name] for each in mixtures], first.share(limit)))
        metrics = validation_metrics(every[-1])
        found |= {f"{key}/{name}": value for key, value in metrics.items()}
    counted = np.sum([sums[1] for sums in every], axis=0)
    per_token = np.array([sums / np.maximum(sums[1], 1) for sums in every])
    shares = np.array(first.weights) / sum(first.weights)
    return validation_metrics(counted * np.tensordot(shares, per_token, axes=1)) | found
