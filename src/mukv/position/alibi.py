"""ALiBi: logits fall linearly with distance, with a fixed slope per head (Press et al. 2021).

Head h of n, counted from 1, subtracts 2 ** (-8 h / n) per token of distance. Where n is not a power
of two, the slopes of the largest smaller power are followed by every second slope of twice that
power.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from mukv.core.typing import Weights
from mukv.position.base import Logits, Pairs, Position


def slopes(heads: int) -> np.ndarray:
    """Compute the slope of each query head: float64 [heads], in logits per token of distance."""
    power = 1 << (heads.bit_length() - 1)
    first = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    if power == heads:
        return first
    return np.concatenate([first, slopes(2 * power)[::2][: heads - power]])


@dataclass(frozen=True)
class ALiBi(Position):
    """Lower logits linearly with distance, with a fixed slope per head and no trained weights."""

    kind: Literal["alibi"] = "alibi"

    @property
    def biases(self) -> bool:
        return True

    def bias(self, weights: Weights, logits: Logits, pairs: Pairs) -> Logits:
        _, kv_heads, group, _, _ = logits.shape
        slope = jnp.asarray(slopes(kv_heads * group), jnp.float32).reshape(1, kv_heads, group, 1, 1)
        return logits - slope * pairs.distance().astype(jnp.float32)
