"""Numeric options are tried with invalid values, and arguments are swapped; a command ends in one
line for any exception."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any, get_args

import pytest
import typer

from mukv.cli import app, ending
from mukv.cli.typed import Command, require_number, spellings
from mukv.core.errors import BadInput
from mukv.storage.files import temporary
from tests.conftest import command
from tests.hostile.harness import check_all
from tests.pairs import params

VALUES = (
    "-1",
    "1" + "0" * 18,
    "1" + "0" * 400,
    "nan",
    "inf",
    "-inf",
    "1e400",
    "",
    "x",
    "٣x",
    "0x1",
)


def commands() -> dict[str, Command]:
    return dict(typer.main.get_command(app).commands)  # pyright: ignore


def number_of(param: Any) -> type | None:
    """Return int or float for a parameter of this type."""
    declared = param.type_descriptor.annotation
    return next((kind for kind in (int, float) if kind in (declared, *get_args(declared))), None)


def numbers() -> list[tuple[str, str, str]]:
    """Return command, option and value for each numeric option."""
    found = []
    for name, each in commands().items():
        spelt = spellings(each.params)
        for param in each.params:
            if number_of(param):
                found += [(name, spelt[param.name], value) for value in VALUES]
    return found


NEEDED = {
    "convert": ("MODEL", "--to", "mla:4", "--out", "x"),
    "data": ("SOURCE", "--out", "x"),
    "import": ("SOURCE", "--out", "x"),
    "export": ("RUN", "--out", "x"),
    "sweep": ("tiny", "train.seed=0,1"),
    "transfer": ("tiny",),
    "bench": ("tiny",),
}


@pytest.mark.product
@pytest.mark.parametrize("every", params([4, 1], [4]))
def test_numbers(tmp_path, monkeypatch, record_property, every):
    """Each value is refused before any file is read, and the error names the option as it was
    typed."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, option: str, value: str) -> None:
        done = command(name, *NEEDED.get(name, ("MODEL",)), f"{option}={value}")
        lines = done.stderr.splitlines()
        assert done.returncode == 2, done.stderr
        assert [line.startswith("error: ") for line in lines] == [True], done.stderr
        assert len(lines[0]) < 1000
        assert option in lines[0], lines[0]
        raise BadInput(option, value, lines[0][:400])

    inputs = [
        (" ".join(each), lambda each=each: call(*each))
        for each in numbers()
        if each[2] != "1" + "0" * 18 or not takes_floats(*each[:2])
    ]
    assert len(inputs) > 250
    tried = inputs[::every]
    assert check_all("options", tried, record_property) == {"refused": len(tried)}


def takes_floats(name: str, option: str) -> bool:
    params = commands()[name].params
    return any(number_of(param) is float and option in param.opts for param in params)


def test_every_number_that_is_allowed_passes():
    for each in commands().values():
        for param in each.params:
            if number_of(param):
                require_number(param, number_of(param)(1))
                require_number(param, param.default)
                require_number(param, None)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {}")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text")
    (tmp_path / "text.md").write_text("a text")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


SWAPPED = [
    ("export OUT run", ["'run' is the model", "mukv export RUN --out"]),
    ("export OUT --out run", ["--out 'run' is a model", "swapped?"]),
    ("import out run", ["'run' is the model", "mukv import SOURCE --out"]),
    ("generate prompt run", ["'run' is the model", "must stand first"]),
    ("generate prompt --prompt run", ["--prompt 'run' is a model"]),
    ("generate run prompt", ["one word too many, 'prompt'", "--prompt TEXT"]),
    ("eval text.md run", ["'run' is the model", "--text FILE"]),
    ("eval text.md --text run", ["--text 'run' is a model"]),
    ("compress text.md run", ["'run' is the model"]),
    ("analyze text.md --text=run", ["--text 'run' is a model"]),
    ("train data.path=x tiny", ["CONFIG stands first", "'tiny'"]),
    ("describe train.steps=3 tiny", ["CONFIG stands first", "'tiny'"]),
    ("data OUT --out texts", ["--out 'texts' is there and SOURCE 'OUT' is not"]),
]


@pytest.mark.product
@pytest.mark.parametrize(("line", "parts"), SWAPPED, ids=[line for line, _ in SWAPPED])
def test_swapped_arguments(mukv, place, line, parts):
    done = mukv(*line.split())
    assert done.returncode == 2
    assert [part for part in parts if part not in done.stderr] == [], done.stderr


