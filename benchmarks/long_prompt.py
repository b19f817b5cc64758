"""Measure peak memory and time of reading a long prompt at once and in chunks.

Run: python benchmarks/long_prompt.py --model DIR [--text FILE] [--lengths 8192,32768]
    [--policy snapkv:1024] [--chunk 1024] [--whole 8192] [--new-tokens 16]

Each length is read in chunks under the policy, and, up to `--whole` tokens, also at once with the
full cache and at once under the policy, every time in a process of its own. The text is repeated
until it is long enough; the model's own limit on the context is lifted. Peak memory is the
largest resident memory of the process, including weights and compilation; the table also has the
peak before the prompt was read.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TEXT = Path(__file__).parents[1] / "docs" / "memory.md"
MIB = 1 << 20


def peak() -> int:
    """Return the highest resident memory of this process so far, in bytes."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """Continue one prompt in this process."""
    from mukv.cache import Policy
    from mukv.cli import launch
    from mukv.runs import loaded

    launch.prepare()
    model = loaded.load(given["model"])
    model = replace(model, run=replace(model.run, model=replace(model.network, context=None)))
    ids = model.encode(Path(given["text"]).read_text())
    ids = (ids * -(-given["length"] // len(ids)))[: given["length"]]
    model.generate_ids([ids[:64]], 2)
    before = peak()
    made = model.generate_ids(
        [ids],
        given["new_tokens"],
        stop=(),
        policy=Policy.parse(given["policy"]),
        prefill_chunk=given["chunk"],
    )
    return {
        "before": before,
        "peak": peak(),
        "cache_bytes": made.cache_bytes,
        "prefill_seconds": made.prefill_seconds,
        "tokens_per_second": made.tokens_per_second,
    }


def main() -> None:
    """Print one row for each length and way of reading."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default=str(TEXT))
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--policy", default="snapkv:1024")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--whole", type=int, default=8192)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        sys.stdout.write(json.dumps(measure(given.one)) + "\n")
        return
    columns = (
        "tokens",
        "policy",
        "chunk",
        "cache MB",
        "peak MB",
        "before",
        "prefill s",
        "tokens/s",
    )
    table = Table(*columns)
    for length in map(int, given.lengths.split(",")):
        ways = [(given.policy, given.chunk)]
        if length <= given.whole:
            ways = [("full", None), (given.policy, None), *ways]
        for policy, chunk in ways:
            asked = vars(given) | {"length": length, "policy": policy, "chunk": chunk, "one": None}
            command = [sys.executable, __file__, "--model", given.model, "--one", json.dumps(asked)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            sizes = (found[name] / MIB for name in ("cache_bytes", "peak", "before"))
            row = (
                f"{length:,}",
                policy,
                str(chunk or "-"),
                *(f"{size:,.0f}" for size in sizes),
                f"{found['prefill_seconds']:.1f}",
                f"{found['tokens_per_second']:.1f}",
            )
            table.add_row(*row)
            Console(stderr=True).print(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
