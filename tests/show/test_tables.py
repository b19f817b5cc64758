"""Tables of commands have units in the headers, equal decimals in a column, and complete
numbers."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.table import Table

from mukv.cli import benchmark, compression, demo, pretrained, tuning
from mukv.compress import Result
from mukv.runs import config, describe
from mukv.show.terminal import Console, table
from mukv.tuning.coordinates import Slope
from mukv.tuning.transfer import Optimum, Transfer


@pytest.fixture
def tables(monkeypatch) -> list[Table]:
    """Return the list to which each printed table is added."""
    found: list[Table] = []

    def keep(self, *printed, **options):
        found.extend(each for each in printed if isinstance(each, Table))

    monkeypatch.setattr(Console, "print", keep)
    return found


def uneven(printed: Table) -> list[str]:
    """Return the columns whose numbers differ in their number of decimals."""
    wrong = []
    for column in printed.columns:
        numbers = [cell for cell in column.cells if re.fullmatch(r"[+-]?[0-9,.]+%?", str(cell))]
        if len({len(cell.rstrip("%").partition(".")[2]) for cell in numbers}) > 1:
            wrong.append(f"{column.header}: {numbers}")
    return wrong


def headers(printed: Table) -> str:
    return " ".join(str(column.header) for column in printed.columns).replace("\n", " ")


def result(policy: str, budget: float, perplexity: float, **changes: Any) -> Result:
    measured = Result(
        policy=policy,
        budget=budget,
        perplexity=perplexity,
        recall=0.5,
        recall_aware=None,
        cache_bytes=16392,
        bytes_per_token=256.1,
        bytes_of_full=0.25,
        bytes_read_per_step=4098,
        read_of_full=0.0625,
        tokens_per_second=12345.6,
        decoding_of_full=1.0,
        prefill_seconds=0.01,
        samples=8,
        strings=96,
        perplexity_low=None,
        perplexity_high=None,
        recall_low=0.4,
        recall_high=0.6,
        capped=None,
    )
    return replace(measured, **changes)


def test_compress(tables):
    found = [
        result("full", 1.0, 9.5),
        result("snapkv", 0.25, 12345.678, recall_aware=1.0),
        result("topp", 64, 10.25, capped=0.5),
    ]
    compression.show_results(found, Console(width=200))
    assert uneven(tables[0]) == []
    for part in ("cache bytes", "bytes/step", "tokens/s", "recall", "aware", "capped"):
        assert part in headers(tables[0])
    assert list(tables[0].columns[1].cells) == ["100.0%", "25.0%", "64 entries"]
    assert list(tables[0].columns[2].cells) == ["0.25"] * 3
    assert list(tables[0].columns[4].cells) == ["50.0% (40-60)"] * 3


def test_compress_on_a_narrow_terminal():
    """No name and no number is wrapped at 80 columns."""
    file = io.StringIO()
    found = [result("full", 1.0, 40.51, cache_bytes=70_778_880)]
    found.append(result("snapkv+int8", 0.25, 41.758, cache_bytes=15_571_968))
    compression.show_results(found, Console(file=file, width=80))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("snapkv+int8" in line for line in lines) == 2
    for number in ("15,571,968", "41.76", "12,346", "50.0% (40-60)"):
        assert any(number in line for line in lines)


def test_compress_warns_of_too_few_strings(tables, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(compression.output, "warn", said.append)
    compression.show_results([result("full", 1.0, 9.5)], Console(width=200))
    assert said == []
    found = [result("full", 1.0, 9.5, strings=4, recall_low=0.15, recall_high=0.85)]
    compression.show_results(found, Console(width=200))
    assert "4 planted strings are too few" in said[0]
    assert "35 points higher or lower" in said[0]
    nothing = {"recall": None, "recall_low": None, "recall_high": None}
    compression.show_results([result("full", 1.0, 9.5, **nothing)], Console(width=200))
    assert "recall" not in headers(tables[2])
    assert len(said) == 1


def test_bench(tables):
    rows = [
        {"task": name, "length": length, "exact_match": 0.5, "interval": (0.25, 0.75),
         "oracle": 1.0, "chance": chance, "cache_bytes_per_token": 256.02, "free_running": free}
        for name, length, chance, free in (("a", 64, 0.5, None), ("b", 12800, 1 / 4096, 0.0625))
    ]  # fmt: skip
    benchmark.show(rows, None, False)
    assert uneven(tables[0]) == []
    assert all(unit in headers(tables[0]) for unit in ("length tokens", "cache bytes/token"))


def test_transfer_and_check(tables):
    optima = {64: Optimum(-8.0, -9, -7, 3.5, True), 128: Optimum(-2.5, -3, -1, 2.25, False)}
    tuning.show_transfer(Transfer(optima, 0.1, 0.0, 0.2, 0.01), Console())
    tuning.show_slopes([Slope("mlp", 0.5, 0.25, 0.75, 0.2, {})], Console())
    assert [uneven(each) for each in tables] == [[], []]
    assert "nats/token" in headers(tables[0])
    assert "octaves per octave" in headers(tables[1])


def test_sweep(tables):
    rows = [
        {
            "run": "r",
            "rate": rate,
            "kind": kind,
            "validation_loss": loss,
            "reason": None,
            "state": "x",
        }
        for rate, kind, loss in ((0.03, "a", 1.5), (0.00965, 1, None), (1e-3, True, 2.25))
    ]
    results = {"rows": rows, "complete": 2, "trials": 3, "study": "s", "edges": []}
    tuning.show_sweep(results, ["rate", "kind"], Console())
    assert uneven(tables[0]) == []
    assert list(tables[0].columns[0].cells) == ["0.03000", "0.00965", "0.00100"]
    assert list(tables[0].columns[1].cells) == ["a", "1", "True"]


def test_describe(tables):
    run = config.load("tiny-hybrid")
    describe.show(describe.describe(run), run, Console())
    assert [uneven(each) for each in tables] == [[], []]
    assert "cache bytes/token fixed bytes" in headers(tables[0])


def test_demo(tables, tmp_path):
    rows = [
        {"name": name, "parameters": 10**6, "cache_bytes_per_token": size,
         "cache_bytes": round(4096 * size), "bits_per_byte": 2.5,
         "decoding_tokens_per_second": 99.5, "continuation": "[/b]"}
        for name, size in (("MHA", 4096), ("MQA", 1024.0))
    ]  # fmt: skip
    demo.show(rows, Console())
    assert uneven(tables[0]) == []
    assert "one seed" in str(tables[0].caption)
    demo.draw(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_demo_of_a_pretrained_model(tables, tmp_path):
    rows = [result("full", 1.0, 9.5), result("snapkv+int8", 0.25, 10.25, perplexity_low=9.0)]
    pretrained.show(rows, Console())
    assert uneven(tables[0]) == []
    assert "strings found" in headers(tables[0])
    heads = np.array([[1.0, 300.0], [2.5, np.nan]])
    pretrained.draw("a model", heads, 512, rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_number_is_never_cut_short():
    shown = table(("a name",), ("bytes",))
    shown.add_row("x" * 30, "123,456,789")
    out = io.StringIO()
    Console(file=out, width=20).print(shown)
    assert re.sub(r"[^0-9]", "", out.getvalue()) == "123456789"
