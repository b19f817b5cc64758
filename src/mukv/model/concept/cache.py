"""The cache of a concept model: window rings for its local layers, one entry per concept."""

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
    """Caches of the stacks of a concept model, and the state of the unfinished chunk.

    encoder, decoder: caches of the local layers
    concepts: cache of the global layers
    cross: cache of the concepts that tokens read in cross-attention; without layers otherwise
    state: state of the unfinished chunk

    Rows complete concepts at different tokens. Therefore the tails of `concepts`, `cross`, and of a
    decoder with prefixes are filled row by row.
    """

    encoder: Cache
    concepts: Cache
    cross: Cache
    decoder: Cache
    state: ChunkState

    @property
    def filled(self) -> Int[Array, ""]:
        """Number of tokens in the tails."""
        return self.encoder.filled

    @property
    def length(self) -> Int[Array, " batch"]:
        """Number of tokens of each row in the bodies."""
        return self.encoder.length

    def split(self) -> tuple[Any, Any]:
        """Return the part that a decode loop only reads, and the part that its steps write."""
        parts = (self.encoder, self.concepts, self.cross, self.decoder)
        frozen, live = zip(*(part.split() for part in parts), strict=True)
        return frozen, (*live, self.state)

    @classmethod
    def join(cls, frozen: Any, live: Any) -> ConceptCache:
        """Invert `split`."""
        *tails, state = live
        encoder, concepts, cross, decoder = map(Cache.join, frozen, tails)
        return cls(encoder, concepts, cross, decoder, state)

    def nbytes(self) -> int:
        """Return the allocated bytes (or those to be allocated, for abstract arrays)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))
