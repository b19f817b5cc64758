"""The rows on which policies are measured: windows of a text, cut in two.

Recall is that of strings planted in the text. Their tokens are drawn from the text's tokens at
random, so that they can be predicted only from the cache. The cue comes after compression, so that
the question is unknown when the cache is compressed ("unaware"), or at the end of the prefill
("aware").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mukv.core.errors import BadInput

CUE, ANSWER = 4, 4
"""Tokens of a planted string that are shown as the cue, and that are to be predicted."""
SHORTEST, USUAL = 32, 64
"""Tokens of a row: the minimum, and the default where a model was trained on fewer."""


@dataclass(frozen=True)
class Rows:
    """Rows of three kinds: plain text, unaware and aware.

    tokens: int32 [row token]
    read: tokens of each row that are prefilled
    asked: true at graded tokens, bool [kind row token], kinds in the order above
    """

    tokens: np.ndarray
    read: int
    asked: np.ndarray

    @property
    def samples(self) -> int:
        """Rows of each kind."""
        return len(self.tokens) // len(self.asked)


def rows_of(texts: Sequence[np.ndarray], length: int, samples: int, seed: int = 0) -> Rows:
    """Make `samples` rows of each kind: windows as they are, with a planted string whose cue comes
    after the prefill, and with the cue at its end. Raises BadInput for texts that are too short.
    """
    longest = max(map(len, texts))
    for name, given in (("text", longest), ("--length", length)):
        if given < SHORTEST:
            raise BadInput(name, f"{given} tokens", f"at least {SHORTEST} in a row")
    length = min(length, longest)
    if samples < 1:
        raise BadInput("samples", samples, "at least 1")
    random = np.random.default_rng(seed)
    starts = [(row, at) for row in texts for at in range(0, len(row) - length + 1, length)]
    chosen = random.choice(len(starts), samples, replace=len(starts) < samples)
    windows = np.stack([starts[i][0][starts[i][1] :][:length] for i in sorted(chosen)])
    read, kinds = length * 3 // 4, []
    known = np.unique(np.concatenate(texts))
    for cue_at in (None, read, read - CUE):
        rows, asked = windows.copy(), np.zeros(windows.shape, bool)
        if cue_at is None:
            asked[:, read:] = True
        else:
            for row, mark in zip(rows, asked, strict=True):
                planted = random.choice(known, CUE + ANSWER)
                at = int(random.integers(CUE, cue_at - CUE - 2 * ANSWER))
                row[at : at + len(planted)] = planted
                row[cue_at : cue_at + len(planted)] = planted
                mark[cue_at + CUE : cue_at + len(planted)] = True
        kinds.append((rows, asked))
    tokens = np.concatenate([rows for rows, _ in kinds]).astype(np.int32)
    asked = np.zeros((len(kinds), *tokens.shape), bool)
    for kind, (_, marks) in enumerate(kinds):
        asked[kind, kind * samples : (kind + 1) * samples] = marks
    return Rows(tokens, read, asked)
