"""`mukv report` writes one self-contained page, refuses wrong folders, and plots only comparable
runs on one axis."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from mukv.cli.report import pictures, report
from mukv.cli.report.foreign import LeftOut, read_picture, read_table
from mukv.cli.report.found import findings
from mukv.cli.report.told import gather, same_text
from mukv.core.errors import BadInput
from mukv.data.build import build_tokens
from mukv.show.figures import saved_figure
from mukv.show.page import Page
from mukv.train.metrics import read_metrics


def test_a_page_is_self_contained(mukv, trained, tmp_path):
    out = tmp_path / "report.html"
    done = mukv("report", trained, trained.parent, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    own = next(run for run in facts["runs"] if run["run"] == str(trained.resolve()))
    assert (own["step"], own["cache_bytes_per_token"]) == (3, 256)
    assert len({run["run"] for run in facts["runs"]}) == len(facts["runs"])
    page = out.read_text()
    assert "data:image/png;base64," in page
    assert not any(word in page for word in ("http:", "https:", "<script", 'src="/'))


def test_findings_are_shown_and_escaped(tmp_path):
    page = Page("a & b")
    folder = tmp_path / "compress"
    folder.mkdir()
    (folder / "compress.csv").write_text("policy,budget\n<full>,1\n")
    assert findings(page, "<run>", tmp_path) == []
    assert "&lt;full&gt;" in page.html()
    assert "<title>a &amp; b</title>" in page.html()
    assert "&lt;run&gt;" in page.html()


def test_no_run(mukv, trained, tmp_path):
    done = mukv("report", str(trained)[:-1], "--out", tmp_path / "x.html")
    assert (done.returncode, "did you mean" in done.stderr) == (2, True)
    assert not (tmp_path / "x.html").exists()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Return token files: one text as bytes and as pairs of bytes, and another text of equal
    length."""
    root = tmp_path_factory.mktemp("texts")
    for name, word in (("a", "word "), ("b", "drow ")):
        (root / name).mkdir()
        for number in range(40):
            (root / name / f"{number:02}.txt").write_text(f"{word}{number} " * (1 + number % 5))
    made = {"bytes": ("a", "bytes"), "pairs": ("a", "bpe:300"), "other": ("b", "bytes")}
    return {
        name: build_tokens([str(root / text)], root / f"t-{name}", tokenizer, validation=0.3).path
        for name, (text, tokenizer) in made.items()
    }


def make_run(trained: Path, folder: Path, tokens: Path | None, losses=(3.0, 2.0)) -> Path:
    """Make a run directory like one that training leaves, with another token file."""
    folder.mkdir(parents=True)
    config = (trained / "config.yaml").read_text()
    if tokens is not None:
        config = re.sub(r"  path: .*", lambda _: f"  path: {json.dumps(str(tokens))}", config)
        stamp = json.loads((tokens / "meta.json").read_text())["fingerprint"]
        (folder / "provenance.json").write_text(json.dumps({"data_fingerprint": stamp}))
        shutil.copy(tokens / "tokenizer.json", folder)
    (folder / "config.yaml").write_text(config)
    records = (
        {"step": step, "loss": loss, "validation_loss": loss, "validation_bits_per_byte": loss / 2}
        for step, loss in enumerate(losses, 1)
    )
    text = "".join(json.dumps(each) + "\n" for each in records)
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def figures(monkeypatch) -> list:
    """Return the list to which each figure that a report draws is added."""
    kept: list = []

    @contextmanager
    def keeping(*args, **options):
        with saved_figure(*args, **options) as figure:
            kept.append(figure)
            yield figure

    monkeypatch.setattr(pictures, "saved_figure", keeping)
    return kept


