"""Cross-entropy of the next token, with only a chunk of the logits in memory at once."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mukv.core.compute import Compute, settled
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.model.base import LanguageModel


def token_losses(
    model: LanguageModel, weights: Weights, hidden: Residual, targets: Tokens, compute: Compute
) -> Float[Array, "batch token"]:
    """-log p(target) in nats, float32."""
    logits = model.logits(weights, hidden, compute)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


class Losses(NamedTuple):
    """Of a batch. objective: what training minimises. cross_entropy: nats, weighted and summed.
    counts: numbers to be reported, summed."""

    objective: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    counts: dict[str, Float[Array, ""]]


def summed_loss(
    model: LanguageModel,
    weights: Weights,
    tokens: Tokens,
    targets: Tokens,
    weight: Float[Array, "batch token"],
    position: Int[Array, "batch token"] | None = None,
    segment: Int[Array, "batch token"] | None = None,
    compute: Compute | None = None,
) -> Losses:
    """Weighted sums of token losses over the batch, in nats.

    The logits of a chunk of tokens are made, used and dropped, and made again for the backward
    pass, so that batch x token x vocab numbers never exist together.
    """
    compute = settled(compute, model.vocab_size)
    result = model.forward(weights, tokens, position, segment, compute)
    hidden, chunk = result.hidden, compute.loss_chunk or tokens.shape[1]

    def part(hidden: Array, targets: Array, weight: Array) -> Float[Array, ""]:
        return jnp.sum(token_losses(model, weights, hidden, targets, compute) * weight)

    def more(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + jax.checkpoint(part)(*piece), None

    if hidden.shape[1] <= chunk:
        total = part(hidden, targets, weight)
    else:
        pieces = jax.tree.map(partial(_chunks, chunk=chunk), (hidden, targets, weight))
        total, _ = jax.lax.scan(more, jnp.zeros((), jnp.float32), pieces)
    objective = total
    if result.penalty is not None:
        # By row, so that it is the same however a batch is split.
        objective += jnp.sum(result.penalty * jnp.sum(weight, axis=1))
    return Losses(objective, total, {name: jnp.sum(n) for name, n in result.counts.items()})


def _chunks(array: Array, chunk: int) -> Array:
    """[chunk batch token ...] of an array [batch token ...], padded with zeros. The chunks are as
    few as can be, and of equal size."""
    batch, length, *rest = array.shape
    number = -(-length // chunk)
    size = -(-length // number)
    if number * size > length:
        array = jnp.pad(array, [(0, 0), (0, number * size - length), *((0, 0) for _ in rest)])
    return array.reshape(batch, number, size, *rest).swapaxes(0, 1)
