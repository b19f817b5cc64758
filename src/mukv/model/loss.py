"""Cross-entropy of the next token, and divergence from a teacher.

Logits are computed for one chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mukv.core.compute import Compute, settled
from mukv.core.partition import by_data_shard
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.model.base import LanguageModel
from mukv.model.evicting import AnyThrough


def token_losses(
    model: LanguageModel, weights: Weights, hidden: Residual, targets: Tokens, compute: Compute
) -> Float[Array, "batch token"]:
    """Return -log p(target) of each token, in nats; float32."""
    return cross_entropies(model.logits(weights, hidden, compute), targets)


def cross_entropies(
    logits: Float[Array, "batch token vocab"], targets: Tokens
) -> Float[Array, "batch token"]:
    """Return -log p(target) of each token, in nats; float32."""
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


def divergences(
    teacher: Float[Array, "batch token vocab"],
    logits: Float[Array, "batch token vocab"],
    temperature: float,
) -> Float[Array, "batch token"]:
    """Compute KL(teacher || model) of the next token in nats, from logits divided by a temperature;
    float32."""
    theirs, ours = teacher / temperature, logits / temperature
    apart = jnp.sum(jax.nn.softmax(theirs, axis=-1) * (theirs - ours), axis=-1)
    return apart - jax.nn.logsumexp(theirs, axis=-1) + jax.nn.logsumexp(ours, axis=-1)


class Teacher(NamedTuple):
    """A model whose predictions another model learns.

    weights: scaled, as the forward pass takes them
    share: weight of the divergence in the objective; the cross-entropy has the rest
    temperature: divisor of the logits of both models in the divergence
    """

    model: LanguageModel
    weights: Weights
    share: float
    temperature: float


class Losses(NamedTuple):
    """Sums over a batch.

    objective: objective of training in nats: cross-entropy, or its mean with the divergence from a
        teacher, plus penalty
    cross_entropy: weighted cross-entropy, in nats
    counts: numbers to log, by name
    divergence: weighted KL(teacher || model) at the teacher's temperature, in nats; None without a
        teacher
    """

    objective: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    counts: dict[str, Float[Array, ""]]
    divergence: Float[Array, ""] | None = None


def summed_loss(
    model: LanguageModel,
    weights: Weights,
    tokens: Tokens,
    targets: Tokens,
    weight: Float[Array, "batch token"],
    position: Int[Array, "batch token"] | None = None,
    segment: Int[Array, "batch token"] | None = None,
    compute: Compute | None = None,
    teacher: Teacher | None = None,
    through: AnyThrough | None = None,
) -> Losses:
    """Sum the weighted token losses over the batch, in nats.

    targets: next token of each token
    weight: weight of each token's loss
    position, segment: as in `LanguageModel.forward`
    teacher: a model with the same vocabulary, which reads the same tokens; the objective becomes
        (1 - share) CE + share T^2 KL (Hinton et al. 2015, section 2), where T^2 keeps the size of
        the gradient
    through: a cache policy or gates in place while the model reads, but not its teacher

    The logits are computed for one chunk of tokens at a time, and recomputed in the backward pass,
    so that no array has batch x token x vocab elements.
    """
    compute = settled(compute)
    result = model.forward(weights, tokens, position, segment, compute, through)
    readout = model.gathered_readout(weights, compute)
    rows = result.hidden, targets, weight
    # Each shard sums the gradient of the readout over its chunks before the shards exchange it.
    divergence = None
    if teacher is None:
        function = partial(_row_losses, model=model, compute=compute)
        sums = by_data_shard(function, readout, *rows, tokens="summed")
        objective = total = jnp.sum(sums)
    else:
        theirs = teacher.model.hidden(teacher.weights, tokens, position, segment, compute)
        readouts = readout, teacher.model.gathered_readout(teacher.weights, compute)
        function = partial(_taught_losses, model=model, compute=compute, teacher=teacher)
        total, divergence = map(
            jnp.sum, by_data_shard(function, readouts, *rows, theirs, tokens="summed")
        )
        share, square = teacher.share, teacher.temperature**2
        objective = (1 - share) * total + share * square * divergence
    missing = None if through is None else through.penalty(result.counts, tokens.shape[1])
    for penalty in (result.penalty, missing):
        if penalty is not None:
            # Weighted row by row, so that it does not depend on how a batch is split.
            objective += jnp.sum(penalty * jnp.sum(weight, axis=1))
    counts = {name: jnp.sum(n) for name, n in result.counts.items()}
    return Losses(objective, total, counts, divergence)


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

    def chunk_losses(
        readout: Weights, hidden: Array, targets: Array, weight: Array
    ) -> Float[Array, " batch"]:
        return jnp.sum(token_losses(model, readout, hidden, targets, compute) * weight, axis=1)

    # Zeros of this form are split over the mesh as the losses are.
    zero = jnp.zeros_like(weight[:, 0])
    chunk = compute.loss_tokens(len(hidden), model.vocab_size)
    return _summed(chunk_losses, zero, readout, (hidden, targets, weight), chunk)


def _taught_losses(
    readouts: tuple[Weights, Weights],
    hidden: Residual,
    targets: Tokens,
    weight: Float[Array, "batch token"],
    theirs: Residual,
    *,
    model: LanguageModel,
    compute: Compute,
    teacher: Teacher,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Sum the weighted token losses and divergences of each row.

    readouts: the weights that make the logits of the model and of its teacher
    theirs: the teacher's residual stream after its last layer
    """

    def chunk_losses(
        readouts: tuple[Weights, Weights],
        hidden: Array,
        targets: Array,
        weight: Array,
        theirs: Array,
    ) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        logits = model.logits(readouts[0], hidden, compute)
        taught = teacher.model.logits(readouts[1], theirs, compute)
        nats = cross_entropies(logits, targets), divergences(taught, logits, teacher.temperature)
        first, second = (jnp.sum(each * weight, axis=1) for each in nats)
        return first, second

    zero = jnp.zeros_like(weight[:, 0])
    # Twice the logits exist together.
    chunk = -(-compute.loss_tokens(len(hidden), model.vocab_size) // 2)
    rows = hidden, targets, weight, theirs
    return _summed(chunk_losses, (zero, zero), readouts, rows, chunk)


def _summed(
    chunk_losses: Callable[..., Any], zero: Any, weights: Any, rows: Any, chunk: int
) -> Any:
    """Sum `chunk_losses(weights, *rows)` over chunks of at most `chunk` tokens.

    rows: arrays [batch token ...]. Activations of a chunk are recomputed in the backward pass.
    """

    def accumulate(total: Any, piece: Any) -> tuple[Any, None]:
        found = jax.checkpoint(chunk_losses)(weights, *piece)
        return jax.tree.map(jnp.add, total, found), None

    if rows[0].shape[1] <= chunk:
        return chunk_losses(weights, *rows)
    pieces = jax.tree.map(partial(_chunks, chunk=chunk), rows)
    return jax.lax.scan(accumulate, zero, pieces)[0]


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
