"""Convert errors of the tokenizers library to errors of one line.

The library is written in Rust. It raises plain Exceptions, and its panics arrive as exceptions that
are not subclasses of `Exception`, after Rust has printed a trace of a hundred lines to standard
error.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from mukv.core.errors import BadInput
from mukv.data.growth import matches_nothing

HARMLESS = frozenset(
    [
        "BertNormalizer",
        "Lowercase",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Precompiled",
        "Prepend",
        "Replace",
        "Sequence",
        "Strip",
        "StripAccents",
        "BertPreTokenizer",
        "ByteLevel",
        "Digits",
        "Metaspace",
        "Punctuation",
        "Split",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
        "BPEDecoder",
        "ByteFallback",
        "Fuse",
        "WordPiece",
    ]
)
"""Types of parts that never panic on a text, unless their regular expression does."""


@contextmanager
def telling_tokenizer_errors(where: str, given: str, quiet: bool = False) -> Iterator[None]:
    """Turn every exception of the library into BadInput.

    quiet: drop the trace of a panic from standard error
    """
    try:
        if quiet:
            with _TRACES.held_back():
                yield
        else:
            yield
    except (BadInput, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        words = (str(error).splitlines() or [type(error).__name__])[0][:200]
        allowed = "what a tokenizer.json of Hugging Face's tokenizers can encode"
        raise BadInput(where, f"{given} ({words})", allowed) from None


def may_panic(tree: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json has parts that can panic on some text.

    While such a tokenizer works, standard error is held back.
    """
    parts = [tree.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    return not all(map(_is_harmless, parts))


def _is_harmless(part: Any) -> bool:
    if isinstance(part, list):
        return all(map(_is_harmless, part))
    if not isinstance(part, Mapping):
        return True
    kind = part.get("type", "Sequence")
    if kind not in HARMLESS or part.get("stop", 0):  # a decoder that strips short tokens' ends
        return False
    pattern = part.get("pattern")
    if isinstance(pattern, Mapping):
        expression = re.escape(pattern["String"]) if "String" in pattern else str(pattern["Regex"])
        # The library fails to replace an empty match at the end of a text.
        return is_quick(expression) and not ("content" in part and matches_nothing(expression))
    return all(map(_is_harmless, part.values()))


def is_quick(expression: str) -> bool:
    """Whether a regular expression certainly takes a number of steps proportional to the text.

    The library's engine panics after 10**7 steps. True for expressions whose alternatives have one
    unlimited repetition, or two of which the second is at the end, as those of GPT-2 and its
    successors.
    """
    plain = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[pP]\{[^}]*\}", "c", expression)
    if re.search(r"\\[1-9kg]", plain):
        return False
    plain = re.sub(r"\\.", "e", plain)
    plain = re.sub(r"\((?:\?(?:i?:|[!=]))?[^()+*{?]*\)", "\0", plain)  # without repetition
    if "(" in plain or re.search(r"\0[+*{]", plain):
        return False
    repeated = r"(?:[+*]|\{\d*,\})[+?]?"
    return all(
        re.fullmatch(rf"[^+*]*|[^+*]*{repeated}[^+*]*|[^+*]*{repeated}[^+*]*{repeated}\0?\??", each)
        for each in re.sub(r"\{\d+(,\d+)?\}", "", plain).split("|")
    )


class _Traces:
    """Holds back the standard error of the whole process while any thread is in a block.

    At the end of each block, traces of panics are dropped, and all other text is passed on.
    """

    TRACE = re.compile(rb"\n?thread '[^\n]* panicked at .*?(\nnote: [^\n]*\n|\Z)", re.DOTALL)

    def __init__(self) -> None:
        self.lock, self.blocks, self.kept = threading.Lock(), 0, -1
        self.file: BinaryIO | None = None
        self.passed_on = 0

    @contextmanager
    def held_back(self) -> Iterator[None]:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()
        with self.lock:
            self._begin()
        try:
            yield
        finally:
            with suppress(OSError, ValueError, AttributeError):
                sys.stderr.flush()
            with self.lock:
                self._end()

    def _begin(self) -> None:
        self.blocks += 1
        if self.blocks > 1:
            return
        with suppress(OSError):  # there may be no standard error
            self.kept = os.dup(2)
            self.file, self.passed_on = tempfile.TemporaryFile(), 0  # noqa: SIM115
            os.dup2(self.file.fileno(), 2)

    def _end(self) -> None:
        self.blocks -= 1
        if self.file is None:
            return
        last = self.blocks == 0
        if last:
            os.dup2(self.kept, 2)
        written = os.pread(self.file.fileno(), os.fstat(self.file.fileno()).st_size, 0)
        fresh = written[self.passed_on :]
        # A trace that another thread is still writing is processed at the end.
        if last or b"thread '" not in fresh:
            with suppress(OSError):
                os.write(self.kept, self.TRACE.sub(b"", fresh))
            self.passed_on = len(written)
        if last:
            os.close(self.kept)
            self.file.close()
            self.file, self.kept = None, -1


_TRACES = _Traces()
