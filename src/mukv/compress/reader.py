"""A model that reads rows under one policy: three quarters at once, after which the policy has
chosen, the rest token by token, through the same steps and folds that `generate` runs.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.cache import Calibrated, Policy
from mukv.cache.reads import bytes_read
from mukv.core.compute import Compute
from mukv.core.typing import Array
from mukv.model.base import LanguageModel

TAIL, SHARE, LEAST = 64, 16, 8
"""Places of the tail, i.e. how often the policy chooses anew while decoding: at most, as a share
of a row, and at least."""


@dataclass(frozen=True)
class Reader:
    """A model that reads rows under one policy."""

    model: LanguageModel
    weights: Any
    compute: Compute
    policy: Policy
    centres: Calibrated
    read: int
    length: int

    @property
    def tail(self) -> int:
        return min(TAIL, max(self.length // SHARE, LEAST))

    @property
    def blocks(self) -> int:
        return math.ceil((self.length - self.read) / self.tail)

    def cache(self, batch: int) -> Any:
        body = self.read + (self.blocks - 1) * self.tail
        return self.model.empty_cache(
            batch, body, self.tail, self.compute.type, self.policy, self.centres
        )

    def check(self) -> None:
        """Raise BadInput where the policy does not fit; nothing is allocated."""
        jax.eval_shape(lambda: self.cache(1))

    def cache_bytes(self) -> int:
        return jax.eval_shape(lambda: self.cache(1)).nbytes()

    def bytes_read(self) -> int:
        """Of the cache, in one step of one row."""

        def step(cache: Any, weights: Any) -> Any:
            token = jnp.zeros(1, jnp.int32)
            logits, cache = self.model.step(weights, cache, token, compute=self.compute)
            return logits, cache.split()[1]

        return bytes_read(step, jax.eval_shape(lambda: self.cache(1)), self.weights)

    def programs(self) -> tuple[Any, Any, Any]:
        """Reading at once, a block of steps, and folding. The first two give, for each token, the
        loss of the next and whether it was the likeliest: [token batch]."""
        model, compute = self.model, self.compute

        def judged(logits: Array, target: Array) -> tuple[Array, Array]:
            likely = jax.nn.log_softmax(logits, axis=-1)
            loss = -jnp.take_along_axis(likely, target[:, None], axis=-1)[:, 0]
            return loss, jnp.argmax(logits, axis=-1) == target

        def prefill(weights: Any, cache: Any, tokens: Array, target: Array) -> Any:
            count = jnp.full(len(tokens), tokens.shape[1])
            logits, cache = model.prefill(weights, cache, tokens, count, compute=compute)
            return cache, judged(logits, target)

        def block(weights: Any, frozen: Any, live: Any, tokens: Array, targets: Array) -> Any:
            def step(live: Any, pair: tuple[Array, Array]) -> tuple[Any, Any]:
                cache = model.cache_class.join(frozen, live)
                logits, cache = model.step(weights, cache, pair[0], compute=compute)
                return cache.split()[1], judged(logits, pair[1])

            return jax.lax.scan(step, live, (tokens.T, targets.T))

        return (
            jax.jit(prefill, donate_argnums=1),
            jax.jit(block, donate_argnums=2),
            jax.jit(model.fold, donate_argnums=1),
        )

    def __call__(self, tokens: np.ndarray, programs: tuple[Any, Any, Any]) -> tuple[Any, float]:
        """Loss and hit of each token from `read` on, [row token], and the seconds of decoding."""
        prefill, block, fold = programs
        end = self.read + self.blocks * self.tail + 1
        padded = jnp.asarray(np.pad(tokens, [(0, 0), (0, end - tokens.shape[1])]))
        cache, (loss, hit) = prefill(
            self.weights, self.cache(len(tokens)), padded[:, : self.read], padded[:, self.read]
        )
        losses, hits = [loss[:, None]], [hit[:, None]]
        jax.block_until_ready(cache)
        start = time.perf_counter()
        frozen, live = cache.split()
        for number in range(self.blocks):
            if number:
                frozen, live = fold(self.weights, self.model.cache_class.join(frozen, live)).split()
            at = self.read + number * self.tail
            now, then = padded[:, at : at + self.tail], padded[:, at + 1 : at + self.tail + 1]
            live, (loss, hit) = block(self.weights, frozen, live, now, then)
            losses.append(loss.T)
            hits.append(hit.T)
        jax.block_until_ready(losses)
        seconds = time.perf_counter() - start
        count = tokens.shape[1] - self.read
        joined = (np.asarray(jnp.concatenate(part, axis=1))[:, :count] for part in (losses, hits))
        return tuple(joined), seconds
