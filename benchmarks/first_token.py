"""Measure how long a user waits for the first token of `mukv generate`.

Run: python benchmarks/first_token.py MODEL [--rounds 6]

Each round starts the command anew. The time is that from its start to its first output, which is
printed with the first token, so that imports, loading, compilation and prefill are part of it. Cold
rounds begin with an empty cache of compiled programs, in a folder of their own; warm rounds have
what the last cold one left.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

PROMPT = "The capital of France is"


def wait(model: str, folder: str) -> float:
    """Run the command; return the seconds to its first output. folder: of the user's cache"""
    command = [sys.executable, "-m", "mukv", "generate", model]
    command += ["--prompt", PROMPT, "--max-tokens", "8"]
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MUKV_CACHE": folder},
    ) as process:
        assert process.stdout is not None
        found = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not found:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Wait for the first token")
    parser.add_argument("model", help="a run directory, a Hugging Face folder or a GGUF file")
    parser.add_argument("--rounds", type=int, default=6, help="warm rounds; half as many are cold")
    given = parser.parse_args()
    cold = []
    for _ in range(max(1, given.rounds // 2)):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(wait(given.model, folder))
    with tempfile.TemporaryDirectory() as folder:
        wait(given.model, folder)
        warm = [wait(given.model, folder) for _ in range(given.rounds)]
    table = Table("seconds to the first token", "median", "all")
    for name, seconds in (("cold", sorted(cold)), ("warm", sorted(warm))):
        each = ", ".join(f"{one:.2f}" for one in seconds)
        table.add_row(name, f"{statistics.median(seconds):.2f}", each)
    Console().print(table)


if __name__ == "__main__":
    main()
