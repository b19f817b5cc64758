"""The lightning indexer: cheap scores by which a query chooses the entries that it reads.

Source: DeepSeek-V3.2 (2512.02556, section 2.1) for latents, DeepSeek V4 for compressed entries. An
entry has one more key, of a few dimensions. The score of a query t and an entry s is the sum over
the indexer's heads of w[t, h] * relu(q[t, h] . k[s]). The choice has no gradient: the indexer is
trained by the divergence of its softmax from what the attention reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mukv.attention.entries import Entries
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights
from mukv.position.base import Logits

EntryChoice = Int[Array, "batch query chosen"]
"""Places of the entries that each query reads, among those of the bags that it chooses from, one
bag after the other; negative for none."""
NONE = -1


@dataclass(frozen=True)
class Indexer:
    """Indexer that chooses the `top_k` entries with the largest scores for each query.

    heads: number of heads of the indexer
    width: width of its keys and of a head of its queries
    top_k: number of entries that a query reads; None for all, the warm-up in which attention is
        dense and the indexer learns from all of it
    loss: weight of the Kullback-Leibler divergence of the indexer's distribution over entries from
        the attention's, in nats per token
    """

    heads: int = 4
    width: int = 32
    top_k: int | None = 64
    loss: float = 1.0

    def __post_init__(self) -> None:
        require_counts(self, "heads", "width", most=1 << 16)
        require_counts(self, "top_k")
        if self.loss <= 0:
            raise BadInput("loss", self.loss, "greater than 0, or the indexer would not learn")

    def params(self, d_model: int, query_rank: int) -> dict[str, Param]:
        """Declare the weights of its queries; the keys are the entries'."""
        latent, heads = {"query_latent": query_rank}, {"index_heads": self.heads}
        return {
            "query": Param(latent | heads | {"index_dim": self.width}, fan_in=tuple(latent)),
            "weight": Param({"embed": d_model, **heads}, fan_in=("embed",)),
        }

    def queries(
        self, weights: Weights, latent: Float[Array, "batch token query_latent"]
    ) -> Float[Array, "batch index_heads token index_dim"]:
        """Project queries from the query latent (not yet rotated)."""
        return project(latent, weights["query"]).swapaxes(1, 2)

    def weight(self, weights: Weights, x: Residual) -> Float[Array, "batch index_heads token"]:
        """Return the weight of each head of each query, with the scale of the scores; float32."""
        drawn = project(x, weights["weight"], out=jnp.dtype("float32"))
        return drawn.swapaxes(1, 2) * (self.heads * self.width) ** -0.5

    def flops(self) -> int:
        """Return the operations of the score of one query and one entry."""
        return 2 * self.heads * self.width


def scores(products: Logits, weight: Float[Array, "batch index_heads query"]) -> Array:
    """Compute the score of each query and entry, [batch query key], float32.

    products: of the indexer's queries and keys, [batch 1 index_heads query key]
    """

    def summed(positive: Array, weight: Array) -> Array:
        return jnp.sum(positive * weight[..., None], axis=1)

    def multiplied(positive: Array, weight: Array) -> Array:
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum("bhqk,bhq->bqk", positive, weight, precision=exact)

    # XLA's sum over an axis that is not the last one is slow on a CPU.
    given = jax.nn.relu(products[:, 0]), weight
    return jax.lax.platform_dependent(*given, cpu=multiplied, default=summed)


def largest(
    score: Float[Array, "batch query key"],
    visible: Bool[Array, "batch query key"],
    number: int,
    position: Int[Array, "batch key"] | None = None,
) -> EntryChoice:
    """Return the places of the `number` visible entries with the largest scores, negative where
    fewer are visible.

    Of equal scores, those of earlier entries are taken, so that a choice does not depend on where
    entries lie. position: of the entries, if they may lie in another order; None otherwise.
    """
    order = None
    if position is not None:
        order = jnp.argsort(position, axis=-1)[:, None]
        score, visible = (jnp.take_along_axis(each, order, axis=-1) for each in (score, visible))
    # top_k takes the first of equal numbers, but tells 0.0 from -0.0.
    masked = jnp.where(visible, jnp.where(score == 0, 0.0, score), -jnp.inf)
    found, place = jax.lax.top_k(masked, number)
    if order is not None:
        place = jnp.take_along_axis(jnp.broadcast_to(order, score.shape), place, axis=-1)
    return jnp.where(found > -jnp.inf, place, NONE)


def among(choice: EntryChoice, keys: int) -> Bool[Array, "batch query key"]:
    """Return whether each query chose each of `keys` entries."""

    def one(place: Int[Array, " chosen"]) -> Bool[Array, " key"]:
        # A place beyond the last entry is dropped; a negative one would count from the end.
        inside = jnp.where(place < 0, keys, place)
        return jnp.zeros(keys, bool).at[inside].set(True, mode="drop")

    return jax.vmap(jax.vmap(one))(choice)


def among_bags(
    choice: EntryChoice | None, bags: Sequence[Entries]
) -> Sequence[Bool[Array, "batch 1 query key"] | None]:
    """Return whether each query chose each entry, by bag; None for all that it may see."""
    if choice is None:
        return [None for _ in bags]
    sizes = [entries.position.shape[-1] for entries in bags]
    cuts = list(itertools.accumulate(sizes))[:-1]
    return jnp.split(among(choice, sum(sizes))[:, None], cuts, axis=-1)
