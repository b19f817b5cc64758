"""Bound how much longer a tokenizer.json can make a text.

Four steps that each replace "a" by 2,000 of them turn one character into 10**13, and the library
ends the process when the machine's memory is exhausted. Files that lengthen texts by more than a
bound are therefore refused before use.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, normalizers

from mukv.core.errors import BadInput

MOST_GROWTH = 256
"""Largest number of characters that one character may become; published files reach 54. Growth by
Unicode normal forms (at most 18) is not counted.
"""
LONGEST_WORD = 1000
"""Largest `max_input_chars_per_word` of WordPiece, whose time is quadratic in it; 100 is usual."""
LONGEST_AFFIX = 64
"""Largest number of characters of affixes such as "##" inside a word or "</w>" at its end."""
VISIBLE = [chr(code) for code in range(0x21, 0x7F)]


def require_bounded(tree: Mapping[str, Any], where: str) -> None:
    """Raise BadInput for a tokenizer.json without a sensible limit.

    It may not make a text, or a decoded text, longer by more than `MOST_GROWTH`, and its model may
    not accept longer words or affixes than the bounds above.
    """
    model = tree["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        length = len(model.get(name) or "")
        if length > LONGEST_AFFIX:
            raise BadInput(where, f"{name} of {length:,}", f"at most {LONGEST_AFFIX} characters")
    longest = model.get("max_input_chars_per_word", 0)
    if longest > LONGEST_WORD:
        given = f"max_input_chars_per_word of {longest:,}"
        raise BadInput(where, given, f"at most {LONGEST_WORD:,}")
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        found = growth([part for name in names for part in _parts(tree.get(name))])
        if found > MOST_GROWTH:
            given = f"a {names[0]} that makes a text {found:,.0f} times as long"
            raise BadInput(where, given, f"at most {MOST_GROWTH} times")


@dataclass
class Growths:
    """The largest number of characters that each character becomes in the following steps.

    others: number for characters that are not in `known`
    known: number by character
    """

    others: float = 1.0
    known: dict[str, float] = field(default_factory=dict)

    def of(self, text: str) -> float:
        """Return the sum over the characters of a text."""
        return sum(self.known.get(c, self.others) for c in text)

    @property
    def most(self) -> float:
        """Largest number of all characters."""
        return max(self.others, *self.known.values(), 0.0)

    def each(self, change: Any) -> Growths:
        """Apply a function to all numbers."""
        return Growths(change(self.others), {c: change(w) for c, w in self.known.items()})


def growth(parts: Iterable[Mapping[str, Any]]) -> float:
    """Compute a bound on the characters that one character becomes in a sequence of parts.

    Parts are processed from last to first. The characters that a part substitutes for n characters
    are divided equally among these.
    """
    weights = Growths()
    for part in reversed(list(parts)):
        weights = _before(part, weights)
    return weights.most


def _before(part: Mapping[str, Any], after: Growths) -> Growths:
    if "pattern" in part and "content" in part:
        return _before_replacing(part["pattern"], after.of(str(part["content"])), after)
    if "prepend" in part:
        added = after.of(str(part["prepend"]))
        return after.each(lambda weight: weight + added)
    if part.get("precompiled_charsmap"):
        return Growths(after.most * max(1, _longest(part["precompiled_charsmap"])))
    if part.get("type") == "ByteLevel":  # a character has up to four bytes
        return Growths(4 * after.most, {c: after.known.get(c, after.others) for c in VISIBLE})
    return Growths(after.most)  # characters may be replaced by others


def _before_replacing(pattern: Any, added: float, after: Growths) -> Growths:
    text = pattern.get("String") if isinstance(pattern, Mapping) else pattern
    if isinstance(text, str) and text:
        changed = {c: max(after.of(c), added / len(text)) for c in text}
        return Growths(after.others, after.known | changed)
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if isinstance(expression, str) and not matches_nothing(expression):
        return after.each(lambda weight: max(weight, added))
    return after.each(lambda weight: weight + added)


def matches_nothing(expression: str) -> bool:
    """Whether an expression may match the empty string between two characters."""
    plain = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]", "c", expression)
    if re.search(r"\(\?<?[=!]|[\^$]|\\[bBGKAzZ]", plain):
        return True
    return normalizers.Replace(Regex(expression), "x").normalize_str("") != ""


def _longest(charsmap: str) -> int:
    """Return the number of characters of the longest text in a character map of SentencePiece: a
    trie, whose size is in the first four bytes, followed by zero-terminated texts.
    """
    data = base64.b64decode(charsmap)
    (trie,) = struct.unpack("<I", data[:4])
    return max(len(text.decode(errors="replace")) for text in data[4 + trie :].split(b"\0"))


def _parts(part: Any) -> list[Mapping[str, Any]]:
    """Return a part, or the parts that it consists of."""
    if not isinstance(part, Mapping):
        return []
    inner = [value for value in part.values() if isinstance(value, list)]
    if inner:
        return [each for values in inner for value in values for each in _parts(value)]
    return [part]
