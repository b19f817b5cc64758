"""Interfaces of a run's input: batches of two splits, and their tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from mukv.data.batches import Batch, Batches
from mukv.data.tokenizer import AnyTokenizer
from mukv.data.tokens import TokenFile

Half = Literal["train", "validation"]


class Source(Protocol):
    """Batches of one split, each a pure function of its number; see `Batches`."""

    def at(self, step: int, host: int = 0, hosts: int = 1) -> Batch: ...

    def once(self, limit: int | None = None, host: int = 0, hosts: int = 1) -> Iterator[Batch]: ...


class Origin(Protocol):
    """Identity of a run's input: its tokenizer, and a fingerprint of its content."""

    @property
    def tokenizer(self) -> AnyTokenizer: ...

    @property
    def fingerprint(self) -> str: ...


class Feed(Origin, Protocol):
    """Input of a run: its identity, and the batches of each split."""

    def source(self, split: Half, seed: int, batch: int, length: int) -> Source: ...


@dataclass(frozen=True, eq=False)
class TextFeed:
    """Batches of a token file.

    packing: see `Batches`
    """

    tokens: TokenFile
    packing: Literal["packed", "contiguous"]

    @property
    def tokenizer(self) -> AnyTokenizer:
        return self.tokens.tokenizer

    @property
    def fingerprint(self) -> str:
        return self.tokens.fingerprint

    def source(self, split: Half, seed: int, batch: int, length: int) -> Source:
        return Batches(self.tokens, seed, batch, length, split, self.packing)
