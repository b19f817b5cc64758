"""Pseudo-programs that pass strings through variables, tuples and functions and print them.

Variables x hold strings, variables t hold pairs of strings. Functions f are defined in the text
(repeat, map, shift, reverse), so that the value in every graded comment follows from the text
before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from mukv.core.errors import BadInput
from mukv.tasks.base import ABSENT, Puzzle, Task
from mukv.tasks.draws import Draws

Strings = Int[np.ndarray, "row letter"]
"""Letters, numbered from 0, and `ABSENT` after the end of the string."""
REVERSE, REPEAT, SHIFT, MAP = range(4)
COPY, TUPLE, ITEM, CALL = range(4)


class Functions(NamedTuple):
    """Definitions of each row's functions.

    kind: REVERSE, REPEAT, SHIFT or MAP
    one, two: a map replaces letter `one` by letter `two`; a shift goes by 1 + one % 3 letters
    """

    kind: Int[np.ndarray, "row function"]
    one: Int[np.ndarray, "row function"]
    two: Int[np.ndarray, "row function"]


@dataclass(frozen=True)
class Program(Task):
    """Tell the values that a program of assignments prints.

    facts: number of graded comments, which show the value of a print, a call or a tuple's item
    statements: number of assignments between two graded comments
    names: number of string variables
    tuples: number of tuple variables
    functions: number of functions
    letters: number of different letters in strings
    shortest: smallest number of letters of a string in the text
    longest: largest number of letters of a string in the text; a function's result is at most twice
        as long
    """

    kind: Literal["program"] = "program"
    facts: int = 4
    filler: int = 16
    statements: int = 2
    names: int = 3
    tuples: int = 1
    functions: int = 2
    letters: int = 8
    shortest: int = 2
    longest: int = 3

    fewest: ClassVar = {
        **{"statements": 0, "names": 2, "tuples": 1, "functions": 1, "letters": 4},
        **{"shortest": 1, "longest": 1},
    }
    ends: ClassVar = 1

    def check(self) -> None:
        if self.shortest > self.longest:
            raise BadInput("shortest", self.shortest, f"at most longest ({self.longest})")
        if self.letters > 26:
            raise BadInput("letters", self.letters, "at most 26")

    @property
    def room(self) -> int:
        """Number of letters of the longest string."""
        return 2 * self.longest

    def filler_words(self) -> Sequence[str]:
        return [f"# {word.strip()}\n" for word in super().filler_words()]

    def symbols(self) -> dict[str, Sequence[str]]:
        alphabet = "".join(chr(ord("a") + number) for number in range(self.letters))
        return {
            "end": ["\n"],
            "name": [f"x{number}" for number in range(self.names)],
            "tuple": [f"t{number}" for number in range(self.tuples)],
            "function": [f"f{number}" for number in range(self.functions)],
            "letter": list(alphabet),
            "equals": ["="],
            "quote": ['"'],
            "open": ["("],
            "comma": [","],
            "close": [")"],
            "item": ["[0]", "[1]"],
            "define": ["def "],
            "does": [":reverse", ":repeat", ":shift ", ":map "],
            "by": [f"{by} in {alphabet}" for by in (1, 2, 3)],
            "to": [">"],
            "print": ["print("],
            "eval": ["eval("],
            "comment": [") # "],
        }

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.letter + np.arange(self.letters)

    def puzzle(self, draws: Draws) -> Puzzle:
        return Writer(self, draws).write()


class Writer:
    """Writes the programs of all rows, statement by statement, and tracks each variable's value."""

    def __init__(self, task: Program, draws: Draws):
        self.task, self.draws = task, draws
        rows = draws.rows
        self.row = np.arange(rows)
        self.values = np.full((rows, task.names, task.room), ABSENT)
        self.pairs = np.full((rows, task.tuples, 2, task.room), ABSENT)
        # Place of the statement that assigned each name and each tuple.
        self.made = np.zeros((rows, task.names), np.int64)
        self.paired = np.zeros((rows, task.tuples), np.int64)
        self.pieces: list[np.ndarray] = []
        self.starts: list[int] = []
        self.width = 0
        self.answers: list[tuple[int, int, np.ndarray]] = []
        self.functions = Functions(
            draws.integers(4, task.functions),
            draws.integers(task.letters, task.functions),
            draws.integers(task.letters, task.functions),
        )

    def write(self) -> Puzzle:
        """Write the whole programs."""
        task, draws = self.task, self.draws
        self.define()
        for name in range(task.names):
            self.assign_string(name)
        for number in range(task.tuples):
            self.assign_tuple(np.full(draws.rows, number), *draws.integers(task.names, 2).T)
        for _ in range(task.facts):
            for _ in range(task.statements):
                self.statement()
            self.comment()
        tokens = np.concatenate(self.pieces, axis=1)
        begins = np.zeros(tokens.shape[1], bool)
        begins[self.starts] = True
        start, stop = (np.array([answer[part] for answer in self.answers]) for part in (0, 1))
        return Puzzle(tokens, begins, start, stop, np.stack([a[2] for a in self.answers], axis=1))

    # Lines

    def line(self, *parts: int | np.ndarray) -> int:
        """Append a line of tokens to all rows; return the place of its first token.

        parts: tokens of the line; a part is one id for all rows, ids [row], or ids [row token]
        """
        rows = len(self.row)
        columns = [
            np.full((rows, 1), part) if isinstance(part, int) else part.reshape(rows, -1)
            for part in parts
        ]
        self.starts.append(self.width)
        self.pieces += columns
        begin = self.width
        self.width += sum(column.shape[1] for column in columns)
        return begin

    def written(self, string: Strings) -> np.ndarray:
        """Return the tokens of a string's letters."""
        return np.where(string == ABSENT, ABSENT, self.task.vocabulary.letter + string)

    def define(self) -> None:
        ids, functions = self.task.vocabulary, self.functions
        for number in range(self.task.functions):
            kind, one, two = (part[:, number] for part in functions)
            first = np.where(kind == MAP, ids.letter + one, ids.by + one % 3)
            first = np.where(kind >= SHIFT, first, ABSENT)
            to, last = (np.where(kind == MAP, part, ABSENT) for part in (ids.to, ids.letter + two))
            self.line(ids.define, ids.function + number, ids.does + kind, first, to, last, ids.end)

    def assign_string(self, name: int) -> None:
        task, ids = self.task, self.task.vocabulary
        length = task.shortest + self.draws.integers(task.longest - task.shortest + 1)
        letters = self.draws.integers(task.letters, task.room)
        string = np.where(np.arange(task.room) < length[:, None], letters, ABSENT)
        shown = self.written(string[:, : task.longest])
        begin = self.line(ids.name + name, ids.equals, ids.quote, shown, ids.quote, ids.end)
        self.values[:, name], self.made[:, name] = string, begin

    def assign_tuple(self, number: np.ndarray, one: np.ndarray, two: np.ndarray) -> None:
        ids, name = self.task.vocabulary, self.task.vocabulary.name
        begin = self.line(
            *(ids.tuple + number, ids.equals, ids.open),
            *(name + one, ids.comma, name + two, ids.close, ids.end),
        )
        for item, source in enumerate((one, two)):
            self.pairs[self.row, number, item] = self.values[self.row, source]
        self.paired[self.row, number] = begin

    def call(self, function: np.ndarray, string: Strings) -> Strings:
        """Apply each row's function to its string. A string that is repeated must have at most half
        of `room` letters.
        """
        task, row = self.task, self.row[:, None]
        kind, one, two = (part[self.row, function][:, None] for part in self.functions)
        length = (string != ABSENT).sum(axis=1, keepdims=True)
        place = np.arange(task.room)
        inside = place < length
        source = np.where(kind == REVERSE, length - 1 - place, place) % length
        moved = string[row, source]
        moved = np.where(kind == SHIFT, (moved + 1 + one % 3) % task.letters, moved)
        moved = np.where((kind == MAP) & (moved == one), two, moved)
        return np.where(inside | ((kind == REPEAT) & (place < 2 * length)), moved, ABSENT)

    def callable(self, function: np.ndarray, string: Strings) -> np.ndarray:
        """Return whether the result of a call fits into `room` letters."""
        length = (string != ABSENT).sum(axis=1)
        repeats = self.functions.kind[self.row, function] == REPEAT
        return ~repeats | (2 * length <= self.task.room)

    # Statements of random kind

    def statement(self) -> None:
        """Write a copy, a tuple, an item of a tuple, or a call."""
        task, ids, row = self.task, self.task.vocabulary, self.row
        kind, pick = self.draws.integers(4), self.draws.integers(2)
        target, one, two = self.draws.integers(task.names, 3).T
        number, function = self.draws.integers(task.tuples), self.draws.integers(task.functions)
        string = self.values[row, one]
        kind = np.where((kind == CALL) & ~self.callable(function, string), COPY, kind)
        copies, pairs, takes, calls = (kind == each for each in (COPY, TUPLE, ITEM, CALL))

        def where(*cases: tuple[np.ndarray, int | np.ndarray]) -> np.ndarray:
            conditions, parts = zip(*cases, strict=True)
            return np.select(conditions, parts, ABSENT)

        left = np.where(pairs, ids.tuple + number, ids.name + target)
        begin = self.line(
            left,
            ids.equals,
            where(
                (copies, ids.name + one),
                (takes, ids.tuple + number),
                (calls, ids.function + function),
            ),
            where((pairs | calls, ids.open), (takes, ids.item + pick)),
            where((pairs | calls, ids.name + one)),
            where((pairs, ids.comma)),
            where((pairs, ids.name + two)),
            where((pairs | calls, ids.close)),
            ids.end,
        )
        made = np.where(calls[:, None], self.call(function, string), string)
        made = np.where(takes[:, None], self.pairs[row, number, pick], made)
        other = self.values[row, two]
        r = row[pairs]
        self.pairs[r, number[pairs]] = np.stack([string, other], axis=1)[pairs]
        self.paired[r, number[pairs]] = begin
        r, t = row[~pairs], target[~pairs]
        self.values[r, t], self.made[r, t] = made[~pairs], begin

    def comment(self) -> None:
        """Write a print of a name or an evaluation, with its result."""
        task, ids, row = self.task, self.task.vocabulary, self.row
        kind, pick = self.draws.integers(3), self.draws.integers(2)
        name, number = self.draws.integers(task.names), self.draws.integers(task.tuples)
        function = self.draws.integers(task.functions)
        string = self.values[row, name]
        calls = (kind == 2) & self.callable(function, string)
        takes = kind == 1
        made = np.where(calls[:, None], self.call(function, string), string)
        made = np.where(takes[:, None], self.pairs[row, number, pick], made)
        source = np.where(takes, ids.tuple + number, ids.name + name)
        begin = self.line(
            np.where(calls | takes, ids.eval, ids.print),
            np.where(calls, ids.function + function, ABSENT),
            np.where(calls, ids.open, ABSENT),
            source,
            np.select([calls, takes], [np.full(len(row), ids.close), ids.item + pick], ABSENT),
            ids.comment,
            self.written(made),
            ids.end,
        )
        fact = np.where(takes, self.paired[row, number], self.made[row, name])
        self.answers.append((begin + 6, self.width, fact))
