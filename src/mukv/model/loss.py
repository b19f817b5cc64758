"""Cross-entropy of the next token, whose logits are computed for one chunk of tokens at a time."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mukv.core.compute import Compute, settled
from mukv.core.mesh import by_data_shard
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.model.base import LanguageModel


def token_losses(
    model: LanguageModel, weights: Weights, hidden: Residual, targets: Tokens, compute: Compute
) -> Float[Array, "batch token"]:
    """Return -log p(target) of each token, in nats; float32."""
    logits = model.logits(weights, hidden, compute)
    # On accelerators the gradient of a lookup, which is a scatter, would be one more pass over all
    # logits; a masked sum and its gradient are fused with the passes of the softmax.
    chosen = jax.lax.platform_dependent(logits, targets, cpu=_looked_up, default=_picked)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _looked_up(logits: Array, targets: Tokens) -> Float[Array, "batch token"]:
    """Return the logit of each target by its index."""
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _picked(logits: Array, targets: Tokens) -> Float[Array, "batch token"]:
    """Return the logit of each target by a sum over the vocabulary."""
    hit = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None, None] == targets[..., None]
    return jnp.sum(logits * hit, axis=-1)


class Losses(NamedTuple):
    """Sums over a batch.

    objective: objective of training, cross-entropy plus penalty, in nats
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
    compute = settled(compute)
    result = model.forward(weights, tokens, position, segment, compute)
    readout = model.gathered_readout(weights, compute)
    rows = result.hidden, targets, weight
    # Each shard sums the gradient of the readout over its chunks before the shards exchange it.
    sums = by_data_shard(partial(_row_losses, model=model, compute=compute), readout, *rows)
    objective = total = jnp.sum(sums)
    if result.penalty is not None:
        # Weighted row by row, so that it does not depend on how a batch is split.
        objective += jnp.sum(result.penalty * jnp.sum(weight, axis=1))
    return Losses(objective, total, {name: jnp.sum(n) for name, n in result.counts.items()})


def _row_losses(
    readout: Weights,
    hidden: Residual,
    targets: Tokens,
    weight: Float[Array, "batch token"],
    *,
    model: LanguageModel,
    compute: Compute,
) -> Float[Array, " batch"]:
    """Sum the weighted token losses of each row. readout: the weight that makes logits."""
    chunk = compute.loss_tokens(len(hidden), model.vocab_size)

    def chunk_losses(
        readout: Weights, hidden: Array, targets: Array, weight: Array
    ) -> Float[Array, " batch"]:
        return jnp.sum(token_losses(model, readout, hidden, targets, compute) * weight, axis=1)

    def accumulate(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + jax.checkpoint(chunk_losses)(readout, *piece), None

    if hidden.shape[1] <= chunk:
        return chunk_losses(readout, hidden, targets, weight)
    pieces = jax.tree.map(partial(_chunks, chunk=chunk), (hidden, targets, weight))
    # Zeros of this form are split over the mesh as the losses are.
    return jax.lax.scan(accumulate, jnp.zeros_like(weight[:, 0]), pieces)[0]


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
    """Compute `token_losses` for one chunk of at most `compute.loss_chunk` tokens at a time.

    Tokens of all rows together are divided into chunks. For evaluation: activations are not
    recomputed in a backward pass.
    """
    chunk = compute.loss_tokens(1, model.vocab_size)

    def one(piece: tuple[Array, Array]) -> Float[Array, "row token"]:
        return token_losses(model, weights, *piece, compute)

    # All tokens form one row, because a chunk of each of many short rows would have too many.
    flat = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), (hidden, targets))
    if targets.size <= chunk:
        found = one(flat)
    else:
        found = jax.lax.map(one, jax.tree.map(partial(_chunks, chunk=chunk), flat))
    return found.reshape(-1)[: targets.size].reshape(targets.shape)
