"""A run whose schedule decays only at its end can be extended, with bit-equal results."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import MINUSCULE
from tests.pairs import params
from tests.processes import contents

POWER = "train.schedule={kind: power, warmup: 2, amplitude: 40, decay: 0.4}"
WSD = "train.schedule={kind: wsd, warmup: 2, decay: 0.4}"


def train(mukv, token_file, out, *changes):
    return mukv("train", "tiny", *MINUSCULE, f"data.path={token_file}", *changes, "--out", out)


@pytest.mark.product
@pytest.mark.parametrize("schedule", params([POWER, WSD], [POWER]))
def test_prolonged_is_long(mukv, token_file, tmp_path, schedule):
    for steps in (5, 10):
        done = train(mukv, token_file, tmp_path / "prolonged", schedule, f"train.steps={steps}")
        assert done.returncode == 0, done.stderr
    train(mukv, token_file, tmp_path / "long", schedule, "train.steps=10")
    assert contents(tmp_path / "prolonged" / "weights") == contents(tmp_path / "long" / "weights")


@pytest.mark.product
def test_without_a_checkpoint_from_before_the_decay_it_is_refused(mukv, token_file, tmp_path):
    assert train(mukv, token_file, tmp_path / "r", WSD, "train.steps=5").returncode == 0
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "3")
    done = train(mukv, token_file, tmp_path / "r", WSD, "train.steps=10")
    assert done.returncode == 2
    assert "no checkpoint from before its decay (step 3)" in done.stderr


@pytest.mark.product
def test_a_run_whose_numbers_follow_from_its_length_keeps_it(mukv, token_file, tmp_path):
    budget = "train.budget={kind: sde, batch: 64, tokens: 192}"
    assert train(mukv, token_file, tmp_path / "r", budget).returncode == 0
    done = train(mukv, token_file, tmp_path / "r", budget, "train.steps=6")
    assert done.returncode == 2
    assert "train.steps" in done.stderr