@pytest.mark.product
@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("data text.md --out t --tokenizer bpe:100", "--tokenizer: got 'bpe:100'"),
        ("data text.md --out t --validation 2", "--validation: got 2.0"),
        ("bench tiny --steps 0", "--steps: got 0"),
        ("bench tiny --samples 0", "--samples: got 0"),
        ("bench tiny --lengths 99999999999", "--lengths: got 99999999999; at most about"),
        ("describe tyny", "CONFIG: got 'tyny'"),
        ("describe tiny steps", "key=value: got 'steps'"),
        ("eval run --text pipe", "--text: got 'pipe'; a readable file (a pipe)"),
        ("data pipe --out t", "pipe: got 'a pipe'"),
        ("data /dev/zero --out t", "/dev/zero: got 'a device'"),
        ("describe ./pipe", "./pipe"),
        (
            "train tiny train.length=100000000",
            "memory: got 'batch 8 x length 100,000,000'",
        ),
    ],
)
def test_errors_name_what_was_typed(mukv, place, line, start):
    (place / "run" / "weights").mkdir(exist_ok=True)
    done = mukv(*line.split())
    assert done.returncode == 2, done.stderr
    if not line.startswith(("eval", "describe ./pipe")):  # a run without weights is reported first
        last = done.stderr.splitlines()[-1]  # notes may stand before it
        assert last.startswith(f"error: {start}"), done.stderr


def test_overwrite_is_an_option(mukv, place):
    assert mukv("data", "texts", "--out", "t").returncode == 0
    (place / "texts" / "a.txt").write_text("another text")
    done = mukv("data", "texts", "--out", "t")
    assert "another path, or --overwrite to replace it" in done.stderr


class Panic(BaseException):
    """Stand in for the exception of a panic in a Rust library."""


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


ENDS = [
    (MemoryError(), 1, "error: not enough memory"),
    (MemoryError("12 bytes\nmore"), 1, "error: not enough memory (12 bytes)"),
    (RuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), 1, "error: not enough memory (RESOURCE"),
    (RuntimeError(), 1, "error: this is a fault of mukv: RuntimeError ("),
    (Panic("index out of bounds"), 1, "error: this is a fault of mukv: Panic: index out of bounds"),
    (Mute(), 1, "error: this is a fault of mukv: Mute ("),
    (RecursionError("deep"), 1, "error: this is a fault of mukv: RecursionError: deep"),
    (UnicodeEncodeError("ascii", "é", 0, 1, "no"), 1, "error: this is a fault of mukv: Unicode"),
    (OSError(), 1, "error: OSError"),
    (OSError(errno.ENOSPC, "No space", b"/a\xff"), 1, "error: /a"),
    (OSError(errno.ENAMETOOLONG, "Too long", "x" * 9000), 2, "error: xxx"),
    (OSError(errno.EIO, None, 3), 1, "error: 3: "),
    (ValueError("x" * 10**6), 1, "error: this is a fault of mukv: ValueError: xxx"),
    (BadInput("x", "y" * 10**6, "z" * 10**6), 2, "error: x: got 'yyy"),
    (BadInput("x", 10**5000, "z"), 2, "error: x: got "),
    (BrokenPipeError(), 1, ""),
]


@pytest.mark.parametrize(
    ("error", "status", "start"), ENDS, ids=[type(e[0]).__name__ for e in ENDS]
)
def test_every_exception_ends_in_a_line(mukv, monkeypatch, error, status, start):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("mukv.runs.resolve.resolve", fail)
    done = mukv("describe", "tiny")
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == (start != "")
    assert len(done.stderr) < 1100
    if "fault of mukv" in start:
        assert "mukv/cli/analysis.py:" in done.stderr or "mukv/cli/inference.py:" in done.stderr
        monkeypatch.setenv(ending.TRACEBACK, "1")
        assert "Traceback" in mukv("describe", "tiny").stderr


@pytest.fixture
def handlers():
    """Restore the signal handlers after the test, since a signal that ends a command resets
    them."""
    before = {number: signal.getsignal(number) for number in ending.SIGNALS}
    # A process in the background may have been started to ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_ends_in_a_line(mukv, monkeypatch, tmp_path, handlers, number, word):
    """A signal ends a command in one line, and context managers exit as after any exception."""

    def wait(*_: object) -> None:
        with temporary(tmp_path / "x") as made:
            made.write_text("half")
            os.kill(os.getpid(), number)
            raise AssertionError("nobody heard the signal")

    with monkeypatch.context() as patch:
        patch.setattr("mukv.runs.resolve.resolve", wait)
        done = mukv("describe", "tiny")
    assert (done.returncode, done.stderr) == (1, f"error: {word}\n")
    assert os.listdir(tmp_path) == []


def test_a_command_that_ends_leaves_the_handlers_as_they_were(mukv, handlers):
    before = {number: signal.getsignal(number) for number in handlers}
    assert mukv("describe", "tyny").returncode == 2
    assert {number: signal.getsignal(number) for number in handlers} == before
