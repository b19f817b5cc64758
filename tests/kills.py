"""Run `mukv` commands in forked children, and kill them before a given file operation.

Importing takes longer than the commands, so one process imports and forks. It never starts JAX,
which does not survive a fork; its children do. It reads requests and writes answers as JSON lines.

Operations are those of Python's audit events. Writes by C++ and Rust (TensorStore, SQLite,
safetensors) have no such events, and count as part of the operation before them.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mukv.compress.measure import measured
from tests.processes import environment

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),),
}
"""Events that change a file system: the places of paths in their arguments, each with the place of
the descriptor of the folder that the path is relative to."""


def operation(event: str, given: tuple[Any, ...], root: Path) -> str | None:
    """Return an operation below `root`, such as "os.mkdir runs/checkpoints", or None."""
    if event == "ctypes.dlsym" and given[1] == "renameat2":
        return "exchange"
    if event == "open" and isinstance(given[0], str | bytes) and given[2] & WRITES:
        paths = [os.path.join(os.getcwd(), os.fsdecode(given[0]))]
    elif event in PATHS:
        paths = [
            _absolute(given[path], -1 if folder is None else given[folder])
            for path, folder in PATHS[event]
        ]
    else:
        return None
    if not any(path.startswith(f"{root}/") for path in paths):
        return None
    return " ".join([event, *(path.removeprefix(f"{root}/") for path in paths)])


def _absolute(path: Any, folder: Any) -> str:
    """Return the absolute path. folder: descriptor of the folder it is relative to, or -1."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
    return os.path.join(base or os.getcwd(), os.fsdecode(path))


def pattern(operation: str) -> str:
    """Return the operation without numbers and without the random names of TensorStore.

    Operations within temporary folders have one pattern, except for making the folder and renaming
    what is in it.
    """
    plain = re.sub(r"\d+", "#", re.sub(r"/d/[0-9a-f]{20,}", "/d/*", operation))
    if plain.startswith(("os.mkdir", "os.rename")):
        return plain
    return re.sub(r"/\.[^/]+\.#\.partial(/(?!\.lock)[^/]+$)?", r"/.*.#.partial", plain)


def count_up(folder: Path, until: int) -> int:
    """Save the numbers 1 to `until` as checkpoints, after the latest; return an exit status."""
    import jax

    from mukv.storage.checkpoint import Checkpoints

    like = {"number": jax.ShapeDtypeStruct((3,), "float32")}
    with Checkpoints(folder, keep_last=1, keep_best=0) as checkpoints:
        step = checkpoints.latest() or 0
        number = checkpoints.restore(None, like)["number"] if step else jax.numpy.zeros(3)
        while step < until:
            step, number = step + 1, number + 1
            checkpoints.save(step, {"number": number})
        checkpoints.wait()
    return int((number != until).any())


def listen(root: Path, log: Path, kill: tuple[str, int] | None) -> None:
    """Log every operation below `root`; die before occurrence `kill[1]` of pattern `kill[0]`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    seen: Counter[str] = Counter()
    one_at_a_time = threading.RLock()

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event != "open" and event != "ctypes.dlsym" and event not in PATHS:
            return
        found = operation(event, given, root)
        if found is None:
            return
        with one_at_a_time:
            kind = pattern(found)
            seen[kind] += 1
            if kill == (kind, seen[kind]):
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(file, f"{found}\n".encode())

    sys.addaudithook(hook)


def measured_once(folder: Path, reader: Any, rows: Any, left: Any, *given: Any) -> Iterator[Any]:
    """Return cached measurements of `compress`, which are not what is tested."""
    path = folder / "measured"
    if not path.exists():
        found = {job.key: each for job, each in measured(reader, rows, left, *given)}
        path.write_bytes(pickle.dumps(found))
    found = pickle.loads(path.read_bytes())
    for job in left:
        yield job, found[job.key]


def child(request: dict[str, Any]) -> int:
    """Run a command; return its exit status."""
    from unittest import mock

    from mukv import cli
    from mukv.cli import launch

    out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(request["root"])
    given = ["mukv", *request["arguments"]]
    kill = request["kill"] and tuple(request["kill"])
    if given[1] == "count-up":
        listen(Path(request["root"]), Path(request["log"]), kill)
        return count_up(Path(given[2]), int(given[3]))
    with (
        mock.patch.object(sys, "argv", given),
        mock.patch.object(launch, "restart_with_allocator"),
        mock.patch(
            "mukv.compress.judge.measured",
            partial(measured_once, Path(request["root"]).parent.parent),
        ),
    ):
        listen(Path(request["root"]), Path(request["log"]), kill)
        try:
            cli.main()
        except SystemExit as exit:
            return exit.code if isinstance(exit.code, int) else 1


def serve() -> None:
    """Answer requests until standard input ends."""

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            process = os.fork()
            if process == 0:
                status = 1
                try:
                    status = child(request)
                except BaseException as error:
                    import traceback

                    traceback.print_exc()
                    os.write(2, repr(error).encode())
                finally:
                    os._exit(status)
            answer = process
        else:
            _, status = os.waitpid(request["process"], 0)
            answer = os.waitstatus_to_exitcode(status)
        print(json.dumps(answer), flush=True)


class Server:
    """Run commands in forked children of one process. A context manager."""

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kills"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment() | {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)

    def ask(self, **request: Any) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, root: Path, *arguments: object, kill: tuple[str, int] | None = None) -> int:
        """Start a command in the folder `root`; return the number of its process."""
        number = len(list(root.parent.glob("*.log")))
        log = root.parent / f"{number}.log"
        self.last = log
        log.touch()
        return self.ask(
            do="start",
            root=str(root),
            arguments=[str(each) for each in arguments],
            kill=kill,
            log=str(log),
            output=str(log.with_suffix(".out")),
        )

    def run(
        self, root: Path, *arguments: object, kill: tuple[str, int] | None = None
    ) -> tuple[int, list[str], str]:
        """Run a command; return its status (-9 if it was killed), the operations that were done,
        and its output."""
        process = self.start(root, *arguments, kill=kill)
        log = self.last
        status = self.ask(do="wait", process=process)
        return status, log.read_text().splitlines(), log.with_suffix(".out").read_text()


if __name__ == "__main__":
    serve()
