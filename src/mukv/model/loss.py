"""Cross-entropy of the next token, with the logits of only one chunk in memory at a time."""

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
    """Return -log p(target) of each token, in nats; float32."""
    logits = model.logits(weights, hidden, compute)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


class Losses(NamedTuple):
    """Sums over a batch.

    objective: what training minimises, in nats: cross-entropy plus penalty
    cross_entropy: weighted cross-entropy, in nats
    counts: numbers to log, by name
    """

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
    """Sum the weighted token losses over the batch, in nats.

    targets: next token of each token
    weight: weight of each token's loss
    position, segment: as in `LanguageModel.forward`

    The logits are computed for one chunk of tokens at a time, and recomputed in the backward pass,
    so that no array has batch x token x vocab elements.
    """
    compute = settled(compute, model.vocab_size)
    result = model.forward(weights, tokens, position, segment, compute)
    hidden, chunk = result.hidden, compute.loss_chunk or tokens.shape[1]

    def chunk_loss(hidden: Array, targets: Array, weight: Array) -> Float[Array, ""]:
        return jnp.sum(token_losses(model, weights, hidden, targets, compute) * weight)

    def accumulate(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + jax.checkpoint(chunk_loss)(*piece), None

    if hidden.shape[1] <= chunk:
        total = chunk_loss(hidden, targets, weight)
    else:
        pieces = jax.tree.map(partial(_chunks, chunk=chunk), (hidden, targets, weight))
        total, _ = jax.lax.scan(accumulate, jnp.zeros((), jnp.float32), pieces)
    objective = total
    if result.penalty is not None:
        # Weighted row by row, so that it does not depend on how a batch is split.
        objective += jnp.sum(result.penalty * jnp.sum(weight, axis=1))
    return Losses(objective, total, {name: jnp.sum(n) for name, n in result.counts.items()})


def _chunks(array: Array, chunk: int) -> Array:
    """Split [batch token ...] to [chunk batch token ...], padded with zeros.

    It makes as few chunks as possible, of equal size, with at most `chunk` tokens each.
    """
    batch, length, *rest = array.shape
    number = -(-length // chunk)
    size = -(-length // number)
    if number * size > length:
        array = jnp.pad(array, [(0, 0), (0, number * size - length), *((0, 0) for _ in rest)])
    return array.reshape(batch, number, size, *rest).swapaxes(0, 1)


def chunked_losses(
    model: LanguageModel, weights: Weights, hidden: Residual, targets: Tokens, compute: Compute
) -> Float[Array, "batch token"]:
    """Return what `token_losses` returns, with the logits of at most `compute.loss_chunk` tokens of
    all rows in memory at once; nothing is kept for a backward pass.
    """
    chunk = compute.loss_chunk or targets.size

    def one(piece: tuple[Array, Array]) -> Float[Array, "row token"]:
        return token_losses(model, weights, *piece, compute)

    # One row of all tokens, because the chunk of each of many short rows would add up.
    flat = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), (hidden, targets))
    if targets.size <= chunk:
        found = one(flat)
    else:
        found = jax.lax.map(one, jax.tree.map(partial(_chunks, chunk=chunk), flat))
    return found.reshape(-1)[: targets.size].reshape(targets.shape)
