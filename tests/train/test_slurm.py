"""`deploy/slurm.sh` on a Slurm of one node: a job is stopped by its time limit, requeued,
finished."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import MINUSCULE
from tests.processes import environment

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm.sh"
DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in DAEMONS if shutil.which(name) is None]
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
pytestmark = [
    pytest.mark.product,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs as root only"),
]


@pytest.fixture
def slurm(tmp_path_factory):
    """Start the daemons in a new folder; return the environment of Slurm's commands."""
    root = tmp_path_factory.mktemp("slurm")
    for path in (root, *list(root.parents)[:-1]):
        path.chmod(path.stat().st_mode | 0o055)  # munge refuses a socket that others can't reach
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o600)
    ports = [free_port(), free_port()]
    text = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0], root=root, ports=ports, cpus=os.cpu_count()
    )
    (root / "slurm.conf").write_text(text)
    for name in ("state", "spool"):
        (root / name).mkdir()
    kinds = ("key-file", "socket", "pid-file", "log-file", "seed-file")
    places = [f"--{kind}={root}/munge.{kind.removesuffix('-file')}" for kind in kinds]
    variables = {**environment(), "SLURM_CONF": str(root / "slurm.conf")}
    subprocess.run(["munged", "--force", *places], check=True, env=variables)
    for daemon in ("slurmctld", "slurmd"):
        subprocess.run([daemon], check=True, env=variables)
    yield variables
    # Jobs outlive the daemons.
    run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}", env=variables)
    run("scancel", f"--user={getpass.getuser()}", env=variables)
    end = time.monotonic() + 60
    while run("squeue", "--noheader", env=variables).strip() and time.monotonic() < end:
        time.sleep(0.5)
    for name in ("slurmd", "slurmctld", "munge"):
        number = int((root / f"{name}.pid").read_text())
        os.kill(number, 15)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_job_continues_after_its_time_limit(slurm, token_file, tmp_path):
    """A job that is signalled 100 seconds before its limit of five minutes is requeued and
    continues. Slurm checks limits every half minute, and signals up to a minute earlier."""
    out, log = tmp_path / "run", tmp_path / "log"
    changes = ("train.steps=100000", "train.log_every=20", "mesh.data=2", f"data.path={token_file}")
    options = ("--nodes=1", "--ntasks-per-node=2", "--time=5", "--signal=B:USR1@100")
    variables = {**slurm, "MUKV": str(Path(sys.executable).parent / "mukv")}
    command = [*options, f"--output={log}", str(SCRIPT), "tiny", *MINUSCULE, *changes]
    job = run("sbatch", "--parsable", *command, "--out", str(out), env=variables).strip()

    def state() -> str:
        return run("squeue", "--noheader", "--format=%T", f"--job={job}", env=slurm).strip()

    wait_for(lambda: "saved step" in text(log), 400, state, log)
    wait_for(lambda: state() == "PENDING", 60, state, log)
    saved = int(text(log).split("saved step ")[1].split(",")[0])
    wait_for(lambda: steps(out)[-1] > saved, 300, state, log)
    assert steps(out) == sorted(set(steps(out)))


def run(*command: str, env: dict[str, str]) -> str:
    return subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def steps(out: Path) -> list[int]:
    """Return the steps of the logged training losses."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def wait_for(done, seconds: float, state, log: Path) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert state(), text(log)[-2000:]  # the job is in the queue or runs
        assert time.monotonic() < end, text(log)[-2000:]
        time.sleep(1)
