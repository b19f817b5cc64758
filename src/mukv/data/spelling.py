"""Compute the bytes of text that each id of a tokenizer.json stands for, from its decoder.

What a decoder returns for a token depends on its position: words are joined by spaces, and the
space before the first word is stripped. Each token is therefore decoded between two others; the
text between theirs is what the token adds to a text anywhere but at its ends.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Tokenizer

TRIED = 1000
"""Number of tokens among which the two neighbours are chosen."""


def byte_alphabet() -> list[str]:
    """Return the visible character that byte-level tokenizers write for each byte
    (GPT-2's table).
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]


UNKNOWN = 0x100
"""The character that stands for one that is in no byte-level vocabulary."""


class _ByteValues(dict[int, int]):
    """Table for `str.translate` from the visible characters of bytes to their values."""

    def __missing__(self, character: int) -> int:
        return UNKNOWN


VALUES = _ByteValues({ord(shown): byte for byte, shown in enumerate(byte_alphabet())})


def spelled(inner: Tokenizer, decoder: Any, silent: Collection[int], size: int) -> list[bytes]:
    """Return the bytes of each id below `size`; empty for unused ids and for ids in `silent`.

    decoder: the file's decoder

    The concatenated bytes of consecutive tokens are the decoded text, except for the first token,
    and if the text consists of whole characters.
    """
    data = [b""] * size
    tokens = {
        token: text
        for text, token in inner.get_vocab(with_added_tokens=True).items()
        if token not in silent and token < size
    }
    kinds = set(_kinds(decoder))
    contextual = dict(tokens)
    if "ByteFallback" in kinds:
        for token, text in tokens.items():
            byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", text)
            if byte:
                data[token] = bytes.fromhex(byte[1])
                del contextual[token]
    if "ByteLevel" in kinds:
        for token, text in tokens.items():
            values = text.translate(VALUES)
            known = chr(UNKNOWN) not in values
            data[token] = values.encode("latin-1") if known else text.encode()
            # Partial characters have no text.
            if kinds == {"ByteLevel"} or not _is_text(data[token]):
                contextual.pop(token, None)
    texts = _between(inner, contextual)
    return [texts[token].encode() if token in texts else data[token] for token in range(size)]


def _between(inner: Tokenizer, tokens: Mapping[int, str]) -> dict[int, str]:
    """Return the text of each id decoded between two others, or alone if there are no suitable
    ones."""
    if not tokens:
        return {}
    ids = list(tokens)
    first, last, before, behind = _neighbours(inner, tokens)
    found = inner.decode_batch([[*first, token, *last] for token in ids])
    texts: dict[int, str] = {}
    for token, text in zip(ids, found, strict=True):
        if first and text.startswith(before) and text[len(before) :].endswith(behind):
            texts[token] = text[len(before) : len(text) - len(behind)]
    # Some decoders drop a repeated token.
    for token in (*first, *last):
        if not texts.get(token):
            texts.pop(token, None)
    alone = [token for token in ids if token not in texts]
    texts.update(zip(alone, inner.decode_batch([[token] for token in alone]), strict=True))
    return texts


def _neighbours(
    inner: Tokenizer, tokens: Mapping[int, str]
) -> tuple[list[int], list[int], str, str]:
    """Choose two tokens to put before and after another; also return the texts that they decode to
    there.
    """
    letters = re.compile("[A-Za-z0-9]")
    tried = sorted(tokens, key=lambda t: (not letters.search(tokens[t]), len(tokens[t]), t))[:TRIED]
    alone = dict(zip(tried, inner.decode_batch([[token] for token in tried]), strict=True))
    good = [token for token in tried if alone[token].strip() and "\ufffd" not in alone[token]]
    for last in good[1:]:
        both, before = inner.decode([good[0], last]), alone[good[0]]
        if both.startswith(before) and len(both) > len(before):
            return [good[0]], [last], before, both[len(before) :]
    return [], [], "", ""


def _kinds(decoder: Any) -> list[str]:
    """Return the names of a decoder's parts."""
    if not isinstance(decoder, Mapping):
        return []
    parts = decoder.get("decoders")
    if isinstance(parts, list):
        return [kind for part in parts for kind in _kinds(part)]
    return [str(decoder.get("type"))]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
