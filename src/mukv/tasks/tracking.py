"""Variable tracking: assignments copy values from name to name (after RULER, Hsieh et al. 2024).

RULER asks for all names that have a value. This task asks for the value of the last name of a
chain, which can't be answered without following every hop.
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
class VariableTracking(Task):
    """Follow chains of assignments to the value of their last name.

    facts: number of chains whose last name is asked
    distractors: number of chains that are not asked
    hops: number of assignments of a chain after the first
    names: number of different names
    values: number of different values
    """

    kind: Literal["variable_tracking"] = "variable_tracking"
    facts: int = 1
    distractors: int = 2
    hops: int = 2
    names: int = 32
    values: int = 64

    fewest: ClassVar = {"distractors": 0, "hops": 0, "names": 1, "values": 2}

    def check(self) -> None:
        needed = (self.facts + self.distractors) * (self.hops + 1)
        if needed > self.names:
            raise BadInput("names", self.names, f"at least {needed}: (hops + 1) in each chain")

    def symbols(self) -> dict[str, Sequence[str]]:
        return {
            "let": ["\nlet"],
            "ask": ["\nask"],
            "equals": [" ="],
            "name": [f" {word}" for word in invented(self.names)],
            "value": [f" {1000 + number}" for number in range(self.values)],
        }

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.value + np.arange(self.values)

    def puzzle(self, draws: Draws) -> Puzzle:
        ids, chains, links = self.vocabulary, self.facts + self.distractors, self.hops + 1
        rows = draws.rows
        name = ids.name + draws.distinct(chains * links, self.names).reshape(rows, chains, links)
        value = ids.value + draws.integers(self.values, chains)
        source = np.concatenate([value[..., None], name[..., :-1]], axis=2)
        let, equals = np.full_like(name, ids.let), np.full_like(name, ids.equals)
        lines = np.stack([let, name, equals, source], axis=-1).reshape(rows, -1, 4)
        # Interleave chains at random and keep the order of each: shuffle the chains' indices, and
        # put the n-th link of a chain at the n-th occurrence of its index.
        whose = np.repeat(np.arange(chains), links)[draws.order(chains * links)]
        mention = np.argsort(np.argsort(whose, axis=1, kind="stable"), axis=1)
        row = np.arange(rows)[:, None]
        lines = lines[row, mention]
        last, answer = name[:, : self.facts, -1], value[:, : self.facts]
        ask, equals = np.full_like(last, ids.ask), np.full_like(last, ids.equals)
        questions = np.stack([ask, last, equals, answer], axis=-1)
        tokens = np.concatenate([lines.reshape(rows, -1), questions.reshape(rows, -1)], axis=1)
        begins, at = consecutive([4] * (chains * links) + [4 * self.facts])
        start = at[-1] + 3 + 4 * np.arange(self.facts)
        # Line that assigns the last name of each asked chain.
        where = np.argsort(mention, axis=1)[:, links - 1 : self.facts * links : links]
        return Puzzle(tokens, begins, start, start + 1, 4 * where)
