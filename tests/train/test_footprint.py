"""Device memory of a training step is computed before it runs; a step that does not fit is
refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.runs import config
from mukv.train import footprint
from mukv.train.step import BATCH_FIELDS, Trainer
from tests.conftest import MINUSCULE

GIB = 1 << 30


def trainer_of(*changes: str) -> Trainer:
    run = config.load("tiny", [*MINUSCULE, *changes])
    return Trainer(run.model, run.train, run.mesh.build())


def test_the_least_is_less_than_what_is_taken_and_holds_the_state():
    trainer = trainer_of()
    state = jax.tree.leaves(trainer.abstract_state())
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
    least, taken = footprint.least_bytes(trainer), footprint.step_bytes(trainer)
    assert held < least < taken < 100 * least


@pytest.mark.product
def test_the_compiled_step_is_the_one_that_runs():
    trainer = trainer_of()
    footprint.step_bytes(trainer)
    shape = (2, 32)
    assert not hasattr(trainer._compiled[shape], "lower")
    batch = {
        name: np.ones(shape, np.float32 if name == "weight" else np.int32) for name in BATCH_FIELDS
    }
    state, metrics = trainer.step(trainer.initial_state(), 0, batch)
    assert int(state.step) == 1
    assert np.isfinite(float(metrics.loss))


def test_absurd_sizes_are_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(footprint, "free_memory", lambda: 24 * GIB)
    monkeypatch.setattr(footprint, "step_bytes", lambda _: pytest.fail("compiled"))
    for change in ("train.length=100000000", "train.batch=10000000", "model.d_model=1000000"):
        with pytest.raises(BadInput, match=r"at least [\d,.]+ GiB of memory, and 22.8 GiB"):
            footprint.require_room(trainer_of(change, "model.vocab_size=10000"))


@pytest.mark.product
def test_what_would_fit_is_named_and_fits(monkeypatch):
    trainer = trainer_of("train.batch=16", "train.length=256")
    taken = footprint.step_bytes(trainer)
    monkeypatch.setattr(footprint, "free_memory", lambda: taken // 2)
    with pytest.raises(BadInput, match=r"train.accumulate=4 or train.batch=\d+ or") as told:
        footprint.require_room(trainer)
    batch = int(told.value.allowed.split("train.batch=")[1].split()[0])
    assert 4 <= batch < 8
    footprint.require_room(trainer_of(f"train.batch={batch}", "train.length=256"))


def test_a_model_that_is_too_large(monkeypatch):
    trainer = trainer_of()
    monkeypatch.setattr(footprint, "free_memory", lambda: 1000)
    with pytest.raises(BadInput, match=r"alone take .*: a smaller model"):
        footprint.require_room(trainer)


@pytest.mark.product
def test_what_is_free_decides_and_can_be_overruled(mukv, token_file, tmp_path, monkeypatch):
    monkeypatch.setattr(footprint, "free_memory", lambda: 1000)
    line = ("train", "tiny", *MINUSCULE, f"data.path={token_file}", "--out", tmp_path / "run")
    done = mukv(*line)
    assert done.returncode == 2
    assert "(or --ignore-memory)" in done.stderr
    assert not (tmp_path / "run").exists()
    assert mukv(*line, "--ignore-memory").returncode == 0


def test_a_cache_that_does_not_fit_is_refused(mukv, trained, monkeypatch):
    monkeypatch.setattr(footprint, "free_memory", lambda: 1 << 20)
    done = mukv("generate", trained, "--prompt", "a", "--max-tokens", "100000")
    assert done.returncode == 2
    assert "error: --max-tokens: got 100000; at most about" in done.stderr


def test_free_memory_is_that_of_this_computer():
    assert 1 << 27 < footprint.free_memory() < 1 << 50
