"""Mixers: the part of a layer that moves information between tokens.

Attention, compressed attention and recurrences are mixers. A mixer writes tensors for later tokens
into named stores and reads from them. A store is a bag of entries, one for every m tokens
(`EntryStore`), or a state of constant size (`StateStore`). Training computes `read(x, write(x))`;
decoding carries the stores from step to step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention.cores import UNKNOWN, CoreChoice
from mukv.attention.entries import Bag, Entries
from mukv.attention.indexer import EntryChoice
from mukv.attention.mask import Mask
from mukv.core.compute import Compute
from mukv.core.params import abstract
from mukv.core.table import Component
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights

Tensors = dict[str, Array]
Written = dict[str, Tensors]
"""Tensors by name, by name of the store."""
Reported = dict[str, Float[Array, " batch"]] | None
"""Auxiliary float32 numbers per row, by name; see `mukv.model.auxiliary`."""
ENTRIES = "entries"
"""Name of the store of a mixer that has only one."""
DIRECT = "direct"
"""Name under which `write` passes arrays of the new tokens to `read`; no store keeps them."""


@dataclass(frozen=True)
class EntryStore:
    """A bag of entries.

    every: tokens per entry
    window: tokens that a query sees, itself included; None for all

    After n tokens of a document the store holds n // every entries. Entry i has the position of its
    last token, i * every + every - 1, so that one comparison of positions decides causality.
    """

    every: int = 1
    window: int | None = None

    def within(self, window: int | None) -> EntryStore:
        """Return the store with its window limited by the window of the layer."""
        if window is None or (self.window is not None and self.window <= window):
            return self
        return replace(self, window=window)

    def count(self, tokens: Int[Array, "*row"]) -> Int[Array, "*row"]:
        """Return the number of entries after this number of tokens of a document."""
        return tokens if self.every == 1 else tokens // self.every

    def added(
        self, before: Int[Array, " batch"], tokens: Int[Array, "*row"]
    ) -> Int[Array, "*rows"]:
        """Return the number of entries that `tokens` more tokens complete after `before` tokens."""
        if self.every == 1:
            return tokens
        return self.count(before + tokens) - self.count(before)

    def places(self, tokens: int) -> int:
        """Return the maximum number of entries that `tokens` consecutive tokens can complete."""
        return -(-tokens // self.every)

    def room(self, tokens: int) -> int:
        """Return the capacity, in entries, for a document of this number of tokens."""
        held = max(tokens // self.every, 1)
        return held if self.window is None else min(held, self.places(self.window))

    def last_token(self, entry: Int[Array, "*place"]) -> Int[Array, "*place"]:
        """Return the position of an entry (that of its last token) from its number in the
        document.
        """
        return entry if self.every == 1 else entry * self.every + self.every - 1

    def closing(
        self, position: Int[Array, "batch token"]
    ) -> tuple[Int[Array, "batch entry"], Bool[Array, "batch entry"]]:
        """Return the indices of the tokens that complete an entry, in order, and their validity.

        The count of tokens restarts with each document; the tokens after the last complete entry of
        a document have no entry.
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
        """Make a bag of what `write` returned for these tokens.

        tensors: arrays by name, [batch heads places(tokens) width]
        position: position of each token in its document
        segment: number of each token's document; None for one document per row
        """
        valid = None
        if self.every > 1:
            place, valid = self.closing(position)
            valid = valid[:, None]
            position = jnp.take_along_axis(position, place, axis=1)
            if segment is not None:
                segment = jnp.take_along_axis(segment, place, axis=1)
        own = None if segment is None else segment[:, None]
        return Entries(tensors, position[:, None], valid, own, window=self.window, every=self.every)

    def mean_visible(self, tokens: int, most: int | None = None) -> float:
        """Return the number of entries a query sees, averaged over a document of this length.

        most: maximum number of entries that a query reads; None for no maximum
        """

        def closed(last: int) -> int:
            """Return the sum of t // every for t from 1 to `last`."""
            whole = last // self.every
            return self.every * whole * (whole - 1) // 2 + whole * (last - whole * self.every + 1)

        if self.window is not None:
            mean = (closed(tokens) - closed(tokens - min(self.window, tokens))) / tokens
            return mean if most is None else min(mean, most)
        full = tokens if most is None else min(most * self.every, tokens)
        return (closed(full) + (tokens - full) * (most or 0)) / tokens


@dataclass(frozen=True)
class StateStore:
    """Float32 arrays without a token axis, which are zero before the first token.

    shapes: shape of each array by name, without the batch axis
    """

    shapes: Mapping[str, tuple[int, ...]]

    def zeros(self, batch: int) -> Tensors:
        """Return the state before the first token."""
        return {name: jnp.zeros((batch, *shape)) for name, shape in self.shapes.items()}


class Carried(NamedTuple):
    """State that `write` continues from.

    states: arrays by store, as they are after the tokens before the new ones
    added: number of valid new tokens of each row; tokens after these don't change the states
    """

    states: Written
    added: Int[Array, " batch"]


