"""Two processes joined by jax.distributed train as one does, and their checkpoints fit other
meshes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from mukv.core.params import named
from mukv.storage.locks import one_writer
from mukv.storage.weights import load_weights
from tests.conftest import MINUSCULE
from tests.pairs import params
from tests.processes import contents, finish, start


def arguments(token_file: Path, out: Path, *changes: str) -> list[object]:
    given = (*MINUSCULE, "train.steps=6", "train.checkpoint_every=2", *changes)
    return ["train", "tiny", *given, f"data.path={token_file}", "--out", out, "--json"]


def alone(*args: object) -> dict:
    status, out, error = finish(start(*args))
    assert status == 0, error
    return json.loads(out.splitlines()[-1])


def launched(token_file: Path, out: Path, *changes: str) -> list[subprocess.Popen[str]]:
    """Start two processes that share a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(*arguments(token_file, out, *changes), "--distributed", f"{address},2,{number}")
        for number in range(2)
    ]


def together(token_file: Path, out: Path, *changes: str) -> list[str]:
    """Wait for two processes that share a run; return their output."""
    ended = [finish(process) for process in launched(token_file, out, *changes)]
    for status, _, error in ended:
        assert status == 0, error
    return [out for _, out, _ in ended]


@pytest.fixture(scope="module")
def single(token_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "run"
    return out, alone(*arguments(token_file, out))


MESHES = [
    ("mesh.data=2",),
    ("mesh.tensor=2",),
    ("mesh.context=2",),
    ("mesh.replica=2", "mesh.context=2"),
    ("mesh.data=2", "mesh.tensor=2"),
]


def assert_same_weights(one: Path, two: Path) -> None:
    """Compare weights up to float32 sums in another order (see laws/test_sharding.py)."""
    (first, _), (second, _) = (load_weights(folder / "weights") for folder in (one, two))
    for name, leaf in named(first).items():
        np.testing.assert_allclose(named(second)[name], leaf, atol=1e-4, err_msg=name)


@pytest.mark.product
@pytest.mark.parametrize("mesh", params(MESHES, MESHES[-1:], "-".join))
def test_two_processes_are_one(token_file, tmp_path, single, mesh):
    """Two processes with different rows, split weights or two devices each train as one; only
    process 0 writes and prints."""
    run, facts = single
    first, second = together(token_file, tmp_path / "run", *mesh)
    assert "{" not in second
    np.testing.assert_allclose(json.loads(first.splitlines()[-1])["loss"], facts["loss"], rtol=2e-5)
    assert_same_weights(tmp_path / "run", run)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if "loss" in record]
    assert steps == [1, 6]


@pytest.mark.product
def test_a_checkpoint_moves_to_other_meshes(token_file, tmp_path, single):
    """Two processes begin the run; one process ends it, on one device and on 2 x 2 devices."""
    run, facts = single
    together(token_file, tmp_path / "begun", "mesh.data=2")
    shutil.rmtree(tmp_path / "begun" / "checkpoints" / "6")
    for mesh in (("mesh.data=1",), ("mesh.data=2", "mesh.tensor=2")):
        out = Path(shutil.copytree(tmp_path / "begun", tmp_path / "-".join(mesh)))
        shutil.rmtree(out / "weights")
        ended = alone(*arguments(token_file, out, *mesh))
        np.testing.assert_allclose(ended["loss"], facts["loss"], rtol=2e-5)
        assert_same_weights(out, run)


@pytest.mark.product
def test_a_signal_to_one_stops_all(token_file, tmp_path):
    """After a signal to one process, all save the same step before the next logged one."""
    out = tmp_path / "run"
    steps = ("train.steps=100000", "train.log_every=50000", "train.evaluate_every=2")
    processes = launched(token_file, out, "mesh.data=2", *steps)
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    (first, said, error), (second, _, _) = map(finish, processes)
    assert (first, second) == (0, 0), error
    facts = json.loads(said.splitlines()[-1])
    assert not facts["finished"]
    assert facts["step"] < 50000
    assert (out / "checkpoints" / str(facts["step"])).is_dir()


@pytest.mark.product
@pytest.mark.parametrize("killed", params([0, 1], [1]))
def test_a_killed_process_ends_the_others(token_file, tmp_path, killed):
    """If a process is killed, the others end with one line that names the last checkpoint."""
    out = tmp_path / "run"
    processes = launched(token_file, out, "mesh.data=2", "train.steps=100000")
    while not (out / "checkpoints" / "2").is_dir():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[killed].kill()
    status, _, error = finish(processes[1 - killed], timeout=30)
    finish(processes[killed])
    assert status == 1
    last = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert f"process {killed} of 2 is gone; the last checkpoint is " in last[0]
    assert "Traceback" not in error


@pytest.mark.product
def test_a_run_that_is_written_is_refused_by_all(token_file, tmp_path):
    """If process 0 finds the lock taken, all processes end with that error."""
    with one_writer(tmp_path / "run"):
        for status, _, error in map(finish, launched(token_file, tmp_path / "run", "mesh.data=2")):
            assert status == 2
            assert f"process {os.getpid()}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.product
def test_bad_input_ends_all(token_file, tmp_path, single):
    """On bad input all processes end before anything is compiled or written."""
    run, _ = single
    before = contents(run)
    for status, _, error in map(finish, launched(token_file, run, "mesh.data=2", "train.seed=1")):
        assert status == 2
        assert "error: train.seed: got 1" in error
    assert contents(run) == before
