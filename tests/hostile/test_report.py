"""`report` and the reading of metrics, with foreign files and names."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mukv.cli.report import pictures, report
from mukv.cli.report.found import findings
from mukv.cli.report.told import told
from mukv.show.figures import saved_figure
from mukv.show.page import Page
from mukv.show.terminal import Console
from mukv.train.loop import known_so_far
from mukv.train.metrics import MetricsFile, read_metrics
from tests.hostile.harness import check_all
from tests.pairs import params

DIGITS = 400
WORDS = (
    *(
        "",
        " ",
        "0",
        "-0",
        "1e400",
        "-1e400",
        "nan",
        "inf",
        "-inf",
        "NaN",
        "1e-400",
        "1_000",
        "0x10",
    ),
    *("9" * DIGITS, "-" + "9" * DIGITS, "9" * 5000, "0." + "9" * DIGITS, "1" + "0" * DIGITS + ".5"),
    *(
        "\u0661\u0662",
        "\u00bd",
        "\u2212" + "1",
        "1,5",
        "1 000",
        "loss",
        "null",
        "true",
        "[1]",
        "{}",
    ),
    *("<b>", "&amp;", "<script>alert(1)</script>", '"', "'", "$\\frac{x$", "[/b]x", "[red]x", "_x"),
    *("\x1b[2J", "\u202ea", "\ufeff", "\ufffd", "\u0000", "\r", "=1+1", "x" * 200_000, "\\", "%s"),
)
NAMES = (
    *(
        "[b]x",
        "[@click=x]y",
        "[red]x",
        "[bold",
        ":smile:",
        "$\\frac{x$",
        "$$",
        "a_b^{",
        "_x",
        "__",
        "_",
        "\\n",
    ),
    *(
        "a\nb",
        "\x1b[2J",
        "\t",
        "\x7f",
        "\udcff\udcfe",
        "\u202ex",
        "\u4e2d\u6587",
        "\u0301",
        " ",
        "x" * 200,
    ),
    *("<b>&", '"', "'", "%s", "{0}", "{", "*", "?", "[a-z]", "-o", "--json", "~", "nan", "1,2"),
    *(".x", "x.", "x y", "\u00e9", "\U0001f600", "a\u200db", "#", "@", "!", "`id`", "$(id)", "a=b"),
)
Input = tuple[str, Callable[[], Any]]


def csvs() -> Iterator[tuple[str, bytes]]:
    """Yield CSV files like those that other programs may write."""
    for word in WORDS:
        yield f"cell {word[:20]!r}", f"step,loss\n1,{word}\n2,3.5\n".encode("utf-8", "replace")
        yield f"name {word[:20]!r}", f"{word},loss\n1,2\n".encode("utf-8", "replace")
    rows = "\n".join(f"{n},{n / 7}" for n in range(100_000))
    yield from {
        "empty": b"",
        "one newline": b"\n",
        "names alone": b"a,b,c\n",
        "an open quote": b'a,b\n"1,2\n',
        "quotes inside": b'a,b\n1"2"3,"4"5\n',
        "binary": bytes(range(256)) * 40,
        "UTF-16": "a,b\n1,2\n".encode("utf-16"),
        "Latin-1": "a,\xfc\n1,2\n".encode("latin-1"),
        "a mark of order": b"\xef\xbb\xbfa,b\n1,2\n",
        "zero bytes": b"a,b\n\0,1\n",
        "only returns": b"a,b\r1,2\r",
        "uneven rows": b"a,b\n1\n1,2,3,4\n\n,\n",
        "wide": b",".join([b"1"] * 200_000) + b"\n",
        "long": f"a,b\n{rows}\n".encode(),
        "one huge cell": b"a,b\n1," + b"9" * 5_000_000 + b"\n",
        "a huge quoted cell": b'a,b\n1,"' + b"\n" * 1_000_000 + b'"\n',
        "too large": b"a,b\n" + b"1,2\n" * 9_000_000,
        "commas": b"," * 100_000,
        "quotes": b'"' * 100_001,
    }.items()
    draw = random.Random(0)
    for number in range(30):
        letters = 'abc,",\n\r;\t 0123.eE+-\0\xff'.encode("latin-1")
        yield f"random {number}", bytes(draw.choice(letters) for _ in range(draw.randrange(400)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pngs() -> Iterator[tuple[str, bytes]]:
    """Yield PNG files that are invalid, damaged, or larger than their size suggests."""
    header = b"\x89PNG\r\n\x1a\n"

    def whole(width: int, height: int, *extra: bytes) -> bytes:
        size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        pixels = zlib.compress(b"\0" * min((width + 1) * height, 4096))
        return header + size + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")

    good = whole(4, 4)
    yield from {
        "good": good,
        "empty": b"",
        "header": header,
        "text": b"no picture",
        "GIF": b"GIF89a" + bytes(20),
        "no pixels wide": whole(0, 4),
        "huge": whole(100_000, 100_000),
        "larger": whole(2**31 - 1, 2**31 - 1),
        "a bomb of text": whole(
            4, 4, chunk(b"zTXt", b"Description\0\0" + zlib.compress(bytes(1 << 27)))
        ),
        "a caption of zeros": whole(4, 4, chunk(b"tEXt", b"Description\0" + bytes(99))),
        "a caption of markup": whole(4, 4, chunk(b"tEXt", b"Description\0<script>")),
        "a long caption": whole(4, 4, chunk(b"tEXt", b"Description\0" + b"x" * 500_000)),
        "a caption in no UTF-8": whole(4, 4, chunk(b"iTXt", b"Description\0\0\0\0\0\xff\xfe")),
        "after the end": good + bytes(1000),
        "too large": good + bytes(33 << 20),
    }.items()
    draw = random.Random(0)
    for number in range(25):
        yield f"cut {number}", good[: draw.randrange(len(good))]
        damaged = bytearray(good)
        for _ in range(3):
            damaged[draw.randrange(8, len(damaged))] = draw.randrange(256)
        yield f"damaged {number}", bytes(damaged)


def metrics() -> Iterator[tuple[str, bytes]]:
    """Yield files with a hostile line among valid lines of metrics.jsonl."""

    def among(line: bytes) -> bytes:
        return (
            b'{"step": 1, "loss": 3.0, "validation_bits_per_byte": 2.0}\n'
            + line
            + b'\n{"step": 9}\n'
        )

    for word in WORDS:
        text = json.dumps(word)
        yield f"text {word[:20]!r}", among(f'{{"step": 2, "loss": {text}}}'.encode())
        yield (
            f"bare {word[:20]!r}",
            among(f'{{"step": 2, "loss": {word}}}'.encode("utf-8", "replace")),
        )
        yield (
            f"step {word[:20]!r}",
            among(f'{{"step": {word}, "loss": 2}}'.encode("utf-8", "replace")),
        )
    yield from {
        "empty": b"",
        "binary": bytes(range(256)) * 40,
        "deep": among(b"[" * 100_000),
        "deep objects": among(b'{"step":' * 50_000),
        "no line ends": b'{"step": 1}' * 100_000,
        "one long line": b"x" * (16 << 20),
        "steps backwards": b"".join(b'{"step": %d, "loss": 2}\n' % n for n in range(99, 0, -1)),
        "one step": b'{"step": 0, "loss": 2, "validation_bits_per_byte": 1}\n' * 50,
        "many": b"".join(b'{"step": %d, "loss": 2}\n' % n for n in range(20_000)),
        "far apart": b'{"step": 0, "loss": 1e-300}\n{"step": 9007199254740992, "loss": 1e12}\n',
        "negative": b'{"step": 1, "loss": -5, "validation_bits_per_byte": -1}\n',
        "too large": b'{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n',
        "nothing": b'{"step": 1, "loss": 0, "validation_bits_per_byte": 0}\n',
    }.items()


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a run directory that may be written to."""
    made = tmp_path / "run"
    made.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "provenance.json", "tokenizer.json"):
        shutil.copy(trained / name, made)
    return made


