"""Measure the speed of greedy decoding, compared with transformers at equal dimensions and context.

Run: python benchmarks/decode.py --peers PYTHON [--size 37m | --model DIR] [--contexts 128,2048]
    [--batches 1] [--quick]

mukv runs the code of `mukv generate`: one prefill, then the compiled loop that reads a body and
writes a small tail. It is compared with transformers' LlamaForCausalLM, or its own reading of the
pretrained model in DIR, with its dynamic and its static cache. All prefill the same number of
random tokens, then decode; both are timed, without compilation. The dtype is float32 on a CPU, and
bfloat16 on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
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


LARGE = {
    "llama-3.2-1b": {
        "d_model": 2048,
        "layers": 16,
        "heads": 32,
        "kv_heads": 8,
        "hidden": 8192,
        "vocab_size": 128_256,
        "tied": True,
    }
}
"""Sizes at which a small machine has memory for one contender at a time."""


def ours(precision: str) -> Contender:
    worker = Worker("ours.py", allocator=True)
    return Contender("mukv", worker, {"precision": precision, "warmup": 1})


def theirs(python: str, precision: str, cache: str) -> Contender:
    request = {"peer": "transformers", "precision": precision, "cache": cache, "warmup": 1}
    return Contender(f"transformers, {cache}", Worker("peers.py", python), request)


def starters(python: str | None, precision: str) -> list[Callable[[], Contender]]:
    """Return functions that start the contenders, in the order of their turns."""
    caches = ("dynamic", "static") if python else ()
    peers = [partial(theirs, str(python), precision, cache) for cache in caches]
    return [partial(ours, precision), *peers]


def together(
    everyone: Sequence[Callable[[], Contender]], case: Mapping[str, Any], rounds: int, say: Console
) -> Case:
    """Measure the contenders in alternating rounds."""
    made = [start() for start in everyone]
    try:
        return compare(made, case, rounds, 0.0, LIMIT, say)
    finally:
        for one in made:
            one.worker.close()


def in_turn(
    everyone: Sequence[Callable[[], Contender]], case: Mapping[str, Any], rounds: int, say: Console
) -> Case:
    """Measure all rounds of one contender after those of another; the machine may change in
    between.
    """
    cases = [together([start], case, rounds, say) for start in everyone]
    busy = [each for case in cases for each in case.busy]
    return Case([one for case in cases for one in case.contenders], busy)


def rows(
    context: int, batch: int, new_tokens: int, case: Case, bandwidth: float
) -> list[dict[str, Any]]:
    """Return the rows to print and save for one case."""
    made = []
    read = case.contenders[0].told.get("read_bytes", float("nan"))
    for one in case.contenders:
        speeds = one.per_second(batch * new_tokens)
        speed = median(speeds)
        made.append(
            {
                "context": context,
                "batch": batch,
                "contender": one.name,
                "tokens_per_second": speed,
                "of_bandwidth": speed and speed / batch * read / bandwidth,
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
    options.add_argument("--size", choices=[*SIZES, *LARGE], default="37m")
    options.add_argument("--model", type=Path, metavar="DIR", help="pretrained model, of any size")
    options.add_argument(
        "--precision", choices=("float32", "bfloat16"), help="dtype of the weights"
    )
    options.add_argument("--contexts", help="tokens of the prompt; default 128,2048,8192")
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
    device = probe.ask(op="device")
    probe.close()
    precision = chosen.precision or ("float32" if device["platform"] == "cpu" else "bfloat16")
    everyone = starters(None if missing else python, precision)
    name = chosen.size if chosen.model is None else chosen.model.name
    if chosen.model is not None:
        size, run = {"folder": str(chosen.model.absolute())}, together
    elif chosen.size in LARGE:
        size, run = LARGE[chosen.size], in_turn
    else:
        size, run = asdict(SIZES[chosen.size]), together
        size.pop("tokens")
    found, busy, told = [], [], {}
    for context in map(int, contexts):
        for batch in map(int, batches):
            new_tokens = FEW if context > 4096 or run is in_turn else MANY
            request = {"batch": batch, "length": context, "new_tokens": new_tokens}
            case = run(everyone, {"task": "decode", **size, **request}, rounds, console)
            fresh = rows(context, batch, new_tokens, case, device["bandwidth"])
            found += fresh
            busy += case.busy
            told |= versions(case.contenders)
            show_case(console, f"{name}, context {context}, batch {batch}", fresh)
    told["bandwidth, GB/s"] = round(device["bandwidth"] / 1e9, 1)
    report(found, told, median(busy) or 0.0, chosen.out)
    return 0


def show_case(console: Console, title: str, fresh: list[dict[str, Any]]) -> None:
    shown = table(
        title,
        ["", "tokens/s", "of bandwidth", "x dynamic", "x static", "prefill/s", "x dynamic"],
    )
    for row in fresh:
        if row["why_not"]:
            shown.add_row(row["contender"], "failed")
            continue
        shown.add_row(
            row["contender"],
            show(row["tokens_per_second"], ",.1f"),
            show(row["of_bandwidth"], ".0%"),
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
