"""Estimates of the best learning rate, its drift with the width, and the loss at another rate."""

from __future__ import annotations

import json
import math

import pytest

from mukv.core.errors import BadInput
from mukv.runs import config
from mukv.runs.resolve import open_feed
from mukv.tuning.transfer import Search
from tests.conftest import MINUSCULE


def search(token_file, folder, widths=(32, 64), seeds=2, **changes):
    run = config.load("tiny", [*MINUSCULE, f"data.path={token_file}"])
    _, feed = open_feed(run)
    return Search(run.model, run.train, feed, widths, seeds, folder, **changes)


def planted(found, drift):
    """Return losses on parabolas whose vertex moves by `drift` octaves per octave of width."""
    for step, width in enumerate(found.points):
        for rate in range(-12, 0):
            for seed in range(found.seeds):
                distance = rate - (-5.3 + drift * step + 0.1 * (seed - 0.5))
                loss = 3 - 0.1 * step + 0.05 * distance**2
                found.losses[width, float(rate), seed] = loss if distance < 4 else math.inf
    return found.verdict()


@pytest.mark.parametrize(("drift", "passed"), [(0.0, True), (-0.2, True), (-1.2, False)])
def test_a_planted_drift_is_found(token_file, tmp_path, drift, passed):
    found = planted(search(token_file, tmp_path, (32, 64, 128)), drift)
    assert found.drift == pytest.approx(drift, abs=1e-6)
    assert found.low <= drift <= found.high
    assert found.gap == pytest.approx(0.05 * (2 * drift) ** 2, abs=0.02)
    assert found.optima[32].loss == pytest.approx(3.0, abs=1e-3)
    assert found.optima[32].low < -5.3 < found.optima[32].high
    assert found.passed == passed


@pytest.mark.product
def test_the_command(mukv, token_file, tmp_path):
    given = ("transfer", "tiny", *MINUSCULE, f"data.path={token_file}", "--widths", "32,64")
    given = (*given, "--seeds", 1, "--octaves", 1, "--out", tmp_path / "t", "--json")
    done = mukv(*given)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (0 if facts["passed"] else 1), done.stderr
    assert facts["optima"].keys() == {"32", "64"}
    assert (tmp_path / "t" / "transfer.png").stat().st_size > 10_000
    # Known losses are not measured again.
    losses = (tmp_path / "t" / "losses.json").read_text()
    assert json.loads(mukv(*given).stdout.splitlines()[-1]) == facts
    assert (tmp_path / "t" / "losses.json").read_text() == losses
    other = mukv(*given, "train.steps=4")
    assert other.returncode == 2
    assert "train.steps: got 4; the search" in other.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (32,)}, "widths: got .*at least two"),
        ({"widths": (32, 40)}, "heads would be"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"octaves": 0}, "octaves: got 0"),
    ],
)
def test_bad_input(token_file, tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        search(token_file, tmp_path, **changes)
