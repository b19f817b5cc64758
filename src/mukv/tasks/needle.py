"""Needles in a haystack: facts among filler, asked at the end.

Single, multi-key, multi-value and multi-query forms of RULER (Hsieh et al. 2024), and retrieval
without literal match (NoLiMa, Modarressi et al. 2025), where the question names the country of the
city that the fact names.
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

CITIES = {
    "Paris": "France", "Rome": "Italy", "Madrid": "Spain", "Lisbon": "Portugal",
    "Vienna": "Austria", "Berlin": "Germany", "Athens": "Greece", "Dublin": "Ireland",
    "Oslo": "Norway", "Stockholm": "Sweden", "Helsinki": "Finland", "Warsaw": "Poland",
    "Prague": "Czechia", "Budapest": "Hungary", "Cairo": "Egypt", "Nairobi": "Kenya",
    "Tokyo": "Japan", "Beijing": "China", "Seoul": "Korea", "Hanoi": "Vietnam",
    "Bangkok": "Thailand", "Delhi": "India", "Tehran": "Iran", "Baghdad": "Iraq",
    "Ankara": "Turkey", "Ottawa": "Canada", "Havana": "Cuba", "Lima": "Peru",
    "Santiago": "Chile", "Bogota": "Colombia", "Quito": "Ecuador", "Kyiv": "Ukraine",
}  # fmt: skip


@dataclass(frozen=True)
class Haystack(Task):
    """Base class: recall the numbers that sentences give for keys.

    facts: number of keys that are asked, one after the other
    values: number of values of each asked key; the answer has all of them, in the order of the text
    distractors: number of keys that are not asked, with one value each
    digits: number of digits of a value
    keys: number of different keys
    """

    facts: int = 1
    values: int = 1
    distractors: int = 0
    digits: int = 3
    keys: int = 32

    fewest: ClassVar = {"values": 1, "distractors": 0, "digits": 1, "keys": 1}

    def check(self) -> None:
        if self.facts + self.distractors > self.keys:
            raise BadInput(
                "keys", self.keys, f"at least facts + distractors ({self.facts + self.distractors})"
            )

    def symbols(self) -> dict[str, Sequence[str]]:
        return {
            "fact": ["\nThe number of"],
            "question": ["\nAsked again, the number of"],
            "key": [f" {word}" for word in invented(self.keys)],
            "says": [" is"],
            "digit": [f" {digit}" for digit in range(10)],
            "end": [".\n"],
        }

    @property
    def choices(self) -> Int[np.ndarray, " choice"]:
        return self.vocabulary.digit + np.arange(10)

    def puzzle(self, draws: Draws) -> Puzzle:
        ids, needles = self.vocabulary, self.facts * self.values + self.distractors
        key = ids.key + draws.distinct(self.facts + self.distractors, self.keys)
        # Key of each needle: asked keys have several values, the others one.
        whose = np.concatenate(
            [
                np.repeat(np.arange(self.facts), self.values),
                np.arange(self.distractors) + self.facts,
            ]
        )
        order = draws.order(needles)
        whose = whose[order]
        digit = ids.digit + draws.integers(10, needles, self.digits)
        row = np.arange(draws.rows)[:, None]
        haystack = self._sentences(ids.fact, key[row, whose], digit)
        # A stable sort keeps the values of a key in the order of the text.
        where = np.argsort(whose, axis=1, kind="stable")[:, : self.facts * self.values]
        answer = digit[row, where].reshape(draws.rows, self.facts, -1)
        questions = self._sentences(ids.question, self.asked(key[:, : self.facts]), answer)
        tokens = np.concatenate(
            [haystack.reshape(draws.rows, -1), questions.reshape(draws.rows, -1)], axis=1
        )
        width, last = self.digits + 4, self.values * self.digits + 4
        begins, at = consecutive([width] * needles + [self.facts * last])
        start = at[-1] + 3 + last * np.arange(self.facts)
        latest = where.reshape(draws.rows, self.facts, self.values).max(axis=2)
        return Puzzle(tokens, begins, start, start + self.values * self.digits, latest * width)

    def asked(self, key: Int[np.ndarray, "row fact"]) -> Int[np.ndarray, "row fact"]:
        """Return the token by which a question names a key."""
        return key

    def _sentences(
        self,
        mark: int,
        key: Int[np.ndarray, "row needle"],
        digit: Int[np.ndarray, "row needle digit"],
    ) -> Int[np.ndarray, "row needle token"]:
        fixed = np.broadcast_to(key[..., None], (*key.shape, 1))
        begin, says, end = (
            np.full_like(fixed, token)
            for token in (mark, self.vocabulary.says, self.vocabulary.end)
        )
        return np.concatenate([begin, fixed, says, digit, end], axis=2)


@dataclass(frozen=True)
class Needle(Haystack):
    """Recall a number by its key: the question has the same word for the key as the fact."""

    kind: Literal["needle"] = "needle"


@dataclass(frozen=True)
class NoLiteral(Haystack):
    """Recall a number by the country of a city: facts name cities, questions name countries.

    The text does not say which city belongs to which country; a model must have learnt it. Cities
    and countries have different tokens.
    """

    kind: Literal["no_literal"] = "no_literal"
    distractors: int = 3
    keys: int = 16

    def check(self) -> None:
        super().check()
        if self.keys > len(CITIES):
            raise BadInput("keys", self.keys, f"at most {len(CITIES)} cities")

    def symbols(self) -> dict[str, Sequence[str]]:
        known = list(CITIES.items())[: self.keys]
        return {
            **super().symbols(),
            "key": [f" {city}" for city, _ in known],
            "country": [f" {country}" for _, country in known],
        }

    def asked(self, key: Int[np.ndarray, "row fact"]) -> Int[np.ndarray, "row fact"]:
        return key - self.vocabulary.key + self.vocabulary.country
