"""Commands print a note for settings without effect, or with an unexpected effect."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mukv.data.build import build_tokens
from mukv.runs import config, notes
from mukv.scaling.schedules import WSD, Cosine, Linear
from mukv.train.training import Training
from tests.conftest import MINUSCULE


@pytest.mark.product
def test_an_ordinary_run_has_no_notes():
    for preset in config.presets():
        run = config.load(preset)
        assert notes.of_run(run) == []
        assert notes.of_defaults(config.given(preset), run) == []


def test_a_warm_up_longer_than_the_run():
    (note,) = notes.of_run(config.load("tiny", ["train.schedule.warmup=20", "train.steps=20"]))
    assert "train.schedule.warmup: 20 steps, but train.steps is 20" in note


def test_a_mesh_that_splits_nothing():
    odd = ("model.attention={kind: grouped, heads: 3, kv_heads: 3, head_dim: 32}",)
    given = [*odd, "model.mlp.hidden=333", "mesh.tensor=2", "model.vocab_size=265"]
    (note,) = notes.of_run(config.load("tiny", [*given, "model.d_model=127"]))
    assert "mesh.tensor: 2 splits no weight" in note
    assert notes.of_run(config.load("tiny", ["mesh.tensor=2"])) == []


def test_default_ranks():
    given = ["model.attention.kind=latent"]
    (note,) = notes.of_defaults(config.given("small", given), config.load("small", given))
    assert "latent with the default rank 64, rope_dim 16" in note
    assert "model.d_model is 512" in note


@pytest.mark.parametrize("schedule", [Cosine(), Linear(final=0.0)])
def test_a_rate_that_jumps(schedule):
    before = Training(steps=100, schedule=schedule)
    (note,) = notes.of_jump(before, replace(before, steps=200), 100)
    assert "from 100 to 200" in note
    assert "wsd, power or inverse_sqrt" in note
    assert notes.of_jump(before, replace(before, steps=200, schedule=WSD()), 100) == []
    assert notes.of_jump(before, replace(before, steps=101), 20) == []


@pytest.mark.product
def test_commands_print_them(mukv, token_file, tmp_path):
    out, data = tmp_path / "run", f"data.path={token_file}"
    done = mukv("train", "tiny", *MINUSCULE, data, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"in {token_file} (data.path)" in done.stderr
    assert "training loss" in done.stdout
    assert "(one batch)" in done.stdout
    assert "(held-out text)" in done.stdout
    again = mukv("train", out, "train.steps=6", "train.evaluate_every=4")
    assert "note: train.steps: from 3 to 6 under cosine" in again.stderr
    assert json.loads(mukv("train", out, "--json").stdout)["step"] == 6
    spoken = mukv("generate", out, "--token-ids", "1", "--max-tokens", 40, "--stop", "5,264,-1")
    assert "note: --stop: 264, -1 can't occur: the model's ids go from 0 to 263" in spoken.stderr
    assert "41 tokens, but the model was trained on rows of 32" in spoken.stderr


def test_a_number_of_an_earlier_step_says_so():
    from mukv.train.loop import shown

    last = {"loss": 2.0, "validation_bits_per_byte": 3.0, "tokens_per_second": 0.0, "mfu": 0.0}
    seen = dict.fromkeys(last, 7)
    assert shown(7, last, seen)["validation bits/byte"] == "3.000"
    assert shown(9, last, seen)["validation bits/byte"] == "3.000 (step 7)"


def test_the_vocabulary_follows_the_data(token_file, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words and others, " * 400)
    tokens = build_tokens([str(tmp_path / "text")], tmp_path / "bpe", "bpe:270")
    run = config.load("tiny", [f"data.path={tokens.path}"])
    assert run.model.vocab_size == -(-tokens.vocab_size // 8) * 8
    assert config.load("tiny", [f"data.path={token_file}"]).model.vocab_size == 264
    task = config.load("tiny", ["data.task={kind: needle}"])
    assert task.data.task.vocab_size <= task.model.vocab_size < task.data.task.vocab_size + 8
    chosen = config.load("tiny", [f"data.path={tokens.path}", "model.vocab_size=300"])
    assert chosen.model.vocab_size == 300


def test_data_says_what_it_left_out(mukv, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words and others, " * 400)
    (tmp_path / "text" / "b.bin").write_bytes(b"\0" * 10)
    done = mukv("data", tmp_path / "text", "--out", tmp_path / "t", "--tokenizer", "bpe:9000")
    assert "note: --tokenizer bpe:9000: the text has only" in done.stderr
    assert "note: left out 1 binary files" in done.stderr
