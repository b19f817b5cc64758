"""A mixer is what a layer does over tokens: attention, compressed attention, a recurrence.

It writes what later tokens need into named stores and reads them. A store is a bag of entries at
its own rate (`EntryStore`) or a state of constant size (`StateStore`). Training is
`read(x, write(x))`; decoding carries the stores from step to step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention.cores import CoreChoice
from mukv.attention.entries import Bag, Entries
from mukv.attention.mask import Mask
from mukv.core.compute import Compute
from mukv.core.params import Param, abstract
from mukv.core.table import Component
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights

Tensors = dict[str, Array]
Written = dict[str, Tensors]
"""Tensors by name of store."""
Reported = dict[str, Float[Array, " batch"]] | None
"""Float32 numbers of each row by name, as `mukv.model.auxiliary` takes them."""
ENTRIES = "entries"
"""Name of the store of a mixer that has only one."""


@dataclass(frozen=True)
class EntryStore:
    """A bag of entries.

    every: tokens per entry. After n tokens of a document the store holds n // every entries; entry
    i has position i * every + every - 1, that of its last token, so that causality is one
    comparison. window: tokens that a query sees, itself included; None for all.
    """

    every: int = 1
    window: int | None = None

    def within(self, window: int | None) -> EntryStore:
        """The same where a layer's window limits it as well."""
        if window is None or (self.window is not None and self.window <= window):
            return self
        return replace(self, window=window)

    def count(self, tokens: Int[Array, "*row"]) -> Int[Array, "*row"]:
        """Entries after this number of tokens."""
        return tokens if self.every == 1 else tokens // self.every

    def added(
        self, before: Int[Array, " batch"], tokens: Int[Array, "*row"]
    ) -> Int[Array, "*rows"]:
        """Entries that `tokens` more tokens add after `before` of them."""
        if self.every == 1:
            return tokens
        return self.count(before + tokens) - self.count(before)

    def places(self, tokens: int) -> int:
        """Entries that any `tokens` tokens in a row close at most."""
        return -(-tokens // self.every)

    def room(self, tokens: int) -> int:
        """Entries of a body for this number of tokens from the start of a document."""
        held = max(tokens // self.every, 1)
        return held if self.window is None else min(held, self.places(self.window))

    def last_token(self, entry: Int[Array, "*place"]) -> Int[Array, "*place"]:
        """Position of an entry, from its number in the document."""
        return entry if self.every == 1 else entry * self.every + self.every - 1

    def closing(
        self, position: Int[Array, "batch token"]
    ) -> tuple[Int[Array, "batch entry"], Bool[Array, "batch entry"]]:
        """Places of the tokens that close an entry, in order, and which of them there are.

        A document restarts the count, and leaves what it did not close without an entry.
        """
        closes = (position + 1) % self.every == 0
        order = jnp.argsort(~closes, axis=1, stable=True)[:, : self.places(position.shape[1])]
        return order, jnp.take_along_axis(closes, order, axis=1)

    def entries(
        self,
        tensors: Tensors,
        position: Int[Array, "batch token"],
        segment: Int[Array, "batch token"] | None = None,
    ) -> Entries:
        """What `write` returned for these tokens, as a bag."""
        there = None
        if self.every > 1:
            place, there = self.closing(position)
            there = there[:, None]
            position = jnp.take_along_axis(position, place, axis=1)
            if segment is not None:
                segment = jnp.take_along_axis(segment, place, axis=1)
        own = None if segment is None else segment[:, None]
        return Entries(tensors, position[:, None], there, own, window=self.window, every=self.every)

    def mean_visible(self, tokens: int) -> float:
        """Entries that a query sees on average in a document of this length."""

        def closed(last: int) -> int:
            """Sum of t // every over the first `last` tokens, counted from 1."""
            whole = last // self.every
            return self.every * whole * (whole - 1) // 2 + whole * (last - whole * self.every + 1)

        return (closed(tokens) - closed(tokens - min(self.window or tokens, tokens))) / tokens


@dataclass(frozen=True)
class StateStore:
    """Float32 arrays without a token axis, zeros before the first token.

    shapes: of each array, the batch axis left out.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def zeros(self, batch: int) -> Tensors:
        return {name: jnp.zeros((batch, *shape)) for name, shape in self.shapes.items()}


class Carried(NamedTuple):
    """What `write` continues from. states: by store, after the tokens before the new ones.
    added: how many of the new tokens are there; those behind them leave the states as they are.
    """

    states: Written
    added: Int[Array, " batch"]


@dataclass(frozen=True)
class Mixer(Component):
    """The contract; fields are the YAML keys.

    A mixer is frozen and knows no weights: it declares them, split into those that write and those
    that read, since a layer that reuses another's entries has none of the first kind.
    """

    def write_params(self, d_model: int) -> dict[str, Any]:
        """Weights that turn tokens into what the stores hold."""
        raise NotImplementedError

    def read_params(self, d_model: int) -> dict[str, Any]:
        """Weights that turn a token and the stores into what is added to the residual stream."""
        raise NotImplementedError

    def stores(self) -> Mapping[str, EntryStore | StateStore]:
        """What a layer remembers, by name."""
        return {ENTRIES: EntryStore()}

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> Any:
        """What the new tokens leave behind; never more than decoding must keep.

        Returns {store: {name: array}}, or the arrays alone where there is one store. An entry
        store with `every` tokens per entry gets arrays [batch heads places(tokens) width], the
        entries that close in order and then whatever; a state store its arrays after the tokens,
        needed only where `memory` is given, as decoding does.
        """
        raise NotImplementedError

    def read(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        mask: Mask,
        compute: Compute,
    ) -> tuple[Residual, Reported]:
        """What each token makes of the bags, which carry their own windows; and what training is
        told besides, such as a penalty."""
        raise NotImplementedError

    def core(
        self, queries: int, compute: Compute, ordered: bool = True, shows: str | None = None
    ) -> CoreChoice | None:
        """The core that reads for so many queries per row; None for a mixer without a softmax.

        ordered: whether the entries of every bag stand in the order of their positions. shows:
        why all logits must exist; None if they need not.
        """
        return None

    def memory(self) -> Hashable:
        """What must agree between a layer that writes and another that reads its stores."""
        raise NotImplementedError

    def read_flops(self) -> int:
        """Floating-point operations of a forward pass in training, per query and visible entry."""
        return 0

    def logit_weight(self, d_model: int) -> Param | None:
        """The weight whose last axis is the width of a query; None for a mixer without logits."""
        return None

    # What all have in common

    def by_store(self, written: Any) -> dict[str, Any]:
        """What `write` returned, by store."""
        name, *more = self.stores()
        return written if more else {name: written}

    @property
    def bags(self) -> dict[str, EntryStore]:
        """The stores that hold entries."""
        stores = self.stores().items()
        return {name: store for name, store in stores if isinstance(store, EntryStore)}

    @property
    def states(self) -> dict[str, StateStore]:
        """The stores that hold states."""
        stores = self.stores().items()
        return {name: store for name, store in stores if isinstance(store, StateStore)}

    def written(
        self, d_model: int, batch: int, length: int, dtype: jnp.dtype
    ) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Shapes and types of the entries of `length` tokens by store, from `write` itself."""
        return _written(self, d_model, batch, length, dtype)

    def describe(self) -> str:
        """The fields on one line."""
        shown = [
            field.name if dataclasses.is_dataclass(value) else f"{field.name} {value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) not in (None, ())
            and field.name not in ("kind", "position")
        ]
        return f"{getattr(self, 'kind', type(self).__name__)} ({', '.join(shown)})"


@functools.lru_cache(256)
def _written(
    mixer: Mixer, d_model: int, batch: int, length: int, dtype: jnp.dtype
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    shapes = jax.eval_shape(
        mixer.write,
        abstract(mixer.write_params(d_model), dtype),
        jax.ShapeDtypeStruct((batch, length, d_model), dtype),
        jax.ShapeDtypeStruct((batch, length), jnp.dtype("int32")),
    )
    return mixer.by_store(shapes)
