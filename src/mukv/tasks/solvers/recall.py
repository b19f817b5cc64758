"""Solve recall from the text: return the latest value of each key."""

import re

PAIR = re.compile(r"^([a-z]+(?: [a-z]+)*) = (\d+|\?)", re.MULTILINE)
MOTIF = re.compile(r"((?: [A-Z])+) =(?:((?: \d+)+);| (\?))")


def pairs(text: str) -> list[str]:
    """Answer questions of lines "key = value"."""
    known: dict[str, str] = {}
    answers = []
    for key, value in PAIR.findall(text):
        if value == "?":
            answers.append(known[key])
        else:
            known[key] = value
    return answers


def motifs(text: str) -> list[str]:
    """Answer questions of items "LETTERS = NUMBERS;"."""
    known: dict[str, str] = {}
    answers = []
    for key, value, asked in MOTIF.findall(text):
        if asked:
            answers.append(known[key] + ";")
        else:
            known[key] = value
    return answers
