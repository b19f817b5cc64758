"""Measurements are stored one at a time, and read again after any interruption."""

from __future__ import annotations

import numpy as np
import pytest

from mukv.cache import Policy
from mukv.compress.finished import NAME, Finished, key_of


def test_stored_measurements_are_read_again(tmp_path):
    finished = Finished(tmp_path)
    assert finished.get("a") is None
    finished.add("a", {"losses": [[0.5, 1.25]]})
    finished.add("b", {"capped": None})
    again = Finished(tmp_path)
    assert again.get("a") == {"losses": [[0.5, 1.25]]}
    assert again.get("b") == {"capped": None}
    assert Finished(tmp_path, again=True).get("a") is None
    assert Finished(tmp_path).get("a") is None


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_short_is_left_out(tmp_path, cut):
    finished = Finished(tmp_path)
    finished.add("a", {"x": 1})
    finished.add("b", {"x": 2})
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-cut])
    after = Finished(tmp_path)
    assert after.get("a") == {"x": 1}
    assert after.get("b") == ({"x": 2} if cut == 1 else None)
    after.add("c", {"x": 3})
    assert Finished(tmp_path).get("c") == {"x": 3}


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"[1]\n", b'{"key": 1, "measured": {}}\n', b"{"]
)
def test_lines_that_are_no_measurements_are_left_out(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    assert Finished(tmp_path).known == {}


def test_a_key_depends_on_every_value():
    policies = [Policy.parse(name, 0.5) for name in ("snapkv", "tova", "topk")]
    policies.append(Policy.parse("snapkv", 0.25))
    arrays = [np.arange(4), np.arange(4.0), np.arange(4).reshape(2, 2), np.arange(4)[::-1]]
    facts = [(each,) for each in (*policies, *arrays, "a", 1)] + [("a", "b"), ("ab", "")]
    assert len({key_of(*each) for each in facts}) == len(facts)
    assert key_of(arrays[0], policies[0]) == key_of(np.arange(4), Policy.parse("snapkv", 0.5))
