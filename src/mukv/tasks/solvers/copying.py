"""Solve selective copying and indirect indexing from the text."""

import re

CAPITALS = re.compile(r"\b[A-Z]{4,}\b")
LIST = re.compile(r"^The list:((?: [A-Z]+)+)", re.MULTILINE)
QUESTION = re.compile(r"^From ([A-Z]+) (\d+) (on|back): \?", re.MULTILINE)


def capitals(text: str) -> list[str]:
    """Return all words in capitals, in order."""
    return [" ".join(CAPITALS.findall(text))]


def neighbours(text: str) -> list[str]:
    """Return the symbol n places after (on) or before (back) each named one in the list."""
    match = LIST.search(text)
    assert match
    listed = match[1].split()
    return [
        listed[listed.index(word) + (int(by) if way == "on" else -int(by))]
        for word, by, way in QUESTION.findall(text)
    ]
