"""Measure loss, speed and bytes of a model whose weights are kept in few bits.

Run: python benchmarks/weights.py --model DIR [--formats float32,bfloat16,int8,int4] [--text FILE]
    [--context 128] [--new-tokens 64] [--length 512] [--tokens 4096] [--rounds 5] [--out FILE.json]

Each format is loaded in its own process, with the settings of `mukv`, which reports the bytes of
its weights, the peak of its memory while loading, and loss and perplexity of the text. Then all
formats prefill the same prompt and decode greedily in alternating rounds, as `mukv generate` does;
compilation is not timed. "float32" loads the weights as they are.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rounds import (
    Contender,
    Worker,
    compare,
    keep_to,
    median,
    names,
    parser,
    report,
    table,
    versions,
)

from mukv.cli import launch
from mukv.core.compact import GROUPS
from mukv.runs import inputs, loaded

TEXT = Path(__file__).parents[1] / "docs" / "memory.md"
LIMIT = 240.0
COLUMNS = ("weights", "MB", "peak MB", "perplexity", "loss", "tokens/s", "ratio", "prefill/s")


class Side:
    """Hold one format in a worker process, with the protocol of the other workers of
    `rounds.py`."""

    def __init__(self) -> None:
        self.model: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request: `setup` loads, evaluates and warms up; `round` decodes."""
        op = request.pop("op")
        return self.setup(**request) if op == "setup" else self.round()

    def setup(
        self,
        model: str,
        kind: str,
        text: str,
        context: int,
        new_tokens: int,
        length: int,
        tokens: int,
    ) -> dict[str, Any]:
        launch.prepare()
        begun = time.perf_counter()
        self.model = loaded.load(model, weights=None if kind == "float32" else kind)
        jax.block_until_ready(self.model.weights)
        seconds, peak = time.perf_counter() - begun, _peak()
        (row, *_) = inputs.rows_of_text(self.model, Path(text))
        found = self.model.evaluate([row[:tokens]], length)
        self.model.__dict__.pop("scaled")  # `mukv generate` does not evaluate before
        self.prompt, self.new_tokens = row[:context].tolist(), new_tokens
        self.round()
        return {
            "weights_bytes": self.model.weights_bytes,
            "load_seconds": seconds,
            "peak_bytes": peak,
            "tokens": found.tokens,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "jax": jax.__version__,
            "device": f"{jax.default_backend()}, {jax.devices()[0].device_kind}",
        }

    def round(self) -> dict[str, float]:
        # The prefill yields the first new token; no token ends the text.
        made = self.model.generate_ids([self.prompt], self.new_tokens + 1, stop=())
        return {
            "seconds": self.new_tokens / made.tokens_per_second,
            "prefill_seconds": made.prefill_seconds,
        }


def _peak() -> int:
    """Return the largest amount of memory that this process had, in bytes; 0 if it is unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def serve() -> None:
    """Answer requests until the input ends; only answers go to stdout."""
    out, sys.stdout = sys.stdout, sys.stderr
    side = Side()
    for line in sys.stdin:
        try:
            reply = side.answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")}
        print(json.dumps(reply), file=out, flush=True)


def rows(sides: list[Contender], case: Any, new_tokens: int, context: int) -> list[dict[str, Any]]:
    """Return the rows to print and save; `ratio` is the speed to that of the first format."""
    return [
        {
            "weights": one.name,
            **{key: value for key, value in one.told.items() if key not in ("jax", "device")},
            "tokens_per_second": median(one.per_second(new_tokens)),
            "ratio": median(case.ratios(one, sides[0].name)),
            "ratios": case.ratios(one, sides[0].name),
            "prefill_tokens_per_second": median(one.per_second(context, "prefill_seconds")),
            "why_not": one.why_not,
        }
        for one in sides
    ]


def main() -> int:
    options = parser("Loss, speed and bytes of weights in few bits")
    options.add_argument("--model", required=True, help="a run directory, a folder or a GGUF file")
    options.add_argument("--formats", default="float32,bfloat16,int8,int4")
    options.add_argument("--text", type=Path, default=TEXT, help="a UTF-8 text")
    options.add_argument("--context", type=int, default=128, help="tokens of the prompt")
    options.add_argument("--new-tokens", type=int, default=64, help="tokens decoded per round")
    options.add_argument("--length", type=int, default=512, help="tokens per window of the loss")
    options.add_argument("--tokens", type=int, default=4096, help="tokens that are evaluated")
    chosen = options.parse_args()
    keep_to(chosen.cores)
    kinds = names(chosen.formats)
    for kind in kinds:
        if kind not in ("float32", *GROUPS):
            options.error(f"--formats: {kind!r}; allowed: float32, {', '.join(GROUPS)}")
    case = {
        "model": chosen.model,
        "text": str(chosen.text),
        "context": chosen.context,
        "new_tokens": 16 if chosen.quick else chosen.new_tokens,
        "length": chosen.length,
        "tokens": 512 if chosen.quick else chosen.tokens,
    }
    console = Console()
    here = Path(__file__).name
    sides = [Contender(kind, Worker(here, allocator=True), {"kind": kind}) for kind in kinds]
    rounds = chosen.rounds or (2 if chosen.quick else 5)
    try:
        found = compare(sides, case, rounds, 0.0, LIMIT, console)
    finally:
        for side in sides:
            side.worker.close()
    made = rows(sides, found, case["new_tokens"], chosen.context)
    shown = table(f"{Path(chosen.model).name}, after {chosen.context} tokens", COLUMNS)
    for row in made:
        if row["why_not"]:
            continue  # `compare` has already printed the reason
        shown.add_row(
            row["weights"],
            f"{row['weights_bytes'] / 1e6:,.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['perplexity']:.2f}",
            f"{row['loss']:.4f}",
            f"{row['tokens_per_second'] or math.nan:.1f}",
            f"{row['ratio'] or math.nan:.2f}",
            f"{row['prefill_tokens_per_second'] or math.nan:,.0f}",
        )
    console.print(shown)
    report(made, versions(sides), median(found.busy) or 0.0, chosen.out)
    return 0 if not any(row["why_not"] for row in made) else 1


if __name__ == "__main__":
    if len(sys.argv) == 1:  # started by Worker
        serve()
    else:
        sys.exit(main())
