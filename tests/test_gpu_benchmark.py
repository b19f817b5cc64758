"""benchmarks/gpu.py: limits, rows that are written at once, continuing, and a dry run on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from tests.pairs import params

BENCHMARKS = Path(gpu.__file__).parent
FAKE = """
import json, sys, time
for case in sys.argv[2:]:
    if case == "hangs": time.sleep(60)
    if case == "dies": sys.exit("out of memory")
    row = {"error": "ValueError: no"} if case == "fails" else {"seconds": 1.0}
    print(json.dumps({"case": case, **row}), flush=True)
"""


@pytest.fixture
def on_device(monkeypatch):
    """Return the module of the measurements, imported as the scripts import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import on_device

    return on_device


def measured(folder, cases, limit=30.0, seconds=30.0):
    """Run the fake process on the remaining cases; return the results on disk."""
    part = type("Part", (), {"cases": cases, "limit": limit})
    results = gpu.Results(folder)
    for work in gpu.plan({"k-means": part}, results):
        gpu.run(work, results, [sys.executable, "-c", FAKE], time.monotonic() + seconds)
    return gpu.Results(folder)


def test_rows_are_written_and_not_measured_again(tmp_path):
    found = measured(tmp_path, ("a", "fails", "dies", "b")).rows
    assert [row["case"] for row in found] == ["a", "fails", "dies"]
    assert found[2]["error"] == "the process ended: out of memory"
    again = gpu.plan(
        {"k-means": type("Part", (), {"cases": ("a", "fails", "b"), "limit": 1.0})},
        gpu.Results(tmp_path),
    )
    assert [work.cases for work in again] == [("b",), ("fails",)]


def test_a_part_is_killed_at_its_limit(tmp_path):
    found = measured(tmp_path, ("a", "hangs", "b"), limit=1.5).rows
    assert [row["case"] for row in found] == ["a", "hangs"]
    assert found[1]["error"] == "stopped after 2 s"


def test_the_end_of_the_time_is_no_failure(tmp_path):
    assert [row["case"] for row in measured(tmp_path, ("a", "hangs"), seconds=1.5).rows] == ["a"]


TINY = [
    ("parity", "bfloat16/packed"),
    ("decode full", "8192/1"),
    ("decode int4", "8192/1"),
    ("decode pages:0.0625", "8192/1"),
    ("decode snapkv:0.25", "8192/1"),
    ("parity of decoding", "int8"),
    ("k-means", "8"),
    ("sweep", "64"),
    ("train 1b", "4096/mukv"),
    ("train 1b", "4096/torch"),
]


@pytest.mark.parametrize(("part", "case"), params(TINY, [TINY[1]], unpack=True))
def test_a_measurement_with_tiny_shapes(part, case, on_device, tmp_path):
    """Each measurement gives a row of the table."""
    row = on_device.PARTS[part].measure(case, tiny=True)
    assert row.get("passed", True)
    results = gpu.Results(tmp_path)
    results.add(json.loads(json.dumps({"part": part, "case": case, **row})))
    assert f"| {part} | {case} |" in gpu.table(results, {"device": "cpu"})


@pytest.mark.product
def test_a_dry_run(tmp_path):
    given = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    parts = ["--parts", "parity of decoding,k-means", "--minutes", "5"]
    first = subprocess.run([*given, *parts], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert len(gpu.Results(tmp_path).rows) == 5
    again = subprocess.run([*given, *parts], capture_output=True, text=True, check=False)
    assert "measured" not in again.stdout


def test_an_unknown_part(on_device):
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--parts", "decoding"])
    assert ended.value.code == 2
