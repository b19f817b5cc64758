"""Recall, from the text: the latest value of each key."""

import re

PAIR = re.compile(r"^([a-z]+(?: [a-z]+)*) = (\d+|\?)", re.MULTILINE)
MOTIF = re.compile(r"((?: [A-Z])+) =(?:((?: \d+)+);| (\?))")


def pairs(text: str) -> list[str]:
    """Lines "key = value"."""
    known: dict[str, str] = {}
    told = []
    for key, value in PAIR.findall(text):
        if value == "?":
            told.append(known[key])
        else:
            known[key] = value
    return told


def motifs(text: str) -> list[str]:
    """Letters, an equals sign, numbers and a semicolon."""
    known: dict[str, str] = {}
    told = []
    for key, value, asked in MOTIF.findall(text):
        if asked:
            told.append(known[key] + ";")
        else:
            known[key] = value
    return told
