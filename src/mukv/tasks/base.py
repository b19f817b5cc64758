"""The base class of tasks. A task makes a puzzle (items without filler), and draws the number of
filler tokens before each item.

Sample i is a pure function of (seed, split, i). The puzzle does not depend on the length, so the
same sample at another length is the same puzzle with more filler. Every sequence begins with a
salt, one of three tokens, chosen so that the sum of salt and puzzle, modulo 3, is the number of the
split: no puzzle of one split can occur in another, whatever the seeds. Each of the three salts is
equally frequent in every split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mukv.core.errors import BadInput, unknown_name
from mukv.core.table import Component
from mukv.tasks.draws import Draws
from mukv.tasks.words import FILLER, SALTS, Vocabulary

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ABSENT = -1
"""Id at a place of a puzzle where a row has no token."""
LONGEST = 1 << 30
"""Most tokens of a sequence."""


class Puzzle(NamedTuple):
    """Rows of items without filler.

    tokens: ids; `ABSENT` where a row has no token
    begins: true at places before which filler may be inserted
    start, stop: range of places of each answer; equal if a row does not have the answer
    fact: first place of the item that determines the answer; if several items do, of the last
    """

    tokens: Int[np.ndarray, "row place"]
    begins: Bool[np.ndarray, " place"]
    start: Int[np.ndarray, " answer"] | Int[np.ndarray, "row answer"]
    stop: Int[np.ndarray, " answer"] | Int[np.ndarray, "row answer"]
    fact: Int[np.ndarray, " answer"] | Int[np.ndarray, "row answer"]


class Samples(NamedTuple):
    """Rows of exactly `length` tokens.

    tokens: ids, int32
    start, stop: range of each answer, tokens[start:stop]; equal if a row does not have the answer
    fact: index of the first token of the fact that determines the answer
    """

    tokens: Int[np.ndarray, "row token"]
    start: Int[np.ndarray, "row answer"]
    stop: Int[np.ndarray, "row answer"]
    fact: Int[np.ndarray, "row answer"]

    @property
    def graded(self) -> Bool[np.ndarray, "row token"]:
        """True at tokens of answers; each is predicted from the tokens before it."""
        rows, length = self.tokens.shape
        edges = np.zeros((rows, length + 1), np.int32)
        row = np.arange(rows)[:, None]
        np.add.at(edges, (row, self.start), 1)
        np.add.at(edges, (row, self.stop), -1)
        return edges.cumsum(axis=1)[:, :-1] > 0

    @property
    def present(self) -> Bool[np.ndarray, "row answer"]:
        """True at answers that the row has."""
        return self.stop > self.start

    def right(self, predicted: Int[np.ndarray, "row token"]) -> Bool[np.ndarray, "row answer"]:
        """Return which answers are predicted correctly in all their tokens.

        predicted: predicted token at each place
        """
        wrong = (predicted != self.tokens) & self.graded
        before = np.cumsum(np.pad(wrong, ((0, 0), (1, 0))), axis=1)
        row = np.arange(len(self.tokens))[:, None]
        return (before[row, self.stop] == before[row, self.start]) & self.present

    @property
    def distance(self) -> Int[np.ndarray, "row answer"]:
        """Number of tokens from the fact to its answer."""
        return self.start - self.fact

    @property
    def depth(self) -> Float[np.ndarray, "row answer"]:
        """Relative position of the fact: 0 at the beginning of the sequence, 1 at its end."""
        return self.fact / self.tokens.shape[1]


@dataclass(frozen=True)
class Task(Component, ABC):
    """Base class of the tasks.

    facts: number of facts to remember; each task defines what a fact is
    filler: number of different filler words; 1 repeats one word
    """

    facts: int = 4
    filler: int = 16

    fewest: ClassVar[Mapping[str, int]] = {}
    """Smallest value of each numeric parameter."""
    ends: ClassVar[int] = 0
    """Number of tokens that mark the end of each answer."""

    def __post_init__(self) -> None:
        for name, low in {"facts": 1, "filler": 1, **self.fewest}.items():
            if getattr(self, name) < low:
                raise BadInput(name, getattr(self, name), f"at least {low}")
        if self.filler > len(FILLER):
            raise BadInput("filler", self.filler, f"at most {len(FILLER)} words")
        self.check()

    def check(self) -> None:
        """Raise BadInput for parameters that contradict each other."""

    # Methods that each task defines

    @abstractmethod
    def symbols(self) -> dict[str, Sequence[str]]:
        """Return the text of each token of the task's own groups, in the order of the ids."""

    @abstractmethod
    def puzzle(self, draws: Draws) -> Puzzle:
        """Make the puzzles of many samples, one row each."""

    @property
    @abstractmethod
    def choices(self) -> Int[np.ndarray, " choice"]:
        """Ids that may occur in an answer, all equally likely."""

    def gaps(
        self, draws: Draws, items: int, free: Int[np.ndarray, "row 1"]
    ) -> Int[np.ndarray, "row item"]:
        """Draw how many filler tokens are before each item, counted from the start of the sequence.

        items: number of items
        free: number of filler tokens of the sequence

        By default the last item ends the sequence and the others are uniformly distributed before
        it.
        """
        inner = np.sort(draws.integers(free + 1, items - 1), axis=1)
        return np.concatenate([inner, free], axis=1)

    def fill(self, draws: Draws, length: int) -> Int[np.ndarray, "row token"]:
        """Return rows of `length` filler tokens."""
        return self.vocabulary.filler + draws.small(self.filler, length)

    def chance(self, samples: Samples) -> float:
        """Return the expected fraction of correct answers of random guesses that have the form and
        length of the answers.
        """
        width = (samples.stop - samples.start)[samples.present] - self.ends
        return float(np.mean(float(len(self.choices)) ** -width))

    def guess(self, samples: Samples, draws: Draws) -> Int[np.ndarray, "row token"]:
        """Return the rows with every answer replaced by a random guess, as `chance` assumes."""
        drawn = self.choices[draws.integers(len(self.choices), samples.tokens.shape[1])]
        guessed = samples._replace(stop=samples.stop - self.ends).graded
        return np.where(guessed, drawn, samples.tokens).astype(np.int32)

    # Methods that follow from these definitions

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Ids and text of all tokens."""
        return Vocabulary({"salt": SALTS, "filler": self.filler_words(), **self.symbols()})

    def filler_words(self) -> Sequence[str]:
        """Return the text of each filler token."""
        return [f" {word}" for word in FILLER[: self.filler]]

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.vocabulary.spelling)

    @cached_property
    def smallest(self) -> int:
        """Number of tokens of the shortest sequence that holds every puzzle."""
        return 1 + self.puzzle(Draws.of(0, 0, np.arange(1))).tokens.shape[1]

    def check_length(self, length: int) -> None:
        """Raise BadInput for a length that does not hold every puzzle."""
        if not self.smallest <= length <= LONGEST:
            allowed = (
                f"at least {self.smallest} tokens for {type(self).__name__} with {self.facts} facts"
            )
            raise BadInput("length", length, allowed)

    def sample(self, length: int, seed: int, split: Split, i: int) -> Samples:
        """Make sample `i`, as one row."""
        return self.batch(length, seed, split, np.array([i]))

    def batch(
        self, length: int, seed: int, split: Split, indices: Int[np.ndarray, " row"]
    ) -> Samples:
        """Make the samples with these indices. Raises BadInput for a length that is too short."""
        self.check_length(length)
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        number = SPLITS.index(split)
        draws = Draws.of(seed, number, np.asarray(indices))
        puzzle = self.puzzle(draws.stream("puzzle"))
        layout = draws.stream(f"length {length}")
        row = np.arange(len(draws.keys))[:, None]

        in_use = puzzle.tokens != ABSENT
        end = 1 + in_use.sum(axis=1, keepdims=True)
        cumulated = self.gaps(layout, int(puzzle.begins.sum()), length - end)
        item = np.cumsum(puzzle.begins) - 1
        at = np.cumsum(in_use, axis=1) + cumulated[:, item]

        tokens = self.fill(layout, length).astype(np.int32)
        flat = (at + row * length)[in_use]
        tokens.reshape(-1)[flat] = puzzle.tokens[in_use]
        total = np.where(in_use, puzzle.tokens, 0).sum(axis=1)
        tokens[:, 0] = (number - total) % len(SALTS)

        present = puzzle.stop > puzzle.start
        start = at[row, puzzle.start]
        # One past the answer's last token, because the place after it may belong to another item.
        stop = np.where(present, at[row, np.maximum(puzzle.stop - 1, 0)] + 1, start)
        return Samples(tokens, start, stop, at[row, puzzle.fact])

    def content(self, tokens: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
        """Return the tokens of a row without salt and filler."""
        return tokens[tokens >= self.vocabulary.filler + self.filler]

    def render(self, tokens: Int[np.ndarray, " token"]) -> str:
        """Return the text of some tokens."""
        spelling = self.vocabulary.spelling
        return "".join(spelling[token] for token in tokens)

    def questions(self, samples: Samples, row: int = 0) -> tuple[str, list[str]]:
        """Return a row as text with " ?" for each answer, and the answers in order."""
        text, answers, done = [], [], 0
        for start, stop in zip(samples.start[row], samples.stop[row], strict=True):
            if stop > start:
                text += [self.render(samples.tokens[row, done:start]), " ?"]
                answers.append(self.render(samples.tokens[row, start:stop]))
                done = stop
        return "".join([*text, self.render(samples.tokens[row, done:])]), answers


def consecutive(widths: Sequence[int]) -> tuple[Bool[np.ndarray, " place"], list[int]]:
    """Return where consecutive items of these widths begin, as a mask and as places."""
    edges = np.cumsum([0, *widths])
    begins = np.zeros(edges[-1], bool)
    begins[edges[:-1]] = True
    return begins, edges[:-1].tolist()
