"""SparQ (Ribar et al. 2024): approximate the attention weights from a few components of the keys.

Keys are also stored by component. The components in which a query is largest give approximate
weights of all entries. The entries with the largest weights are read exactly; the approximate
weight of the others goes to the mean of all values.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mukv.attention import Entries, Query, Recall, Recalled, Retrieved
from mukv.attention.recalled import Whole
from mukv.cache.select import Index, Select, View, best, joined, shares
from mukv.cache.shelf import NOWHERE, Shelf
from mukv.core.counts import require_counts
from mukv.core.typing import Array, Float
from mukv.position.base import Logits


@dataclass(frozen=True)
class SparQ(Select):
    """Read the entries with the largest approximate weights (Ribar et al. 2024).

    components: number of components of each key that are read; None for a quarter of its width
    """

    components: int | None = None

    def __post_init__(self) -> None:
        require_counts(self, "components", most=1 << 20)

    def index(self, view: View) -> dict[str, Array]:
        heads, stores = view.key.shape[1], view.there.shape[1]
        there = jnp.repeat(view.there, heads // stores, axis=1)[..., None]
        number = jnp.maximum(jnp.sum(there, axis=2, keepdims=True), 1)
        mean = jnp.sum(jnp.where(there, view.value, 0.0), axis=2, keepdims=True) / number
        key = jnp.where(there, view.key, 0.0)
        return {
            "component": key.swapaxes(-1, -2).astype(view.key.dtype),
            "mean": mean.astype(view.value.dtype),
            "always": view.always(),
        }

    def retrieve(self, shelf: Shelf, index: Index, query: Query, recall: Recall) -> Retrieved:
        whole = joined(query)
        width = whole.shape[-1]
        number = min(self.components or max(width // 4, 1), width)
        # One choice of components for the group, so that each is read once.
        _, largest = jax.lax.top_k(jnp.sum(jnp.abs(whole), axis=2), number)
        keys = jnp.take_along_axis(index["component"], largest[..., None], axis=2)
        short = jnp.take_along_axis(whole, largest[:, :, None], axis=3)
        norms = (jnp.sum(jnp.abs(x), axis=-1, keepdims=True) for x in (short, whole))
        part, all_of_it = norms
        temperature = jnp.sqrt(jnp.maximum(part, 1e-20) / jnp.maximum(all_of_it, 1e-20))
        logits = jnp.einsum("bhgr,bhrs->bhgs", short, keys, preferred_element_type=jnp.float32)
        logits = logits / temperature
        there = shelf.position != NOWHERE
        slots = best(
            shares(logits, there), index["always"], min(self.budget.of(shelf.slots), shelf.slots)
        )
        entries = shelf.runs(slots)
        # Approximate weight of the entries that are read, per query head.
        per_store = whole.shape[1] // there.shape[1]
        seen = jnp.repeat(there, per_store, axis=1)[:, :, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
        taken = jnp.repeat(slots, per_store, axis=1)[:, :, None]
        found = jnp.take_along_axis(jnp.where(seen, weights, 0.0), taken, axis=3)
        read = jnp.sum(found, axis=-1, keepdims=True)
        return _with_rest(recall(entries), entries, index["mean"], read, shelf)


def _with_rest(
    recalled: Recalled, entries: Entries, mean: Array, read: Array, shelf: Shelf
) -> Retrieved:
    """Append one entry whose value is the mean value, for the entries that are not read."""
    newest = jnp.max(shelf.position, axis=-1, keepdims=True)
    assert entries.valid is not None
    some = jnp.any(shelf.position != NOWHERE, axis=-1, keepdims=True)
    if entries.valid.shape[-1] >= shelf.slots:
        some = jnp.zeros_like(some)
    position = jnp.concatenate([entries.position, newest], axis=-1)
    valid = jnp.concatenate([entries.valid, some], axis=-1)
    missing = jnp.maximum(1 - read, 0.0) / jnp.maximum(read, 1e-6)
    return (
        WithRest(recalled, mean, missing[..., None], entries.valid),
        Entries({}, position, valid),
    )


@dataclass(frozen=True)
class WithRest(Recalled):
    """Some entries followed by the mean of all, which gets `missing` times their
    attention weight.
    """

    recalled: Recalled
    mean: Float[Array, "batch kv_heads 1 width"]
    missing: Float[Array, "batch kv_heads group 1 1"]
    valid: Array

    def products(self, query: Query) -> Logits:
        products = self.recalled.products(query)
        heads = products.shape[1]
        valid = jnp.repeat(self.valid, heads // self.valid.shape[1], axis=1)[:, :, None, None]
        mass = jax.nn.logsumexp(jnp.where(valid, products, -1e30), axis=-1, keepdims=True)
        rest = mass + jnp.log(jnp.maximum(self.missing, 1e-30))
        return jnp.concatenate([products, rest], axis=-1)

    def mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        known, rest = jnp.split(weights, [weights.shape[-1] - 1], axis=-1)
        mean = self.mean.astype(jnp.float32)[:, :, None]
        return self.recalled.mixture(known) + rest * mean

    def dense(self, heads: int) -> tuple[Whole, Whole]:
        return self.recalled.dense(heads)

    @property
    def width(self) -> int:
        return self.recalled.width
