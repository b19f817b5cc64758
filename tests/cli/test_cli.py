"""The command line: its help and output, and results equal to those of the library."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mukv as package
from mukv.compress.measure import measured
from mukv.core.errors import BadInput
from mukv.data.tokenizer import ByteTokenizer, JsonTokenizer

pytestmark = pytest.mark.xdist_group("trained")
COMMANDS = ("demo", "data", "train", "eval", "generate", "chat", "compress", "describe")
COMPRESSED = {"policy", "budget", "perplexity", "recall", "cache_bytes", "bytes_read_per_step"}
DESCRIBED = {"parameters", "flops_per_token", "cache_bytes_per_token", "cache_bytes_constant"}
LAYER = {"attention", "position", "window", "reads", "cache_bytes_per_token"}
EVALUATED = {"tokens", "loss", "perplexity", "bits_per_byte"}
GENERATED = {"token_ids", "text", "texts", "cache_bytes", "tokens_per_second"} | {
    *("compile_seconds", "prefill_seconds")
}
TRAINED = {"run", "step", "loss", "validation_bits_per_byte", "tokens_per_second"}
PROMPT = "Déjà"


@pytest.fixture(scope="module")
def facts(mukv):
    """Return a function that returns the object that a command prints with --json."""

    def run(*args):
        done = mukv(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.product
@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(mukv, name):
    done = mukv(name, "--help")
    assert done.returncode == 0
    assert re.search(rf"Example:\s+mukv {name} ", done.stdout)


def test_help_names_every_command(mukv):
    listed = mukv("--help").stdout
    assert [name for name in COMMANDS if f" {name} " not in listed] == []


def test_train(facts, token_file, trained, mukv):
    made = facts("train", trained)
    assert made.keys() >= TRAINED
    assert (made["run"], made["step"], made["finished"]) == (str(trained), 3, True)
    assert 0 < made["loss"] < 10
    names = {path.name for path in trained.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "checkpoints", "tokenizer.json", "weights"}
    assert names == expected | {"provenance.json"}
    assert f"run: {trained}" in mukv("train", trained).stdout


def test_data(facts, mukv, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 9)
    made = facts("data", tmp_path / "a.txt", "--out", tmp_path / "t")
    assert made["bytes"] == 90
    assert made["vocab_size"] == 257
    assert Path(made["path"]) == tmp_path / "t"
    again = mukv("data", tmp_path / "a.txt", "--out", tmp_path / "t")
    printed = again.stdout.splitlines()
    assert printed[:2] == [f"tokens       {made['tokens']:,}", f"documents    {made['documents']}"]
    assert printed[-2:] == [f"fingerprint  {made['fingerprint']}", f"token file: {tmp_path / 't'}"]


@pytest.mark.product
def test_eval_of_text_is_eval_of_its_ids(facts, mukv, trained, tmp_path):
    text = "Déjà vu number 3. " * 5
    (tmp_path / "a.txt").write_text(text)
    np.save(tmp_path / "a.npy", np.array([256, *text.encode()]))
    of_text = facts("eval", trained, "--text", tmp_path / "a.txt")
    assert of_text.keys() == EVALUATED
    assert of_text == facts("eval", trained, "--tokens", tmp_path / "a.npy")
    assert of_text["tokens"] == len(text.encode())
    shown = mukv("eval", trained, "--text", tmp_path / "a.txt").stdout.splitlines()
    assert shown[1] == f"loss           {of_text['loss']:.4f} nats per token"
    assert shown[-1] == f"bits per byte  {of_text['bits_per_byte']:.4f}"
    short = facts("eval", trained, "--text", tmp_path / "a.txt", "--length", 5)
    assert short["tokens"] == of_text["tokens"]
    assert short["loss"] != of_text["loss"]


def generate(facts, trained, *args):
    made = facts("generate", trained, "--max-tokens", 6, *args)
    return made["token_ids"]


def test_generate(facts, trained):
    made = facts("generate", trained, "--prompt", PROMPT, "--max-tokens", 6)
    assert made.keys() == GENERATED
    assert made["text"] == ByteTokenizer().decode(made["token_ids"])
    ids = ",".join(map(str, [256, *PROMPT.encode()]))
    assert generate(facts, trained, "--token-ids", ids) == made["token_ids"]
    loaded = package.load(trained)
    assert loaded.generate(PROMPT, 6).token_ids == made["token_ids"]


def test_an_empty_prompt_begins_a_text(facts, mukv, trained, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").touch()
    given = {"--prompt": "", "--prompt-file": tmp_path / "empty.txt"}
    begun = generate(facts, trained, "--token-ids", "256")
    assert package.load(trained).generate("", 6).token_ids == begun
    assert [generate(facts, trained, *each) for each in given.items()] == [begun, begun]
    noted = mukv("generate", trained, "--prompt-file", tmp_path / "empty.txt").stderr
    assert "empty.txt: it is empty, so that a new text is begun" in noted
    monkeypatch.setattr(JsonTokenizer, "start", ())
    for option, value in given.items():
        done = mukv("generate", trained, option, value)
        assert done.returncode == 2
        assert f"error: {option}: got '{value}'; a text that is not empty" in done.stderr
    with pytest.raises(BadInput, match="prompts: got ''; a text that is not empty"):
        package.load(trained).generate(["a", ""], 6)


@pytest.mark.product
def test_seeds_stops_and_copies(facts, trained):
    base = ("--prompt", PROMPT, "--temperature", 2)
    drawn = {seed: generate(facts, trained, *base, "--seed", seed) for seed in (0, 1)}
    assert drawn[0] != drawn[1]
    assert generate(facts, trained, *base, "--seed", 0) == drawn[0]
    stop = drawn[0][2]
    stopped = generate(facts, trained, *base, "--stop", f"{stop},999")
    assert stopped == drawn[0][: drawn[0].index(stop) + 1]
    made = facts("generate", trained, *base, "--max-tokens", 6, "--copies", 3)
    copies = made["all_token_ids"]
    assert copies[0] == made["token_ids"] == drawn[0]
    assert len({tuple(ids) for ids in copies}) == 3


@pytest.mark.product
def test_several_prompts_are_one_batch(facts, mukv, trained, tmp_path):
    (tmp_path / "a.txt").write_text("number 3")
    base = ("generate", trained, "--max-tokens", 6)
    many = facts(*base, "--prompt", PROMPT, "--prompt", "vu", "--prompt-file", tmp_path / "a.txt")
    alone = [facts(*base, "--prompt", text)["token_ids"] for text in (PROMPT, "vu", "number 3")]
    assert many["all_token_ids"] == alone
    assert many["token_ids"] == alone[0]
    assert many["texts"] == [ByteTokenizer().decode(ids) for ids in alone]
    shown = mukv(*base, "--prompt", PROMPT, "--prompt", "vu", "--copies", 2).stdout
    assert [line for line in shown.splitlines() if line.startswith("--- ")] == [
        f"--- {number}" for number in range(4)
    ]
    assert shown.count(PROMPT) == 2


def test_a_prompt_from_standard_input(facts, trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    made = facts("generate", trained, "--max-tokens", 6, "--prompt-file", "-")
    assert made["token_ids"] == generate(facts, trained, "--prompt", PROMPT)


def test_special_tokens_of_a_prompt(facts, trained):
    marked = generate(facts, trained, "--prompt", "a<|begin|>b", "--special")
    assert marked == generate(facts, trained, "--token-ids", "256,97,256,98")
    own = generate(facts, trained, "--prompt", "<|begin|>b", "--special")
    assert own == generate(facts, trained, "--token-ids", "256,98")
    letters = ",".join(map(str, [256, *b"a<|begin|>b"]))
    plain = generate(facts, trained, "--prompt", "a<|begin|>b")
    assert plain == generate(facts, trained, "--token-ids", letters)


@pytest.mark.product
def test_generate_under_a_policy(facts, trained):
    base = ("generate", trained, "--prompt", PROMPT * 40, "--max-tokens", 6)
    full = facts(*base)
    kept = facts(*base, "--cache", "knorm", "--budget", 1)
    assert kept["token_ids"] == full["token_ids"]
    less = facts(*base, "--cache", "streaming+int8", "--budget", 0.25)
    assert less["cache_bytes"] < full["cache_bytes"] / 2


def test_compress(mukv, trained, tmp_path):
    (tmp_path / "a.txt").write_text("Déjà vu number 3, once more. " * 9)
    given = ("compress", trained, "--text", tmp_path / "a.txt", "--out", tmp_path / "c")
    policies = "streaming,topp:0.05"
    sizes = ("--samples", 2, "--strings", 3)
    made = mukv(*given, "--policy", policies, "--budget", "1,0.25", *sizes, "--json")
    assert "--budget means nothing to topp:0.05\n" in made.stderr
    rows = json.loads(made.stdout.splitlines()[-1])["rows"]
    assert [(row["policy"], row["budget"]) for row in rows] == [
        *(("full", 1.0), ("streaming", 1.0), ("streaming", 0.25), ("topp", 0.05))
    ]
    assert all(row.keys() >= COMPRESSED | {"tokens_per_second"} for row in rows)
    full, same, less, values = rows
    assert full["perplexity_low"] == full["perplexity"] == full["perplexity_high"]
    for row in rows:
        assert row["perplexity_low"] <= row["perplexity"] <= row["perplexity_high"]
        assert row["recall_low"] <= row["recall"] <= row["recall_high"]
        assert row["prefill_seconds"] > 0
        assert row["tokens_per_second"] > 0
        assert row["strings"] == 3
        assert row["recall_aware"] is None
    # The weights of a barely trained model are spread: one entry in twenty has less than 95 %.
    assert [row["capped"] for row in rows] == [None] * 3 + [1.0]
    assert same["perplexity"] == pytest.approx(full["perplexity"], rel=1e-4)
    assert less["perplexity"] != full["perplexity"]
    assert less["cache_bytes"] < full["cache_bytes"]
    assert less["bytes_of_full"] == less["cache_bytes"] / full["cache_bytes"]
    for small in (less, values):
        assert small["bytes_read_per_step"] < full["bytes_read_per_step"]
    table = (tmp_path / "c" / "compress.csv").read_text().splitlines()
    assert len(table) == 1 + len(rows)
    assert (tmp_path / "c" / "compress.png").stat().st_size > 10_000


@pytest.mark.product
def test_compress_continues(mukv, trained, tmp_path, monkeypatch):
    """A repeated command with further policies measures only the new ones."""
    (tmp_path / "a.txt").write_text("Once upon a time, and once more. " * 9)
    given = ("compress", trained, "--text", tmp_path / "a.txt", "--out", tmp_path / "c", "--json")
    sizes = ("--samples", 1, "--strings", 2, "--policy")
    first = mukv(*given, *sizes, "knorm")
    assert "about " in first.stderr
    done: list[str] = []

    def counted(reader, rows, left, *rest):
        done.extend(job.candidate.policy.name for job in left)
        yield from measured(reader, rows, left, *rest)

    monkeypatch.setattr("mukv.compress.judge.measured", counted)
    again = mukv(*given, *sizes, "knorm")
    assert done == []
    assert again.stdout == first.stdout
    more = mukv(*given, *sizes, "knorm,random")
    assert done == ["random", "random"]
    assert "4 of 6 measurements are stored" in more.stderr
    rows = [json.loads(run.stdout.splitlines()[-1])["rows"] for run in (first, more)]
    assert rows[1][:2] == rows[0]
    mukv(*given, *sizes, "knorm", "--again")
    assert sorted(done[2:]) == ["full", "full", "knorm", "knorm"]


@pytest.mark.product
def test_compress_at_equal_bytes_without_recall(facts, trained, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time, and once more. " * 9)
    given = ("compress", trained, "--text", tmp_path / "a.txt", "--out", tmp_path / "c")
    sizes = ("--samples", 1, "--strings", 0, "--policy", "streaming,tova", "--bytes", 0.6)
    full, *rows = facts(*given, *sizes)["rows"]
    assert full["recall"] is None
    for row in rows:
        assert 0.5 < row["bytes_of_full"] <= 0.6
        assert row["budget"] < 0.6


@pytest.mark.product
def test_another_compute_type(facts, trained, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time, and once more. " * 9)
    given = ("eval", trained, "--text", tmp_path / "a.txt")
    exact, rounded = (facts(*given, "--compute", name) for name in ("float32", "bfloat16"))
    assert facts(*given) == exact
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
    made = [
        facts("generate", trained, "--prompt", "a", "--max-tokens", 2, "--compute", name)
        for name in ("float32", "bfloat16")
    ]
    assert made[1]["cache_bytes"] < 0.6 * made[0]["cache_bytes"]


@pytest.mark.product
def test_text_streams(mukv, facts, trained):
    text = facts("generate", trained, "--prompt", "[1]", "--max-tokens", 40)["text"]
    done = mukv("generate", trained, "--prompt", "[1]", "--max-tokens", 40)
    # Without line ends: rich counts \r and the like as such.
    assert done.stdout.split() == f"[1]{text}".split()
    assert re.search(r"tokens/s, first token after .* cache [\d,]+ bytes", done.stderr)


def test_describe(facts, mukv, trained):
    of_preset = facts("describe", "tiny")
    assert of_preset.keys() >= DESCRIBED
    assert len(of_preset["layers"]) == 4
    assert all(layer.keys() >= LAYER for layer in of_preset["layers"])
    assert facts("describe", trained)["parameters"] < of_preset["parameters"]
    assert f"{of_preset['parameters']:,}" in mukv("describe", "tiny").stdout


def test_a_result_for_a_closed_standard_output_is_an_error():
    line = f"exec '{sys.executable}' -m mukv --version >&-"
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "standard output is closed" in done.stderr
