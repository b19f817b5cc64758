"""Streamed text ends before stop texts; only final characters are printed."""

from __future__ import annotations

import io

import pytest

from mukv.data.tokenizer import ByteTokenizer
from mukv.infer.stream import TokenStream


def streamed(data: bytes, stop=()):
    """Return what was printed after each byte, and the final text."""
    out, shown = io.StringIO(), []
    stream = TokenStream(ByteTokenizer(), out, stop=stop)
    for byte in data:
        stream.add([byte])
        shown.append(out.getvalue())
    stream.end()
    return shown, stream.text, out.getvalue()


def test_a_character_is_printed_whole():
    shown, text, printed = streamed("aé".encode())
    assert shown == ["a", "a", "aé"]
    assert (text, printed) == ("aé", "aé\n")
    assert streamed(b"a\xc3")[1:] == ("a\ufffd", "a\ufffd\n")


@pytest.mark.parametrize(
    ("data", "stop", "text"),
    [
        (b"yes. END no", ["END"], "yes. "),
        (b"yes. EN", ["END"], "yes. EN"),
        (b"a\n\nb", ["\n\n", "b"], "a"),
        (b"EEND", ["END"], "E"),
        (b"ENDEND", ["END"], ""),
    ],
)
def test_a_possible_stop_text_is_not_printed_yet(data, stop, text):
    shown, found, printed = streamed(data, stop)
    assert (found, printed) == (text, text + "\n")
    assert all(text.startswith(each) for each in shown)
