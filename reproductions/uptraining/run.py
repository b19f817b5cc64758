"""Convert a pretrained model to smaller caches, and train each with the original as its teacher.

    python reproductions/uptraining/run.py --model DIR [--steps 32]
    python reproductions/uptraining/run.py --draw

The text is docstrings of the Python standard library and its help topics; perplexity is that of
held-out documents. The original is trained on the same text in the same way, so that what the text
teaches is not taken for a property of the conversion. Continues where it was interrupted. Writes
results.json and figure.png beside this file; --draw makes the figure from the existing file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import mukv
from mukv.cli import launch
from mukv.core.compute import Compute
from mukv.data.build import build_tokens
from mukv.data.tokens import TokenFile, open_tokens
from mukv.model.loss import token_losses
from mukv.runs.convert import convert_model
from mukv.runs.describe import describe
from mukv.runs.exchange import import_model
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import resolve
from mukv.runs.train import train_run
from mukv.show.figures import saved_figure, series_styles
from mukv.storage.files import write_atomic

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "concept-model"))
from prose import documents  # noqa: E402

LENGTH, BATCH, CALIBRATION = 256, 2, 4096
DOCUMENTS, LONGEST = 16, 512
"""Number of held-out documents that are judged, and most tokens of one."""
TAUGHT = 0.5
"""Weight of the divergence from the teacher in the objective; the cross-entropy has the rest."""


@dataclass(frozen=True)
class Variant:
    """A model that is trained. to: the conversion; None for the original."""

    name: str
    to: str | None


VARIANTS = (
    Variant("latent, 128 + 64", "mla:128"),
    Variant("pairs of layers", "reuse:2"),
    Variant("one KV head", "gqa(by=similarity):1"),
    Variant("original", None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, such as SmolLM2 135M's")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--folder", type=Path, default=Path("runs/uptraining"))
    parser.add_argument("--draw", action="store_true", help="only draw the figure")
    given = parser.parse_args()
    if not given.draw:
        if given.model is None:
            parser.error("--model DIR is needed")
        launch.prepare()
        measure(given.model, given.folder, given.steps, given.rate)
    results = json.loads((HERE / "results.json").read_text())
    draw(results, HERE / "figure.png")
    show(results)


def measure(model: Path, folder: Path, steps: int, rate: float) -> None:
    """Measure the variants that results.json lacks; write it after each."""
    settings = {
        "steps": steps,
        "batch": BATCH,
        "length": LENGTH,
        "learning_rate": rate,
        "distillation": TAUGHT,
        "calibration_tokens": CALIBRATION,
    }
    path = HERE / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    results = known if known.get("settings") == settings else {"settings": settings, "variants": {}}
    tokens = corpus(folder, model)
    rows = held_out(tokens)
    count = sum(len(row) - 1 for row in rows)
    original = folder / "original"
    if not original.exists():
        import_model(str(model), original)
    for variant in VARIANTS:
        if variant.name in results["variants"]:
            continue
        start = original
        if variant.to is not None:
            start = folder / "converted" / variant.to
            if not start.exists():
                text = [folder / "calibration.txt"]
                convert_model(str(original), variant.to, start, text, CALIBRATION)
        before = nats_of(start, rows)
        perplexity = np.exp(sum(before) / count)
        Console(stderr=True).print(f"{variant.name}: {perplexity:.2f} before training")
        trained = folder / "trained" / variant.name.replace(", ", "-").replace(" ", "-")
        seen = train(start, trained, tokens, original, steps, rate)
        facts = describe(RunDirectory(start).load_config())
        results["variants"][variant.name] = {
            "to": variant.to,
            "parameters": facts["parameters"],
            "bytes_per_token": facts["cache_bytes_per_token"],
            "nats_before": before,
            "nats_after": nats_of(trained, rows),
            "seen": seen,
        }
        results["held_out_tokens"] = [len(row) - 1 for row in rows]
        results["fingerprint"] = tokens.fingerprint
        write_atomic(path, json.dumps(results, indent=1) + "\n")


def corpus(folder: Path, model: Path) -> TokenFile:
    """Return the token file to train on; write the text of its training part for calibration."""
    out, text = folder / "tokens", folder / "calibration.txt"
    if not out.exists():
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "prose.jsonl"
            lines = (json.dumps({"text": document}) + "\n" for document in documents())
            path.write_text("".join(lines))
            build_tokens([str(path)], out, str(model / "tokenizer.json"))
    tokens = open_tokens(out)
    if not text.exists():
        split = tokens.split("train")
        write_atomic(text, tokens.tokenizer.decode_further(split.tokens.tolist()))
    return tokens


def held_out(tokens: TokenFile) -> list[np.ndarray]:
    """Return the beginnings of DOCUMENTS held-out documents, evenly spaced over all of them."""
    split = tokens.split("validation")
    ends = [*split.starts[1:], len(split.tokens)]
    every = [
        np.asarray(split.tokens[begin:end][: LONGEST + 1])
        for begin, end in zip(split.starts, ends, strict=True)
    ]
    long = [document for document in every if len(document) > LENGTH]
    chosen = np.linspace(0, len(long) - 1, min(DOCUMENTS, len(long))).astype(int)
    return [long[place] for place in chosen]


def nats_of(folder: Path, rows: list[np.ndarray]) -> list[float]:
    """Return the loss of each document in nats, summed over its tokens; in float32, in windows of
    LENGTH tokens.
    """
    model = mukv.load(folder)
    network, weights = model.network, model.scaled
    compute = Compute("float32", "float32").resolve("cpu")

    @jax.jit
    def losses(weights: Any, tokens: jax.Array) -> jax.Array:
        hidden = network.hidden(weights, tokens[:, :-1], compute=compute)
        return token_losses(network, weights, hidden, tokens[:, 1:], compute)

    found = []
    for row in rows:
        total = 0.0
        for start in range(0, len(row) - 1, LENGTH):
            window = row[start : start + LENGTH + 1]
            padded = np.zeros((1, LENGTH + 1), np.int32)
            padded[0, : len(window)] = window
            made = np.asarray(losses(weights, padded), np.float64)
            total += float(made[0, : len(window) - 1].sum())
        found.append(total)
    return found


def train(
    start: Path, out: Path, tokens: TokenFile, teacher: Path, steps: int, rate: float
) -> list[dict[str, float]]:
    """Train from a run directory into another; return loss and divergence of each step."""
    changes = [
        f"data.path={tokens.path}",
        f"train.start={start}",
        f"train.teacher={teacher}",
        f"train.distillation.weight={TAUGHT}",
        f"train.steps={steps}",
        f"train.batch={BATCH}",
        f"train.length={LENGTH}",
        f"train.learning_rate={rate}",
        f"train.schedule={{kind: cosine, warmup: {max(steps // 10, 1)}}}",
        "train.optimizer.weight_decay=0",
        "train.compute={dtype: float32, operands: float32}",
        "train.evaluate_every=null",
        "train.checkpoint_every=16",
        "train.keep_last=1",
        "train.keep_best=0",
        "train.log_every=1",
    ]
    run, folder = resolve(str(start), changes, out)
    train_run(run, folder, title=out.name).require_finished(out)
    logged = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    names = "step", "loss", "divergence"
    return [{name: line[name] for name in names} for line in logged if "loss" in line]


def perplexity(results: dict[str, Any], name: str, when: str) -> float:
    """Return the perplexity of held-out text. when: "before" or "after" training."""
    nats = sum(results["variants"][name][f"nats_{when}"])
    return float(np.exp(nats / sum(results["held_out_tokens"])))


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw perplexity after conversion and after training, one line per variant."""
    rows = results["variants"]
    with saved_figure(path, (8, 3.4)) as figure:
        axes = figure.subplots()
        places = range(len(rows))[::-1]
        for place, name, style in zip(places, rows, series_styles(len(rows)), strict=True):
            converted, trained = (perplexity(results, name, when) for when in ("before", "after"))
            axes.plot([converted, trained], [place, place], color=style["color"], lw=1)
            for at, fill in ((converted, "white"), (trained, style["color"])):
                axes.plot(at, place, "o", color=style["color"], markerfacecolor=fill, markersize=8)
            held = f"{rows[name]['bytes_per_token']:,} bytes"
            axes.annotate(held, (converted, place), (9, 0), textcoords="offset points", va="center")
        level = perplexity(results, "original", "after")
        axes.axvline(level, color="0.6", linewidth=1, zorder=0)
        axes.set_yticks(places, list(rows))
        axes.set(
            xlabel="perplexity of held-out text; open: converted, filled: trained again",
            xscale="log",
            xlim=(17, 560),
            ylim=(-0.6, len(rows) - 0.4),
        )
        axes.grid(alpha=0.3)


def show(results: dict[str, Any]) -> None:
    table = Table("", "bytes per token", "converted", "trained again")
    for name, row in results["variants"].items():
        numbers = (f"{perplexity(results, name, when):,.1f}" for when in ("before", "after"))
        table.add_row(name, f"{row['bytes_per_token']:,}", *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
