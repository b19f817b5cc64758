"""Measure the speed of a training step, compared with torch and transformers at equal dimensions.

Run: python benchmarks/train_step.py --peers PYTHON [--sizes 10m] [--lengths 1024] [--quick]

A step is forward, backward, clipping and AdamW. mukv runs the step of `mukv train`, on one device
and with the batch split over simulated ones. The peers are a GPT-2-class decoder in bare torch and
transformers' LlamaForCausalLM, eager and with torch.compile, with fused AdamW. Layers, widths,
weights (apart from learned positions) and batches are equal, and so is precision: float32, or
bfloat16 operands against bfloat16 autocast.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rounds import (
    Case,
    Contender,
    Worker,
    compare,
    cores,
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


@dataclass(frozen=True)
class Size:
    """Dimensions of a model, and tokens per step."""

    d_model: int
    layers: int
    heads: int
    hidden: int
    vocab_size: int
    tokens: int


SIZES = {
    "1m": Size(128, 5, 4, 320, 256, 4096),
    "10m": Size(384, 6, 6, 1024, 256, 4096),
    "37m": Size(384, 6, 6, 1024, 32768, 2048),
    "300m": Size(1024, 20, 16, 2816, 32768, 16384),
    "1b": Size(2048, 16, 16, 5632, 32768, 16384),
}
COMPILED = ("10m", "300m")
"""Sizes at which torch.compile is measured: it needs minutes, and gains as much at other sizes."""
LEAST, LIMIT = 0.6, 70.0


def simulated() -> int:
    """Return the number of devices to split a batch over: the largest power of two within the
    cores, up to 8.
    """
    return min(8, 1 << (cores().bit_length() - 1))


def contenders(python: str | None, compiled: bool, on_cpu: bool) -> list[Contender]:
    """Return the contenders, in the order of their turns."""
    made: list[Contender] = []
    precisions = ("float32", "bfloat16") if on_cpu else ("bfloat16",)
    devices = sorted({1, simulated()}) if on_cpu else [1]
    for precision in precisions:
        for number in devices:
            name = f"mukv {precision}" + (f", data={number}" if number > 1 else "")
            request = {"precision": precision, "devices": number}
            made.append(Contender(name, Worker("ours.py", allocator=True), request))
        if python:
            for peer, compile in (
                ("plain", False),
                ("transformers", False),
                ("transformers", True),
            ):
                if compile and not compiled:
                    continue
                name = f"{peer} {precision}" + (", compiled" if compile else "")
                request = {"precision": precision, "peer": peer, "compile": compile}
                made.append(Contender(name, Worker("peers.py", python), request))
    return made


def rows(size: str, length: int, case: Case, on_cpu: bool) -> list[dict[str, Any]]:
    """Return the rows to print and save for one case."""
    made = []
    for one in case.contenders:
        precision = one.request["precision"]
        speeds = one.per_second(one.told.get("tokens", 0))
        speed = median(speeds)
        row = {
            "size": size,
            "length": length,
            "contender": one.name,
            "parameters": one.told.get("parameters"),
            "tokens_per_second": speed,
            "to_plain": median(case.ratios(one, f"plain {precision}")),
            "to_transformers": median(case.ratios(one, f"transformers {precision}")),
            "rounds": speeds,
            "why_not": one.why_not,
        }
        if not on_cpu and speed and "peak_flops" in one.told:
            row["mfu"] = speed * one.told["flops_per_token"] / one.told["peak_flops"]
        made.append(row)
    return made


def main() -> int:
    options = parser("Speed of a training step")
    options.add_argument("--sizes", help=f"of {', '.join(SIZES)}; default: by device")
    options.add_argument("--lengths", help="tokens per row; default 256,1024")
    chosen = options.parse_args()
    keep_to(chosen.cores)
    console = Console()
    python, missing = find_peers(chosen.peers)
    if missing:
        console.print(f"no peers, ours alone: {missing}", markup=False, highlight=False)
    probe = Worker("ours.py")
    on_cpu = probe.ask(op="device")["platform"] == "cpu"
    probe.close()
    sizes = names(chosen.sizes or "")
    sizes = sizes or (["1m"] if chosen.quick else ["1m", "10m", "37m"])
    if not chosen.sizes and not on_cpu:
        sizes += ["300m", "1b"]
    for name in sizes:
        if name not in SIZES:
            options.error(f"--sizes: {name!r}; allowed: {', '.join(SIZES)}")
    lengths = [
        int(name) for name in names(chosen.lengths or ("256" if chosen.quick else "256,1024"))
    ]
    rounds = chosen.rounds or (2 if chosen.quick else 5)
    compiled = not chosen.quick and bool(set(sizes) & set(COMPILED))
    everyone = contenders(None if missing else python, compiled, on_cpu)
    found, busy = [], []
    try:
        for name in sizes:
            for length in lengths:
                size = asdict(SIZES[name])
                batch = max(size.pop("tokens") // length, simulated() if on_cpu else 1)
                here = [
                    one
                    for one in everyone
                    if name in COMPILED or not one.request.get("compile", False)
                ]
                case = compare(
                    here, {**size, "batch": batch, "length": length}, rounds, LEAST, LIMIT, console
                )
                fresh = rows(name, length, case, on_cpu)
                found += fresh
                busy += case.busy
                show_case(console, f"{name}, {batch} x {length}", fresh, on_cpu)
        told = versions(everyone)
    finally:
        for one in everyone:
            one.worker.close()
    report(found, told, median(busy) or 0.0, chosen.out)
    return 0


def show_case(console: Console, title: str, fresh: list[dict[str, Any]], on_cpu: bool) -> None:
    columns = ["", "parameters", "tokens/s", "x plain", "x transformers"]
    shown = table(title, columns if on_cpu else [*columns, "MFU"])
    for row in fresh:
        if row["why_not"]:
            shown.add_row(row["contender"], "-", "failed")
            continue
        cells = [
            row["contender"],
            f"{row['parameters'] / 1e6:.1f}M",
            show(row["tokens_per_second"]),
            show(row["to_plain"], ".2f"),
            show(row["to_transformers"], ".2f"),
        ]
        shown.add_row(*cells, *([] if on_cpu else [show(row.get("mfu"), ".0%")]))
    console.print(shown)
    for row in fresh:
        if row["why_not"]:
            console.print(f"{row['contender']}: {row['why_not']}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
