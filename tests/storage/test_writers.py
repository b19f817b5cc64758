"""Of several processes that write into one folder, one succeeds; errors of the others name its
id."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.data.tokens import open_tokens
from mukv.storage import locks
from mukv.storage.locks import Held, one_writer
from mukv.tuning import sweep
from tests.conftest import MINUSCULE
from tests.kills import Server
from tests.pairs import params
from tests.processes import contents

pytestmark = pytest.mark.xdist_group("writers")

SMALL = (*MINUSCULE, "model.plan=[{repeats: 1}]", "train.steps=2")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def said(root: Path, number: int) -> str:
    return (root.parent / f"{number}.out").read_text()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_further_writers_are_refused(server, token_file, root):
    """While a writer is stopped, two more are refused; then it continues and ends."""
    given = ["train", "tiny", *SMALL, f"data.path={token_file}", "--out", "run"]
    first = server.start(root, *given)
    while not (root / "run" / "config.yaml").exists():
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)
    others = [server.start(root, *given) for _ in range(2)]
    for number, other in enumerate(others, start=1):
        assert server.ask(do="wait", process=other) == 2
        assert f"error: run: got 'a folder that process {first} is writing'" in said(root, number)
    os.kill(first, signal.SIGCONT)
    assert server.ask(do="wait", process=first) == 0
    finished = contents(root / "run" / "weights")
    status, _, words = server.run(root, *given)
    assert status == 0
    assert "all 2 steps are already done" in words
    assert contents(root / "run" / "weights") == finished
    assert not list(root.rglob(".*"))


def test_a_run_is_read_while_it_is_written(server, token_file, root):
    """A run can be read while checkpoints are written and deleted at every step."""
    often = ("train.steps=100000", "train.checkpoint_every=1", "train.keep_last=1")
    given = ["train", "tiny", *SMALL, *often, f"data.path={token_file}", "--out", "run"]
    writer = server.start(root, *given)
    saved = root / "run" / "checkpoints"
    while not any(path.name.isdecimal() for path in saved.glob("*")):
        time.sleep(0.001)
    for _ in range(2):
        command = ("generate", "run", "--token-ids", "1", "--max-tokens", 1)
        status, _, words = server.run(root, *command)
        assert status == 0, words
    os.kill(writer, signal.SIGKILL)
    assert server.ask(do="wait", process=writer) == -signal.SIGKILL


@pytest.mark.parametrize("count", params([2, 4], [2]))
def test_trainings_that_begin_together(server, token_file, root, trained, count):
    given = ["train", "tiny", *SMALL, f"data.path={token_file}", "--out", "run"]
    started = [server.start(root, *given) for _ in range(count)]
    ended = [server.ask(do="wait", process=process) for process in started]
    assert 0 in ended
    for number, status in enumerate(ended):
        names = [f"process {process} " in said(root, number) for process in started]
        assert status == 0 or (status == 2 and sum(names) == 1), said(root, number)
    status, _, alone = server.run(root, *given[:-1], "alone")
    assert status == 0, alone
    assert contents(root / "run" / "weights") == contents(root / "alone" / "weights")
    assert not list(root.rglob(".*"))


@pytest.mark.parametrize("count", params([2, 4], [2]))
@pytest.mark.parametrize("overwrite", params([False, True], [True]))
def test_token_files_that_are_built_together(server, root, count, overwrite):
    """Several builds of one token file all succeed if the texts are equal; otherwise the file is
    the whole of one of them."""
    for number in range(2):
        (root / f"{number}.txt").write_text(f"Text {number}. " * 3000)
    option = ["--overwrite"] if overwrite else []
    for sources in (["0.txt"] * count, [f"{number % 2}.txt" for number in range(count)]):
        started = [server.start(root, "data", each, "--out", "t", *option) for each in sources]
        ended = [server.ask(do="wait", process=process) for process in started]
        assert 0 in ended
        assert set(ended) <= ({0} if overwrite or len(set(sources)) == 1 else {0, 2})
        open_tokens(root / "t").verify()
        assert not list(root.rglob(".*"))


WRITING = {
    "train": ("train", "run", "train.steps=9"),
    "compress": ("compress", "run", "--tokens", "ids.npy"),
    "analyze": ("analyze", "run", "--tokens", "ids.npy"),
    "calibrate": (
        *("analyze", "run", "--tokens", "ids.npy", "--out", "elsewhere"),
        *("--calibrate", "keys", "--clusters", 2),
    ),
    "bench": ("bench", "run", "--tasks", "mqar", "--lengths", 64),
    "report": ("report", "run", "--out", "run/report.html"),
    "export": ("export", "run", "--out", "run/exported"),
    "import": ("import", "exported", "--out", "run/imported"),
    "data": ("data", "a.txt", "--out", "run/tokens"),
    "check": ("transfer", "tiny", "--check", "--out", "run/check.png"),
    "transfer": ("transfer", "tiny", "--out", "run/transfer"),
    "demo": ("demo", "--fast", "--out", "run/demo"),
}
READING = {
    "eval": ("eval", "run", "--tokens", "ids.npy"),
    "generate": ("generate", "run", "--token-ids", "1,2", "--max-tokens", 2),
    "describe": ("describe", "run"),
    "report": ("report", "run", "--out", "report.html"),
    "export": ("export", "run", "--out", "new"),
}


@pytest.fixture
def held(trained, exported, tmp_path, monkeypatch) -> Iterator[Path]:
    """Yield a folder with a run whose lock this process holds."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(exported, tmp_path / "exported")
    np.save(tmp_path / "ids.npy", np.arange(96) % 250)
    (tmp_path / "a.txt").write_text("some text " * 20)
    monkeypatch.chdir(tmp_path)
    with one_writer(tmp_path / "run"):
        yield tmp_path / "run"


