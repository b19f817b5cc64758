"""Solve tasks in words: read the message, return the answers."""

import re
from collections import Counter

from mukv.tasks.solvers.needle import CAPITAL

NUMBER = re.compile(r"One of the special magic numbers for ([\w ]+?) is: (\d+)\.")
NUMBERS_OF = re.compile(
    r"^What (?:is the special magic number|are all the special magic numbers) for (.+) "
    r"mentioned in the provided text\?",
    re.MULTILINE,
)
ASSIGNMENT = re.compile(r"VAR (\w+) = (?:VAR )?(\w+)\.")
VALUES_OF = re.compile(
    r"^Question: What .+ of the variables? (.+) in the text above\?", re.MULTILINE
)
WORD = re.compile(r"\b[A-Z]{4,}\b")
MOST = re.compile(
    r"^Question: What (?:is|are) the (\d+) most (?:common|frequent) words?", re.MULTILINE
)


def names(listed: str) -> list[str]:
    """Split "a, b, and c"."""
    return [name.removeprefix("and ") for name in listed.split(", ")]


def numbers(message: str) -> list[str]:
    """Return all numbers of each asked name, or of the capital that is asked."""
    question = NUMBERS_OF.search(message)
    assert question
    known: dict[str, list[str]] = {}
    for key, number in NUMBER.findall(message):
        known.setdefault(key, []).append(number)
    found = []
    for name in names(question[1]):
        found += known[CAPITAL[name[15:]] if name.startswith("the capital of ") else name]
    return found


def values(message: str) -> list[str]:
    """Return the value of each variable that is asked."""
    source, question = dict(ASSIGNMENT.findall(message)), VALUES_OF.search(message)
    assert question
    found = []
    for name in names(question[1]):
        value = name
        while not value.isdecimal():
            value = source[value]
        found.append(value)
    return found


def most(message: str) -> list[str]:
    """Return the words in capital letters that are mentioned most often."""
    question = MOST.search(message)
    assert question
    ranked = Counter(WORD.findall(message)).most_common()
    count = int(question[1])
    if len(ranked) > count and ranked[count - 1][1] == ranked[count][1]:
        raise ValueError("the text does not determine which words are meant")
    return [word for word, _ in ranked[:count]]


SOLVERS_IN_WORDS = {
    "needle": numbers,
    "no_literal": numbers,
    "variable_tracking": values,
    "common_words": most,
    "frequent_words": most,
}
"""Solvers by the kind of the task; each takes a prompt's message and returns the answers."""
