"""Solve variable tracking: follow the names back to a number."""

import re

LINE = re.compile(r"^let (\w+) = (\w+)", re.MULTILINE)
QUESTION = re.compile(r"^ask (\w+) = \?", re.MULTILINE)


def values(text: str) -> list[str]:
    """Return the value of each name that is asked."""
    source = dict(LINE.findall(text))
    answers = []
    for name in QUESTION.findall(text):
        value = name
        while not value.isdecimal():
            value = source[value]
        answers.append(value)
    return answers
