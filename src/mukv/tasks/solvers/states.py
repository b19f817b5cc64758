"""Flip-flop and counting, from the text: run the instructions."""

import re

COUNT = re.compile(r"^(set|add|ask) (\w+)", re.MULTILINE)


def flip_flop(text: str) -> list[str]:
    """Reads give what was written last."""
    bit, told = "", []
    for line in text.splitlines():
        if line.startswith("write"):
            bit = line.split()[1]
        elif line.startswith("read"):
            told.append(bit)
    return told


def counts(text: str) -> list[str]:
    """Increments since a variable was last set."""
    state: dict[str, int] = {}
    told = []
    for verb, name in COUNT.findall(text):
        if verb == "ask":
            told.append(str(state[name]))
        else:
            state[name] = state[name] + 1 if verb == "add" else 0
    return told
