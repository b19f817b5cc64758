"""A PostgreSQL server that starts with the tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PASSWORD = "secret-of-the-tests"
DEBIAN = Path("/usr/lib/postgresql")
"""Folder of Debian's packages, which do not put the server's programs on the path."""


def program(name: str) -> str | None:
    """Return the path of a program of the server, of the newest version; None if there is none."""
    found = sorted(DEBIAN.glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    return shutil.which(name) or (str(found[-1]) if found else None)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Yield the URL of an empty database, with a password, on a server of its own."""
    initdb, server = program("initdb"), program("pg_ctl")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed")
    # The server refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory() as folder:
        data, secret, port = f"{folder}/data", Path(folder) / "password", free_port()
        secret.write_text(PASSWORD)
        if user is not None:
            shutil.chown(folder, user)
            shutil.chown(secret, user)

        def run(*command: str) -> None:
            # No pipes: the server keeps those of the command that starts it.
            log = Path(folder) / "output"
            with log.open("w") as output:
                done = subprocess.run(
                    command, stdout=output, stderr=output, user=user, cwd=folder, check=False
                )
            assert done.returncode == 0, log.read_text()

        given = ("-U", "mukv", f"--pwfile={secret}", "-A", "scram-sha-256", "-E", "UTF8")
        run(initdb, "-D", data, *given, "--locale=C", "--no-sync")
        # Sockets and locks go to the folder: the usual one is not writable for every user.
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run(server, "-D", data, "-l", f"{folder}/log", "-o", options, "-w", "start")
        try:
            yield f"postgresql://mukv:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run(server, "-D", data, "-m", "immediate", "-w", "stop")
