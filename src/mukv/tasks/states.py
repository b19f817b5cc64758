"""Tasks with a state that instructions change: flip-flop and counting.

In the flip-flop language (Liu et al. 2023, "Exposing attention glitches") instructions write,
ignore and read a bit. In counting (Golovneva et al. 2024, CoPE) variables are set to zero and
incremented, among filler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from mukv.core.errors import BadInput
from mukv.tasks.base import ABSENT, Puzzle, Task, consecutive
from mukv.tasks.draws import Draws
from mukv.tasks.words import invented


@dataclass(frozen=True)
class FlipFlop(Task):
    """Recall the last written bit: each instruction has a bit, and a read has that of the last
    write.

    facts: number of reads
    writes: number of writes; the first instruction is a write
    filler: must be 1; the filler is `ignore` instructions, whose number grows with the length
    """

    kind: Literal["flip_flop"] = "flip_flop"
    facts: int = 4
    writes: int = 4
    filler: int = 1

    fewest: ClassVar = {"writes": 1}

    def check(self) -> None:
        if self.filler != 1:
            raise BadInput("filler", self.filler, "must be 1: the filler is `ignore` instructions")

    def symbols(self) -> dict[str, Sequence[str]]:
        return {"write": ["\nwrite"], "read": ["\nread"], "bit": [" 0", " 1"]}

    def filler_words(self) -> Sequence[str]:
        return ["\nignore"]

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.bit + np.arange(2)

    def puzzle(self, draws: Draws) -> Puzzle:
        ids, rows, count = self.vocabulary, draws.rows, self.writes + self.facts
        # The first instruction is a write and the last a read; those between are shuffled.
        inner = np.arange(count - 2) >= self.writes - 1
        reads = np.zeros((rows, count), bool)
        reads[:, 1:-1] = inner[draws.order(count - 2)]
        reads[:, -1] = True
        written = draws.integers(2, count)
        place = np.arange(count)
        latest = np.maximum.accumulate(np.where(reads, 0, place), axis=1)
        row = np.arange(rows)[:, None]
        bit = ids.bit + written[row, latest]
        tokens = np.stack([np.where(reads, ids.read, ids.write), bit], axis=-1)
        begins, _ = consecutive([2] * count)
        where = np.nonzero(reads)[1].reshape(rows, self.facts)
        start = 2 * where + 1
        return Puzzle(tokens.reshape(rows, -1), begins, start, start + 1, 2 * latest[row, where])

    def gaps(
        self, draws: Draws, items: int, free: Int[np.ndarray, "row 1"]
    ) -> Int[np.ndarray, "row item"]:
        # Filler is whole instructions; if one token is left over, it is an `ignore` without a bit
        # at the beginning.
        return super().gaps(draws, items, free // 2) * 2 + free % 2

    def fill(self, draws: Draws, length: int) -> Int[np.ndarray, "row token"]:
        row = np.full((draws.rows, length), self.vocabulary.filler)
        first = 2 + (length - 1) % 2
        places = np.arange(first, length, 2)
        row[:, places] = self.vocabulary.bit + draws.small(2, len(places))
        return row

    def content(self, tokens: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
        odd = 1 + (len(tokens) - 1) % 2
        pairs = tokens[odd:].reshape(-1, 2)
        return pairs[pairs[:, 0] != self.vocabulary.filler].reshape(-1)


@dataclass(frozen=True)
class Counting(Task):
    """Count the increments of variables since they were last set to zero; at the end some variables
    are asked, one after the other.

    facts: number of variables that are asked
    distractors: number of variables that are not asked
    largest: largest count; all counts are equally likely
    resets: number of times that each variable is set to zero again, at random places
    """

    kind: Literal["counting"] = "counting"
    facts: int = 2
    distractors: int = 1
    largest: int = 9
    resets: int = 1
    filler: int = 1

    fewest: ClassVar = {"distractors": 0, "largest": 1, "resets": 0}

    def filler_words(self) -> Sequence[str]:
        return ["\npass", *super().filler_words()[1:]]

    def symbols(self) -> dict[str, Sequence[str]]:
        names = invented(self.facts + self.distractors)
        return {
            "set": [f"\nset {name}" for name in names],
            "add": [f"\nadd {name}" for name in names],
            "ask": [f"\nask {name}:" for name in names],
            "count": [f" {number}" for number in range(self.largest + 1)],
        }

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.count + np.arange(self.largest + 1)

    def puzzle(self, draws: Draws) -> Puzzle:
        ids, rows, variables = self.vocabulary, draws.rows, self.facts + self.distractors
        row = np.arange(rows)[:, None]
        # A "life" of a variable is a reset followed by as many increments as its count, which is at
        # most `largest`.
        lives = variables * (self.resets + 1)
        count = draws.integers(self.largest + 1, lives)
        step = np.arange(self.largest + 1)
        whose = np.arange(lives) % variables
        life = np.where(step == 0, ids.set, ids.add) + whose[:, None]
        life = np.where(step <= count[..., None], life, ABSENT).reshape(rows, lives, -1)
        # Interleave the steps of different variables at random and keep the order of each: shuffle
        # the variables' indices, then put the n-th step of a variable at the n-th occurrence of its
        # index.
        own = life.reshape(rows, self.resets + 1, variables, -1).swapaxes(1, 2)
        own = own.reshape(rows, -1)
        turns = np.repeat(np.arange(variables), own.shape[1] // variables)
        turns = turns[draws.order(own.shape[1])]
        nth = np.argsort(np.argsort(turns, axis=1, kind="stable"), axis=1)
        steps = own[row, nth]
        asked = draws.order(variables)[:, : self.facts]
        answer = count.reshape(rows, self.resets + 1, variables)[:, -1][row, asked]
        questions = np.stack([ids.ask + asked, ids.count + answer], axis=-1).reshape(rows, -1)
        tokens = np.concatenate([steps, questions], axis=1)
        begins, at = consecutive([1] * steps.shape[1] + [2 * self.facts])
        start = at[-1] + 1 + 2 * np.arange(self.facts)
        last = ids.set + asked
        newest = np.where(steps[:, None] == last[..., None], np.arange(steps.shape[1]), -1)
        return Puzzle(tokens, begins, start, start + 1, newest.max(axis=2))
