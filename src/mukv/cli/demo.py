"""Compare attention variants in small models of equal size: the first half of `mukv demo`.

Each model is trained on the source code of Python's standard library, which every machine has. A
variant with fewer attention weights has a wider MLP, so that all models have about the same number
of parameters. Bits per byte of held-out text, and decoding speed after a long context, are plotted
against the bytes of the cache after that context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mukv.core.params import count
from mukv.infer.sampling import Sampling
from mukv.model.block import Gated
from mukv.runs import config, loaded
from mukv.runs.config import Run
from mukv.runs.describe import describe
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import open_corpus
from mukv.runs.train import train_run
from mukv.show.figures import labels, legend, powers, saved_figure, series_styles
from mukv.show.terminal import Console, styled, table
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json

PROMPT = "def __init__(self, "
CONTINUATION = 160
SAMPLING = Sampling(temperature=0.7, top_p=0.9)
CONTEXT = 4096
"""Tokens of context in the cache when its bytes and the decoding speed are measured."""
MEASURED, ROUNDS = 128, 3
MLP_MULTIPLE = 8
CAPTION = (
    "Models of equal size with different attention, one run each: quality and decoding speed "
    f"against the bytes of the cache after {CONTEXT:,} tokens."
)


@dataclass(frozen=True)
class Contestant:
    """An attention variant of the demonstration.

    name: name in tables
    preset: preset with its configuration
    words: a short description
    """

    name: str
    preset: str
    words: str


CONTESTANTS = (
    Contestant("MHA", "tiny-mha", "a key and a value per head"),
    Contestant("shared KV", "tiny-shared-kv", "keys are the rotated values; two heads share them"),
    Contestant("MQA", "tiny-mqa", "all heads share a key and a value"),
    Contestant("MLA", "tiny-mla", "a latent and one rotated key"),
    Contestant("DeltaNet", "tiny-gdn", "a state of constant size"),
    Contestant("HCA", "tiny-hca", "a window, and an entry per 8 tokens"),
)


def demonstrate(out: Path, fast: bool, console: Console) -> dict[str, Any]:
    """Train the models, compare and plot them; return the table as data and the paths of files.

    fast: whether only every second variant is trained, for fewer steps
    """
    steps, contestants = (40, CONTESTANTS[::2]) if fast else (120, CONTESTANTS)
    target = count(config.load(CONTESTANTS[0].preset).model.params())
    time = "1 minute" if fast else "5 minutes"
    console.say(f"{len(contestants)} models, {steps} steps each: about {time} of processor time")
    rows, models = [], []
    for contestant in contestants:
        run = equal_size(contestant.preset, target, [f"train.steps={steps}"])
        folder = RunDirectory(out / f"{contestant.preset}-{steps}")
        console.print(styled((contestant.name, "bold"), f": {contestant.words}"))
        outcome = train_run(run, folder, title=contestant.name)
        outcome.require_finished(folder.path)
        facts, model = describe(run), loaded.load(folder.path)
        made = model.generate_ids([model.encode(PROMPT)], CONTINUATION, SAMPLING)
        models.append(model)
        each, constant = facts["cache_bytes_per_token"], facts["cache_bytes_constant"]
        rows.append(
            {
                "name": contestant.name,
                "run": str(folder.path),
                "parameters": facts["parameters"],
                "mlp_hidden": hidden_of(run),
                "cache_bytes_per_token": each,
                "cache_bytes": round(each * CONTEXT + constant),
                "bits_per_byte": outcome.validation_bits_per_byte,
                "decoding_context": CONTEXT,
                "continuation": model.tokenizer.decode(made.tokens[0]),
            }
        )
    console.say(f"decoding after {CONTEXT:,} tokens, in {ROUNDS} rounds")
    for row, speed in zip(rows, decoding_speeds(models), strict=True):
        row["decoding_tokens_per_second"] = speed
    plot, results = out / "quality-against-memory.png", out / "results.json"
    draw(rows, plot)
    write_atomic(results, to_json(rows, indent=2))
    show(rows, console)
    console.say(f"plot:  {plot}")
    console.say(f"table: {results}")
    for row in rows:
        console.say(f"{row['name']:12} {row['run']}")
    return {
        "rows": rows,
        "plot": str(plot),
        "table": str(results),
        "runs": [row["run"] for row in rows],
    }


def equal_size(preset: str, target: int, overrides: Sequence[str]) -> Run:
    """Return a preset with the MLP width (a multiple of MLP_MULTIPLE) whose number of parameters is
    nearest to `target`."""

    def sized(hidden: int) -> Run:
        return config.load(preset, [*overrides, f"model.mlp.hidden={hidden}"])

    def parameters(hidden: int) -> int:
        return count(sized(hidden).model.params())

    own = hidden_of(config.load(preset))
    per_unit = parameters(own + 1) - parameters(own)
    wanted = own + (target - parameters(own)) / per_unit
    return sized(MLP_MULTIPLE * round(wanted / MLP_MULTIPLE))


def hidden_of(run: Run) -> int:
    """Return the MLP width of a run, whose MLP must be gated."""
    assert isinstance(run.model.mlp, Gated)
    return run.model.mlp.hidden


def decoding_speeds(models: Sequence[loaded.Model]) -> list[float]:
    """Measure the decoding speed after CONTEXT tokens of held-out text, in tokens per second.

    Rounds alternate between the models, so that other load on the machine meets all of them. The
    result is the maximum over rounds, since it only lowers the speed.
    """
    text = open_corpus(models[0].run).split("validation").tokens[:CONTEXT].tolist()
    rounds = [
        [model.generate_ids([text], MEASURED).tokens_per_second for model in models]
        for _ in range(ROUNDS)
    ]
    return [max(speeds) for speeds in zip(*rounds, strict=True)]


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the comparison as a table, and a continuation of PROMPT by each model."""
    numbers = ("parameters", "cache\nbytes/token", f"bytes at\n{CONTEXT:,}", "held-out\nbits/byte")
    words = f"one run each (one seed); decoding after {CONTEXT:,} tokens"
    shown = table(("variant",), (*numbers, "decoding\ntokens/s"), caption=words)
    for row in rows:
        difference = row["parameters"] / rows[0]["parameters"] - 1
        shown.add_row(
            row["name"],
            f"{row['parameters']:,} ({difference:+.1%})",
            f"{row['cache_bytes_per_token']:,.0f}",
            f"{row['cache_bytes']:,}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['decoding_tokens_per_second']:,.0f}",
        )
    console.print(shown)
    for row in rows:
        console.print(styled((row["name"], "bold"), " continues ", (PROMPT, "dim")))
        console.print(row["continuation"])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot bits per byte and decoding speed against the bytes of the cache."""
    panels = (
        ("bits_per_byte", "bits per byte, held-out text", "Quality (down and left is better)"),
        (
            "decoding_tokens_per_second",
            f"decoding tokens/s after {CONTEXT:,} tokens",
            "Speed (up and left is better)",
        ),
    )
    with saved_figure(path, (10, 4.4), caption=CAPTION) as figure:
        left, right = figure.subplots(1, 2)
        names = labels(row["name"] for row in rows)
        for axes, (key, label, title) in zip((left, right), panels, strict=True):
            for row, name, style in zip(rows, names, series_styles(len(rows)), strict=True):
                point = {"color": style["color"], "marker": style["marker"], "label": name}
                axes.scatter(row["cache_bytes"] / 1024, row[key], s=70, zorder=3, **point)
            powers(axes.xaxis, [row["cache_bytes"] / 1024 for row in rows])
            axes.margins(0.2)
            axes.grid(alpha=0.3, zorder=0)
            axes.set(xlabel=f"KiB of cache at {CONTEXT:,} tokens", ylabel=label, title=title)
        legend(figure, left, "one run each (one seed)")
