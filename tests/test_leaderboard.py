"""benchmarks/leaderboard.py: its table, and a run that is continued."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import leaderboard
from mukv.cache import FULL, Policy

COST = {
    "kept": 1.0,
    "cache_bytes": 400,
    "bytes_read_per_step": 200,
    "step_seconds": 0.5,
    "decoding_of_full": 1.0,
    "prefill_seconds": 2.0,
}


def batch(kind, rows):
    whole = np.zeros((2, 3), np.int32)
    return leaderboard.Batch(kind, whole, np.array([3, 3]), whole, whole > 0, rows)


def test_rows_are_compared_on_the_batches_that_all_policies_have():
    half = Policy.parse("snapkv", 0.5)
    batches = [batch("text", 2), batch("unseen", 1), batch("text", 2)]
    less = COST | {"cache_bytes": 100, "bytes_read_per_step": 50, "decoding_of_full": 2.0}
    known = [
        {FULL: {"loss": [1.0, 3.0], **COST}, half: {"loss": [1.5, 4.0], **less}},
        # The second row only fills the batch.
        {FULL: {"right": [True, False]}, half: {"right": [False, True]}},
        {FULL: {"loss": [9.0, 9.0]}},
    ]
    full, row = leaderboard.summary(batches, known, {FULL: 1.0, half: 0.5})
    assert (row["policy"], row["budget"], row["texts"], row["questions"]) == ("snapkv", 0.5, 2, 1)
    assert row["added_loss"] == 0.75
    assert row["added_loss_interval"] == pytest.approx((0.26, 1.24), abs=0.01)
    assert row["perplexity"] == pytest.approx(np.exp(2.75))
    assert (full["unseen"], row["unseen"], row["seen"]) == (1.0, 0.0, None)
    assert [row[f"{name}_of_full"] for name in leaderboard.RATIOS] == [0.25, 0.25, 2.0, 1.0]
    first, second = leaderboard.table([row, full]).splitlines()[2:]
    assert first.startswith("| `full` | 1 | 0.000 | 1.00 (0.21 to 1.00) |  | 1.00")
    assert second.startswith("| `snapkv` | 0.5 | 0.750 (0.260 to 1.240) | 0.00")


@pytest.mark.product
def test_a_run_is_continued(trained, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    replayed = "kvzip+uniform", "kvzip+uniform+int8"
    text.write_text("A line of text, and some more of it.\n" * 200)
    given = ("--model", trained, "--text", text, "--out", out, "--budgets", "0.5")
    given += ("--length", 1408, "--follow", 16, "--rows", 3, "--tasks", "needle", "--samples", 1)
    leaderboard.main([*map(str, given), "--policies", "snapkv"])
    first = (out / "finished.jsonl").read_bytes()
    leaderboard.main(
        [*map(str, given), "--policies", "snapkv,tova,int8,kvzip+uniform,kvzip+uniform+int8"]
    )
    assert (out / "finished.jsonl").read_bytes().startswith(first)
    rows = {row["policy"]: row for row in json.loads((out / "leaderboard.json").read_text())}
    assert list(rows) == ["full", "snapkv", "tova", "int8", *replayed]
    assert all(row["texts"] == 3 and row["questions"] == 1 for row in rows.values())
    assert rows["full"]["added_loss"] == 0
    assert 0.4 < rows["snapkv"]["cache_bytes_of_full"] < 0.7
    assert 0.4 < rows["tova"]["kept"] < 0.6
    assert abs(rows["int8"]["added_loss"]) < 0.01
    assert abs(rows[replayed[1]]["added_loss"] - rows[replayed[0]]["added_loss"]) < 0.01
    assert rows[replayed[1]]["cache_bytes"] < rows[replayed[0]]["cache_bytes"]
    assert (out / "leaderboard.png").stat().st_size > 10_000
    before = capsys.readouterr()
    leaderboard.main(
        [*map(str, given), "--policies", "snapkv,tova,int8,kvzip+uniform,kvzip+uniform+int8"]
    )
    assert "batch" not in capsys.readouterr().out
    assert before.out.count("tova") > 0
