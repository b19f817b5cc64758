"""Tasks on order and position: selective copying and indirect indexing.

Selective copying follows Mamba and MAD (Gu and Dao 2023; Poli et al. 2024). Indirect indexing
follows PoPE (Gopalakrishnan et al. 2025): it asks for the symbol n places after (or before) a given
symbol of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from mukv.core.errors import BadInput
from mukv.tasks.base import Puzzle, Task, consecutive
from mukv.tasks.draws import Draws
from mukv.tasks.words import invented


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """Copy the symbols that are scattered in filler, in order, as one answer.

    facts: number of symbols
    values: number of different symbols
    """

    kind: Literal["selective_copy"] = "selective_copy"
    facts: int = 8
    values: int = 16

    fewest: ClassVar = {"values": 2}

    def symbols(self) -> dict[str, Sequence[str]]:
        return {
            "ask": ["\nCopy all in capitals:"],
            "value": [f" {word.upper()}" for word in invented(self.values)],
        }

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.value + np.arange(self.values)

    def puzzle(self, draws: Draws) -> Puzzle:
        value = self.vocabulary.value + draws.integers(self.values, self.facts)
        ask = np.full((draws.rows, 1), self.vocabulary.ask)
        tokens = np.concatenate([value, ask, value], axis=1)
        begins, at = consecutive([1] * self.facts + [1 + self.facts])
        start = np.array([at[-1] + 1])
        return Puzzle(tokens, begins, start, start + self.facts, np.array([self.facts - 1]))


@dataclass(frozen=True)
class IndirectIndexing(Task):
    """Find the symbol that is n places after (or before) a given symbol in a list.

    facts: number of questions
    listed: number of symbols in the list
    farthest: largest n
    values: number of symbols in the alphabet
    """

    kind: Literal["indirect_indexing"] = "indirect_indexing"
    facts: int = 2
    listed: int = 16
    farthest: int = 4
    values: int = 32

    fewest: ClassVar = {"listed": 2, "farthest": 1, "values": 2}

    def check(self) -> None:
        if self.listed > self.values:
            raise BadInput("listed", self.listed, f"at most values ({self.values})")
        if self.farthest >= self.listed:
            raise BadInput("farthest", self.farthest, f"fewer than listed ({self.listed})")

    def symbols(self) -> dict[str, Sequence[str]]:
        places = range(1, self.farthest + 1)
        return {
            "list": ["\nThe list:"],
            "ask": ["\nFrom"],
            "after": [f" {places} on:" for places in places],
            "before": [f" {places} back:" for places in places],
            "value": [f" {word.upper()}" for word in invented(self.values)],
        }

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.value + np.arange(self.values)

    def puzzle(self, draws: Draws) -> Puzzle:
        ids, rows = self.vocabulary, draws.rows
        value = ids.value + draws.distinct(self.listed, self.values)
        by = 1 + draws.integers(self.farthest, self.facts)
        back = draws.integers(2, self.facts) == 1
        # The place in question is drawn among those that have such a neighbour.
        room = draws.integers(self.listed - by, self.facts)
        source = np.where(back, room + by, room)
        target = np.where(back, source - by, source + by)
        row = np.arange(rows)[:, None]
        shift = np.where(back, ids.before, ids.after) + by - 1
        ask = np.full_like(shift, ids.ask)
        questions = np.stack([ask, value[row, source], shift, value[row, target]], axis=-1)
        begin = np.full((rows, 1), ids.list)
        tokens = np.concatenate([begin, value, questions.reshape(rows, -1)], axis=1)
        begins, at = consecutive([1 + self.listed, 4 * self.facts])
        start = at[-1] + 3 + 4 * np.arange(self.facts)
        return Puzzle(tokens, begins, start, start + 1, 1 + target)
