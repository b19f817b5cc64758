"""`mukv bench --oracle`: scores of a solver and a guesser instead of a model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mukv.bench.grading import effective_length, shares
from mukv.tasks import TASKS

DOCS = Path(__file__).parents[2] / "docs"


def test_all_tasks_are_shown(mukv):
    done = mukv("bench", "--oracle", "--lengths", "256", "--samples", "40", "--json")
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["task"] for row in rows] == list(TASKS)
    for row in rows:
        assert row["length"] == 256
        assert row["oracle"] == row["exact_match"] == 1.0
        assert 0 < row["chance"] <= 0.5
        assert row["cache_bytes_per_token"] == 0


def test_the_table_in_the_terminal(mukv):
    done = mukv("bench", "--oracle", "--tasks", "needle,mqar", "--lengths", "64,32")
    assert done.returncode == 0
    # Exact match, the upper end of its interval, and the oracle: two tasks, two lengths.
    assert done.stdout.count("1.000") == 12


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--tasks", "mqr"), "did you mean 'mqar'"),
        (("--lengths", "64"), "at least 97 tokens for FuzzyRecall"),
        (("--lengths", "many"), "whole numbers"),
        (("--lengths", "0"), "at least 1"),
        (("--samples", "0"), "at least 1"),
    ],
)
def test_bad_input(mukv, given, said):
    done = mukv("bench", "--oracle", *given)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())


def test_effective_length():
    assert effective_length({64: 1.0, 128: 0.86, 256: 0.84, 512: 1.0}, 0.01) == 128
    assert effective_length({64: 0.02, 128: 0.02}, 0.02) == 0


def test_exact_match_by_group():
    rows = shares(np.array([True, False, True]), np.array([1, 5, 9]), [0, 4, 8])
    assert [row["exact_match"] for row in rows] == [1, 0, 1]


def test_the_docs_show_what_samples_are():
    spec = importlib.util.spec_from_file_location("samples", DOCS / "samples.py")
    assert spec is not None
    assert spec.loader is not None
    samples = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(samples)
    text = (DOCS / "benchmark.md").read_text()
    assert samples.page(text) == text
    assert all(f"**{name}**" in text for name in TASKS)
