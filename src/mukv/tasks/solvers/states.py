"""Solve flip-flop and counting by running the instructions."""

import re

COUNT = re.compile(r"^(set|add|ask) (\w+)", re.MULTILINE)


def flip_flop(text: str) -> list[str]:
    """Return the bit last written before each read."""
    bit, answers = "", []
    for line in text.splitlines():
        if line.startswith("write"):
            bit = line.split()[1]
        elif line.startswith("read"):
            answers.append(bit)
    return answers


def counts(text: str) -> list[str]:
    """Return the number of increments of each asked variable since it was last set."""
    state: dict[str, int] = {}
    answers = []
    for verb, name in COUNT.findall(text):
        if verb == "ask":
            answers.append(str(state[name]))
        else:
            state[name] = state[name] + 1 if verb == "add" else 0
    return answers
