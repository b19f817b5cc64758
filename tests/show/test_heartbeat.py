"""A command that prints nothing for a while prints a heartbeat."""

from __future__ import annotations

import io
import sys
import time

import pytest

from mukv.show.heartbeat import Heartbeat, duration


def test_a_line_when_nothing_was_shown(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with Heartbeat("mukv train", quiet=0.05):
        time.sleep(0.3)
    assert sys.stderr is err
    assert sys.stdout is out
    lines = err.getvalue().splitlines()
    assert 2 <= len(lines) <= 6
    assert set(lines) == {"mukv train: still working, 0 s"}
    assert out.getvalue() == ""


def test_silent_while_something_else_is_shown(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with Heartbeat("mukv train", quiet=0.5):
        for _ in range(10):
            time.sleep(0.08)
            print("token", end="")
    assert err.getvalue() == ""
    assert out.getvalue() == "token" * 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 s"), (42.4, "42 s"), (99, "99 s"), (100, "1 min 40 s"), (3600, "60 min")),
        *((120, "2 min 00 s"), (130.4, "2 min 10 s"), (599.4, "9 min 59 s"), (599.6, "10 min")),
        *((6000, "1 h 40 min"), (11100, "3 h 05 min")),
    ],
)
def test_times_are_said_in_words(seconds, text):
    assert duration(seconds) == text
