"""Attention of queries whose tokens are split over the mesh axis `context`.

Keys and values of a layer are gathered over `context` right before, and their gradients are summed
by a reduce-scatter; each device attends from its own queries. A later query sees more keys, so that
most devices would wait for the one with the last queries. They therefore exchange queries: of 2 n
pieces of a row on n devices, device i attends from the pieces i and 2 n - 1 - i (Llama 3,
2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mukv.attention.cores.base import Core, Out, Part, Scores
from mukv.attention.recalled import Dense, Query
from mukv.core.mesh import size_of, specification
from mukv.core.partition import context_size, partitioned_mesh
from mukv.core.tap import capturing
from mukv.core.typing import Array

AXIS = "context"


def context_of(tokens: int) -> int:
    """Return the number of devices that the queries of this many tokens per row are split over: 1
    where all logits are recorded, and if they can't be divided."""
    size = context_size()
    return 1 if tokens % size or capturing() else size


def over_context(core: Core, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
    """Apply the core to the queries of each device if `context` splits their tokens.

    Arguments and result are those of `core.apply`. The parts are given to the core as not aligned.
    """
    mesh, length = partitioned_mesh(), query[0].shape[3]
    size = context_of(length)
    if size == 1 or mesh is None:
        return core.apply(query, parts, scores)
    exchange = _Exchange(size if length % (2 * size) == 0 else 1)
    # Rows and heads are split as well: the partitioner would gather them for `all_gather`. A bias
    # depends on the number of a head, which only the partitioner knows; other forms than `Dense` do
    # not have their heads in the second axis.
    whole_heads = (
        scores.position.biases
        or query[0].shape[1] % size_of(mesh, "tensor")
        or not all(isinstance(part.recalled, Dense) for part in parts)
    )
    apart = (*mesh.manual_axes, *(("tensor",) if whole_heads else ()))

    def placed(tree: Any, *names: str) -> Any:
        def one(x: Array) -> PartitionSpec:
            return specification(dict(zip(names, x.shape, strict=False)), mesh, exclude=apart)

        return jax.tree.map(one, tree)

    queries = {
        "query": (query, ("batch", "kv_heads", "group", "token")),
        "bias": (scores.query if scores.position.biases else None, ("batch", "", "group", "token")),
        "position": (scores.query_position, ("batch", "token")),
        "segment": (tuple(part.mask.segment for part in parts), ("batch", "token")),
        "chosen": (tuple(part.mask.chosen for part in parts), ("batch", "kv_heads", "token")),
    }
    asked = {name: tree for name, (tree, _) in queries.items()}
    axes = {name: names.index("token") for name, (_, names) in queries.items()}
    recalled, form = jax.tree.flatten(tuple(part.recalled for part in parts))
    bare = tuple(replace(part.entries, tensors={}) for part in parts)
    places, places_form = jax.tree.flatten(bare)
    recalled_placed = placed(recalled, "batch", "kv_heads", "token")

    def own(asked: Any, recalled: Any, places: Any, weights: Any, sinks: Any) -> Array:
        mine = {
            name: jax.tree.map(lambda x, axis=axes[name]: exchange.given(x, axis), tree)
            for name, tree in asked.items()
        }
        keys = form.unflatten(map(_gathered, recalled, recalled_placed))
        entries = places_form.unflatten(places)
        at = {"query": mine["bias"], "query_position": mine["position"]}
        given = [
            Part(keys, held, replace(part.mask, segment=segment, chosen=chosen, aligned=False))
            for part, keys, held, segment, chosen in zip(
                parts, keys, entries, mine["segment"], mine["chosen"], strict=True
            )
        ]
        out = core.apply(mine["query"], given, replace(scores, **at, weights=weights, sinks=sinks))
        return exchange.returned(out, 3)

    # Cores do not say over which axes their loops' carries vary.
    split = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(
            {name: placed(tree, *names) for name, (tree, names) in queries.items()},
            recalled_placed,
            placed(places, "batch", "kv_heads"),
            PartitionSpec(),
            placed(scores.sinks, "kv_heads"),
        ),
        out_specs=placed(query[0], "batch", "kv_heads", "group", "token"),
        axis_names={*mesh.axis_names} - {*apart},
        check_vma=False,
    )
    out: Array = split(asked, recalled, places, scores.weights, scores.sinks)
    return out


def _gathered(keys: Array, placed: PartitionSpec) -> Array:
    """Gather the keys or values of all tokens, unless they could not be split."""
    if AXIS not in placed:
        return keys
    return jax.lax.all_gather(keys, AXIS, axis=2, tiled=True)


class _Exchange:
    """The exchange of halves of the queries between `size` devices; of nothing if that is 1."""

    def __init__(self, size: int) -> None:
        """Number the pieces: device i holds 2 i and 2 i + 1, and works on i and 2 size - 1 - i."""
        self.size = size
        goes = [min(piece, 2 * size - 1 - piece) for piece in range(2 * size)]
        self.pairs = tuple(
            [(device, goes[2 * device + half]) for device in range(size)] for half in (0, 1)
        )

    def given(self, x: Array, axis: int) -> Array:
        """Exchange the halves along an axis: the result has those that this device works on."""
        return self._sent(x, axis, self.pairs)

    def returned(self, x: Array, axis: int) -> Array:
        """Undo `given`."""
        return self._sent(x, axis, tuple([(b, a) for a, b in pairs] for pairs in self.pairs))

    def _sent(self, x: Array, axis: int, pairs: Sequence[Any]) -> Array:
        if self.size == 1:
            return x
        halves = jnp.split(x, 2, axis=axis)
        sent = (jax.lax.ppermute(half, AXIS, to) for half, to in zip(halves, pairs, strict=True))
        return jnp.concatenate([*sent], axis=axis)
