"""A conversation in token ids with one cache: each turn reads only the tokens added since the last.

The capacity of the cache is fixed. Tokens are decoded one by one and none is read ahead, so that
the cache holds exactly the tokens of the conversation. This also holds for recurrent layers, whose
states can't be reverted.
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
from mukv.cache.replay import TWICE
from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.infer.decode import TAIL
from mukv.infer.functions import decode_functions
from mukv.infer.sampling import Sampling
from mukv.model.base import LanguageModel

SHORTEST = 16
"""Smallest length of a prefill in tokens; longer ones are padded to a power of two."""
LONGEST = 512
"""Maximum number of new tokens in one prefill after tokens in the cache, which bounds the array of
logits [new tokens, tokens in the cache and new tokens]."""


def check_policy(policy: Policy) -> None:
    """Raise BadInput for a policy that needs the end of the prompt; the messages and answers of a
    conversation alternate."""
    if policy.keep.replays:
        raise BadInput("policy", policy.name, TWICE)
    if policy.keep.when.holds:
        allowed = "a policy without +hold in a conversation, whose prompt does not end"
        raise BadInput("policy", policy.name, allowed)


@dataclass(frozen=True)
class Answer:
    """One turn of a model.

    tokens: new tokens, a stop token included
    read: number of tokens that were prefilled in this turn
    kept: number of tokens that were in the cache from earlier turns
    cache_bytes: bytes of the allocated cache
    prefill_seconds: time until the first token, without compile_seconds
    compile_seconds: time to compile programs, or to read them from disk
    tokens_per_second: decoding speed after the first token
    """

    tokens: list[int]
    read: int
    kept: int
    cache_bytes: int
    prefill_seconds: float
    compile_seconds: float
    tokens_per_second: float


class Conversation:
    """The token ids of a conversation, which grow turn by turn, and their cache."""

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
        """Allocate the cache.

        weights: weights from `decoding_weights`
        length: maximum number of tokens of the conversation
        policy, centres: cache policy, and its calibrated centres if it needs them

        Raises BadInput for a policy that does not fit the model or a conversation.
        """
        check_policy(policy)
        self.model, self.weights, self.length = model, weights, length
        self.sampling = sampling or Sampling()
        self.compute = settled(compute)
        self.policy, self.centres = policy, centres
        self.functions = decode_functions(model, replace(self.sampling, seed=0), self.compute)
        self.turns = 0
        self.ids: list[int] = []
        """Tokens in the cache, in order."""
        self.filled = 0
        """Number of these tokens that are in the tail."""
        self.cache = self._empty()
        self.cache_bytes = self.cache.nbytes()

    def reset(self) -> None:
        """Empty the cache."""
        self.ids, self.filled, self.cache = [], 0, self._empty()

    def _empty(self) -> Any:
        room = 1, self.length, min(TAIL, self.length)
        return self.model.empty_cache(*room, self.compute.type, self.policy, self.centres)

    def continues(self, ids: Sequence[int]) -> bool:
        """Return whether `ids` are the tokens in the cache, followed by more."""
        return len(ids) > len(self.ids) and list(ids[: len(self.ids)]) == self.ids

    def answer(
        self,
        ids: Sequence[int],
        max_tokens: int,
        stop: Collection[int] = (),
        show: Callable[[int], None] | None = None,
        ended: Callable[[list[int]], bool] | None = None,
    ) -> Answer:
        """Continue a conversation by up to `max_tokens` tokens, or until the cache is full.

        ids: all tokens of the conversation; if they continue the tokens in the cache, only the
            others are read, otherwise the cache is emptied first
        stop: ids that end the answer
        show: called with each new token
        ended: whether the answer is complete; called with all its tokens after each token

        Raises BadInput for no tokens, ids outside of the vocabulary, and a conversation that does
        not fit into the cache.
        """
        self._check(ids, max_tokens)
        if self.ids and not self.continues(ids):
            self.reset()
        kept, new = len(self.ids), list(ids[len(self.ids) :])
        try:
            found = self._answer(new, min(max_tokens, self.length - len(ids)), stop, show, ended)
        except BaseException:
            # The content of the cache is unknown, or was donated to a program that did not return.
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
        # Each turn has its own seed, so that equal messages may have different answers.
        key = jax.random.fold_in(jax.random.key(self.sampling.seed), self.turns)
        number, one = jnp.ones((), jnp.int32), np.int32(1)
        pieces = (
            [new] if not self.ids else [new[i : i + LONGEST] for i in range(0, len(new), LONGEST)]
        )
        inputs = [(*self._padded(piece), key) for piece in pieces]
        read = functions.extend if self.ids else functions.prefill

        start = time.perf_counter()
        pending = [read.begin(weights, self.cache, *each) for each in inputs]
        token, after = pending[-1].outputs()
        # Compiled in other threads while the message is read.
        functions.block.begin(weights, *after.split(), token, number, key, one)
        functions.fold.begin(weights, after)
        programs = [each.result() for each in pending]
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
        start = time.perf_counter()
        block = functions.block.compiled(weights, frozen, live, token, number, key, one)
        compile_seconds += time.perf_counter() - start
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
        """Return the tokens as one padded row, int32 [1 token], and their number [1]."""
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
