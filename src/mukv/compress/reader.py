"""Read rows with a model under one cache policy.

Three quarters of a row are prefilled, after which the policy has compressed the cache; the rest is
read token by token, through the same steps and folds as `generate`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.cache import Calibrated, Policy
from mukv.cache.reads import bytes_read
from mukv.cache.values import CAPPED, TopP
from mukv.core.compute import Compute
from mukv.core.tap import capture
from mukv.core.typing import Array
from mukv.model import Decoder
from mukv.model.base import LanguageModel

TAIL, SHARE, LEAST = 64, 16, 8
"""Size of the tail in tokens, which is the interval at which the policy compresses while decoding:
upper bound, fraction of a row (1 / SHARE), lower bound.
"""
Programs = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Read:
    """Measurements of some rows.

    loss: nats of each token from `read` on, [row token]
    hit: whether each such token was the likeliest, [row token]
    capped: fraction of the choices of `topp` at which the budget was exhausted before the mass was
        reached; NaN if there are none
    prefill_seconds, decode_seconds: time of prefill, and of all steps and folds
    """

    loss: np.ndarray
    hit: np.ndarray
    capped: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class PolicyReader:
    """A model that reads rows under one policy.

    weights: from `decoding_weights`
    read: tokens of a row that are prefilled
    length: tokens of a row
    """

    model: LanguageModel
    weights: Any
    compute: Compute
    policy: Policy
    centres: Calibrated
    read: int
    length: int

    @property
    def tail(self) -> int:
        """Size of the cache's tail in tokens."""
        return min(TAIL, max(self.length // SHARE, LEAST))

    @property
    def blocks(self) -> int:
        """Number of blocks of `tail` decode steps."""
        return math.ceil((self.length - self.read) / self.tail)

    def cache(self, batch: int) -> Any:
        """Make an empty cache."""
        body = self.read + (self.blocks - 1) * self.tail
        return self.model.empty_cache(
            batch, body, self.tail, self.compute.type, self.policy, self.centres
        )

    def check(self) -> None:
        """Raise BadInput if the policy does not fit; allocates nothing."""
        jax.eval_shape(lambda: self.cache(1))

    def cache_bytes(self) -> int:
        """Return the bytes of one row's cache."""
        return jax.eval_shape(lambda: self.cache(1)).nbytes()

    def bytes_read(self) -> int:
        """Return the bytes of the cache read in one decode step of one row."""

        def step(cache: Any, weights: Any) -> Any:
            token = jnp.zeros(1, jnp.int32)
            logits, cache = self.model.step(weights, cache, token, compute=self.compute)
            return logits, cache.split()[1]

        return bytes_read(step, jax.eval_shape(lambda: self.cache(1)), self.weights)

    @property
    def caps(self) -> bool:
        """Whether capped choices can be counted. They can't in a concept model, whose global layers
        run inside a conditional, which taps can't leave.
        """
        return isinstance(self.policy.select, TopP) and isinstance(self.model, Decoder)

    def programs(self) -> Programs:
        """Return the compiled functions of prefill, of a block of steps, and of folding.

        The first two return the loss of the next token and whether it was the likeliest, [token
        batch]; the second also the fraction of capped choices, [token], NaN if there were none.
        """
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
                with capture() if self.caps else nullcontext({}) as taps:
                    logits, cache = model.step(weights, cache, pair[0], compute=compute)
                capped = [value.ravel() for name, value in taps.items() if name.endswith(CAPPED)]
                share = jnp.mean(jnp.concatenate(capped)) if capped else jnp.nan
                return cache.split()[1], (*judged(logits, pair[1]), share)

            return jax.lax.scan(step, live, (tokens.T, targets.T))

        return (
            jax.jit(prefill, donate_argnums=1),
            jax.jit(block, donate_argnums=2),
            jax.jit(model.fold, donate_argnums=1),
        )

    def warm(self, tokens: np.ndarray, programs: Programs) -> None:
        """Run every program once, so that later calls compile nothing."""
        self(tokens, programs, min(self.blocks, 2))

    def __call__(
        self,
        tokens: np.ndarray,
        programs: Programs,
        blocks: int | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Read:
        """Read rows of tokens.

        blocks: number of blocks of steps; None means all
        tick: called after prefill and after each block
        """
        prefill, block, fold = programs
        end = self.read + self.blocks * self.tail + 1
        padded = jnp.asarray(np.pad(tokens, [(0, 0), (0, end - tokens.shape[1])]))
        now, then = padded[:, : self.read], padded[:, self.read]
        empty = jax.block_until_ready(self.cache(len(tokens)))
        start = time.perf_counter()
        cache, (loss, hit) = jax.block_until_ready(prefill(self.weights, empty, now, then))
        filled = time.perf_counter()
        tick()
        losses, hits, capped = [loss[:, None]], [hit[:, None]], []
        frozen, live = cache.split()
        seconds = 0.0
        for number in range(self.blocks if blocks is None else blocks):
            at = self.read + number * self.tail
            now, then = padded[:, at : at + self.tail], padded[:, at + 1 : at + self.tail + 1]
            began = time.perf_counter()
            if number:
                frozen, live = fold(self.weights, self.model.cache_class.join(frozen, live)).split()
            live, (loss, hit, share) = jax.block_until_ready(
                block(self.weights, frozen, live, now, then)
            )
            seconds += time.perf_counter() - began
            tick()
            losses.append(loss.T)
            hits.append(hit.T)
            capped.append(share)
        count = tokens.shape[1] - self.read
        loss, hit = (
            np.asarray(jnp.concatenate(part, axis=1))[:, :count] for part in (losses, hits)
        )
        return Read(loss, hit, float(jnp.mean(jnp.concatenate(capped))), filled - start, seconds)
