"""Decoding: prefill in one pass or in chunks, then a compiled loop over a cache of static shape.

The loop carries only the small tails of the cache. The large bodies are read in place, and full
tails are folded into them. Text can be shown while it is decoded. The loop is compiled in another
thread while the prompt is read, so that the first token does not wait for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mukv.cache import FULL, Calibrated, Policy
from mukv.core.compact import any_compact
from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.core.typing import Weights
from mukv.infer.functions import BLOCK, begin, decode_functions
from mukv.infer.prompts import PROMPT_MULTIPLE, joined, readings, round_up
from mukv.infer.replay import Spent, read_twice
from mukv.infer.sampling import Sampling
from mukv.model.base import LanguageModel

SHOWN_EVERY = 0.1
"""Upper bound, in seconds, of a block of steps whose tokens are shown; blocks grow up to it."""
TAIL = 64
"""Largest tail in tokens. A larger tail makes steps read more unused entries, a smaller one makes
folds more frequent.
"""


@dataclass(frozen=True)
class Generation:
    """Result of decoding.

    tokens: new tokens of each row, a stop token included
    cache_bytes: bytes of the allocated cache
    prefill_seconds: time to read the prompts and draw the first token
    tokens_per_second: over all rows, after the first token
    compile_seconds: time waited for programs to be compiled or read from disk; the other times
        exclude it
    """

    tokens: list[list[int]]
    cache_bytes: int
    prefill_seconds: float
    tokens_per_second: float
    compile_seconds: float


@dataclass(frozen=True)
class Sizes:
    """Static shapes of one generation, in rows and tokens.

    after: most tokens of a body that follow the prompt
    """

    batch: int
    prompt: int
    body: int
    tail: int
    after: int

    @classmethod
    def plan(cls, batch: int, longest_prompt: int, max_tokens: int, then: int = 0) -> Sizes:
        """Compute the smallest cache for the prompt and all new tokens but the last.

        longest_prompt: tokens of the longest prompt, with the tokens that are read after it
        then: largest number of tokens that are read after a prompt
        """
        prompt = round_up(longest_prompt, PROMPT_MULTIPLE)
        read_back = round_up(max(max_tokens - 1, 1), BLOCK)
        tails = math.ceil(read_back / TAIL)
        tail = round_up(math.ceil(read_back / tails), BLOCK)
        more = (tails - 1) * tail
        return cls(batch, prompt, prompt + more, tail, then + more)


def decoding_weights(model: LanguageModel, weights: Weights, compute: Compute | None = None) -> Any:
    """Prepare weights for decoding: scaled, in the compute dtype, one entry per layer.

    On one CPU the layers share the memory of the stacked weights.
    """
    compute = settled(compute)
    declared = model.params()

    def scaled(weights: Weights) -> Any:
        return compute.working_copy(declared, model.scaled(weights))

    if any_compact(weights):
        return model.unstack(scaled(weights))  # a program would return copies
    if all(map(_on_one_cpu, jax.tree.leaves(weights))):
        return jax.device_put(model.unstack(jax.tree.map(np.asarray, scaled(weights))))
    # One program instead of one for each layer and weight.
    return jax.jit(lambda weights: model.unstack(scaled(weights)))(weights)


def _on_one_cpu(weight: Any) -> bool:
    """Whether an array is in the memory of one CPU device; one that is traced is nowhere."""
    if isinstance(weight, Tracer):
        return False
    if not isinstance(weight, jax.Array):
        return jax.default_backend() == "cpu"
    devices = weight.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def generate(
    model: LanguageModel,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    compute: Compute | None = None,
    show: Callable[[list[list[int]]], None] | None = None,
    policy: Policy = FULL,
    centres: Calibrated | None = None,
    ended: Callable[[list[int]], bool] | None = None,
    then: Sequence[Sequence[int]] | None = None,
    prefill_chunk: int | None = None,
) -> Generation:
    """Continue each prompt by up to `max_tokens` tokens.

    weights: from `decoding_weights`
    stop: ids that end a row
    show: called with the new tokens of every row as they are decoded
    policy, centres: cache policy, and its calibrated centres if it needs them
    ended: whether a row is complete; called with all new tokens of the row after each block
    then: tokens that follow each prompt, at least one; they are read after the policy has chosen
        from the prompt
    prefill_chunk: tokens of a prompt that are read at once; the policy chooses entries after each
        chunk, so that the memory of reading does not grow with the prompt. None reads it whole.

    Raises BadInput for empty or too long prompts, for ids outside of the vocabulary, and for a
    policy that does not fit the model.
    """
    whole = joined(prompts, then)
    check(model, whole, max_tokens)
    sampling = sampling or Sampling()
    compute = settled(compute)
    behind = max(map(len, then)) if then else 0
    sizes = Sizes.plan(len(prompts), max(map(len, whole)), max_tokens, behind)
    # The seed is an argument of the compiled functions: another seed needs no compilation.
    functions = decode_functions(model, replace(sampling, seed=0), compute)

    key = jax.random.key(sampling.seed)
    room = sizes.batch, sizes.body, sizes.tail
    number, one = jnp.ones((), jnp.int32), np.int32(1)
    reads = readings(functions.prefill, functions.extend, prompts, then, prefill_chunk)
    token, first = jnp.zeros(sizes.batch, jnp.int32), Spent()
    if policy.keep.replays:
        token, cache, first = read_twice(
            model, weights, prompts, reads, policy, room, sizes.after, compute, key
        )
        reads = [each for each in reads if not each.chooses]
    else:
        cache = model.empty_cache(*room, compute.type, policy, centres, sizes.after)
    cache_bytes = cache.nbytes()

    start = time.perf_counter()
    programs = begin(functions, weights, reads, cache, token, key, max_tokens - 1, sizes.tail)
    compiled = [each.result() for each in programs]
    compile_seconds = first.compiling + time.perf_counter() - start

    start = time.perf_counter()
    for program, each in zip(compiled, reads, strict=True):
        last, cache = program(weights, *each.inputs(cache, key))
        token = each.token(last, token)
    rows = _Rows(stop, max_tokens, show, ended)
    rows.add(np.asarray(token)[:, None])
    prefill_seconds = first.reading + time.perf_counter() - start
    if rows.done:
        return Generation(rows.tokens, cache_bytes, prefill_seconds, 0.0, compile_seconds)

    start = time.perf_counter()
    frozen, live = cache.split()
    block = functions.block.compiled(weights, frozen, live, token, number, key, one)
    compile_seconds += time.perf_counter() - start
    start = time.perf_counter()
    done, steps = 0, 1 if show else BLOCK
    while not rows.done:
        if done and done % sizes.tail == 0:
            cache = model.cache_class.join(frozen, live)
            frozen, live = functions.fold.compiled(weights, cache)(weights, cache).split()
        now = min(steps, sizes.tail - done % sizes.tail)
        begun = time.perf_counter()
        new, live, token, number = block(weights, frozen, live, token, number, key, np.int32(now))
        rows.add(np.asarray(new)[:, :now])
        done += now
        if time.perf_counter() - begun < SHOWN_EVERY / 2:
            steps = min(2 * steps, BLOCK)
    speed = done * len(prompts) / (time.perf_counter() - start)
    return Generation(rows.tokens, cache_bytes, prefill_seconds, speed, compile_seconds)


class _Rows:
    """Collects the new tokens of each row, up to a stop token or the limit."""

    def __init__(
        self,
        stop: Collection[int],
        limit: int,
        show: Callable[[list[list[int]]], None] | None,
        over: Callable[[list[int]], bool] | None = None,
    ):
        self.stop, self.limit, self.show, self.over = frozenset(stop), limit, show, over
        self.tokens: list[list[int]] = []
        self.ended: list[bool] = []

    @property
    def done(self) -> bool:
        return all(self.ended)

    def add(self, new: np.ndarray) -> None:
        """Append new tokens, int [batch token]."""
        if not self.tokens:
            self.tokens = [[] for _ in new]
            self.ended = [False] * len(new)
        fresh: list[list[int]] = [[] for _ in new]
        for row, ids in enumerate(new.tolist()):
            for token in ids:
                if self.ended[row]:
                    break
                fresh[row].append(token)
                length = len(self.tokens[row]) + len(fresh[row])
                self.ended[row] = token in self.stop or length == self.limit
            self.tokens[row] += fresh[row]
            if self.over and fresh[row] and not self.ended[row]:
                self.ended[row] = self.over(self.tokens[row])
        if self.show:
            self.show(fresh)


def check(model: LanguageModel, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """Raise BadInput for prompts that the model can't continue by this many tokens."""
    if not 1 <= max_tokens < 1 << 31:
        raise BadInput("max_tokens", max_tokens, "at least 1, and positions have 32 bits")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise BadInput("prompt", "", "at least one token")
    for prompt in prompts:
        worst = max(prompt, key=lambda token: abs(2 * token - model.vocab_size))
        if not 0 <= worst < model.vocab_size:
            raise BadInput("prompt", worst, f"token ids go from 0 to {model.vocab_size - 1}")
    longest = max(map(len, prompts))
    if model.context is not None and longest + max_tokens > model.context:
        raise BadInput(
            "max_tokens",
            max_tokens,
            f"the model's context is {model.context} tokens and the prompt has {longest}: "
            f"at most {max(model.context - longest, 0)}",
        )
