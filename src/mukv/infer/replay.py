"""Read prompts twice, and keep the entries that the model reads while it repeats them (KVzip).

First the whole prompts are read with a full cache. Then their chunks are read again after it, each
behind an instruction to repeat it, and every pass scores the entries of one chunk. The entries that
the policy keeps by these scores are copied to a smaller cache, and the full one is freed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.cache import Policy
from mukv.cache.layers import best_of_layers
from mukv.cache.replay import TWICE, KVzip
from mukv.cache.seen import Score
from mukv.cache.threshold import Threshold
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.programs import Programs
from mukv.core.typing import Array
from mukv.infer.prompts import PROMPT_MULTIPLE, Reading, round_up
from mukv.model import Decoder
from mukv.model.base import LanguageModel
from mukv.model.cache_update import compressed
from mukv.model.empty_cache import empty_cache
from mukv.model.policy_check import check_policy
from mukv.model.replayed import replaying, scores

ASKS = (
    "\n\nRepeat the previous context exactly.",
    "\n\nRepeat the part of the previous context exactly, starting with",
    "\n",
)
"""Instructions of the first and of further chunks, and what follows them (Kim et al. 2025)."""
LAST = 8
"""Tokens of the chunk before that the instruction names."""


def asking(policy: Policy, encode: Callable[[str], np.ndarray]) -> Policy:
    """Return the policy with the instructions that it needs, as token ids. encode: function from
    a text to token ids."""
    if not isinstance(policy.keep, KVzip):
        return policy
    asks = tuple(tuple(encode(text).tolist()) for text in ASKS)
    return replace(policy, keep=replace(policy.keep, asks=asks))


@dataclass(frozen=True)
class Spent:
    """Seconds of compiling and of reading."""

    compiling: float = 0.0
    reading: float = 0.0


@lru_cache(maxsize=8)
def _replay(model: Decoder, compute: Compute, chunk: int, sinks: int, plus: bool) -> Programs:
    """Return the function that reads tokens behind a cache and scores entries by them: (weights,
    cache, tokens, count, index of the first entry) to the scores of each layer."""

    def replay(weights: Any, cache: Any, tokens: Array, count: Array, start: Array) -> Any:
        told = replaying(model.stack, cache, start, chunk, sinks, plus)
        _, after = model.prefill(weights, told, tokens, count, fresh=False, compute=compute)
        return scores(after)

    return Programs(replay)


def read_twice(
    model: LanguageModel,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    reads: Sequence[Reading],
    policy: Policy,
    room: tuple[int, int, int],
    after: int,
    compute: Compute,
    key: Array,
) -> tuple[Array, Any, Spent]:
    """Return the next token of each prompt, and a cache with what the policy keeps of the prompts.

    reads: how they are read, and what follows them, which is left out here. room: rows of the
    cache, tokens of its bodies and of its tails. after: most tokens of a row that follow its prompt

    Raises BadInput for a model of several stacks, and for prompts that leave no room in the model's
    context for a repetition.
    """
    require_replay(model, policy, max(map(len, prompts)))
    whole = model.empty_cache(*room, compute.type)
    began, compiling = time.perf_counter(), 0.0
    token = jnp.zeros(len(prompts), jnp.int32)
    for each in reads:
        if each.chooses:
            start = time.perf_counter()
            program = each.begin(weights, whole, key).result()
            compiling += time.perf_counter() - start
            last, whole = program(weights, *each.inputs(whole, key))
            token = each.token(last, token)
    cache, replaying = kept_by_replay(model, weights, whole, prompts, policy, room, after, compute)
    jax.block_until_ready(cache)
    compiling += replaying
    return token, cache, Spent(compiling, time.perf_counter() - began - compiling)


def require_replay(model: LanguageModel, policy: Policy, longest: int) -> None:
    """Raise BadInput for a model that can't read a prompt twice, and for a prompt of `longest`
    tokens that leaves no room in the model's context for a repetition."""
    assert isinstance(policy.keep, KVzip)
    if not isinstance(model, Decoder):
        raise BadInput("policy", policy.name, TWICE)
    check_policy(model.stack, policy)
    _require_context(model, policy.keep, longest)


def _require_context(model: Decoder, keep: KVzip, longest: int) -> int:
    """Return the number of tokens that are repeated at once of a prompt of `longest` tokens. Raises
    BadInput if the model's context has no room for them."""
    chunk = min(keep.chunk, round_up(longest, PROMPT_MULTIPLE))
    width = max(tokens.shape[1] for tokens, _ in _pieces([range(longest)], chunk, keep.asks))
    if model.context is not None and longest + width > model.context:
        allowed = f"the model's context is {model.context} tokens, of which the prompt takes "
        allowed += f"{longest} and its repetition {width}; kvzip(chunk=N) repeats fewer at once"
        raise BadInput("policy", "kvzip", allowed)
    return chunk


