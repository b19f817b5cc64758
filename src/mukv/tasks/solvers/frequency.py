"""Solve common and frequent words from the text by counting words in capitals."""

import re
from collections import Counter

WORD = re.compile(r"\b[A-Z]{4,}\b")
QUESTION = re.compile(r"^The (\d+) most (common|frequent),.*: \?", re.MULTILINE)


def most(text: str) -> list[str]:
    """Return the most mentioned words: common ones by first mention, frequent ones by frequency."""
    question = QUESTION.search(text)
    assert question
    counts = Counter(WORD.findall(text[: question.start()]))
    ranked = sorted(counts, key=lambda word: -counts[word])
    asked, kind = int(question[1]), question[2]
    chosen = ranked[:asked]
    if len(ranked) > asked and counts[ranked[asked]] == counts[ranked[asked - 1]]:
        raise ValueError("the text does not determine which words are meant")
    if kind == "common":
        chosen.sort(key=text.index)
    return [" ".join(chosen)]
