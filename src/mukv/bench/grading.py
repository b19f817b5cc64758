"""Compute fractions of correct answers, nearness of wrong ones, effective length and calibration
error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

BASE_SHARE = 0.85
"""Fraction of the score at the shortest length that a length must reach to count as mastered.
RULER's threshold (Hsieh et al. 2024) is its baseline's score, 85.6 %.
"""
CONFIDENCES = np.linspace(0, 1, 10, endpoint=False)
"""Lower edges of the confidence buckets."""


def calibration_error(right: np.ndarray, confidence: np.ndarray) -> float:
    """Compute the expected calibration error over ten equal buckets of confidence (Guo et al. 2017,
    equation 3).

    right: whether each token is predicted correctly, bool [token]
    confidence: probability of the likeliest token, [token]
    """
    bucket = np.searchsorted(CONFIDENCES, confidence, side="right") - 1
    gaps = np.bincount(bucket, weights=right - confidence)
    return float(np.abs(gaps).sum() / len(right))


def effective_length(scores: Mapping[int, float], chance: float) -> int:
    """Return the longest length up to which every score is at least 85 % of that at the shortest
    length; 0 if the score at the shortest length is at most twice the chance.

    scores: score by length in tokens
    """
    lengths = sorted(scores)
    base = scores[lengths[0]]
    if base <= 2 * chance:
        return 0
    mastered = 0
    for length in lengths:
        if scores[length] < BASE_SHARE * base:
            break
        mastered = length
    return mastered


def shares(
    right: np.ndarray, value: np.ndarray, edges: list[float] | np.ndarray
) -> list[dict[str, float]]:
    """Compute the fraction of correct answers by bucket of a value.

    right: bool [answer]
    value: [answer]
    edges: lower edges of the buckets; the last bucket is open
    """
    bucket = np.searchsorted(edges, value, side="right") - 1
    rows = []
    for number, low in enumerate(edges):
        inside = right[bucket == number]
        if len(inside):
            rows.append(
                {"from": float(low), "answers": len(inside), "exact_match": float(inside.mean())}
            )
    return rows


def names(answer: str, wanted: str) -> bool:
    """Whether an answer contains the wanted text as whole words, whatever the case."""
    whole = rf"(?<!\w){re.escape(wanted.strip())}(?!\w)"
    return re.search(whole, answer, re.IGNORECASE) is not None


def closeness(answer: str, wanted: str) -> float:
    """Compute the nearness of an answer: 1 - edits / characters of the wanted text.

    Edits are the insertions, deletions and substitutions (Levenshtein 1966) that turn the most
    similar part of the answer into the wanted text, whatever the case. The result is 1 if the
    answer contains the wanted text, and 0 if it shares no character with it.
    """
    wanted, answer = wanted.strip().casefold(), answer.casefold()
    if wanted in answer:
        return 1.0
    letters = np.array([ord(letter) for letter in answer], np.int64)
    places = np.arange(len(letters) + 1)
    # Sellers' recursion: a part may begin at any place, so the first row is zero.
    row = np.zeros(len(letters) + 1, np.int64)
    for count, letter in enumerate(wanted, start=1):
        kept = row[:-1] + (letters != ord(letter))
        least = np.concatenate([[count], np.minimum(row[1:] + 1, kept)])
        # Insertions: one edit for each place since any earlier one.
        row = np.minimum.accumulate(least - places) + places
    return 1 - int(row.min()) / len(wanted)
