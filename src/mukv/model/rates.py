"""The rates of the stacks of a model, and the sizes of their caches."""

from __future__ import annotations

from typing import NamedTuple

from mukv.model.stack import Stack


class StackRate(NamedTuple):
    """Minimum mean number of a model's tokens per vector that one of its stacks processes.

    entry: tokens per vector that is written
    query: tokens per vector that reads
    """

    entry: int = 1
    query: int = 1


class Capacity(NamedTuple):
    """Cache sizes of one stack, per row.

    stack: the stack
    length: capacity of the bodies, in tokens of the stack
    tail: capacity of the tails, in tokens of the stack
    by_row: whether some steps keep the tokens of some rows only (see `Cache.by_row`)
    """

    stack: Stack
    length: int
    tail: int
    by_row: bool = False
