"""Run directories whose files were damaged, exchanged or written by others."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import resolve
from mukv.train.loop import known_so_far
from mukv.train.metrics import MetricsFile
from tests.hostile.harness import check_all

pytestmark = pytest.mark.xdist_group("trained")
LINES = [
    "", "[]", "1", "null", "{}", "{", "\x00", "é", '{"step": 1}', '{"step": "1"}', '{"step": 1.5}',
    '{"step": -1, "loss": 1}', '{"step": true, "loss": 1}', '{"step": null, "loss": 1}',
    '{"step": 1, "loss": "low"}', '{"step": 1, "loss": [1]}', '{"step": 1, "loss": NaN}',
    '{"step": 1, "loss": Infinity}', '{"step": 1, "loss": 1e999}', '{"step": 1, "loss": {}}',
    '{"step": 1' + "0" * 400 + ', "loss": 2}', '{"step": 1' + "0" * 5000 + ', "loss": 2}',
    '{"step": 1, "loss": 1' + "0" * 400 + "}", "[" * 10**5, '{"a":' * 10**5, "x" * (1 << 20),
    '{"step": 1, "validation_loss": "x"}', '{"step": 1, "tokens_per_second": null}',
]  # fmt: skip


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_metrics(tmp_path, record_property):
    """A continued run reads any metrics.jsonl, and keeps the numbers in it."""
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 2, "loss": 3.5}'

    def resume(lines: list[str]) -> None:
        path.write_bytes("\n".join([*lines, good, '{"step": 3, "lo']).encode(errors="replace"))
        known, _ = known_so_far(path, 5)
        assert known["loss"] == 3.5
        assert all(isinstance(value, int | float) for value in known.values())
        MetricsFile(path, 5).close()
        for line in path.read_text().splitlines():
            assert isinstance(json.loads(line)["step"], int)

    random.seed(0)
    mixes = [[line] for line in LINES] + [random.sample(LINES, 3) for _ in range(60)]
    calls = [(str(mix)[:80], lambda mix=mix: resume(mix)) for mix in mixes]
    assert check_all("metrics", calls, record_property) == {"accepted": len(calls)}


@pytest.mark.product
def test_a_run_continues_with_foreign_metrics(mukv, run):
    (run / "metrics.jsonl").write_text("\n".join(line for line in LINES if len(line) < 10**4))
    done = mukv("train", run, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 3


def test_configurations(run, record_property):
    """A configuration is read or refused after a few bytes of it were exchanged, left out or
    doubled."""
    config = run / "config.yaml"
    text = config.read_bytes()
    random.seed(0)

    def damaged(number: int) -> bytes:
        start = random.randrange(len(text))
        stop = min(start + random.choice((1, 1, 4, 40)), len(text))
        middle = (bytes(random.choices(range(256), k=stop - start)), b"", 2 * text[start:stop])
        return text[:start] + middle[number % 3] + text[stop:]

    def read(content: bytes) -> None:
        config.write_bytes(content)
        resolve(str(run), [], None)
        RunDirectory(run).load_config()

    contents = [damaged(number) for number in range(60)]
    calls = [(repr(each[:60]), lambda each=each: read(each)) for each in contents]
    check_all("run configurations", calls, record_property)


FILES = (
    "config.yaml",
    "metrics.jsonl",
    "provenance.json",
    "tokenizer.json",
    "weights",
    "checkpoints",
)


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds(mukv, run, name, record_property):
    """With a folder, pipe, device, broken link or noise in place of a file, a command exits with 1
    or 2 and one line, or does not need the file."""
    path = run / name

    def pipe() -> None:
        os.mkfifo(path)

    kinds = {
        "folder": path.mkdir,
        "pipe": pipe,
        "device": lambda: path.symlink_to("/dev/zero"),
        "broken link": lambda: path.symlink_to("nowhere"),
        "noise": lambda: path.write_bytes(bytes(range(256))),
        "empty": path.touch,
    }

    def generate(make) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make()
        done = mukv("generate", run, "--prompt", "a", "--max-tokens", "1")
        assert done.returncode in (0, 1, 2)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == (done.returncode > 0), done.stderr
        assert "fault of mukv" not in done.stderr, done.stderr

    calls = [(f"{name}: {kind}", lambda make=make: generate(make)) for kind, make in kinds.items()]
    check_all("run files", calls, record_property)
