"""The two-level memory of a concept model: rings for its local layers, an entry per concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, no_type_check

import jax

from mukv.cache import Cache
from mukv.core.typing import Array, Int
from mukv.model.concept.chunks import ChunkState


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConceptCache:
    """encoder, decoder: of the local layers. concepts: of the global ones. cross: what tokens read
    of the concepts, where the injection has such a memory. Rows make concepts at tokens of their
    own, so that the last two, and a decoder with prefixes, go on by row.
    """

    encoder: Cache
    concepts: Cache
    cross: Cache
    decoder: Cache
    state: ChunkState

    @property
    def filled(self) -> Int[Array, ""]:
        return self.encoder.filled

    @property
    def length(self) -> Int[Array, " batch"]:
        return self.encoder.length

    def split(self) -> tuple[Any, Any]:
        """What a decode loop only reads, and what its steps write."""
        parts = (self.encoder, self.concepts, self.cross, self.decoder)
        frozen, live = zip(*(part.split() for part in parts), strict=True)
        return frozen, (*live, self.state)

    @classmethod
    def join(cls, frozen: Any, live: Any) -> ConceptCache:
        """The inverse of `split`."""
        *tails, state = live
        encoder, concepts, cross, decoder = map(Cache.join, frozen, tails)
        return cls(encoder, concepts, cross, decoder, state)

    def nbytes(self) -> int:
        """Bytes as allocated (or as they would be, for abstract arrays)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))