def kept_by_replay(
    model: LanguageModel,
    weights: Any,
    whole: Any,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    room: tuple[int, int, int],
    after: int,
    compute: Compute,
) -> tuple[Any, float]:
    """Read prompts again; return a cache of the entries that the policy keeps of them, and the
    seconds of compiling.

    whole: full cache of the prompts, of the size `room`; it is donated. Other arguments as in
    `read_twice`. Call `require_replay` first.
    """
    assert isinstance(policy.keep, KVzip)
    assert isinstance(model, Decoder)
    layers, compiling = replayed(model, weights, whole, prompts, policy.keep, compute)
    return kept_by_scores(model, weights, whole, layers, policy, room, after, compute), compiling


def replayed(
    model: Decoder,
    weights: Any,
    whole: Any,
    prompts: Sequence[Sequence[int]],
    keep: KVzip,
    compute: Compute,
) -> tuple[list[Score], float]:
    """Return the score of each entry of each body without a window, in order, from the repetition
    of the prompts; also the seconds of compiling.

    weights: from `decoding_weights`. whole: a full cache of the prompts

    Raises BadInput for prompts that leave no room in the model's context for a repetition.
    """
    chunk, compiling = _require_context(model, keep, max(map(len, prompts))), 0.0
    pieces = _pieces(prompts, chunk, keep.asks)
    replay, found = _replay(model, compute, chunk, keep.sinks, keep.plus), []
    for number, (tokens, count) in enumerate(pieces):
        given = whole, tokens, count, np.int32(number * chunk)
        start = time.perf_counter()
        program = replay.compiled(weights, *given)
        compiling += time.perf_counter() - start
        found.append(program(weights, *given))
    return [jnp.concatenate(each, axis=2) for each in zip(*found, strict=True)], compiling


def kept_by_scores(
    model: Decoder,
    weights: Any,
    whole: Any,
    layers: Sequence[Score],
    policy: Policy,
    room: tuple[int, int, int],
    after: int,
    compute: Compute,
) -> Any:
    """Return a cache of the entries that the policy keeps.

    layers: scores from `replayed` for a policy with the same `scoring`. Other arguments as in
        `kept_by_replay`
    """
    keep, size = policy.keep, room[1]
    assert isinstance(keep, KVzip)
    layers = [jnp.pad(each, [(0, 0), (0, 0), (0, size)])[:, :, :size] for each in layers]
    counts = None
    if keep.spread.over_layers:
        stores = sum(each.shape[1] for each in layers)
        number = np.array([keep.budget.total(int(n), stores) for n in whole.length], np.int32)
        place = jnp.arange(size)[None, None]
        for step in keep.refine:
            assert isinstance(step, Threshold)
            layers = [step.cut(each, place, whole.length) for each in layers]
        choose = jax.jit(best_of_layers, static_argnums=(3, 4))
        layers, kept = choose(layers, whole.length, number, keep.sinks, keep.recent)
        counts = np.asarray(kept).max(axis=1).tolist()
    sizes = *room, compute.type
    empty = empty_cache(model.stack, *sizes, policy, after=after, kept=counts)
    reduce = jax.jit(
        lambda weights, *caches: compressed(model.stack.bags, weights["layers"], *caches),
        donate_argnums=2,
    )
    return reduce(weights, whole, empty, layers)


def _pieces(
    prompts: Sequence[Sequence[int]], chunk: int, asks: Sequence[Sequence[int]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the tokens of each repetition, padded to one shape, and how many of them each row has:
    none where a prompt has no tokens in that chunk."""
    first, further, behind = asks or ((), (), ())
    starts = range(0, max(map(len, prompts)), chunk)

    def row(prompt: Sequence[int], at: int) -> list[int]:
        if at >= len(prompt):
            return []
        asked = [*further, *prompt[at - LAST : at]] if at else first
        return [*asked, *behind, *prompt[at : at + chunk]]

    rows = [[row(prompt, at) for prompt in prompts] for at in starts]
    width = round_up(max(len(each) for piece in rows for each in piece), PROMPT_MULTIPLE)
    found = []
    for piece in rows:
        tokens = np.zeros((len(piece), width), np.int32)
        for place, each in zip(tokens, piece, strict=True):
            place[: len(each)] = each
        found.append((tokens, np.array([*map(len, piece)], np.int32)))
    return found
