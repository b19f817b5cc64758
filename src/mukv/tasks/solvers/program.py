"""Solve pseudo-programs with an interpreter."""

import re
from collections.abc import Callable

LINE = re.compile(
    r"def (?P<def>f\d+):(?P<does>\w+) ?(?P<how>\S*)(?: in (?P<alphabet>[a-z]+))?"
    r"|(?P<left>[xt]\d+)=(?P<right>\S+)|(?:print|eval)\((?P<shown>\S+)\) # {1,2}\?"
)
CALL = re.compile(r"(f\d+)\((x\d+)\)|\((x\d+),(x\d+)\)|(t\d+)\[([01])\]|\"([a-z]*)\"|(x\d+)")


def function(does: str, how: str, alphabet: str) -> Callable[[str], str]:
    """Return the function that a definition describes."""
    if does == "reverse":
        return lambda text: text[::-1]
    if does == "repeat":
        return lambda text: text * 2
    if does == "shift":
        by = int(how)
        shifted = str.maketrans(alphabet, alphabet[by:] + alphabet[:by])
        return lambda text: text.translate(shifted)
    old, new = how.split(">")
    return lambda text: text.replace(old, new)


def comments(text: str) -> list[str]:
    """Return the values that the graded comments show, in order."""
    functions: dict[str, Callable[[str], str]] = {}
    values: dict[str, str] = {}
    pairs: dict[str, tuple[str, str]] = {}
    answers = []

    def value(expression: str) -> str:
        match = CALL.fullmatch(expression)
        assert match, expression
        called, argument, _, _, pair, item, literal, name = match.groups()
        if called:
            return functions[called](values[argument])
        if pair:
            return pairs[pair][int(item)]
        return literal if literal is not None else values[name]

    for line in LINE.finditer(text):
        if line["def"]:
            functions[line["def"]] = function(line["does"], line["how"], line["alphabet"])
        elif line["shown"]:
            answers.append(value(line["shown"]))
        elif line["left"].startswith("t"):
            match = CALL.fullmatch(line["right"])
            assert match
            pairs[line["left"]] = (values[match[3]], values[match[4]])
        else:
            values[line["left"]] = value(line["right"])
    return answers
