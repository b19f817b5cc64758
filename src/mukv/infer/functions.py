"""The compiled functions that decode with a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.compute import Compute
from mukv.core.programs import (
    Compilation,
    Programs,
    Subprogram,
    Subprograms,
    SubprogramsCompilation,
)
from mukv.core.typing import Array
from mukv.infer.prompts import Reading
from mukv.infer.sampling import Sampling
from mukv.model import Decoder
from mukv.model.base import LanguageModel

BLOCK = 16
"""Largest number of decode steps per call of the compiled loop; stop tokens are checked in
between.
"""


class DecodeFunctions(NamedTuple):
    """Compiled functions of a model, one program per shape.

    prefill, extend: (weights, cache, tokens, count, key) to (token, cache), for an empty cache and
        for a cache with tokens in it
    block: (weights, frozen, live, token, number, key, steps) to (tokens, live, token, number), for
        at most BLOCK steps; `steps` is traced, so that one program serves every number
    fold: (weights, cache) to cache
    """

    prefill: Programs | Subprograms
    extend: Programs | Subprograms
    block: Programs
    fold: Programs


@lru_cache(maxsize=32)
def decode_functions(model: LanguageModel, sampling: Sampling, compute: Compute) -> DecodeFunctions:
    """Return the functions that decode with a model. The seed of `sampling` is not used."""

    def rows(key: Array, number: Array, batch: int) -> Array:
        step = jax.random.fold_in(key, number)
        return jax.vmap(partial(jax.random.fold_in, step))(jnp.arange(batch))

    def prefill(
        fresh: bool, weights: Any, cache: Any, tokens: Array, count: Array, key: Array
    ) -> tuple[Array, Any]:
        logits, cache = read(weights, cache, tokens, count, fresh, compute)
        return first(logits, key), cache

    @Subprogram
    def first(logits: Array, key: Array) -> Array:
        return sampling.draw(logits, rows(key, jnp.zeros((), jnp.int32), len(logits)))

    def block(
        weights: Any, frozen: Any, live: Any, token: Array, number: Array, key: Array, steps: Array
    ) -> tuple[Array, Any, Array, Array]:
        def step(place: Array, carry: Any) -> Any:
            live, token, number, tokens = carry
            cache = model.cache_class.join(frozen, live)
            logits, cache = model.step(weights, cache, token, compute=compute)
            token = sampling.draw(logits, rows(key, number, len(token)))
            return cache.split()[1], token, number + 1, tokens.at[place].set(token)

        tokens = jnp.zeros((BLOCK, len(token)), jnp.int32)
        carry = live, token, number, tokens
        live, token, number, tokens = jax.lax.fori_loop(0, steps, step, carry)
        return tokens.T, live, token, number

    read: Callable[..., Any] = model.prefill
    made: Callable[..., Programs | Subprograms] = partial(Programs, donate_argnums=1)
    if isinstance(model, Decoder) and model.layer_inputs is None and compute.platform == "cpu":
        # A program of 30 layers takes half a second to read from the cache of compiled programs,
        # and on a CPU it is no faster.
        read, made = partial(model.prefill, owned=True), partial(Subprograms, donate_argnums=1)
    return DecodeFunctions(
        made(partial(prefill, True)),
        made(partial(prefill, False)),
        Programs(block, donate_argnums=2),
        Programs(model.fold, donate_argnums=1),
    )


def begin(
    functions: DecodeFunctions,
    weights: Any,
    reads: Sequence[Reading],
    cache: Any,
    token: Array,
    key: Array,
    steps: int,
    tail: int,
) -> list[Compilation | SubprogramsCompilation]:
    """Begin to compile the programs of a generation; return those of `reads`.

    reads: the prefill calls, in order
    steps: number of decode steps; tail: number of tokens between two folds
    """
    programs: list[Compilation | SubprogramsCompilation] = []
    after, drawn = cache, token
    for each in reads:
        programs.append(each.begin(weights, after, key))
        drawn, after = programs[-1].outputs()
    # Compiled in other threads while the prompt is read.
    if steps > 0:
        number, one = jnp.ones((), jnp.int32), np.int32(1)
        functions.block.begin(weights, *after.split(), drawn, number, key, one)
        if steps > tail:
            functions.fold.begin(weights, after)
    return programs
