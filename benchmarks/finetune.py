"""Measure fine-tuning with low-rank adapters beside fine-tuning of all weights.

Run: python benchmarks/finetune.py MODEL TOKENS [--ranks 8] [--batch 2] [--length 128]

MODEL is a run directory, a Hugging Face folder or a GGUF file, TOKENS a token file made with its
tokenizer. The contenders stay warm in processes of their own and take steps in turn. Memory is the
peak of the process, reading the weights and compiling included, and what the compiled step takes:
weights, optimizer state and gradients, batch and activations.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rounds import (
    Contender,
    Worker,
    compare,
    keep_to,
    median,
    parser,
    report,
    show,
    table,
    versions,
)

GIB = 1 << 30
LEAST, LIMIT = 0.1, 600.0


def main() -> int:
    options = parser("Speed and memory of fine-tuning")
    options.add_argument("model")
    options.add_argument("tokens")
    options.add_argument("--ranks", default="8", help="ranks of adapters, separated by commas")
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--length", type=int, default=128)
    chosen = options.parse_args()
    keep_to(chosen.cores)
    ways: list[tuple[str, dict[str, object]]] = [("all weights", {})]
    for rank in chosen.ranks.split(","):
        ways.append((f"adapters, rank {rank}", {"rank": int(rank)}))
    ways += [(f"{name}, scanned", {**way, "unroll": False}) for name, way in ways]
    everyone = [Contender(name, Worker("tuner.py", allocator=True), way) for name, way in ways]
    case = {
        "model": chosen.model,
        "tokens": chosen.tokens,
        "batch": chosen.batch,
        "length": chosen.length,
    }
    try:
        found = compare(everyone, case, chosen.rounds or 5, LEAST, LIMIT, Console())
    finally:
        for one in everyone:
            one.worker.close()
    rows = []
    columns = ("", "trained", "tokens/s", "x all weights", "step, GiB", "peak, GiB", "last loss")
    shown = table(f"{chosen.model}, {chosen.batch} x {chosen.length}", columns)
    for one in everyone:
        if one.why_not:
            Console().print(f"{one.name}: {one.why_not}", markup=False)
            continue
        row = {
            "contender": one.name,
            "trained": one.told["trained"],
            "tokens_per_second": median(one.per_second(one.told["tokens"])),
            "to_all_weights": median(found.ratios(one, "all weights")),
            "compiled_gib": one.told["compiled_bytes"] / GIB,
            "peak_gib": max(answer["peak"] for answer in one.answers),
            "kept": one.told["kept"],
            "losses": [answer["loss"] for answer in one.answers],
        }
        rows.append(row)
        shown.add_row(
            one.name,
            f"{row['trained'] / 1e6:.2f}M",
            show(row["tokens_per_second"], ",.1f"),
            show(row["to_all_weights"], ".2f"),
            f"{row['compiled_gib']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{row['losses'][-1]:.3f}",
        )
    Console().print(shown)
    report(rows, versions(everyone), median(found.busy) or 0.0, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