@pytest.mark.product
def test_only_equal_texts_share_axes(figures, trained, texts, tmp_path):
    for name in texts:
        make_run(trained, tmp_path / "runs" / name, texts[name])
    make_run(trained, tmp_path / "runs" / "unknown", None)
    runs, left_out = gather([tmp_path / "runs"])
    assert left_out == []
    groups = {frozenset(run.name for run in group): group for group in same_text(runs)}
    one, other = frozenset(("bytes", "pairs")), frozenset(("other",))
    assert groups.keys() == {one, other, frozenset(("unknown",))}
    assert "only between equal tokens" in pictures.curves(groups[one], tmp_path / "x.png")
    labels = [axes.get_ylabel().split(",")[0] for axes in figures[0].axes]
    assert labels == [*2 * ["training loss of one batch"], "held-out bits/byte"]
    series = [
        [line.get_label() for line in axes.lines if len(line.get_xdata())]
        for axes in figures[0].axes
    ]
    assert series == [["bytes"], ["pairs"], ["bytes", "pairs"]]
    assert pictures.trade_off(groups[other], tmp_path / "y.png") is None
    facts = report([tmp_path / "runs"], tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert "3 different texts" in page
    assert page.count("<figcaption>Quality against cache bytes, on one text") == 1
    assert all(f"t-{name} (" in page for name in texts)
    assert [run["tokens"] for run in facts["runs"]] == 4 * [2 * 2 * 32]


def test_a_missing_text_is_identified_by_its_fingerprint(trained, texts, tmp_path):
    gone = shutil.copytree(texts["pairs"], tmp_path / "gone")
    for name in "ab":
        make_run(trained, tmp_path / "runs" / name, gone)
    make_run(trained, tmp_path / "runs" / "c", texts["bytes"])
    shutil.rmtree(gone)
    assert [len(group) for group in same_text(gather([tmp_path / "runs"])[0])] == [2, 1]


@pytest.mark.product
def test_the_range_of_a_curve_leaves_out_its_start(figures, trained, texts, tmp_path):
    good = [2 + 8 * math.exp(-step / 3) for step in range(60)]
    bad = [*good[:50], *(4.0 + step for step in range(10))]
    for name, losses in (("good", good), ("bad", bad)):
        run = make_run(trained, tmp_path / name, texts["bytes"], losses)
        caption = pictures.curves(gather([run])[0], tmp_path / "x.png")
        low, high = figures[-1].axes[0].get_ylim()
        assert low < min(losses)
        assert high > max(losses[30:])
        assert ("leave out" in caption) == (high < max(losses)) == (name == "good")
    flat = make_run(trained, tmp_path / "flat", texts["bytes"], 9 * [2.0])
    assert "leave out" not in str(pictures.curves(gather([flat])[0], tmp_path / "x.png"))


def test_figures_of_an_earlier_step_are_marked(trained, texts, tmp_path):
    run = make_run(trained, tmp_path / "r", texts["bytes"])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1500, "loss": 1.5}\n')
    report([run], tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert "<td>1.000 (step 2)</td>" in page
    assert "<td>1.500</td>" in page
    assert "were measured at that step" in page


def test_captions_are_shown(tmp_path):
    (tmp_path / "bench").mkdir()
    for name, caption in (("with", "What a <reader> should know."), ("with-out", None)):
        with saved_figure(tmp_path / "bench" / f"{name}.png", (2, 2), caption=caption) as figure:
            figure.subplots().plot([1])
    page = Page("x")
    assert findings(page, "run", tmp_path) == []
    assert "<figcaption>What a &lt;reader&gt; should know.</figcaption>" in page.html()
    assert "<figcaption>with out</figcaption>" in page.html()


def test_numbers_of_a_table_are_even_and_names_stay(tmp_path):
    (tmp_path / "x.csv").write_text("name,007,x,n\n_a,010,0.5,1000\n$b$,007,12.25,\nc,1,,3\n")
    table = read_table(tmp_path / "x.csv")
    assert table.columns == ["name", "007", "x", "n"]
    assert table.rows == [
        ["_a", "010", "0.50", "1,000"],
        ["$b$", "007", "12.25", ""],
        ["c", "1", "", "3"],
    ]


def test_folders_that_are_no_runs_are_left_out_with_the_reason(trained, texts, tmp_path):
    make_run(trained, tmp_path / "runs" / "good", texts["bytes"])
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("model: [")
    facts = report([tmp_path / "runs"], tmp_path / "x.html")
    assert len(facts["runs"]) == 1
    assert "broken" in facts["left_out"][0]
    assert "What was left out" in (tmp_path / "x.html").read_text()
    with pytest.raises(BadInput):
        report([broken], tmp_path / "y.html")
    assert not (tmp_path / "y.html").exists()


def test_pipes_and_directories_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.csv")
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(LeftOut, match="not a regular file"):
        read_table(tmp_path / "x.csv")
    with pytest.raises(LeftOut, match="not a regular file"):
        read_picture(tmp_path / "x.png")
    told: list[tuple[int, str]] = []
    assert list(read_metrics(tmp_path / "metrics.jsonl", lambda *line: told.append(line))) == []
    assert told == [(0, "not a regular file")]


def test_metrics_keep_numbers_only(tmp_path):
    lines = (
        '{"step": 1, "loss": 2.5}',
        '{"step": 2, "loss": "low", "tokens": 7}',
        '{"step": 1e2}',
        '{"step": -1}',
        '{"step": true}',
        f'{{"step": {10**400}}}',
        f'{{"step": 3, "loss": {10**400}}}',
        "9" * 5000,
        "[" * 100_000,
        '{"step": 4, "loss": NaN, "y": [1]}',
        "x" * (1 << 21),
        '{"step": 5}',
        '{"step": 6, "lo',
    )
    (tmp_path / "m").write_text("\n".join(lines))
    told: list[tuple[int, str]] = []
    found = list(read_metrics(tmp_path / "m", lambda *line: told.append(line)))
    assert found == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "tokens": 7},
        {"step": 3},
        {"step": 4},
        {"step": 5},
    ]
    assert [number for number, _ in told] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 11, 13]
    assert list(read_metrics(tmp_path / "m")) == found