@dataclass(frozen=True)
class Mixer(Component):
    """Base class of mixers; the fields are the YAML keys.

    A mixer is frozen and holds no weights. It declares the weights for writing and for reading
    separately, since a layer that reuses another layer's entries has only those for reading.
    """

    sizes: ClassVar[tuple[str, ...]] = ()
    """Fields that must be counts of at least 1."""
    grows: ClassVar[tuple[str, ...]] = ()
    """Fields that scale with the width of the model."""
    also: ClassVar[tuple[str, ...]] = ()
    """Other names of this kind, in lower case: an error about an unknown kind suggests it."""

    def write_params(self, d_model: int) -> dict[str, Any]:
        """Declare the weights that compute the contents of the stores from tokens."""
        raise NotImplementedError

    def read_params(self, d_model: int) -> dict[str, Any]:
        """Declare the weights that compute the output from tokens and stores."""
        raise NotImplementedError

    def stores(self) -> Mapping[str, EntryStore | StateStore]:
        """Return the stores of a layer by name."""
        return {ENTRIES: EntryStore()}

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> Any:
        """Compute the entries and states that the stores keep for the new tokens.

        x: new tokens after the layer's norm
        position: their positions in their documents
        memory: states to continue from, in prefill and decoding; None in training

        Returns {store: {name: array}}, or the inner dict if there is one store. The arrays of an
        entry store are [batch heads places(tokens) width]: the completed entries in order, then
        arbitrary values. The arrays of a state store are the state after the new tokens; they are
        only needed if `memory` is not None. `read` doesn't receive states: where the output depends
        on them, the dict under DIRECT holds the arrays that `read` needs for these tokens.
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
        direct: Tensors | None = None,
    ) -> tuple[Residual, Reported]:
        """Compute what is added to the residual stream.

        x: tokens after the layer's norm
        position: their positions in their documents
        parts: bags of entries that the tokens read, each with its own window
        mask: which entries each token sees
        compute: settings of the forward pass
        direct: what `write` returned under DIRECT for the same tokens; None for nothing

        Returns the output, and auxiliary numbers such as a penalty (see `mukv.model.auxiliary`) or
        None.
        """
        raise NotImplementedError

    def choose(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        mask: Mask,
        compute: Compute,
    ) -> EntryChoice | None:
        """Choose the entries that each token reads; None for all that it may see.

        The arguments are those of `read`, which chooses by this method unless `mask.choice` already
        says what is read. The choice gets no gradient.
        """
        return None

    def core(
        self,
        queries: int,
        compute: Compute,
        ordered: bool = True,
        shows: str | None = None,
        aligned: bool = False,
        dropped: bool = False,
        context: int = 1,
        unread: str | None = UNKNOWN,
    ) -> CoreChoice | None:
        """Choose the attention core for this many queries per row; None for a mixer without
        softmax.

        ordered: whether the entries of every bag lie in the order of their positions
        shows: why the logits of all pairs are needed at once; None if they are not
        aligned: whether the only bag has one entry per query, written by the query's own token
        dropped: whether entries are dropped between queries
        context: number of devices that the queries of a row are split over
        unread: why a kernel can't read the bags in their stored form; None if it can
        """
        return None

    def step_core(self, d_model: int, compute: Compute) -> CoreChoice | None:
        """Choose the core by which a step of decoding reads a full cache; None for a mixer without
        softmax."""
        return None

    def memory(self) -> Hashable:
        """Return a hashable value that two layers must have in common for one to read the other's
        stores."""
        raise NotImplementedError

    def read_flops(self) -> int:
        """Return the floating-point operations of the forward pass per query and visible entry."""
        return 0

    def pair_flops(
        self, bags: Mapping[str, EntryStore], tokens: int, most: int | None = None
    ) -> float:
        """Return the operations per query that depend on the number of entries: the mean of the
        forward pass over a document in training.

        bags: stores of the layer, with its window applied
        tokens: length of the document
        most: maximum number of entries that a query reads, where another layer chooses them
        """
        return self.read_flops() * sum(
            (bag.mean_visible(tokens, most) for bag in bags.values()), 0.0
        )

    def token_flops(self) -> int:
        """Return the floating-point operations per token of a training forward pass that involve
        neither weights nor entries, such as products of a recurrence with its state.
        """
        return 0

    # Shared methods

    def by_store(self, written: Any) -> dict[str, Any]:
        """Return the result of `write` as a dict by store, also if there is only one store."""
        name, *more = self.stores()
        return written if more else {name: written}

    @property
    def bags(self) -> dict[str, EntryStore]:
        """The stores that hold entries, by name."""
        stores = self.stores().items()
        return {name: store for name, store in stores if isinstance(store, EntryStore)}

    @property
    def states(self) -> dict[str, StateStore]:
        """The stores that hold states, by name."""
        stores = self.stores().items()
        return {name: store for name, store in stores if isinstance(store, StateStore)}

    def written(
        self, d_model: int, batch: int, length: int, dtype: jnp.dtype
    ) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Return the shapes and types that `write` returns for `length` tokens, by store."""
        return _written(self, d_model, batch, length, dtype)

    def describe(self) -> str:
        """Return the kind and the fields on one line."""
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
