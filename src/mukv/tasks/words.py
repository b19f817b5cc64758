"""The tokens of a task: named groups of ids, and the text of each id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product

SALTS = ("Note A.", "Note B.", "Note C.")
"""The first token of every sequence; see `base.py`."""
LINES = """
and the grass grows green here while that old river runs on past our quiet mill
where birds sing all day until some cloud comes over a hill with rain for
every field then wind turns back so they rest under trees as night falls
"""
FILLER = tuple(LINES.split())
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = [consonant + vowel for vowel in VOWELS for consonant in CONSONANTS]


def invented(count: int) -> list[str]:
    """Return `count` different words of two or more syllables: bada, badu ..."""
    syllables = 2
    while len(SYLLABLES) ** syllables < count:
        syllables += 1
    # In a product the last syllable varies fastest; the stride makes first letters vary as well.
    stride = max(1, len(SYLLABLES) ** syllables // max(count, 1))
    every = product(SYLLABLES, repeat=syllables)
    return ["".join(word) for word in islice(every, 0, stride * count, stride)]


@dataclass(frozen=True)
class Vocabulary:
    """Ids and texts of tokens; ids are numbered in the order of the groups.

    groups: text of each token of a group, by the group's name
    """

    groups: dict[str, Sequence[str]]

    def __getattr__(self, name: str) -> int:
        """Return the first id of a group."""
        groups = self.__dict__["groups"]
        if name not in groups:
            raise AttributeError(name)
        before = list(groups)[: list(groups).index(name)]
        return sum(len(groups[other]) for other in before)

    @property
    def spelling(self) -> list[str]:
        """Text of each id."""
        return [word for group in self.groups.values() for word in group]
