"""Associative recall: a text has pairs of key and value, then keys whose values are asked.

The tasks are multi-query associative recall with its compositional and forgetting forms (Arora et
al. 2024, "Zoology"; their code), and the noisy and fuzzy recall of MAD (Poli et al. 2024).
"""

from __future__ import annotations

import math
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
class PairTask(Task):
    """Base class: recall the value of a key; keys have one or two tokens, values have one.

    facts: number of pairs that are asked
    distractors: number of pairs that are not asked
    updates: number of asked keys that later get another value; the last value is the answer
    parts: number of tokens of a key. With 2, keys are all pairs of two sets of tokens, so that
        neither token alone identifies a key
    keys: number of different keys
    values: number of different values
    """

    distractors: int = 0
    updates: int = 0
    parts: int = 1
    keys: int = 64
    values: int = 64

    fewest: ClassVar = {"distractors": 0, "updates": 0, "parts": 1, "keys": 1, "values": 2}

    def check(self) -> None:
        shown = self.facts + self.distractors
        if shown > self.keys:
            raise BadInput("keys", self.keys, f"at least facts + distractors ({shown})")
        if self.updates > self.facts:
            raise BadInput("updates", self.updates, f"at most facts ({self.facts})")
        if self.parts > 2:
            raise BadInput("parts", self.parts, "1 or 2")
        if self.parts == 2 and self.side**2 != self.keys:
            raise BadInput("keys", self.keys, "a square number where parts is 2")

    @property
    def side(self) -> int:
        """Number of different tokens at each place of a key."""
        return math.isqrt(self.keys) if self.parts == 2 else self.keys

    def symbols(self) -> dict[str, Sequence[str]]:
        words = invented(self.side * self.parts)
        first = [f"\n{word}" for word in words[: self.side]]
        last = [f" {word} =" for word in words[self.side :]]
        if self.parts == 1:
            return {"key": [f"{word} =" for word in first], "value": numbers(self.values)}
        return {"key": [*first, *last], "value": numbers(self.values)}

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.value + np.arange(self.values)

    def puzzle(self, draws: Draws) -> Puzzle:
        shown, width = self.facts + self.distractors, self.parts + 1
        key = self._key_tokens(draws.distinct(shown, self.keys))
        value = self.vocabulary.value + draws.integers(self.values, shown + self.updates)
        # Pairs to ask are drawn at random; the first `updates` of them are updated.
        asked = draws.order(shown)[:, : self.facts]
        source = np.concatenate(
            [np.tile(np.arange(shown), (draws.rows, 1)), asked[:, : self.updates]], axis=1
        )
        row = np.arange(draws.rows)[:, None]
        pairs = np.concatenate([key[row, source], value[:, :, None]], axis=2)
        latest = asked.copy()
        latest[:, : self.updates] = shown + np.arange(self.updates)
        turn = draws.order(self.facts)
        asked, latest = asked[row, turn], latest[row, turn]
        questions = np.concatenate([key[row, asked], value[row, latest][:, :, None]], axis=2)
        tokens = np.concatenate([pairs, questions], axis=1).reshape(draws.rows, -1)
        begins, at = consecutive([width] * (shown + self.updates + self.facts))
        answers = np.array(at[-self.facts :]) + self.parts
        return Puzzle(tokens, begins, answers, answers + 1, latest * width)

    def _key_tokens(self, number: Int[np.ndarray, "row key"]) -> Int[np.ndarray, "row key part"]:
        if self.parts == 1:
            return self.vocabulary.key + number[..., None]
        halves = np.stack([number // self.side, self.side + number % self.side], axis=-1)
        return self.vocabulary.key + halves


@dataclass(frozen=True)
class Mqar(PairTask):
    """Recall the values of keys. All pairs come first; the questions follow at distances d with a
    density proportional to 1 / d.
    """

    kind: Literal["mqar"] = "mqar"

    def gaps(
        self, draws: Draws, items: int, free: Int[np.ndarray, "row 1"]
    ) -> Int[np.ndarray, "row item"]:
        front = np.zeros((draws.rows, items - self.facts), np.int64)
        far = np.sort((free + 1.0) ** draws.uniform(self.facts) - 1, axis=1).astype(np.int64)
        return np.concatenate([front, far], axis=1)


@dataclass(frozen=True)
class NoisyRecall(PairTask):
    """Recall values of keys, with filler anywhere between pairs and questions."""

    kind: Literal["noisy_recall"] = "noisy_recall"


@dataclass(frozen=True)
class FuzzyRecall(Task):
    """Recall values of keys, which have one to `motif` symbols each; the end mark of a value is
    part of the answer.

    facts: number of pairs that are asked
    distractors: number of pairs that are not asked
    motif: largest number of symbols of a key or value
    keys: number of different symbols that keys are made of, at most 26
    values: number of different symbols that values are made of
    """

    kind: Literal["fuzzy_recall"] = "fuzzy_recall"
    distractors: int = 4
    motif: int = 3
    keys: int = 6
    values: int = 16

    fewest: ClassVar = {"distractors": 0, "motif": 1, "keys": 2, "values": 1}
    ends: ClassVar = 1

    def check(self) -> None:
        if self.keys > 26:
            raise BadInput("keys", self.keys, "at most 26 letters")
        if self.facts + self.distractors > self.different:
            raise BadInput(
                "facts",
                self.facts,
                f"with distractors ({self.distractors}) at most the {self.different} different "
                f"keys of up to {self.motif} of {self.keys} symbols",
            )

    @property
    def different(self) -> int:
        """Number of different keys."""
        return sum(self.keys**length for length in range(1, self.motif + 1))

    def symbols(self) -> dict[str, Sequence[str]]:
        letters = [f" {chr(ord('A') + number)}" for number in range(self.keys)]
        return {"key": letters, "equals": [" ="], "value": numbers(self.values), "end": [";\n"]}

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.value + np.arange(self.values)

    def puzzle(self, draws: Draws) -> Puzzle:
        shown, width = self.facts + self.distractors, 2 * self.motif + 2
        place = np.arange(self.motif)
        number = draws.distinct(shown, self.different)
        # Keys are numbered by length: those of one symbol first, then those of two, and so on.
        edges = np.cumsum([0, *(self.keys**length for length in range(1, self.motif + 1))])
        size = np.searchsorted(edges, number, side="right")
        digits = (number - edges[size - 1])[..., None] // self.keys**place % self.keys
        key = np.where(place < size[..., None], self.vocabulary.key + digits, ABSENT)
        drawn = self.vocabulary.value + draws.integers(self.values, shown, self.motif)
        size = 1 + draws.integers(self.motif, shown)
        value = np.where(place < size[..., None], drawn, ABSENT)
        mark, end = (
            np.full((draws.rows, shown, 1), token)
            for token in (self.vocabulary.equals, self.vocabulary.end)
        )
        pairs = np.concatenate([key, mark, value, end], axis=2)
        row = np.arange(draws.rows)[:, None]
        asked = draws.order(shown)[:, : self.facts]
        tokens = np.concatenate([pairs, pairs[row, asked]], axis=1).reshape(draws.rows, -1)
        widths = [width] * shown + [width] * self.facts
        begins, at = consecutive(widths)
        # No filler between the questions, which are at the end.
        begins[at[shown + 1 :]] = False
        answers = np.array(at[shown:]) + self.motif + 1
        return Puzzle(tokens, begins, answers, answers + self.motif + 1, asked * width)


def numbers(count: int) -> list[str]:
    """Return the text of `count` numbers of equal width."""
    first = 10 ** max(2, len(str(count)))
    return [f" {first + number}" for number in range(count)]
