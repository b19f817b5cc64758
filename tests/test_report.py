"""One page about runs: everything lies inside it, wrong folders are refused."""

from __future__ import annotations

import json


def test_a_page_needs_nothing_else(mukv, trained, tmp_path):
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


def test_findings_are_shown_and_escaped(mukv, trained, tmp_path):
    from mukv.page import Page
    from mukv.report import _findings, told

    run, page = told(trained, "<run>"), Page("a & b")
    folder = tmp_path / "compress"
    folder.mkdir()
    (folder / "compress.csv").write_text("policy,budget\n<full>,1\n")
    _findings(page, run, folder, "Cache policies")
    assert "&lt;full&gt;" in page.html()
    assert "<title>a &amp; b</title>" in page.html()
    assert "&lt;run&gt;" in page.html()


def test_no_run(mukv, trained, tmp_path):
    done = mukv("report", str(trained)[:-1], "--out", tmp_path / "x.html")
    assert (done.returncode, "did you mean" in done.stderr) == (2, True)
    assert not (tmp_path / "x.html").exists()
