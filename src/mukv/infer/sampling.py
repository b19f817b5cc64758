"""How the next token is drawn from the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mukv.core.arguments import require_types
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int


@dataclass(frozen=True)
class Sampling:
    """Parameters of drawing the next token.

    temperature: divisor of the logits; 0 takes the likeliest token (greedy)
    top_k: number of likeliest tokens to draw from; None means no limit
    top_p: probability mass of the likeliest tokens to draw from; None means no limit
    seed: 32-bit seed
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_types(
            temperature=(self.temperature, float | int),
            top_k=(self.top_k, int | None),
            top_p=(self.top_p, float | int | None),
            seed=(self.seed, int),
        )
        if not 0 <= self.temperature < math.inf:
            raise BadInput("temperature", self.temperature, "at least 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise BadInput("top_k", self.top_k, "at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BadInput("top_p", self.top_p, "above 0 and at most 1")
        if not 0 <= self.seed < 1 << 32:
            raise BadInput("seed", self.seed, "0 to 4294967295 (32 bits)")

    def draw(self, logits: Float[Array, "batch vocab"], keys: Array) -> Int[Array, " batch"]:
        """Draw one token per row.

        keys: one random key per row, so that a row does not depend on its batch
        """
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
            before -= jax.nn.softmax(ordered, axis=-1)
            # The likeliest token is always kept: the mass before it is 0.
            least = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), -1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
