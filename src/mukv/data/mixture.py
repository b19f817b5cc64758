"""Batches from several token files in fixed shares: each row comes from one of them.

Rows are dealt in cycles of `CYCLE`. A cycle has a fixed number of rows of each part, spread evenly
over it, so which part a row comes from, and which row of that part it is, follow from the row's
number alone. All rows have the same number of tokens, so shares of rows are shares of tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from mukv.core.errors import BadInput
from mukv.data.batches import Batch, Batches, rows_of
from mukv.data.feed import Half
from mukv.data.tokenizer import AnyTokenizer
from mukv.data.tokens import SPLITS, TokenFile

CYCLE = 1 << 14
"""Rows of a cycle: weights are rounded to multiples of 1 / CYCLE of their sum."""


@dataclass(frozen=True)
class MixturePart:
    """A token file of a mixture, and its share. Raises BadInput.

    path: as `data.path`
    weight: share of the training tokens, relative to the weights of the other parts. A part of
        weight 0 is only validated on
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.path or "\0" in self.path:
            raise BadInput("path", self.path, "a path without NUL characters")
        if not 0 <= self.weight < math.inf:
            raise BadInput("weight", self.weight, "a finite number of at least 0")


def require_shares(weights: Sequence[float], where: str = "mixture") -> None:
    """Raise BadInput for weights that sum to nothing, and for a share below one row of a cycle."""
    total = math.fsum(weights)
    if not 0 < total < math.inf:
        raise BadInput(f"{where}: weights", list(weights), "weights with a finite sum above 0")
    for number, weight in enumerate(weights):
        if 0 < weight < total / CYCLE:
            allowed = f"0, or at least 1/{CYCLE} of the sum of the weights ({total:g})"
            raise BadInput(f"{where}.{number}.weight", weight, allowed)


def dealt(weights: Sequence[float]) -> Int[np.ndarray, " part"]:
    """Return the rows of each part in a cycle: the largest remainders are rounded up, and each
    weight above 0 has at least one row."""
    exact = np.array(weights, float) / math.fsum(weights) * CYCLE
    rows = np.maximum(np.floor(exact), exact > 0).astype(np.int64)
    order = np.argsort(-(exact - rows), kind="stable")
    rows[order[: CYCLE - rows.sum()]] += 1
    return rows


@dataclass(frozen=True, eq=False)
class Mixture:
    """Batches of one split of several token files.

    parts: batches of each token file by name, all with the same rows per batch and tokens per row
    weights: share of each part
    """

    parts: dict[str, Batches]
    weights: tuple[float, ...]

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of each part in a cycle [part]; the part of each row of the cycle [row], and the
        number of the row among those of its part [row]."""
        rows = dealt(self.weights)
        part = np.repeat(np.arange(len(rows)), rows)
        number = np.arange(CYCLE) - np.repeat(np.cumsum(rows) - rows, rows)
        order = np.argsort((number + 0.5) / rows[part], kind="stable")
        return rows, part[order], number[order]

    def at(self, step: int, host: int = 0, hosts: int = 1) -> Batch:
        """Return this host's rows of the training batch of a step; see `Batches.at`."""
        first = next(iter(self.parts.values()))
        cycle, place = np.divmod(rows_of(first.batch, step, host, hosts), CYCLE)
        rows, part, number = self._table
        chosen, index = part[place], cycle * rows[part[place]] + number[place]
        found = [
            (np.flatnonzero(chosen == k), source) for k, source in enumerate(self.parts.values())
        ]
        pieces = [source.training_rows(index[where]) for where, source in found if len(where)]
        order = np.argsort(np.concatenate([where for where, _ in found]), kind="stable")
        return Batch(*(np.concatenate(arrays)[order] for arrays in zip(*pieces, strict=True)))

    def once(self, limit: int | None = None, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        """Yield the windows of one part after another; see `Batches.once`.

        limit: largest number of batches, shared equally; each part has at least one
        """
        for source in self.parts.values():
            yield from source.once(self.share(limit), host, hosts)

    def share(self, limit: int | None) -> int | None:
        """Return the validation batches of each part at most, of `limit` in all."""
        return None if limit is None else max(1, limit // len(self.parts))


@dataclass(frozen=True, eq=False)
class MixtureFeed:
    """Batches of a mixture. Raises BadInput for parts that can't be mixed.

    tokens: token file of each part
    weights: share of each part
    packing: see `Batches`
    """

    tokens: tuple[TokenFile, ...]
    weights: tuple[float, ...]
    packing: Literal["packed", "contiguous"]

    def __post_init__(self) -> None:
        require_shares(self.weights, "data.mixture")
        for number, file in enumerate(self.tokens):
            where = f"data.mixture.{number}.path"
            if file.tokenizer.fingerprint != self.tokenizer.fingerprint:
                stamps = [each.fingerprint[:12] for each in (file.tokenizer, self.tokenizer)]
                allowed = f"the tokenizer of {self.tokens[0].path} ({stamps[1]})"
                raise BadInput(where, f"{file.path} (tokenizer {stamps[0]})", allowed)
            for split in SPLITS:
                count = len(file.split(split).tokens)
                if count < 2:
                    given = f"{file.path}, whose {split} part has {count} tokens"
                    raise BadInput(where, given, "at least 2 tokens")

    @property
    def tokenizer(self) -> AnyTokenizer:
        return self.tokens[0].tokenizer

    @property
    def fingerprint(self) -> str:
        """A hash of the fingerprints of all parts and of the rows of each in a cycle."""
        content = [[file.fingerprint for file in self.tokens], dealt(self.weights).tolist()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def source(self, split: Half, seed: int, batch: int, length: int) -> Mixture:
        made = [Batches(file, seed, batch, length, split, self.packing) for file in self.tokens]
        names = part_names([file.path for file in self.tokens])
        return Mixture(dict(zip(names, made, strict=True)), self.weights)


def part_names(paths: Sequence[Path]) -> list[str]:
    """Return a name of each path: its last component, with its number where two have the same."""
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names)
    ]
