"""Measure time and memory of loading a pretrained model, compared with transformers.

Run: python benchmarks/load.py --peers PYTHON [--preset llama-3.2-1b] [--folder DIR]

First a checkpoint of the preset's shape is written in Hugging Face's format, with random bfloat16
weights in files of 1 GiB. Then each contender loads it in a process of its own, in turn:
`mukv.load`, `mukv import` (which writes a run directory), and transformers. Seconds are those of
the load alone, until every weight was read, with the files in the page cache. Memory is the peak
resident memory of the process, anonymous and mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROUNDS = 3
SHARD_BYTES = 1 << 30
GIB = 1 << 30


def write(preset: str, folder: Path) -> int:
    """Write a checkpoint of the preset's shape; return its bytes."""
    import jax.numpy as jnp

    from mukv.hub import FAMILIES
    from mukv.hub.base import pieces
    from mukv.runs import config
    from mukv.runs.exchange import write_shards
    from mukv.storage.tensors import Spec

    model = config.load(preset).model
    family = next(f for f in FAMILIES.values() if not list(f.misfits(model)))
    random = np.random.default_rng(0)
    noise = (0.02 * random.standard_normal(1 << 20)).astype(jnp.bfloat16)

    def numbers(size: int) -> Iterator[np.ndarray]:
        for start in range(0, size, len(noise)):
            yield noise[: min(len(noise), size - start)]

    specs = {
        piece.theirs: Spec(
            piece.shape, noise.dtype, partial(numbers, int(np.prod(piece.shape, dtype=np.int64)))
        )
        for piece in pieces(family.rules, model)
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, specs, SHARD_BYTES)
    told = family.write(model, 2048) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(told))
    return sum(spec.nbytes for spec in specs.values())


# Contenders, each of which runs in its own process


def load_ours(folder: Path) -> Any:
    import jax

    import mukv

    return jax.block_until_ready(mukv.load(folder).weights)


def import_ours(folder: Path) -> Any:
    from mukv.runs.exchange import import_model

    out = folder.parent / f"{folder.name}-run"
    import_model(str(folder), out)
    shutil.rmtree(out)


def load_theirs(folder: Path) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    # On a CPU the weights are the mapped files; read them once.
    return model, [weight.sum().item() for weight in model.parameters()]


def start_ours() -> None:
    import jax

    jax.block_until_ready(jax.numpy.zeros(1))


def start_theirs() -> None:
    import torch
    import transformers

    # transformers imports its parts on first use.
    transformers.AutoModelForCausalLM  # noqa: B018
    torch.zeros(1)


CONTENDERS: dict[str, tuple[Callable[[], None], Callable[[Path], Any]]] = {
    "mukv.load": (start_ours, load_ours),
    "mukv import": (start_ours, import_ours),
    "transformers": (start_theirs, load_theirs),
}


class Watch:
    """Sample this process's resident memory every 5 ms and keep the peak."""

    def __init__(self) -> None:
        self.peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def look(self) -> None:
        while not self.stop.wait(0.005):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in self.peaks:
                    self.peaks[name] = max(self.peaks[name], 1024 * int(rest.split()[0]))

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def alone(name: str, folder: Path) -> dict[str, float]:
    """Measure one load."""
    start, load = CONTENDERS[name]
    start()
    with Watch() as before:
        time.sleep(0.1)
    with Watch() as watch:
        began, worked = time.perf_counter(), time.process_time()
        kept = load(folder)
        seconds, work = time.perf_counter() - began, time.process_time() - worked
    del kept
    found = {"seconds": seconds, "cpu_seconds": work, "before": before.peaks["VmRSS"]}
    return found | {key: float(value) for key, value in watch.peaks.items()}


def main() -> int:
    options = argparse.ArgumentParser(description="Time and memory of loading")
    options.add_argument("--preset", default="llama-3.2-1b")
    options.add_argument("--peers", metavar="PYTHON", default=sys.executable)
    options.add_argument("--folder", type=Path, help="where the checkpoint is written and kept")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--out", type=Path, metavar="FILE.json")
    options.add_argument("--alone", choices=CONTENDERS, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.alone:
        print(json.dumps(alone(chosen.alone, chosen.folder)))
        return 0
    console = Console()
    folder = chosen.folder or Path(tempfile.mkdtemp()) / "checkpoint"
    try:
        size = write(chosen.preset, folder)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(chosen.rounds):
            for name, rounds in found.items():
                python = chosen.peers if name == "transformers" else sys.executable
                command = [python, __file__, "--alone", name, "--folder", str(folder)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    console.print(f"{name}: {done.stderr.splitlines()[-1]}", markup=False)
                    continue
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        if not chosen.folder:
            shutil.rmtree(folder.parent, ignore_errors=True)
    rows = [
        {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        | {"name": name, "all_seconds": [each["seconds"] for each in rounds]}
        for name, rounds in found.items()
        if rounds
    ]
    show(console, f"{chosen.preset}, {size / GIB:.2f} GiB, {os.cpu_count()} cores", rows)
    if chosen.out:
        chosen.out.write_text(json.dumps({"bytes": size, "rows": rows}, indent=1) + "\n")
    return 0


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    columns = ("", "seconds", "of all cores", "of its own", "mapped", "together", "at first")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        sizes = (row[key] / GIB for key in ("RssAnon", "RssFile", "VmRSS", "before"))
        times = row["seconds"], row["cpu_seconds"]
        table.add_row(row["name"], *(f"{number:.2f}" for number in (*times, *sizes)))
    console.print(table, "memory in GiB", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
