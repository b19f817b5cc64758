"""The texts on which policies are measured: windows of a text, and windows with planted strings.

A window is cut in two: its first three quarters are prefilled, and the rest is predicted. Recall is
that of strings planted in prefilled windows, at even distances. Their tokens are drawn from the
text's tokens at random, so that they can be predicted only from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mukv.core.errors import BadInput

CUE, ANSWER = 4, 4
"""Tokens of a planted string that are shown as the cue, and that are to be predicted."""
SPACING = 64
"""Tokens of text per planted string."""
KNOWN = 8
"""Largest number of strings whose cues end the prefilled text at once. Their 32 tokens are as many
as SnapKV's window.
"""
SHORTEST, USUAL = 32, 64
"""Tokens of a row: the minimum, and the default where a model was trained on fewer."""
ROWS, TOKENS = 8, 4096
"""Default number of rows: ROWS, but at most so many that they have TOKENS tokens, and at least one.
"""


@dataclass(frozen=True)
class Rows:
    """Tokens to read.

    text: windows of the text, int32 [row token]
    read: tokens of each window that are prefilled
    planted: prefilled parts of windows with planted strings, int32 [row token]
    strings: the strings planted in each of them, int32 [row string token]
    """

    text: np.ndarray
    read: int
    planted: np.ndarray
    strings: np.ndarray

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.text.shape[1]

    @property
    def asked(self) -> int:
        """Number of planted strings."""
        return self.strings.shape[0] * self.strings.shape[1]

    @property
    def together(self) -> int:
        """Number of planted strings whose cues end a prefilled text at once."""
        return min(KNOWN, self.strings.shape[1])

    def reminders(self, rows: slice) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the cues of `together` strings at a time, int32 [row token], with the index of the
        first of these strings. The last group has earlier strings again if there are too few.
        """
        count, size = self.strings.shape[1], self.together
        for first in range(0, count, size):
            start = min(first, count - size)
            cues = self.strings[rows, start : start + size, :CUE]
            yield start, cues.reshape(len(cues), -1)


def usual_samples(length: int) -> int:
    """Return the default number of rows of this length."""
    return max(1, min(ROWS, TOKENS // length))


def rows_of(
    texts: Sequence[np.ndarray], length: int, samples: int | None, strings: int, seed: int = 0
) -> Rows:
    """Choose windows and plant strings.

    length: tokens per window, or as many as the longest text has
    samples: windows whose text is predicted; None for `usual_samples`
    strings: planted strings, rounded up to whole windows; 0 for none

    Raises BadInput for texts that are too short, and for numbers out of range.
    """
    longest = max(map(len, texts))
    for name, given in (("text", longest), ("--length", length)):
        if given < SHORTEST:
            raise BadInput(name, f"{given} tokens", f"at least {SHORTEST} in a row")
    length = min(length, longest)
    samples = usual_samples(length) if samples is None else samples
    if samples < 1:
        raise BadInput("samples", samples, "at least 1")
    if strings < 0:
        raise BadInput("strings", strings, "at least 0")
    random = np.random.default_rng(seed)
    starts = [(row, at) for row in texts for at in range(0, len(row) - length + 1, length)]

    def windows(number: int) -> np.ndarray:
        chosen = random.choice(len(starts), number, replace=len(starts) < number)
        cut = [starts[i][0][starts[i][1] :][:length] for i in sorted(chosen)]
        return np.stack(cut).astype(np.int32) if cut else np.zeros((0, length), np.int32)

    text, read = windows(samples), length * 3 // 4
    each = max(1, read // SPACING)
    planted = windows(-(-strings // each))[:, :read]
    known = np.unique(np.concatenate(texts)).astype(np.int32)
    drawn = random.choice(known, (len(planted), each, CUE + ANSWER))
    # The first tokens stay, which policies keep as sinks, and the last, which cues may replace.
    first, last = CUE, read - CUE * (min(each, KNOWN) + 1)
    room = (last - first) // each
    for row, own in zip(planted, drawn, strict=True):
        for number, string in enumerate(own):
            at = first + number * room + int(random.integers(room - len(string) + 1))
            row[at : at + len(string)] = string
    return Rows(text, read, planted, drawn)
