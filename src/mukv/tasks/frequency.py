"""Tasks of counting words: common words and frequent words (after RULER, Hsieh et al. 2024).

In RULER all samples have the same order, so that the common words are always at the same places; in
these tasks each sample has its own order. The question defines the order of the words in an answer,
so that an answer is right or wrong as a whole.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from mukv.core.errors import BadInput
from mukv.tasks.base import Puzzle, Samples, Task, consecutive
from mukv.tasks.draws import Draws
from mukv.tasks.words import invented


@dataclass(frozen=True)
class Mentions(Task):
    """Base class: name the words that a text mentions more often than others.

    facts: number of words in the answer
    distractors: number of words that are mentioned less often
    words: number of different words in the vocabulary
    """

    facts: int = 3
    distractors: int = 6
    words: int = 64

    fewest: ClassVar = {"distractors": 0, "often": 1, "seldom": 1, "words": 1}
    question: ClassVar[str]
    """Text of the question, formatted with the number of words."""

    def check(self) -> None:
        if self.facts + self.distractors > self.words:
            shown = self.facts + self.distractors
            raise BadInput("words", self.words, f"at least facts + distractors ({shown})")

    def symbols(self) -> dict[str, Sequence[str]]:
        return {
            "ask": ["\n" + self.question.format(self.facts)],
            "word": [f" {word.upper()}" for word in invented(self.words)],
        }

    @property
    @abstractmethod
    def mentions(self) -> list[int]:
        """Number of mentions of each word; the words of the answer come first."""

    @abstractmethod
    def answer_order(self, first: Int[np.ndarray, "row fact"]) -> Int[np.ndarray, "row fact"]:
        """Return the indices of the answer's words in the order of the answer.

        first: place of each word's first mention
        """

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.word + np.arange(self.words)

    def chance(self, samples: Samples) -> float:
        """Return the expected fraction of correct answers of random guesses of different words."""
        return float(1 / np.prod(np.arange(self.words, self.words - self.facts, -1, dtype=float)))

    def guess(self, samples: Samples, draws: Draws) -> Int[np.ndarray, "row token"]:
        guessed = samples.tokens.copy()
        guessed[samples.graded] = self.vocabulary.word + draws.distinct(
            self.facts, self.words
        ).reshape(-1)
        return guessed

    def puzzle(self, draws: Draws) -> Puzzle:
        ids, rows = self.vocabulary, draws.rows
        shown = len(self.mentions)
        total = sum(self.mentions)
        word = ids.word + draws.distinct(shown, self.words)
        row = np.arange(rows)[:, None]
        whose = np.repeat(np.arange(shown), self.mentions)[draws.order(total)]
        # Sort mentions by word, each word's in the order of the text: first mentions are then at
        # the edges between words.
        where = np.argsort(whose, axis=1, kind="stable")
        edges = np.cumsum([0, *self.mentions])
        first, last = where[:, edges[: self.facts]], where[:, edges[1 : self.facts + 1] - 1]
        order = self.answer_order(first)
        answer = word[row, order]
        ask = np.full((rows, 1), ids.ask)
        tokens = np.concatenate([word[row, whose], ask, answer], axis=1)
        begins, at = consecutive([1] * total + [1 + self.facts])
        start = np.array([at[-1] + 1])
        return Puzzle(tokens, begins, start, start + self.facts, last.max(axis=1, keepdims=True))


@dataclass(frozen=True)
class CommonWords(Mentions):
    """Name the common words in the order of their first mention; all other words are rare.

    often: mentions of each common word
    seldom: mentions of each rare word
    """

    kind: Literal["common_words"] = "common_words"
    often: int = 5
    seldom: int = 2

    question: ClassVar = "The {} most common, as they first appear:"

    def check(self) -> None:
        super().check()
        if self.seldom >= self.often:
            raise BadInput("seldom", self.seldom, f"fewer than often ({self.often})")

    @property
    def mentions(self) -> list[int]:
        return [self.often] * self.facts + [self.seldom] * self.distractors

    def answer_order(self, first: Int[np.ndarray, "row fact"]) -> Int[np.ndarray, "row fact"]:
        return np.argsort(first, axis=1)


@dataclass(frozen=True)
class FrequentWords(Mentions):
    """Name the most frequent words, the most frequent first; frequencies fall as a power of the
    rank.

    The frequencies of the words of the answer are all different.

    often: mentions of the word of rank 1
    seldom: smallest number of mentions of any word
    exponent: mentions are proportional to rank ** -exponent
    """

    kind: Literal["frequent_words"] = "frequent_words"
    often: int = 12
    seldom: int = 1
    exponent: float = 1.0

    question: ClassVar = "The {} most frequent, the most frequent first:"

    def check(self) -> None:
        super().check()
        if self.exponent <= 0:
            raise BadInput("exponent", self.exponent, "greater than 0")
        least = self.facts + self.seldom
        if self.often < least:
            raise BadInput("often", self.often, f"at least {least} for {self.facts} different")

    @property
    def mentions(self) -> list[int]:
        shown = self.facts + self.distractors
        ideal = [round(self.often * rank**-self.exponent) for rank in range(1, shown + 1)]
        counts: list[int] = []
        for rank, count in enumerate(ideal):
            floor = self.seldom + max(self.facts - rank, 0)
            limit = counts[-1] - (rank <= self.facts) if counts else self.often
            counts.append(max(min(count, limit), floor))
        return counts

    def answer_order(self, first: Int[np.ndarray, "row fact"]) -> Int[np.ndarray, "row fact"]:
        return np.tile(np.arange(self.facts), (len(first), 1))
