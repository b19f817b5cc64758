"""Cross-entropy of the next token, and divergence from a teacher, with only a chunk of the logits
in memory at once."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mukv.core.compute import Compute, settled
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.model.base import LanguageModel


def token_losses(
    model: LanguageModel, weights: Weights, hidden: Residual, targets: Tokens, compute: Compute
) -> Float[Array, "batch token"]:
    """-log p(target) in nats, float32."""
    return _cross_entropies(model.logits(weights, hidden, compute), targets)


class Teacher(NamedTuple):
    """A model whose predictions another one learns.

    weights: scaled; no gradient flows into them
    share: of the divergence in what is minimised; the cross-entropy has the rest
    temperature: divisor of both models' logits in the divergence
    """

    model: LanguageModel
    weights: Weights
    share: float
    temperature: float


class Losses(NamedTuple):
    """Of a batch. objective: what training minimises. cross_entropy: nats, weighted and summed.
    counts: numbers to be reported, summed. divergence: from the teacher, KL(teacher || model) at
    its temperature, in nats, weighted and summed; None without one."""

    objective: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    counts: dict[str, Float[Array, ""]]
    divergence: Float[Array, ""] | None = None


def divergences(
    teacher: Float[Array, "batch token vocab"],
    logits: Float[Array, "batch token vocab"],
    temperature: float,
) -> Float[Array, "batch token"]:
    """KL(teacher || model) in nats of the distributions that logits divided by a temperature have;
    float32."""
    theirs, ours = teacher / temperature, logits / temperature
    apart = jnp.sum(jax.nn.softmax(theirs, axis=-1) * (theirs - ours), axis=-1)
    return apart - jax.nn.logsumexp(theirs, axis=-1) + jax.nn.logsumexp(ours, axis=-1)


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
) -> Losses:
    """Weighted sums of token losses over the batch, in nats.

    The logits of a chunk of tokens are made, used and dropped, and made again for the backward
    pass, so that batch x token x vocab numbers never exist together; those of the teacher too.
    """
    compute = settled(compute, model.vocab_size)
    result = model.forward(weights, tokens, position, segment, compute)
    hidden, chunk = result.hidden, compute.loss_chunk or tokens.shape[1]
    theirs = None
    if teacher is not None:
        theirs = teacher.model.hidden(teacher.weights, tokens, position, segment, compute)
        theirs = jax.lax.stop_gradient(theirs)

    def part(
        hidden: Array, targets: Array, weight: Array, theirs: Array | None
    ) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
        logits = model.logits(weights, hidden, compute)
        loss = jnp.sum(_cross_entropies(logits, targets) * weight)
        if teacher is None or theirs is None:
            return loss, None
        taught = teacher.model.logits(teacher.weights, theirs, compute)
        apart = divergences(jax.lax.stop_gradient(taught), logits, teacher.temperature)
        return loss, jnp.sum(apart * weight)

    def more(total: Any, piece: tuple[Any, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.checkpoint(part)(*piece)), None

    whole = hidden, targets, weight, theirs
    if hidden.shape[1] <= chunk:
        total, apart = part(*whole)
    else:
        pieces = jax.tree.map(partial(_chunks, chunk=chunk), whole)
        zero = jnp.zeros((), jnp.float32)
        start = zero, None if teacher is None else zero
        (total, apart), _ = jax.lax.scan(more, start, pieces)
    objective = total
    if teacher is not None and apart is not None:
        share = teacher.share
        objective = (1 - share) * total + share * teacher.temperature**2 * apart
    if result.penalty is not None:
        # By row, so that it is the same however a batch is split.
        objective += jnp.sum(result.penalty * jnp.sum(weight, axis=1))
    counts = {name: jnp.sum(n) for name, n in result.counts.items()}
    return Losses(objective, total, counts, apart)


def _cross_entropies(
    logits: Float[Array, "batch token vocab"], targets: Tokens
) -> Float[Array, "batch token"]:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _chunks(array: Array, chunk: int) -> Array:
    """[chunk batch token ...] of an array [batch token ...], padded with zeros. The chunks are as
    few as can be, and of equal size."""
    batch, length, *rest = array.shape
    number = -(-length // chunk)
    size = -(-length // number)
    if number * size > length:
        array = jnp.pad(array, [(0, 0), (0, number * size - length), *((0, 0) for _ in rest)])
    return array.reshape(batch, number, size, *rest).swapaxes(0, 1)
