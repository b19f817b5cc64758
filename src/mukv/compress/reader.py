"""Read a text once for all policies, and continue it under each of them.

The prefill of a text computes the same entries and queries under every policy, so that it is run
once, with a cache that records them (`mukv.cache.RECORD`). Each policy makes its own cache from
this record. Text that is known is then read in blocks of one tail: a block gives the logits of as
many decoding steps and a fold, in one pass. A Decoder runs layer by layer, so that one layer is
compiled instead of all; other models are compiled whole. Speed is measured with the decoding loop
itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.cache import FULL, RECORD, Cache, Calibrated, Policy, Slot
from mukv.cache.kept import Kept
from mukv.cache.reads import bytes_read
from mukv.cache.values import CAPPED, TopP
from mukv.compress.rows import ANSWER, CUE
from mukv.core.compute import Compute
from mukv.core.programs import Programs
from mukv.core.tap import capture
from mukv.core.typing import Array
from mukv.infer.replay import kept_by_replay, require_replay
from mukv.model import Decoder
from mukv.model.base import LanguageModel

TAIL, SHARE, LEAST = 64, 16, 8
"""Size of the tail in tokens, which is the interval at which the policy compresses while decoding:
upper bound, fraction of a row (1 / SHARE), lower bound.
"""
STEPS, ROUNDS, ROUND_SECONDS = 8, 3, 0.2
"""Decoding steps per round of a measurement of speed (at most a tail); least number of rounds, and
least time that they take together.
"""
MOST_ROUNDS = 20
ASKED = 128
"""Most tokens of cues and answers that are read at once."""
SHORT_SECONDS = 2.0
"""A shorter prefill is timed a second time, because most of the first one may be compilation."""
Tick = Callable[[], None]


@dataclass(frozen=True)
class Speed:
    """Speed of decoding one row.

    seconds: per step, the median of all rounds
    full: seconds of a step with the full cache divided by those with this one, each measured right
        after the other; the median of all rounds
    capped: fraction of the choices of `topp` at which the budget was exhausted before the mass was
        reached; None for other policies
    """

    seconds: float
    full: float
    capped: float | None


@dataclass(frozen=True)
class PolicyReader:
    """A model that reads texts, each once for all policies.

    weights: from `decoding_weights`
    read: tokens of a row that are prefilled
    length: tokens of a row
    """

    model: LanguageModel
    weights: Any
    compute: Compute
    read: int
    length: int

    @property
    def tail(self) -> int:
        """Size of the cache's tail in tokens."""
        return min(TAIL, max(self.length // SHARE, LEAST))

    @property
    def blocks(self) -> int:
        """Number of blocks of `tail` tokens that are read after the prefill."""
        return math.ceil((self.length - self.read) / self.tail)

    def cache(self, batch: int, policy: Policy, centres: Calibrated) -> Any:
        """Make an empty cache."""
        after = (self.blocks - 1) * self.tail
        sizes = batch, self.read + after, self.tail
        return self.model.empty_cache(*sizes, self.compute.type, policy, centres, after)

    def cache_bytes(self, policy: Policy, centres: Calibrated) -> int | None:
        """Return the bytes of one row's cache, without allocating it; None if they depend on the
        scores of a text. Raises BadInput if the policy does not fit.
        """
        if policy.keep.replays:
            require_replay(self.model, policy, self.read)
            if policy.keep.spread.over_layers:
                return None
        return jax.eval_shape(lambda: self.cache(1, policy, centres)).nbytes()

    def stored(self, cache: Any, policy: Policy, centres: Calibrated) -> Any:
        """Return the shapes and types of the cache of one row. cache: of several, under the
        policy"""
        if self.cache_bytes(policy, centres) is None:
            return jax.eval_shape(lambda: one_row(cache))
        return jax.eval_shape(lambda: self.cache(1, policy, centres))

    def bytes_read(self, cache: Any) -> int:
        """Return the bytes of a cache that are read in one decode step.

        cache: of one row, or its shapes and types
        """

        def step(cache: Any, weights: Any) -> Any:
            token = jnp.zeros(1, jnp.int32)
            logits, cache = self.model.step(weights, cache, token, compute=self.compute)
            return logits, cache.split()[1]

        return bytes_read(step, cache, self.weights)

    # Programs

    @cached_property
    def _compiled(self) -> Callable[[Callable[..., Any]], Any]:
        """Return a jitted method of the model; a Decoder compiles each of its layers separately
        instead."""
        return (lambda method: method) if isinstance(self.model, Decoder) else jax.jit

    @cached_property
    def _prefill(self) -> Any:
        return self._compiled(partial(self.model.prefill, fresh=True, compute=self.compute))

    @cached_property
    def _extend(self) -> Any:
        return self._compiled(partial(self.model.prefill, fresh=False, compute=self.compute))

    @cached_property
    def _compress(self) -> Any:
        return self._compiled(self.model.compressed)

    @cached_property
    def _block(self) -> Any:
        return self._compiled(partial(self.model.read_block, compute=self.compute))

    @cached_property
    def _answer(self) -> Any:
        """Compiled function of blocks that continue one cache, [question row token], to logits."""

        def block(weights: Any, cache: Any, tokens: Array) -> Array:
            return self.model.read_block(weights, cache, tokens, self.compute, joins=False)[0]

        return self._compiled(jax.vmap(block, (None, None, 0)))

    @cached_property
    def _steps(self) -> Programs:
        """Compiled loop of decoding steps over known tokens; returns the arrays that it writes, and
        the fraction of capped choices (NaN without any)."""
        model = self.model

        def run(taps: bool, weights: Any, frozen: Any, live: Any, tokens: Array) -> Any:
            def step(live: Any, token: Array) -> tuple[Any, Array]:
                cache = model.cache_class.join(frozen, live)
                with capture() if taps else nullcontext({}) as seen:
                    _, cache = model.step(weights, cache, token, compute=self.compute)
                capped = [value.ravel() for name, value in seen.items() if name.endswith(CAPPED)]
                share = jnp.mean(jnp.concatenate(capped)) if capped else jnp.nan
                return cache.split()[1], jnp.asarray(share)

            return jax.lax.scan(step, live, tokens.T)

        return Programs(run, static=1)

    # Reading

    def record(self, tokens: np.ndarray) -> tuple[Array, Any, float]:
        """Prefill rows of tokens, [row token]; return the logits of the next token, the record, and
        the seconds of one row.
        """
        logits, cache, seconds = self._record(tokens)
        if seconds <= SHORT_SECONDS:
            logits, cache, seconds = self._record(tokens)
        return logits, cache, seconds / len(tokens)

    def _record(self, tokens: np.ndarray) -> tuple[Array, Any, float]:
        empty = self.cache(len(tokens), RECORD, {})
        count = jnp.full(len(tokens), tokens.shape[1])
        start = time.perf_counter()
        made = self._prefill(self.weights, empty, jnp.asarray(tokens), count)
        logits, cache = jax.block_until_ready(made)
        return logits, cache, time.perf_counter() - start

    def extended(self, record: Any, tokens: np.ndarray) -> Any:
        """Return the record of more tokens, [row token]."""
        count = jnp.full(len(tokens), tokens.shape[1])
        return self._extend(self.weights, record, jnp.asarray(tokens), count)[1]

    def compressed(
        self, record: Any, policy: Policy, centres: Calibrated, tokens: np.ndarray
    ) -> tuple[Any, float]:
        """Return the cache under a policy, and the seconds of one row.

        tokens: that the record is of, [row token]; some policies read them again
        """
        batch = len(record.length)
        if policy.keep.replays:
            whole, seconds = self.compressed(record, FULL, {}, tokens)
            after = (self.blocks - 1) * self.tail
            room, prompts = (batch, self.read + after, self.tail), tokens.tolist()
            start = time.perf_counter()
            again = self.model, self.weights, whole, prompts, policy, room, after, self.compute
            cache, compiling = kept_by_replay(*again)
            spent = time.perf_counter() - start - compiling
            return jax.block_until_ready(cache), seconds + spent / batch
        empty = jax.block_until_ready(self.cache(batch, policy, centres))
        start = time.perf_counter()
        if policy.keep.limits:  # what it drops is not read in the prefill either
            prompt = jnp.asarray(tokens), jnp.full(batch, tokens.shape[1])
            _, cache = jax.block_until_ready(self._prefill(self.weights, empty, *prompt))
            return cache, (time.perf_counter() - start) / batch
        cache = jax.block_until_ready(self._compress(self.weights, record, empty))
        return cache, (time.perf_counter() - start) / batch

    def losses(self, logits: Array, cache: Any, tokens: np.ndarray, tick: Tick) -> np.ndarray:
        """Return the loss of each token after the prefill in nats, [row token].

        logits: after the prefill. tokens: of whole rows. tick: called after each block.
        """
        end = self.read + self.blocks * self.tail + 1
        padded = np.pad(tokens, [(0, 0), (0, end - tokens.shape[1])])
        found = [np.asarray(_graded(logits[:, None], padded[:, self.read, None])[0])]
        for number in range(self.blocks):
            at = self.read + number * self.tail
            now = jnp.asarray(padded[:, at : at + self.tail])
            logits, cache = self._block(self.weights, cache, now)
            then = padded[:, at + 1 : at + self.tail + 1]
            found.append(np.asarray(_graded(logits, then)[0]))
            tick()
        return np.concatenate(found, axis=1)[:, : tokens.shape[1] - self.read]

    def recalled(self, cache: Any, strings: np.ndarray, tick: Tick = lambda: None) -> np.ndarray:
        """Return whether each token of each answer is the likeliest after its cue and the earlier
        tokens of the answer, bool [row string token]. strings: [row string token].
        """
        asked = np.moveaxis(strings, 1, 0)
        rows, size = len(strings), strings.shape[2] - 1
        # Chunks of equal size, so that one is compiled; the last one takes earlier strings again.
        chunk = strings_together(rows, len(asked), size)
        found = np.zeros((len(asked), rows, ANSWER), bool)
        for first in range(0, len(asked), chunk):
            start = min(first, len(asked) - chunk)
            some = asked[start : start + chunk]
            logits = self._answer(self.weights, cache, jnp.asarray(some[:, :, :-1]))
            hits = _graded(logits[:, :, CUE - 1 :], some[:, :, CUE:])[1]
            found[start : start + chunk] = np.asarray(hits)
            tick()
        return np.moveaxis(found, 0, 1)

    def _taps(self, policy: Policy) -> bool:
        """Whether choices of the policy are counted while it decodes."""
        return isinstance(policy.select, TopP) and isinstance(self.model, Decoder)

    def _stepping(self, cache: Any, taps: bool, tokens: np.ndarray) -> tuple[Any, ...]:
        """Return the arguments of `_steps`."""
        tokens = tokens[:, : min(STEPS, self.tail)]
        return taps, self.weights, *cache.split(), jnp.asarray(tokens)

    def begin_speeds(self, cache: Any, policy: Policy, tokens: np.ndarray) -> None:
        """Begin to compile, in another thread, what `speeds` will run for this cache."""
        self._steps.begin(*self._stepping(cache, self._taps(policy), tokens))

    def speeds(self, cache: Any, policy: Policy, full: Any, tokens: np.ndarray) -> Speed:
        """Measure decoding with a cache of one row, in turn with the full cache.

        full: a cache without compression, of the same text. tokens: that follow, [1 token].
        """
        taps = self._taps(policy)

        def timed(cached: Any) -> tuple[float, float]:
            return self._timed(self._stepping(cached, taps and cached is cache, tokens))

        for each in (full, cache):
            timed(each)  # the first time compiles
        rounds: list[tuple[tuple[float, float], tuple[float, float]]] = []
        start = time.perf_counter()
        while len(rounds) < ROUNDS or (
            len(rounds) < MOST_ROUNDS and time.perf_counter() - start < ROUND_SECONDS
        ):
            rounds.append((timed(full), timed(cache)))
        whole, own = (np.array([pair[place][0] for pair in rounds]) for place in (0, 1))
        capped = rounds[0][1][1]
        return Speed(
            float(np.median(own)),
            float(np.median(whole / own)),
            None if math.isnan(capped) else capped,
        )

    def _timed(self, arguments: tuple[Any, ...]) -> tuple[float, float]:
        """Return the seconds of a step, and the fraction of capped choices.

        arguments: of `_steps`
        """
        program = self._steps.compiled(*arguments)
        start = time.perf_counter()
        _, shares = jax.block_until_ready(program(*arguments[1:]))
        seconds = (time.perf_counter() - start) / arguments[-1].shape[1]
        return seconds, float(jnp.mean(shares))


def strings_together(rows: int, strings: int, size: int) -> int:
    """Return the number of strings of each row that are asked for at once. size: tokens of one."""
    return max(1, min(strings, ASKED // (rows * size)))


def for_steps(cache: Any) -> Any:
    """Return a cache without what only the next choice of entries needs; see `Slot.for_steps`."""

    def one(slot: Any) -> Any:
        return slot.for_steps() if isinstance(slot, Slot) else slot

    return jax.tree.map(one, cache, is_leaf=lambda part: isinstance(part, Slot))


def kept_shares(cache: Any) -> np.ndarray:
    """Return the fraction of the entries of each row that bodies under a policy hold, mean over
    layers and heads; float64 [row]."""
    shares = []
    for part in jax.tree.leaves(cache, is_leaf=lambda part: isinstance(part, Cache)):
        for slot in part.slots if isinstance(part, Cache) else ():
            if isinstance(slot.body, Kept):
                there = np.asarray(slot.body.shelf.there())
                written = np.asarray(slot.store.count(part.length))
                shares.append(there.sum(axis=-1).mean(axis=-1) / np.maximum(written, 1))
    return np.mean(shares, axis=0, dtype=float)


def capped_share(cache: Any) -> float | None:
    """Return the fraction of the entries that a policy would keep which it drops for lack of room,
    over all rows and layers; None for policies that do not count them."""
    lost = kept = 0
    parts = jax.tree.leaves(cache, is_leaf=lambda part: isinstance(part, Kept))
    bodies = [part for part in parts if isinstance(part, Kept) and CAPPED in part.notes]
    for body in bodies:
        lost += int(np.asarray(body.notes[CAPPED]).sum())
        kept += int(np.asarray(body.shelf.there()).sum())
    return lost / max(lost + kept, 1) if bodies else None


def one_row(cache: Any) -> Any:
    """Return the first row of a cache or of a record."""
    return jax.tree.map(lambda leaf: leaf[:1] if leaf.ndim else leaf, cache)


@jax.jit
def _graded(logits: Array, target: Any) -> tuple[Array, Array]:
    """Return -log p of each target in nats, and whether it is the likeliest.

    logits: [... vocab]
    """
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    return loss, jnp.argmax(logits, axis=-1) == target
