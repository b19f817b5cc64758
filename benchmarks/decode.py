"""Speed of greedy decoding beside transformers, at equal dimensions and context.

Run: python benchmarks/decode.py --peers PYTHON [--contexts 128,2048] [--batches 1] [--quick]

Ours is what `mukv generate` runs: one prefill, then the compiled loop over a frozen body and a
small tail. The peers are transformers' LlamaForCausalLM with its dynamic and its static cache.
All read the same number of random tokens, then decode; both are timed, compilation is not.
Float32 on a CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rounds import (
    Case,
    Contender,
    Worker,
    compare,
    find_peers,
    keep_to,
    median,
    names,
    parser,
    report,
    show,
    table,
    versions,
)
from train_step import SIZES

LIMIT = 90.0
FEW, MANY = 32, 64
"""Tokens decoded per round, in contexts beyond 4,096 and up to it."""


def contenders(python: str | None, precision: str) -> list[Contender]:
    """Everyone, in the order in which they take turns."""
    ours = Worker("ours.py", allocator=True)
    made = [Contender("mukv", ours, {"precision": precision, "warmup": 1})]
    if python:
        for cache in ("dynamic", "static"):
            request = {"peer": "transformers", "precision": precision, "cache": cache, "warmup": 1}
            made.append(Contender(f"transformers, {cache}", Worker("peers.py", python), request))
    return made


def rows(context: int, batch: int, new_tokens: int, case: Case) -> list[dict[str, Any]]:
    """What to print and keep of one case."""
    made = []
    for one in case.contenders:
        speeds = one.per_second(batch * new_tokens)
        made.append(
            {
                "context": context,
                "batch": batch,
                "contender": one.name,
                "tokens_per_second": median(speeds),
                "to_dynamic": median(case.ratios(one, "transformers, dynamic")),
                "to_static": median(case.ratios(one, "transformers, static")),
                "prefill_tokens_per_second": median(
                    one.per_second(batch * context, "prefill_seconds")
                ),
                "prefill_to_dynamic": median(
                    case.ratios(one, "transformers, dynamic", "prefill_seconds")
                ),
                "rounds": speeds,
                "why_not": one.why_not,
            }
        )
    return made


def main() -> int:
    options = parser("Speed of decoding")
    options.add_argument("--size", choices=SIZES, default="37m")
    options.add_argument("--contexts", help="tokens before the new ones; default 128,2048,8192")
    options.add_argument("--batches", help="rows decoded together; default 1,8")
    chosen = options.parse_args()
    keep_to(chosen.cores)
    console = Console()
    python, missing = find_peers(chosen.peers)
    if missing:
        console.print(f"no peers, ours alone: {missing}", markup=False, highlight=False)
    contexts = names(chosen.contexts or ("128,2048" if chosen.quick else "128,2048,8192"))
    batches = names(chosen.batches or ("1" if chosen.quick else "1,8"))
    rounds = chosen.rounds or (2 if chosen.quick else 5)
    probe = Worker("ours.py")
    on_cpu = probe.ask(op="device")["platform"] == "cpu"
    probe.close()
    everyone = contenders(None if missing else python, "float32" if on_cpu else "bfloat16")
    size = asdict(SIZES[chosen.size])
    size.pop("tokens")
    found, busy = [], []
    try:
        for context in map(int, contexts):
            for batch in map(int, batches):
                new_tokens = FEW if context > 4096 else MANY
                request = {"batch": batch, "length": context, "new_tokens": new_tokens}
                case = compare(
                    everyone, {"task": "decode", **size, **request}, rounds, 0.0, LIMIT, console
                )
                fresh = rows(context, batch, new_tokens, case)
                found += fresh
                busy += case.busy
                show_case(console, f"{chosen.size}, context {context}, batch {batch}", fresh)
        told = versions(everyone)
    finally:
        for one in everyone:
            one.worker.close()
    report(found, told, median(busy) or 0.0, chosen.out)
    return 0


def show_case(console: Console, title: str, fresh: list[dict[str, Any]]) -> None:
    shown = table(
        title,
        ["", "tokens/s", "x dynamic", "x static", "prefill/s", "x dynamic"],
    )
    for row in fresh:
        if row["why_not"]:
            shown.add_row(row["contender"], "failed")
            continue
        shown.add_row(
            row["contender"],
            show(row["tokens_per_second"]),
            show(row["to_dynamic"], ".2f"),
            show(row["to_static"], ".2f"),
            show(row["prefill_tokens_per_second"]),
            show(row["prefill_to_dynamic"], ".2f"),
        )
    console.print(shown)
    for row in fresh:
        if row["why_not"]:
            console.print(f"{row['contender']}: {row['why_not']}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