def check_findings(folder: Path) -> None:
    """Check that the findings of a folder become HTML without scripts."""
    page = Page("x")
    left_out = findings(page, "run", folder)
    html = page.html()
    html.encode()
    assert "<script" not in html
    assert left_out or len(page.parts) > 1
    assert all(len(line) < 600 for line in left_out)


def test_tables_and_pictures(tmp_path, record_property):
    def inputs() -> Iterator[Input]:
        for suffix, files in (("csv", csvs()), ("png", pngs())):
            for number, (label, content) in enumerate(files):
                folder = tmp_path / f"{suffix}{number}"
                (folder / "bench").mkdir(parents=True)
                (folder / "bench" / f"x.{suffix}").write_bytes(content)
                yield f"{suffix}: {label}", partial(check_findings, folder)
        for suffix in ("csv", "png"):
            for make in (
                os.mkfifo,
                os.mkdir,
                partial(os.symlink, "/dev/zero"),
                partial(os.symlink, "no"),
            ):
                folder = tmp_path / f"{suffix} {make}".replace("/", "-")[:90]
                (folder / "bench").mkdir(parents=True)
                make(folder / "bench" / f"x.{suffix}")
                yield f"{suffix}: {make}", partial(check_findings, folder)

    counts = check_all("report", inputs(), record_property)
    assert counts.total() >= 150


