"""Latent attention: a truncated decomposition of keys and values (TransMLA, Meng et al. 2025).

For each frequency, the pairs of all KV heads are complex numbers that rotate by the same phase, and
so do their principal components over heads. The first `rope` of these form the rotated key that all
heads share. The rest of the keys loses its rotation, which is replaced by its mean over the
distances within reach: this keeps slow pairs and drops fast ones. The rest of the keys and the
values become a latent of `rank` principal components, in the metric of their effect on logits and
outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mukv.attention import Grouped, Latent
from mukv.conversion.base import Conversion, ConvertedLayer, Misfit, SourceLayer, plain_misfits
from mukv.conversion.fits import FLOOR, Matrix, components
from mukv.conversion.rotary import pairs_of
from mukv.core.typing import Float
from mukv.position import RoPE


@dataclass(frozen=True)
class TruncatedLatent(Conversion):
    """Multi-head latent attention without a norm of the latent.

    rank: width of the latent
    rope: number of rotated keys that are kept, each as wide as a head's; with those of all KV heads
        and the largest rank nothing changes
    """

    rank: int
    rope: int = 1

    def misfits(self, attention: Grouped) -> Iterator[Misfit]:
        position = attention.position
        if not isinstance(position, RoPE) or not int(position.partial * attention.head_dim):
            yield "position", position.kind, "rope: gqa, mqa, shared_kv and reuse are possible"
        yield from plain_misfits(attention)

    def excess(self, attention: Grouped) -> Iterator[tuple[str, str]]:
        number, most = attention.kv_heads, self.largest(attention)
        if self.rope > number:
            yield "rope", f"possible with {number} KV heads: 1 to {number}"
        if self.rank > most:
            yield "rank", f"possible with rope={self.rope}: mla:1 to mla:{most}, which is all"

    def largest(self, attention: Grouped) -> int:
        """Return the rank at which the latent has all numbers that are not in the rotated keys."""
        turning = int(getattr(attention.position, "partial", 0) * attention.head_dim)
        both = 2 * attention.kv_heads * attention.head_dim
        return both - self.rope * turning

    def converted_layer(self, source: SourceLayer) -> ConvertedLayer:
        attention = source.attention
        width, number = attention.head_dim, attention.kv_heads
        queries = source.of_examples("query")
        rotated, query, left = self.split(source, queries)
        value = source.weight("value")
        both = np.concatenate([left, value], axis=1).reshape(len(value), -1)
        seen = source.examples @ both.astype(np.float32)
        down, up = components(seen, errors(source, queries), self.rank)
        key_up, value_up = np.split(up.reshape(-1, 2 * number, width), 2, axis=1)
        made = Latent(
            position=replace(attention.position, partial=1.0),
            heads=attention.heads,
            scale=attention.scale or width**-0.5,
            softcap=attention.softcap,
            sinks=attention.sinks,
            gate=attention.gate,
            rank=self.rank,
            head_dim=width,
            rope_dim=rotated.shape[1],
            rope_parts=self.rope,
            norm=None,
        )
        read = {
            **source.read,
            "query": np.concatenate([source.weight("query"), query], axis=-1),
            "key_up": np.repeat(key_up, source.group, axis=1),
            "value_up": np.repeat(value_up, source.group, axis=1),
        }
        return ConvertedLayer(made, read, {"latent": both @ down, "key": rotated})

    def split(
        self, source: SourceLayer, queries: Float[np.ndarray, "heads example head_dim"]
    ) -> tuple[
        Float[np.ndarray, "embed rope_dim"],
        Float[np.ndarray, "embed heads rope_dim"],
        Float[np.ndarray, "embed kv_heads head_dim"],
    ]:
        """Return the rotated keys, the queries that read them, and the rest of the keys."""
        pairs, key = source.pairs, source.weight("key")
        basis, sizes = self.basis(source, queries)
        # Components c = U* s k of the keys k of all heads; from them k = U c / s.
        turning = pairs.complex(key)
        kept = np.einsum("egp,gjp->ejp", turning * sizes, basis.conj())
        found = np.einsum("ejp,gjp->egp", kept, basis) / sizes
        left = pairs.real((turning - found) * mean_rotation(source), key[..., pairs.rest])
        owners = np.arange(source.attention.heads) // source.group
        query = pairs.complex(source.weight("query"))[:, :, None]
        toward = query * (basis.conj() / sizes[:, None])[owners]
        alone = pairs_of(replace(source.attention.position, partial=1.0), 2 * len(pairs.first))
        rotated, query = (alone.real(each, np.real(each)[..., :0]) for each in (kept, toward))
        return rotated.reshape(len(key), -1), query.reshape(*query.shape[:2], -1), left

    def basis(
        self, source: SourceLayer, queries: Float[np.ndarray, "heads example head_dim"]
    ) -> tuple[Float[np.ndarray, "kv_heads rope pair"], Float[np.ndarray, "kv_heads pair"]]:
        """Return the principal components over heads of each pair, and the factors of the heads'
        pairs in them, which are the sizes of the queries that read these pairs."""
        pairs, number = source.pairs, source.attention.kv_heads
        squares = np.mean(np.abs(pairs.complex(queries)) ** 2, axis=1)
        sizes = squares.reshape(number, source.group, -1).sum(axis=1)
        sizes = np.sqrt(np.maximum(sizes, FLOOR * sizes.mean()))
        keys = (pairs.complex(source.of_examples("key")) * sizes[:, None]).transpose(2, 0, 1)
        _, vectors = np.linalg.eigh(keys @ keys.conj().swapaxes(1, 2))
        return np.moveaxis(vectors[:, :, ::-1][:, :, : self.rope], 0, -1), sizes


def mean_rotation(source: SourceLayer) -> Float[np.ndarray, " pair"]:
    """Return the mean factor of each pair's product with a query over distances: complex.

    Distances d within reach have the weight 1 / (d + 1), since attention prefers near tokens.
    """
    position = source.attention.position
    assert isinstance(position, RoPE)
    distance = np.arange(source.reach)
    angles = np.outer(distance, position.frequencies(source.attention.head_dim))
    share = 1 / (distance + 1)
    factor = position.scaling.rotation_factor if position.scaling else 1.0
    return share @ np.exp(-1j * angles) / share.sum() * factor**2


def errors(source: SourceLayer, queries: Float[np.ndarray, "heads example head_dim"]) -> Matrix:
    """Return the quadratic form of errors of keys and values [keys of all heads, values].

    Errors of keys are measured by the variance of the logits, as a mean over heads; errors of
    values
    by their share of the square of the layer's output.
    """
    attention, width, number = source.attention, source.attention.head_dim, source.group
    scale = attention.scale or width**-0.5
    output = source.weight("output")
    toward, forth = queries.swapaxes(1, 2) @ queries, output @ output.swapaxes(1, 2)
    blocks = np.stack([scale**2 * toward / queries.shape[1] / len(queries), forth])
    blocks = blocks.reshape(2, attention.kv_heads, number, width, width).sum(axis=2)
    values = source.of_examples("value")
    square = np.sum((values.swapaxes(1, 2) @ values) * blocks[1]) / values.shape[1]
    blocks[1] /= max(square, np.finfo(float).tiny)
    return block_diagonal(blocks.reshape(-1, width, width))


def block_diagonal(blocks: Float[np.ndarray, "block width width"]) -> Matrix:
    count, width, _ = blocks.shape
    whole = np.zeros((count, width, count, width))
    whole[np.arange(count), :, np.arange(count)] = blocks
    return whole.reshape(count * width, -1)
