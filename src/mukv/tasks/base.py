"""What a task is: a puzzle without filler, and how much filler stands before each of its items.

Sample i is a pure function of (seed, split, i). Its puzzle does not depend on the length, so that
the same sample at another length is the same puzzle with more filler. Every sequence begins with
a salt, one of three tokens, which makes the sum of salt and puzzle, modulo 3, the number of the
split: no puzzle of one split can occur in another, whatever the seeds. A salt says nothing else:
each is as frequent in every split.
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
from mukv.tasks.draws import Draws
from mukv.tasks.words import FILLER, SALTS, Vocabulary

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
ABSENT = -1
"""In a puzzle: no token stands here."""
LONGEST = 1 << 30


class Puzzle(NamedTuple):
    """Rows without filler.

    tokens: `ABSENT` where a row has none. begins: places before which filler may stand. start,
    stop: places of each answer (equal where a row has no such answer). fact: the place of what
    the answer follows from, the latest where there are several.
    """

    tokens: Int[np.ndarray, "row place"]
    begins: Bool[np.ndarray, " place"]
    start: Int[np.ndarray, " answer"] | Int[np.ndarray, "row answer"]
    stop: Int[np.ndarray, " answer"] | Int[np.ndarray, "row answer"]
    fact: Int[np.ndarray, " answer"] | Int[np.ndarray, "row answer"]


class Samples(NamedTuple):
    """Rows of exactly `length` tokens.

    tokens: int32. start, stop: where each answer stands (tokens[start:stop]); equal where a row
    has no such answer. fact: where the fact begins that it follows from.
    """

    tokens: Int[np.ndarray, "row token"]
    start: Int[np.ndarray, "row answer"]
    stop: Int[np.ndarray, "row answer"]
    fact: Int[np.ndarray, "row answer"]

    @property
    def graded(self) -> Bool[np.ndarray, "row token"]:
        """The tokens that belong to answers; each is predicted from those before it."""
        rows, length = self.tokens.shape
        edges = np.zeros((rows, length + 1), np.int32)
        row = np.arange(rows)[:, None]
        np.add.at(edges, (row, self.start), 1)
        np.add.at(edges, (row, self.stop), -1)
        return edges.cumsum(axis=1)[:, :-1] > 0

    @property
    def present(self) -> Bool[np.ndarray, "row answer"]:
        return self.stop > self.start

    def right(self, predicted: Int[np.ndarray, "row token"]) -> Bool[np.ndarray, "row answer"]:
        """Which answers are right as a whole, where `predicted` says what stands at each place."""
        wrong = (predicted != self.tokens) & self.graded
        before = np.cumsum(np.pad(wrong, ((0, 0), (1, 0))), axis=1)
        row = np.arange(len(self.tokens))[:, None]
        return (before[row, self.stop] == before[row, self.start]) & self.present

    @property
    def distance(self) -> Int[np.ndarray, "row answer"]:
        """Tokens from a fact to its answer."""
        return self.start - self.fact

    @property
    def depth(self) -> Float[np.ndarray, "row answer"]:
        """Where the fact stands: 0 at the beginning, 1 at the end of the sequence."""
        return self.fact / self.tokens.shape[1]


@dataclass(frozen=True)
class Task(ABC):
    """facts: how many there are to be remembered (a family says of what). filler: how many
    different words there are between them; 1 for the same again and again."""

    facts: int = 4
    filler: int = 16

    fewest: ClassVar[Mapping[str, int]] = {}
    """The smallest value of each knob that is a number."""
    ends: ClassVar[int] = 0
    """Tokens at the end of each answer that say only that it is complete."""

    def __post_init__(self) -> None:
        for name, low in {"facts": 1, "filler": 1, **self.fewest}.items():
            if getattr(self, name) < low:
                raise BadInput(name, getattr(self, name), f"at least {low}")
        if self.filler > len(FILLER):
            raise BadInput("filler", self.filler, f"at most {len(FILLER)} words")
        self.check()

    def check(self) -> None:  # noqa: B027  (a family may have nothing to refuse)
        """Raise BadInput for knobs that contradict each other."""

    # What a family says

    @abstractmethod
    def symbols(self) -> dict[str, Sequence[str]]:
        """Its own groups of tokens, in the order of their ids, and how each is written."""

    @abstractmethod
    def puzzle(self, draws: Draws) -> Puzzle:
        """Puzzles of many samples."""

    @property
    @abstractmethod
    def choices(self) -> Int[np.ndarray, " choice"]:
        """The ids that may stand at a place of an answer, all equally likely."""

    def gaps(
        self, draws: Draws, items: int, free: Int[np.ndarray, "row 1"]
    ) -> Int[np.ndarray, "row item"]:
        """Filler before each item, counted from the beginning: it grows along the items up to
        `free`. By default the last item ends the sequence, the others lie anywhere before it."""
        inner = np.sort(draws.integers(free + 1, items - 1), axis=1)
        return np.concatenate([inner, free], axis=1)

    def fill(self, draws: Draws, length: int) -> Int[np.ndarray, "row token"]:
        """A whole row of filler."""
        return self.vocabulary.filler + draws.small(self.filler, length)

    def chance(self, samples: Samples) -> float:
        """Share of the answers that a guesser gets who knows their form and length, but has not
        read the text."""
        width = (samples.stop - samples.start)[samples.present] - self.ends
        return float(np.mean(float(len(self.choices)) ** -width))

    def guess(self, samples: Samples, draws: Draws) -> Int[np.ndarray, "row token"]:
        """The rows with every answer replaced by such a guess."""
        drawn = self.choices[draws.integers(len(self.choices), samples.tokens.shape[1])]
        guessed = samples._replace(stop=samples.stop - self.ends).graded
        return np.where(guessed, drawn, samples.tokens).astype(np.int32)

    # What follows

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary({"salt": SALTS, "filler": self.filler_words(), **self.symbols()})

    def filler_words(self) -> Sequence[str]:
        return [f" {word}" for word in FILLER[: self.filler]]

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.spelling)

    @cached_property
    def smallest(self) -> int:
        """Tokens of the shortest sequence that every puzzle fits."""
        return 1 + self.puzzle(Draws.of(0, 0, np.arange(1))).tokens.shape[1]

    def check_length(self, length: int) -> None:
        """Raises BadInput where not every puzzle would fit."""
        if not self.smallest <= length <= LONGEST:
            allowed = (
                f"at least {self.smallest} tokens for {type(self).__name__} with {self.facts} facts"
            )
            raise BadInput("length", length, allowed)

    def sample(self, length: int, seed: int, split: Split, i: int) -> Samples:
        """One row."""
        return self.batch(length, seed, split, np.array([i]))

    def batch(
        self, length: int, seed: int, split: Split, indices: Int[np.ndarray, " row"]
    ) -> Samples:
        """The samples of these numbers. Raises BadInput for a length that is too short."""
        self.check_length(length)
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        number = SPLITS.index(split)
        draws = Draws.of(seed, number, np.asarray(indices))
        puzzle = self.puzzle(draws.stream("puzzle"))
        placed = draws.stream(f"length {length}")
        row = np.arange(len(draws.keys))[:, None]

        there = puzzle.tokens != ABSENT
        end = 1 + there.sum(axis=1, keepdims=True)
        cumulated = self.gaps(placed, int(puzzle.begins.sum()), length - end)
        item = np.cumsum(puzzle.begins) - 1
        at = np.cumsum(there, axis=1) + cumulated[:, item]

        tokens = self.fill(placed, length).astype(np.int32)
        flat = (at + row * length)[there]
        tokens.reshape(-1)[flat] = puzzle.tokens[there]
        total = np.where(there, puzzle.tokens, 0).sum(axis=1)
        tokens[:, 0] = (number - total) % len(SALTS)

        present = puzzle.stop > puzzle.start
        start = at[row, puzzle.start]
        # The answer's last token, then one beyond: the place after it may be in another item.
        stop = np.where(present, at[row, np.maximum(puzzle.stop - 1, 0)] + 1, start)
        return Samples(tokens, start, stop, at[row, puzzle.fact])

    def content(self, tokens: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
        """A row's puzzle: without salt and filler."""
        return tokens[tokens >= self.vocabulary.filler + self.filler]

    def render(self, tokens: Int[np.ndarray, " token"]) -> str:
        """As text."""
        spelling = self.vocabulary.spelling
        return "".join(spelling[token] for token in tokens)

    def questions(self, samples: Samples, row: int = 0) -> tuple[str, list[str]]:
        """A row as text with " ?" for each answer, and the answers in order."""
        text, answers, done = [], [], 0
        for start, stop in zip(samples.start[row], samples.stop[row], strict=True):
            if stop > start:
                text += [self.render(samples.tokens[row, done:start]), " ?"]
                answers.append(self.render(samples.tokens[row, start:stop]))
                done = stop
        return "".join([*text, self.render(samples.tokens[row, done:])]), answers


def consecutive(widths: Sequence[int]) -> tuple[Bool[np.ndarray, " place"], list[int]]:
    """Items of these widths one after the other: where they begin, as a mask and as places."""
    edges = np.cumsum([0, *widths])
    begins = np.zeros(edges[-1], bool)
    begins[edges[:-1]] = True
    return begins, edges[:-1].tolist()
