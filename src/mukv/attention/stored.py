"""Keys and values as a cache stores them, for kernels that decode them block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mukv.core.typing import Array, Float, Int

StoredRows = dict[str, Array]
"""StoredRows [row width] of the arrays of a tensor, by part."""
BlockDecoder = Callable[[StoredRows, int], Float[Array, "slot width"]]
"""Function from the rows of some slots, and the number of these slots, to their numbers."""


@dataclass(frozen=True, eq=False)
class Coded:
    """One tensor of the entries of a bag.

    parts: arrays [batch heads row width] by name; a row belongs to one slot or to a run of slots
    slots: number of slots
    width: of the decoded tensor
    decode: how a kernel decodes a block of slots of one head
    """

    parts: dict[str, Array]
    slots: int
    width: int
    decode: BlockDecoder

    @property
    def heads(self) -> int:
        """Number of heads that are stored."""
        return next(iter(self.parts.values())).shape[1]


@dataclass(frozen=True)
class StoredForm:
    """Keys, in pieces, and values of a bag; where values are a piece of the keys, `value` is that
    piece.

    runs: the runs of slots that are read, in this order: run i begins at slot i * length; None for
        all slots
    length: slots per run
    position: of each slot, negative for an empty one; None where slots have no stored position
    """

    keys: tuple[Coded, ...]
    value: Coded
    runs: Int[Array, "batch heads run"] | None = None
    length: int = 1
    position: Int[Array, "batch heads slot"] | None = None

    @property
    def places(self) -> int:
        """Number of slots that are read."""
        return self.value.slots if self.runs is None else self.runs.shape[-1] * self.length

    @property
    def tensors(self) -> list[Coded]:
        """The tensors, each once."""
        return list({id(each): each for each in (*self.keys, self.value)}.values())


def unchanged(rows: StoredRows, slots: int) -> Float[Array, "slot width"]:
    """Return the rows of a tensor that is stored as it is."""
    return rows["exact"]


def exact(tensor: Float[Array, "batch heads slot width"]) -> Coded:
    """Describe a tensor that is stored as it is."""
    return Coded({"exact": tensor}, tensor.shape[2], tensor.shape[3], unchanged)