@pytest.mark.product
def test_every_command_that_writes_into_a_run_is_refused(mukv, held):
    before = contents(held.parent)
    for name, command in WRITING.items():
        done = mukv(*command)
        assert done.returncode == 2, (name, done.stderr)
        assert f"process {os.getpid()}" in done.stderr, (name, done.stderr)
        assert str(held.name) in done.stderr
        assert contents(held.parent) == before, name


@pytest.mark.product
def test_commands_that_read_a_run_are_not(mukv, held):
    before = contents(held)
    for name, command in READING.items():
        done = mukv(*command)
        assert done.returncode == 0, (name, done.stderr)
    assert contents(held) == before


def test_other_folders_have_one_writer_as_well(mukv, tmp_path):
    with one_writer(tmp_path / "found"):
        for command in ("demo", "--fast"), ("bench", "tiny"), ("transfer", "tiny"):
            done = mukv(*command, "--out", tmp_path / "found")
            assert done.returncode == 2
            assert f"process {os.getpid()}" in done.stderr


def test_a_lock_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    with one_writer(folder), pytest.raises(Held, match=str(os.getpid())), one_writer(folder):
        pass
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    with one_writer(folder):
        pass
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_a_lock_file_without_a_process_is_nothing(tmp_path):
    (tmp_path / ".lock").write_text(f"{os.getpid()} elsewhere\n")
    with one_writer(tmp_path):
        assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())


def test_without_locks_a_note_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with one_writer(tmp_path):
        pass
    assert "no locks on this file system" in capsys.readouterr().err


@pytest.mark.product
@pytest.mark.parametrize("number", params([errno.EROFS, errno.EACCES], [errno.EROFS]))
def test_a_run_that_can_not_be_written_is_refused(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "acquire", refuse)
    with pytest.raises(BadInput, match="can't be written"), one_writer(tmp_path):
        pass


@pytest.mark.product
def test_a_sweep_waits_for_the_lock_of_a_point(mukv, token_file, tmp_path, monkeypatch):
    """A sweep waits for a worker that seemed dead but still holds the lock of a point."""
    held, waits = ExitStack(), []
    held.enter_context(one_writer(tmp_path / "sweep" / "trials" / "0001"))

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            held.close()

    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=wait))
    rates = "train.learning_rate=1e-3,1e-2"
    done = mukv(
        *("sweep", "tiny", *SMALL, f"data.path={token_file}", rates),
        *("--out", tmp_path / "sweep", "--json"),
    )
    assert done.returncode == 0, done.stderr
    assert '"complete": 2' in done.stdout
    assert len(waits) >= 3
