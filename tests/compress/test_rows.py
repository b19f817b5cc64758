"""Windows of a text and planted strings are those of their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from mukv.compress.rows import CUE, KNOWN, SPACING, rows_of, usual_samples
from mukv.core.errors import BadInput

TEXT = [np.arange(3000) % 251]


def test_windows_are_of_the_text_and_strings_are_at_their_places():
    rows = rows_of(TEXT, 1024, 2, 30)
    assert rows.text.shape == (2, 1024)
    assert rows.read == 768
    each = 768 // SPACING
    assert rows.strings.shape == (-(-30 // each), each, 8)
    assert rows.asked == rows.strings[:, :, 0].size >= 30
    assert rows.planted.shape == (len(rows.strings), 768)
    for row in rows.text:
        assert (np.diff(row) % 251 == 1).all()
    for row, strings in zip(rows.planted, rows.strings, strict=True):
        line = row.tobytes()
        places = [line.find(string.tobytes()) for string in strings]
        assert all(place >= 4 * CUE for place in places), "planted, and not among the first tokens"
        assert places == sorted(places), "in their order, each in a stretch of its own"
        end = 4 * (768 - CUE * KNOWN)
        assert all(place + strings[0].nbytes <= end for place in places), "before the cues"
        changed = np.diff(row) % 251 != 1
        assert changed.sum() <= len(strings) * 9


def test_strings_of_short_rows():
    rows = rows_of(TEXT, 32, 1, 5)
    assert rows.strings.shape == (5, 1, 8)
    assert rows.together == 1
    assert rows_of(TEXT, 32, 1, 0).asked == 0


def test_every_string_is_among_the_reminders():
    rows = rows_of(TEXT, 1024, 1, 12)
    found = np.zeros(rows.strings.shape[1], int)
    for start, cues in rows.reminders(slice(0, 1)):
        assert cues.shape == (1, KNOWN * CUE)
        some = slice(start, start + KNOWN)
        np.testing.assert_array_equal(cues, rows.strings[:1, some, :CUE].reshape(1, -1))
        found[some] += 1
    assert (found > 0).all()


@pytest.mark.parametrize(
    ("length", "samples"), [(64, 8), (512, 8), (1024, 4), (4096, 1), (9999, 1)]
)
def test_long_rows_are_fewer(length, samples):
    assert usual_samples(length) == samples


@pytest.mark.parametrize(
    ("length", "samples", "strings", "words"),
    [
        (16, 1, 1, "--length: got '16 tokens'"),
        (64, 0, 1, "samples"),
        (64, 1, -1, "strings"),
    ],
)
def test_refused(length, samples, strings, words):
    with pytest.raises(BadInput, match=words):
        rows_of(TEXT, length, samples, strings)
