"""Written JSON has no NaN, so that every parser reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mukv.show import output
from mukv.storage.json_text import to_json
from mukv.train import metrics


def refuse(word: str) -> None:
    raise AssertionError(word)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        ([math.inf, -math.inf, 1.5], [None, None, 1.5]),
        ({"a": {"b": (math.nan, 2)}}, {"a": {"b": [None, 2]}}),
        (np.float32("nan"), None),
        (np.array([1.0, np.inf]), [1.0, None]),
        (jnp.array([jnp.nan, 2.0]), [None, 2.0]),
        (np.int64(3), 3),
        ({1: True, None: "text", 0.1: 2}, {"1": True, "null": "text", "0.1": 2}),
        (Path("a/b"), "a/b"),
        ("NaN", "NaN"),
        (10**400, 10**400),
    ],
)
def test_what_is_not_finite_is_null(value, expected, capsys):
    assert json.loads(to_json(value), parse_constant=refuse) == expected
    output.print_json({"value": value})
    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {"value": expected}


OLD = """\
{"step": 1, "loss": NaN, "learning_rate": 0.1}
{"step": 2, "loss": "text", "gradient_norm": Infinity, "tokens": 64}
{"step": 3, "loss": 1.5, "mfu": null, "folder": {"a": 1}, "note": [1]}
{"step": MANY, "loss": 1.0}
{"step": 9999999999999999999999999999999999999999, "loss": 1.0}
{"step": true, "loss": 1.0}
{"step": -1, "loss": 1.0}
{"step": 4, "loss": MANY, "tokens": 128}
[[1]]
DEEP
{"step": 5, "lo""".replace("MANY", "9" * 5000).replace("DEEP", "[" * 100_000)


def test_records_of_a_metrics_file_are_finite_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(OLD)
    kept = [
        {"step": 1, "learning_rate": 0.1},
        {"step": 2, "tokens": 64},
        {"step": 3, "loss": 1.5},
    ]
    assert list(metrics.read_metrics(path)) == kept
    metrics.MetricsFile(path, keep_until=2).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept[:2]
    file = metrics.MetricsFile(path)
    file.log(3, {"loss": math.nan, "tokens": 96})
    file.close()
    last = json.loads(path.read_text().splitlines()[-1], parse_constant=refuse)
    assert last == {"step": 3, "loss": None, "tokens": 96}
    assert list(metrics.read_metrics(path))[-1] == {"step": 3, "tokens": 96}
