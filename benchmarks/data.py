"""Measure the speed of building token files and of making batches, compared with plain code.

Run: python benchmarks/data.py [--json]

Building reads, tokenises on all cores, hashes and writes the Python library's source; it is
compared with `tokenizers` alone on one thread, with the text already in memory. Streaming builds
the same text from a JSONL file of a local web server, with the spool from which a killed build goes
on; it is compared with reading and tokenising the lines as they come. Batches are shuffled epochs
with segments, positions and weights; they are compared with a loop over random windows of a memory
map, which has none of these. A mixture takes its rows from three token files; its peer chooses one
at random for each row. Each figure is the best of several alternating runs. A training run of the
preset tiny then measures the fraction of its time in which steps waited for their batch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mukv.data.batches import Batches
from mukv.data.build import build_tokens
from mukv.data.feed import Source
from mukv.data.mixture import MixtureFeed
from mukv.data.text import pieces
from mukv.data.tokens import TokenFile
from mukv.runs import config
from mukv.runs.folder import RunDirectory
from mukv.runs.train import train_run

REPEATS = 5
SHAPES = ((8, 256), (64, 1024), (4, 16384))
TOKENS = 1 << 22
"""Tokens read per timed run of batches."""


def fastest(*runs: Callable[[], object]) -> list[float]:
    """Return the best time of each function in seconds; they alternate, so that noise
    affects all.
    """
    seconds = [float("inf")] * len(runs)
    for _ in range(REPEATS):
        for number, run in enumerate(runs):
            began = time.perf_counter()
            run()
            seconds[number] = min(seconds[number], time.perf_counter() - began)
    return seconds


def building(spec: str, folder: Path) -> tuple[TokenFile, float, float]:
    """Return MB/s of a whole build, and of `tokenizers` on one thread."""
    file = build_tokens(["stdlib"], folder / spec.replace(":", ""), spec)
    texts = [piece.data.decode() for piece in pieces(["stdlib"])]
    inner, out = file.tokenizer.inner, folder / "out"
    learnt = str(file.path / "tokenizer.json") if spec != "bytes" else spec

    def ours() -> None:
        shutil.rmtree(out, ignore_errors=True)
        build_tokens(["stdlib"], out, learnt)

    def peer() -> None:
        for text in texts:
            np.array(inner.encode(text, add_special_tokens=False).ids, np.uint16)

    ours_seconds, peer_seconds = fastest(ours, peer)
    return file, file.bytes / 1e6 / ours_seconds, file.bytes / 1e6 / peer_seconds


def streaming(folder: Path) -> tuple[float, float]:
    """Return MB/s of a build from a local web server, and of a loop over the lines."""
    web, out = folder / "web", folder / "streamed"
    web.mkdir()
    texts = [piece.data.decode() for piece in pieces(["stdlib"])]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (web / "text.jsonl").write_text(lines)
    handler = partial(Quiet, directory=str(web))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/text.jsonl"

        def ours() -> None:
            shutil.rmtree(out, ignore_errors=True)
            build_tokens([url], out)

        def peer() -> None:
            with urllib.request.urlopen(url) as answer:
                for line in answer:
                    np.frombuffer(json.loads(line)["text"].encode(), np.uint8).astype(np.uint16)

        seconds = fastest(ours, peer)
        server.shutdown()
    size = sum(len(text.encode()) for text in texts) / 1e6
    return size / seconds[0], size / seconds[1]


class Quiet(SimpleHTTPRequestHandler):
    """Serve files without a log."""

    def log_message(self, *args: object) -> None:
        pass


def batching(
    source: Source, files: list[TokenFile], batch: int, length: int
) -> tuple[float, float]:
    """Return million tokens per second of mukv's batches, and of random windows of the files."""
    steps = TOKENS // (batch * length)
    generator = np.random.default_rng(0)

    def ours() -> None:
        for step in range(steps):
            source.at(step)

    def peer() -> None:
        for _ in range(steps):
            maps = [np.memmap(file.path / "train.bin", "<u2", "r") for file in files]
            rows = [maps[k] for k in generator.integers(len(files), size=batch)]
            starts = [int(generator.integers(len(data) - length)) for data in rows]
            for shift in (0, 1):
                np.stack(
                    [
                        data[start + shift : start + shift + length].astype(np.int64)
                        for data, start in zip(rows, starts, strict=True)
                    ]
                )

    ours_seconds, peer_seconds = fastest(ours, peer)
    return TOKENS / 1e6 / ours_seconds, TOKENS / 1e6 / peer_seconds


def waiting(file: TokenFile, folder: Path) -> float:
    """Return the fraction of the time of 100 training steps in which they waited for data."""
    run = config.load("tiny", [f"data.path={file.path}", "train.validation_batches=1"])
    outcome = train_run(run, RunDirectory(folder / "run"))
    outcome.require_finished(folder)
    return outcome.wait_fraction


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of building and reading data")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for spec in ("bytes", "bpe:8192"):
            file, ours, peer = building(spec, Path(folder))
            rows.append((f"build stdlib, {spec}", "MB/s", ours, peer))
        rows.append(("stream stdlib, bytes", "MB/s", *streaming(Path(folder))))
        for batch, length in SHAPES:
            source = Batches(file, seed=0, batch=batch, length=length)
            ours, peer = batching(source, [file], batch, length)
            rows.append((f"batches of {batch} x {length}", "M tokens/s", ours, peer))
        plain = build_tokens(["stdlib"], Path(folder) / "plain")
        parts = [
            build_tokens([f"package:{name}"], Path(folder) / name) for name in ("numpy", "mukv")
        ]
        parts = [plain, *parts]
        mixture = MixtureFeed((*parts,), (3.0, 2.0, 1.0), "packed")
        for batch, length in SHAPES:
            ours, peer = batching(mixture.source("train", 0, batch, length), parts, batch, length)
            rows.append((f"mixture, {batch} x {length}", "M tokens/s", ours, peer))
        wait = waiting(plain, Path(folder))
    if as_json:
        keys = ("what", "unit", "mukv", "peer")
        made = [dict(zip(keys, row, strict=True)) for row in rows]
        print(json.dumps({"rows": made, "wait_fraction": wait}))
        return
    table = Table(title=f"data, {os.cpu_count()} cores")
    for name in ("what", "unit", "mukv", "peer", "mukv / peer"):
        table.add_column(name, justify="left" if name in ("what", "unit") else "right")
    for what, unit, ours, peer in rows:
        table.add_row(what, unit, f"{ours:.1f}", f"{peer:.1f}", f"{ours / peer:.1f}")
    Console().print(table)
    Console().print(f"training waited for data {wait:.2%} of its time")


if __name__ == "__main__":
    main()