@pytest.mark.product
def test_metrics(run, tmp_path, record_property):
    def read(path: Path) -> None:
        shutil.copy(path, run / "metrics.jsonl")
        found = told(run, "x")
        assert all(len(why) < 600 for why in found.left_out)
        # As a continued run reads it.
        assert all(type(value) is not str for value in known_so_far(path, 10)[0].values())
        MetricsFile(path, keep_until=5).close()
        assert all(record["step"] <= 5 for record in read_metrics(path))

    def inputs() -> Iterator[Input]:
        for number, (label, content) in enumerate(metrics()):
            path = tmp_path / f"{number}.jsonl"
            path.write_bytes(content)
            yield f"metrics: {label}", partial(read, path)

    assert check_all("report", inputs(), record_property).total() >= 100


@pytest.mark.product
def test_curves_of_foreign_metrics(run, tmp_path, record_property):
    drawn = ("step", "far", "negative", "too", "nothing", "one", "many", "bare")
    chosen = [each for each in metrics() if each[0].startswith(drawn)][::6]

    def draw(content: bytes) -> None:
        (run / "metrics.jsonl").write_bytes(content)
        pictures.curves([told(run, "x")], tmp_path / "x.png")

    inputs = [(f"curves: {label}", partial(draw, content)) for label, content in chosen]
    check_all("report", inputs, record_property)


@pytest.mark.product
@pytest.mark.parametrize("every", params([4, 1], [4]))
def test_names(run, tmp_path, record_property, every):
    """Runs, files and labels of figures may have every name."""
    out, tried = tmp_path / "page", NAMES[::every]

    def whole(names: tuple[str, ...]) -> None:
        root = tmp_path / f"runs {len(list(tmp_path.iterdir()))}"
        for name in names:
            made = root / name
            shutil.copytree(run, made)
            (made / "bench").mkdir()
            (made / "bench" / f"{name}.csv").write_text("a,b\n1,2\n")
            with saved_figure(made / "bench" / f"{name}.png", (2, 2), name, name) as figure:
                figure.subplots().plot([name], [1], label=name)
        facts = report([root], out)
        assert sorted(Path(each["run"]).name for each in facts["runs"]) == sorted(names)
        assert facts["left_out"] == []
        assert out.read_bytes().count(b"<figcaption>") == len(names) + 1 + (len(names) > 1)
        printed = io.StringIO()
        for name in names:
            Console(file=printed, width=500).say(f"run: {name}")
        printed.getvalue().encode()

    inputs = [(f"names {number}", partial(whole, tried[number::6])) for number in range(6)]
    check_all("report", inputs, record_property)
    record_property("hostile", ("report", {"names": len(NAMES)}))


def test_the_path_of_the_page_is_in_use(run, tmp_path, record_property):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "x").mkdir(parents=True)
    targets = (
        tmp_path / "file" / "page",
        tmp_path / "folder",
        Path("/dev/full/x"),
    )
    inputs = [(f"out {path}", partial(report, [run], path)) for path in targets]
    sources = (
        tmp_path / "file",
        tmp_path / "missing",
        tmp_path / "x\udcff",
        Path("/dev/null"),
    )
    inputs += [(f"of {path!r}", partial(report, [path], tmp_path / "p")) for path in sources]
    assert check_all("report", inputs, record_property)["refused"] == len(inputs)
