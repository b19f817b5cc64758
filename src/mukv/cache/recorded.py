"""All entries and queries of a text, from which the body of any policy can be made.

Prefill computes the same entries and queries under every policy, because no entry is dropped before
its end. To compare policies, a text is read once under `RECORD`; `LanguageModel.compressed` then
makes the cache of each policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp

from mukv.attention import AnyAttention, Entries, Queries
from mukv.attention.mixer import ENTRIES
from mukv.cache.base import AllRead, Reader, SlotArrays, body_entries, fold
from mukv.cache.policy import Policy
from mukv.core.typing import Array, Int


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorded(AllRead):
    """Body that grows with every new entry, and also keeps the queries of the tokens.

    tensors: of the entries, in the order of their positions
    queries: of the tokens; None before the first one, and where an entry stands for several tokens,
        which no policy judges by queries
    """

    tensors: SlotArrays
    queries: Queries | None
    needs_queries: bool = field(metadata={"static": True})

    def entries(self, length: Int[Array, " batch"]) -> Entries:
        return body_entries(self.tensors, length, wraps=False)

    def extended(
        self,
        new: SlotArrays,
        length: Int[Array, " batch"],
        added: Int[Array, " batch"],
        reader: Reader,
        fresh: bool = False,
    ) -> Recorded:
        if fresh:
            return replace(self, tensors=dict(new), queries=reader.queries)

        def longer(old: Array, more: Array) -> Array:
            """Append the new rows after the `length` rows in use, along axis 2."""
            room = jnp.pad(old, [(0, 0), (0, 0), (0, more.shape[2]), (0, 0)])
            return fold({"": room}, {"": more}, length, added)[""]

        tensors = {name: longer(self.tensors[name], more) for name, more in new.items()}
        queries = None
        if self.queries is not None and reader.queries is not None:
            batch, heads, group, _, width = reader.queries.shape
            both = (x.reshape(batch, -1, x.shape[3], width) for x in (self.queries, reader.queries))
            queries = longer(*both).reshape(batch, heads, group, -1, width)
        return replace(self, tensors=tensors, queries=queries)


@dataclass(frozen=True)
class Recording(Policy):
    """The policy whose bodies record everything; see the top of this module."""

    @property
    def everything(self) -> bool:
        return False

    def check(self, number: int, attention: AnyAttention) -> None:
        """Accept every layer."""

    def body(
        self,
        attention: AnyAttention,
        d_model: int,
        batch: int,
        length: int,
        dtype: jnp.dtype,
        place: tuple[int, int],
        centres: Mapping[str, Array] | None = None,
        bag: str = ENTRIES,
        after: int | None = None,
        kept: int | None = None,
    ) -> Any:
        """Make an empty `Recorded`."""
        every = attention.bags[bag].every
        shapes = attention.written(d_model, batch, every, dtype)[bag]
        tensors = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
        return Recorded(tensors, None, needs_queries=every == 1)


RECORD = Recording()
