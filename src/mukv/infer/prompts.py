"""Prepare prompts for prefill: pad them, cut them into chunks, and append further tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from mukv.cache import choosing
from mukv.core.errors import BadInput
from mukv.core.programs import Compilation, Programs, Subprograms, SubprogramsCompilation
from mukv.core.typing import Array

PROMPT_MULTIPLE = 64
"""Prompts are padded to a multiple of this many tokens, so that few lengths are compiled."""
SHORT = (16, 32)
"""Lengths that shorter prompts are padded to."""


@dataclass(frozen=True)
class Reading:
    """Tokens of one prefill call, and the function that prefills them.

    function: the compiled function
    tokens: ids, padded, int32 [batch token]
    count: number of tokens of each row [batch]
    chooses: whether a policy with `hold`, which keeps all entries after the prompt, may choose
        among these tokens
    """

    function: Programs | Subprograms
    tokens: np.ndarray
    count: np.ndarray
    chooses: bool

    def inputs(self, cache: Any, key: Array) -> tuple[Any, ...]:
        """Return the function's arguments after the weights."""
        cache = choosing(cache, True) if self.chooses else cache
        return cache, self.tokens, self.count, key

    def token(self, new: Array, before: Array) -> Array:
        """Return the next token of each row: the new one, or that of the chunk before for a short
        row, which has no token in this chunk."""
        return new if self.count.all() else jnp.where(self.count > 0, new, before)

    def begin(self, weights: Any, cache: Any, key: Array) -> Compilation | SubprogramsCompilation:
        """Begin to compile the function for a cache, whose arrays may be abstract."""
        return self.function.begin(weights, *self.inputs(cache, key))


def readings(
    first: Programs | Subprograms,
    further: Programs | Subprograms,
    prompts: Sequence[Sequence[int]],
    then: Sequence[Sequence[int]] | None,
    chunk: int | None,
) -> list[Reading]:
    """Return the prefill calls in order: the prompts in chunks, then the tokens that follow them.

    first: function that prefills an empty cache
    further: function that appends to a cache with tokens
    prompts: token ids of each row
    then: token ids that follow each prompt; None if nothing follows
    chunk: number of tokens of a prompt that are prefilled at once; None for all

    Raises BadInput for a chunk of less than one token.
    """
    if chunk is not None and not 1 <= chunk < 1 << 31:
        raise BadInput("prefill_chunk", chunk, "at least 1 token")
    start, *rest = _chunks(*_padded(prompts), chunk)
    found = [Reading(first, *start, chooses=True)]
    found += [Reading(further, *each, chooses=True) for each in rest]
    if then is not None:
        found.append(Reading(further, *_padded(then), chooses=False))
    return found


def joined(
    prompts: Sequence[Sequence[int]], then: Sequence[Sequence[int]] | None
) -> Sequence[Sequence[int]]:
    """Return each prompt with the tokens that follow it. Raises BadInput if a prompt or its
    continuation is empty."""
    if then is None:
        return prompts
    if len(prompts) != len(then) or not all(map(len, (*prompts, *then))):
        raise BadInput("then", f"{len(then)} rows", "as many rows as prompts, none of them empty")
    return [[*first, *second] for first, second in zip(prompts, then, strict=True)]


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids padded to few lengths, int32 [batch token], and the number of tokens of each
    row."""
    longest = padded_length(max(map(len, prompts)))
    padded = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, np.array([len(prompt) for prompt in prompts], np.int32)


def _chunks(
    tokens: np.ndarray, count: np.ndarray, size: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut padded rows into chunks of `size` tokens, of which the last is padded to `size`; None for
    one chunk.

    Returns ids [batch token] and the number of tokens of each row [batch], for each chunk.
    """
    length = int(tokens.shape[1])
    size = length if size is None else min(size, length)
    tokens = np.pad(tokens, [(0, 0), (0, -length % size)])
    starts = range(0, count.max(), size)
    return [(tokens[:, at : at + size], np.clip(count - at, 0, size)) for at in starts]


def padded_length(tokens: int) -> int:
    """Return the length that a prompt of this many tokens is padded to."""
    if tokens > SHORT[-1]:
        return round_up(tokens, PROMPT_MULTIPLE)
    return next(length for length in SHORT if tokens <= length)


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple that is at least `number`."""
    return -(-number // multiple) * multiple
