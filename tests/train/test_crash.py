"""A run that is killed at any moment and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from tests.conftest import MINUSCULE
from tests.processes import contents, finish, start

KILLS = 10
STEPS = 60


def arguments(token_file: Path, out: Path) -> list[object]:
    changes = (f"train.steps={STEPS}", "train.checkpoint_every=2", "train.log_every=1")
    return ["train", "tiny", *MINUSCULE, *changes, f"data.path={token_file}", "--out", out]


def wait_for(folder: Path, pattern: str, beyond: set[Path], process) -> bool:
    """Wait until a new file matches the pattern; return False if the process ended before."""
    while process.poll() is None:
        if set(folder.glob(pattern)) - beyond:
            return True
        time.sleep(0.0005)
    return False


UNFINISHED = "*orbax-checkpoint-tmp*"
"""Orbax writes under a temporary name until a checkpoint is complete."""


@pytest.mark.product
def test_killed_ten_times(token_file, tmp_path):
    """Ten kills, half of them during the writing of a checkpoint, do not change the final bits."""
    undisturbed = start(*arguments(token_file, tmp_path / "undisturbed"))
    out, moments = tmp_path / "killed", random.Random(0)
    checkpoints = out / "checkpoints"
    killed = torn = 0
    for kill in range(KILLS):
        pattern = UNFINISHED if kill % 2 else "[0-9]*"
        before = set(checkpoints.glob(pattern))
        process = start(*arguments(token_file, out))
        if wait_for(checkpoints, pattern, before, process):
            time.sleep(moments.uniform(0, 0.004 if kill % 2 else 0.05))
            process.kill()
            killed += process.wait() == -9
            torn += any(checkpoints.glob(UNFINISHED))
        process.communicate()
    status, _, error = finish(start(*arguments(token_file, out)))
    assert status == 0, error
    assert killed == KILLS
    assert torn > 1
    assert not list(checkpoints.glob(UNFINISHED))
    status, _, error = finish(undisturbed)
    assert status == 0, error
    assert contents(out / "weights") == contents(tmp_path / "undisturbed" / "weights")
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [record["step"] for record in logged if "loss" in record]
    assert losses == list(range(1, STEPS + 1))
