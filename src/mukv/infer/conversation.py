"""A conversation in token ids over one cache: each turn reads only what is new since the last one.

The cache has a fixed room. Steps are taken one by one, so that what is in the cache is exactly what
was read: a model whose state can't go back needs nothing special.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.cache import FULL, Calibrated, Policy
from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.core.programs import outputs
from mukv.infer.decode import TAIL, Sampling, decode_functions
from mukv.model.base import LanguageModel

SHORTEST = 16
"""Fewest tokens that a prefill is compiled for; others are padded to a power of two."""
LONGEST = 512
"""Most new tokens that are read at once behind others: scores are [query, cache and new tokens]."""


@dataclass(frozen=True)
class Answer:
    """One turn of a model.

    tokens: new ones, a stop token included. read: tokens that were prefilled; kept: tokens that
    the cache had from earlier turns. cache_bytes: as allocated. prefill_seconds: until the first
    token, without compile_seconds. tokens_per_second: after the first token.
    """

    tokens: list[int]
    read: int
    kept: int
    cache_bytes: int
    prefill_seconds: float
    compile_seconds: float
    tokens_per_second: float


class Conversation:
    """Token ids that grow turn by turn, and the cache of those that were read."""

    def __init__(
        self,
        model: LanguageModel,
        weights: Any,
        length: int,
        sampling: Sampling | None = None,
        compute: Compute | None = None,
        policy: Policy = FULL,
        centres: Calibrated | None = None,
    ):
        """weights: from `decoding_weights`. length: tokens that the conversation may have in all.
        policy, centres: of the cache. Raises BadInput for a policy that does not fit the model."""
        self.model, self.weights, self.length = model, weights, length
        self.sampling = sampling or Sampling()
        self.compute = settled(compute)
        self.policy, self.centres = policy, centres
        self.functions = decode_functions(model, replace(self.sampling, seed=0), self.compute)
        self.turns = 0
        self.ids: list[int] = []
        """Tokens in the cache, in order."""
        self.filled = 0
        """Those of them in the tail."""
        self.cache = self._empty()
        self.cache_bytes = self.cache.nbytes()

    def reset(self) -> None:
        """Empty the cache."""
        self.ids, self.filled, self.cache = [], 0, self._empty()

    def _empty(self) -> Any:
        room = 1, self.length, min(TAIL, self.length)
        return self.model.empty_cache(*room, self.compute.type, self.policy, self.centres)

    def continues(self, ids: Sequence[int]) -> bool:
        """Whether these begin with all that is in the cache, and go on."""
        return len(ids) > len(self.ids) and list(ids[: len(self.ids)]) == self.ids

    def answer(
        self,
        ids: Sequence[int],
        max_tokens: int,
        stop: Collection[int] = (),
        show: Callable[[int], None] | None = None,
        ended: Callable[[list[int]], bool] | None = None,
    ) -> Answer:
        """Continue a conversation by up to `max_tokens` tokens, as many as there is room for.

        ids: all of its tokens. Those in the cache are not read again if `ids` continue them;
        otherwise the cache begins anew. stop: ids that end the answer. show: called with each new
        token. ended: whether the answer is complete, called with all its tokens after each one.
        Raises BadInput for no tokens, ids that the model lacks, and more than there is room for.
        """
        self._check(ids, max_tokens)
        if self.ids and not self.continues(ids):
            self.reset()
        kept, new = len(self.ids), list(ids[len(self.ids) :])
        try:
            found = self._answer(new, min(max_tokens, self.length - len(ids)), stop, show, ended)
        except BaseException:
            # What the cache holds now is unknown, or was given to a program that has not returned.
            self.reset()
            raise
        self.turns += 1
        return replace(found, kept=kept)

    def _answer(
        self,
        new: list[int],
        most: int,
        stop: Collection[int],
        show: Callable[[int], None] | None,
        ended: Callable[[list[int]], bool] | None,
    ) -> Answer:
        model, weights, functions = self.model, self.weights, self.functions
        # Another seed for each turn: the same message need not have the same answer.
        key = jax.random.fold_in(jax.random.key(self.sampling.seed), self.turns)
        number, one = jnp.ones((), jnp.int32), np.int32(1)
        pieces = (
            [new] if not self.ids else [new[i : i + LONGEST] for i in range(0, len(new), LONGEST)]
        )
        inputs = [(*self._padded(piece), key) for piece in pieces]
        read = functions.extend if self.ids else functions.prefill

        start = time.perf_counter()
        programs = [read.compiled(weights, self.cache, *each) for each in inputs]
        token, after = outputs(programs[-1])
        functions.block.compiled(weights, *after.split(), token, number, key, one)
        functions.fold.compiled(weights, after)
        compile_seconds = time.perf_counter() - start

        start = time.perf_counter()
        cache = self.cache
        if self.filled:
            cache = functions.fold.compiled(weights, cache)(weights, cache)
        for program, each in zip(programs, inputs, strict=True):
            token, cache = program(weights, cache, *each)
        tokens = [int(token[0])]
        prefill_seconds = time.perf_counter() - start
        self.ids += new
        frozen, live = cache.split()
        block = functions.block.compiled(weights, frozen, live, token, number, key, one)
        filled, tail = 0, min(TAIL, self.length)
        start = time.perf_counter()
        while True:
            if show:
                show(tokens[-1])
            over = tokens[-1] in stop or len(tokens) >= most
            if over or (ended is not None and ended(tokens)):
                break
            if filled == tail:
                cache = model.cache_class.join(frozen, live)
                cache = functions.fold.compiled(weights, cache)(weights, cache)
                (frozen, live), filled = cache.split(), 0
            made, live, token, number = block(weights, frozen, live, token, number, key, one)
            self.ids.append(tokens[-1])
            tokens.append(int(made[0, 0]))
            filled += 1
        seconds = time.perf_counter() - start
        self.cache, self.filled = model.cache_class.join(frozen, live), filled
        speed = (len(tokens) - 1) / seconds if len(tokens) > 1 else 0.0
        times = prefill_seconds, compile_seconds, speed
        return Answer(tokens, len(new), 0, self.cache_bytes, *times)

    def _padded(self, tokens: list[int]) -> tuple[np.ndarray, jax.Array]:
        """A prompt of one row as a program takes it, and its number of tokens."""
        size = max(SHORTEST, 1 << (len(tokens) - 1).bit_length())
        padded = np.zeros((1, min(size, self.length)), np.int32)
        padded[0, : len(tokens)] = tokens
        return padded, jnp.asarray([len(tokens)], jnp.int32)

    def _check(self, ids: Sequence[int], max_tokens: int) -> None:
        if not ids:
            raise BadInput("ids", "[]", "at least one token")
        if max_tokens < 1:
            raise BadInput("max_tokens", max_tokens, "at least 1")
        if len(ids) >= self.length:
            allowed = f"fewer than the {self.length:,} that the cache has room for (`length`)"
            raise BadInput("conversation", f"{len(ids):,} tokens", allowed)
        beyond = next((token for token in ids if not 0 <= token < self.model.vocab_size), None)
        if beyond is not None:
            allowed = f"token ids go from 0 to {self.model.vocab_size - 1}"
            raise BadInput("ids", beyond, allowed)
