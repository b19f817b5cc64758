"""Variable tracking, from the text: follow the names back to a number."""

import re

LINE = re.compile(r"^let (\w+) = (\w+)", re.MULTILINE)
QUESTION = re.compile(r"^ask (\w+) = \?", re.MULTILINE)


def values(text: str) -> list[str]:
    source = dict(LINE.findall(text))
    told = []
    for name in QUESTION.findall(text):
        value = name
        while not value.isdecimal():
            value = source[value]
        told.append(value)
    return told
