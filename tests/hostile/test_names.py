"""Any name that the file system allows works and is shown unchanged, or is refused at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mukv.core.names import printable
from tests.hostile.harness import check_all

pytestmark = pytest.mark.xdist_group("trained")

NAMES = [
    # markup of the terminal library, TeX, emphasis and HTML
    "[/b]x", "[red]x", "[link=a]x", "[", "]", "[[x]]", ":smile:", "$\\frac{x$", "$x$", "x_{",
    "<b>x", "&amp;", "a&b;", "<!--", "`x`", "*x*", "#x", "a#b", "# x",
    # shells, globs, options, formats, URLs
    "_x", "__", "-x", "--out", "--", "-", "~", "~root", "$HOME", "${x}", "%s", "%20", "%", "{0}",
    "{x}", "{", "*", "?", "a?b", "'", '"', "a'b\"c", ";x", "a|b", "a=b", "a:b", "@x", "a,b", "!x",
    "file:x", "\\", "\\n", "a\\b", "(x)", "+x", "^",
    # spaces and control characters
    " ", " x", "x ", "a  b", "a\nb", "\n", "a\tb", "a\rb", "\x1b[31mx", "\x1b]0;x\x07", "\x01",
    "\x7f", "\u2028", "\u200b", "\xa0",
    # Unicode
    "e\u0301", "\xe9", "a\u0300\u0301\u0302", "\u202eabc", "\u0639\u0631\u0628", "\u65e5\u672c",
    "\U0001f600", "\U0001f468\u200d\U0001f469", "\ufeffx", "\ufffd",
    os.fsdecode(b"\xff\xfe"), os.fsdecode(b"a\xe9b"), "\udced\udca0\udc80",
    # lengths
    "x" * 255, "x" * 250, "x" * 200, "\u65e5" * 85,
    # dots, names of others and names of our own
    "...", "..x", ".hidden", "x.", "CON", "nul", "null", "true", "1", "1e3", "0", "x.partial",
    ".x.1.partial", "x.old", "x.lock", ".lock", "x.png", "x.html", "x.yaml", "config.yaml",
    "x.safetensors", "x.csv", "x.npy", "x.gguf", "checkpoints", "weights", "x.orbax-checkpoint-tmp",
    "stdlib", "tiny",
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_given(name: str) -> str:
    """Return a path that can't be taken for an option."""
    return f"./{name}"


def ends_well(done, name: str) -> bool:
    """Return whether the command worked; assert that it was refused in one line otherwise."""
    assert "Traceback" not in done.stderr, done.stderr
    assert "fault of mukv" not in done.stderr, done.stderr
    if done.returncode == 0:
        return True
    assert done.returncode == 2, (done.returncode, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0], done.stderr
    return False


def shows(text: str, name: str) -> bool:
    """Return whether a text contains the name, with its control characters escaped."""
    return printable(name) in text


def each(
    work: Callable[[str], None], names: Sequence[str] = NAMES
) -> list[tuple[str, Callable[[], None]]]:
    return [(ascii(name), lambda name=name: work(name)) for name in names]


def writes(
    mukv, place: Path, record_property, area: str, *command: object, names=NAMES, end: str = ""
) -> None:
    """Check a command with --out of each name: it makes only that file and prints its name."""

    def work(name: str) -> None:
        before = sorted(os.listdir(place))
        name += end
        done = mukv(*command, "--out", as_given(name))
        found = sorted(set(os.listdir(place)) - set(before))
        if not ends_well(done, name):
            assert found == [], found
            return
        assert found == [name.split("/")[0]], found
        assert shows(done.stdout + done.stderr, name), done.stdout + done.stderr
        made = place / found[0]
        shutil.rmtree(made) if made.is_dir() else made.unlink()

    counts = check_all(area, each(work, names), record_property)
    assert counts["accepted"] > len(names) / 2, counts


@pytest.mark.product
def test_token_files(mukv, place, record_property):
    (place / "source.txt").write_text("some text " * 30)
    writes(mukv, place, record_property, "names of token files", "data", "source.txt")


@pytest.mark.product
def test_sources(mukv, place, record_property):
    """A text file of any name becomes a token file, or is refused."""
    (place / "x").mkdir()

    def work(name: str) -> None:
        source = place / name
        source.write_text("some text " * 30)
        try:
            done = mukv("data", as_given(name), "--out", "x/tokens")
            if ends_well(done, name):
                assert shows((place / "x/tokens/meta.json").read_text() + done.stdout, "tokens")
            else:
                assert os.listdir(place / "x") == []
        finally:
            source.unlink()
            shutil.rmtree(place / "x/tokens", ignore_errors=True)

    check_all("names of sources", each(work, NAMES[1::3]), record_property)


class Cells(HTMLParser):
    """Parse the text of each row's first cell, and the title, from a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.title, self.within, self.column = "", "", 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.within = tag
        self.column = 0 if tag == "tr" else self.column + (tag == "td")
        if tag == "td" and self.column == 1:
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within == "td" and self.column == 1:
            self.found[-1] += data
        elif self.within == "title":
            self.title += data


@pytest.fixture
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small run, which is quick to copy and to report."""
    copy = tmp_path_factory.mktemp("run") / "copy"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    return copy


def test_runs_of_a_folder_in_a_report(mukv, place, run):
    (place / "runs").mkdir()
    names = [name for name in NAMES[::8] if "/" not in name]
    for name in names:
        shutil.copytree(run, place / "runs" / name)
    done = mukv("report", "runs", "--out", "page.html", "--json")
    assert done.returncode == 0, done.stderr
    page = Cells((place / "page.html").read_text())
    assert page.found == [printable(name) for name in sorted(names)]
    facts = json.loads(done.stdout)
    assert [Path(each["run"]).name for each in facts["runs"]] == sorted(names)


@pytest.mark.product
def test_runs_by_name(mukv, place, run, record_property):
    """`report` and `describe` show a run of any name under that name, or refuse it."""

    def work(name: str) -> None:
        if "/" in name:
            (place / name).parent.mkdir(exist_ok=True)
        run.rename(place / name)
        made = place / "page"
        made.unlink(missing_ok=True)
        try:
            done = mukv("report", as_given(name), "--out", made.name)
            if ends_well(done, name):
                page = Cells(made.read_text())
                assert page.found == [printable(Path(name).name)]
                assert page.title.startswith("Runs: ")
                assert ends_well(mukv("describe", as_given(name)), name)
            else:
                assert not made.exists()
        finally:
            (place / name).rename(run)

    check_all("names of runs", each(work, NAMES[::8]), record_property)


@pytest.mark.product
def test_reports(mukv, place, run, record_property):
    names = [name for name in NAMES[2::4] if len(name) < 245]
    writes(mukv, place, record_property, "names of pages", "report", run, names=names, end=".html")


def test_exports(mukv, place, run, record_property):
    names = ("[red]a  b\n", "\u65e5\\$x{", "-x")
    writes(mukv, place, record_property, "names of exports", "export", run, names=names)
