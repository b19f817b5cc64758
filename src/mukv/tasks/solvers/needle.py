"""Solve needles from the text: return all numbers that the text gives for a name."""

import re

FACT = re.compile(r"^The number of (\w+) is ([\d ]+)\.", re.MULTILINE)
QUESTION = re.compile(r"^Asked again, the number of (\w+) is \?", re.MULTILINE)
CAPITALS = """
Paris France, Rome Italy, Madrid Spain, Lisbon Portugal, Vienna Austria, Berlin Germany,
Athens Greece, Dublin Ireland, Oslo Norway, Stockholm Sweden, Helsinki Finland, Warsaw Poland,
Prague Czechia, Budapest Hungary, Cairo Egypt, Nairobi Kenya, Tokyo Japan, Beijing China,
Seoul Korea, Hanoi Vietnam, Bangkok Thailand, Delhi India, Tehran Iran, Baghdad Iraq,
Ankara Turkey, Ottawa Canada, Havana Cuba, Lima Peru, Santiago Chile, Bogota Colombia,
Quito Ecuador, Kyiv Ukraine
"""
CAPITAL: dict[str, str] = {
    land: city for city, land in (pair.split() for pair in CAPITALS.split(","))
}


def numbers(text: str) -> list[str]:
    """Return all numbers of each asked name: the name in the facts, or the country of the city in
    them.
    """
    known: dict[str, list[str]] = {}
    for key, number in FACT.findall(text):
        known.setdefault(key, []).append(number)
    return [" ".join(known[CAPITAL.get(key) or key]) for key in QUESTION.findall(text)]
